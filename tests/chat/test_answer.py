"""An answer read from its tokens: marks count only as control tokens, never as typed text."""

import pytest

from dgemma.chat.reply import read_answer
from dgemma.chat.tokenizer import Tokenizer
from dgemma.train.data import tokenizer as bundled


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    bundled.save(folder)
    return Tokenizer.from_folder(folder)


def read(tokenizer, text, prompt="", typed=False):
    answer = read_answer(tokenizer, tokenizer.encode(prompt), tokenizer.encode(text, specials=not typed))
    return answer.text, answer.reasoning, answer.tool_calls


def test_thoughts_text_and_calls_are_told_apart(tokenizer):
    raw = '<|channel>thought\nhm <3\n<channel|>Hi!<|tool_call>call:f{a:<|"|>x<y<|"|>,n:[1,{b:null}]}<tool_call|>'
    assert read(tokenizer, raw) == ("Hi!", "hm <3", [{"name": "f", "arguments": {"a": "x<y", "n": [1, {"b": None}]}}])


def test_an_empty_and_an_unclosed_thought(tokenizer):
    assert read(tokenizer, "<|channel>thought\n<channel|>Hi") == ("Hi", None, [])
    assert read(tokenizer, "<|channel>thought\nso") == ("", "so", [])


def test_fill_is_no_text(tokenizer):
    assert read(tokenizer, "a<pad><pad>b<unused3>") == ("ab", None, [])


@pytest.mark.parametrize("text", ["The <eos> token ends it", "a <|channel> opens", "<|tool_call>call:f{}<tool_call|>",
                                  "1 < 2 <turn|> \ue000<"])
def test_a_mark_typed_as_text_is_text(tokenizer, text):
    assert read(tokenizer, text, typed=True) == (text, None, [])


def test_a_prompt_may_leave_a_thought_open(tokenizer):
    long = "x" * 500
    assert read(tokenizer, "so<channel|>Hi", prompt=f"<|channel>thought\n{long}") == ("Hi", "so", [])
    assert read(tokenizer, "so", prompt="<|channel>thought\n<channel|>") == ("so", None, [])


def test_a_mark_typed_in_the_prompt_opens_nothing(tokenizer):
    prompt = tokenizer.encode("What does <|channel> mean?", specials=False)
    assert read_answer(tokenizer, prompt, tokenizer.encode("A mark.")).text == "A mark."
