"""Thoughts told apart from text; a thought read whole or in chunks."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgemma.chat.thoughts import CLOSE, OPEN, STOPS, Channel, split_thoughts


@pytest.mark.parametrize(
    ("raw", "reasoning", "text"),
    [
        ("", None, ""),
        ("Hello  \n", None, "Hello  \n"),
        ("<|channel>thought\nI see.\n<channel|>Yes.<turn|>", "I see.", "Yes."),
        ("<|channel>thought\nI see.\n<channel|>\n\n  Yes.", "I see.", "  Yes."),
        ("<|channel>thought\n<channel|>Yes.", None, "Yes."),
        ("<|channel>thought<channel|>Yes.", None, "Yes."),
        ("<|channel><channel|>Yes.", None, "Yes."),
        ("<|channel>thought\n \n <channel|>Yes.", None, "Yes."),
        ("<|channel>thought\nI see", "I see", ""),
        ("<|channel>thou", None, ""),
        ("<|channel>thoughtful words<channel|>Yes", "thoughtful words", "Yes"),
        (
            "<|channel>thought\na\n\n b <channel|>Yes<|channel>thought\nc<channel|> and no",
            "a\n\n b\n\nc",
            "Yes and no",
        ),
        ("<|channel>thought\na<|channel>thought\nb<channel|>c", "a\n\nb", "c"),
        ("Yes.<channel|> No.", None, "Yes. No."),
        ("Yes.<turn|>\n<|turn>user\nMore<eos>", None, "Yes."),
        ("Yes.<eos><eos><pad>", None, "Yes."),
        ("<|channel>thought\nhm<turn|>x", "hm", ""),
        ("<|tool_call>call:f{}<tool_call|><|tool_response>", None, "<|tool_call>call:f{}<tool_call|>"),
        ("a <|chan b <turn", None, "a <|chan b <turn"),
        ("\nYes", None, "Yes"),
    ],
)
def test_split(raw, reasoning, text):
    assert split_thoughts(raw) == (reasoning, text)



def test_a_thought_is_passed_on_as_soon_as_it_is_sure():
    channel = Channel(inside=True)
    assert channel.thought("thou") == ""
    assert channel.thought("ght\nI s") == "I s"
    assert channel.thought("ee. \n") == "ee."
    assert channel.thought("More") == " \nMore"
    channel.leave()
    channel.enter()
    assert channel.thought("thought\nnew") == "\n\nnew"


BITS = [
    "<|channel>",
    "<channel|>",
    "thought\n",
    "thou",
    "\n",
    " ",
    "<",
    "|>",
    "a",
    "<|tool_call>",
    "é",
    *STOPS,
]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.sampled_from(BITS), max_size=14).map("".join),
    st.randoms(use_true_random=False),
    st.booleans(),
)
def test_chunks_do_not_matter(raw, random, inside):
    channel, reasoning, text = Channel(inside), "", ""
    for part in re.split("(" + "|".join(map(re.escape, (OPEN, CLOSE, *STOPS))) + ")", raw):
        if part in (OPEN, CLOSE):
            channel.enter() if part == OPEN else channel.leave()
            continue
        if part in STOPS:
            break
        if not channel.open:
            text += part
            continue
        while part:
            size = random.randint(1, 6)
            reasoning, part = reasoning + channel.thought(part[:size]), part[size:]
    assert (reasoning or None, text.lstrip("\n")) == split_thoughts(raw, inside)
    if not any(mark in raw for mark in (OPEN, CLOSE, *STOPS)) and not inside:
        assert split_thoughts(raw)[1] == raw.lstrip("\n")


def test_a_thought_that_the_prompt_left_open():
    assert split_thoughts("I see.\n<channel|>Yes.", inside=True) == ("I see.", "Yes.")
