"""Thoughts told apart from text, whole or in chunks."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgemma.chat import ThoughtParser, split_thoughts
from dgemma.chat.thoughts import STOPS


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




def test_pieces_come_as_soon_as_they_are_sure():
    parser = ThoughtParser()
    assert [(p.kind, p.text) for p in parser.feed("<|channel>thought\nI s")] == [("reasoning", "I s")]
    assert [(p.kind, p.text) for p in parser.feed("ee. \n<chan")] == [("reasoning", "ee.")]
    assert parser.feed("nel|") == []
    assert [(p.kind, p.text) for p in parser.feed(">Yes<")] == [("text", "Yes")]
    assert not parser.stopped
    assert parser.feed("turn|>more") == []
    assert parser.stopped
    assert parser.feed("more") == parser.finish() == []


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
    parser, pieces, rest = ThoughtParser(inside), [], raw
    while rest:
        size = random.randint(1, 6)
        pieces += parser.feed(rest[:size])
        rest = rest[size:]
    pieces += parser.finish()
    assert all(piece.text for piece in pieces)
    joined = {kind: "".join(p.text for p in pieces if p.kind == kind) for kind in ("reasoning", "text")}
    assert (joined["reasoning"] or None, joined["text"]) == split_thoughts(raw, inside)
    if not any(mark in raw for mark in ("<|channel>", "<channel|>", *STOPS)) and not inside:
        assert joined["text"] == raw.lstrip("\n")


def test_a_thought_that_the_prompt_left_open():
    assert split_thoughts("I see.\n<channel|>Yes.", inside=True) == ("I see.", "Yes.")
