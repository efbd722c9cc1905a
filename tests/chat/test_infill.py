"""A canvas as a user writes it: parts become token ids that stay, may change, or are to be filled in."""

import pytest

import dgemma
from dgemma.chat.infill import is_parts, middle_canvas, read_canvas
from dgemma.errors import DgemmaError

LENGTH, STOPS = 12, (1, 106, 50)
TURN_END, FILL = 106, 1


@pytest.fixture(scope="module")
def tokenizer():
    return dgemma.load("sudoku").tokenizer


@pytest.fixture
def read(tokenizer):
    return lambda *parts: read_canvas(parts, tokenizer, LENGTH, STOPS)


def test_text_stays_unless_it_says_otherwise_and_blanks_are_noise(read, tokenizer):
    start = read("ab", {"blank": 2}, {"text": "c", "pinned": False}, {"text": "d"})
    a, b, c, d = tokenizer.encode("abcd")
    assert start.token_ids == [a, b, None, None, c, d]
    assert start.pinned == [True, True, False, False, False, True]


def test_the_end_is_the_stop_token_and_fill(read, tokenizer):
    start = read("ab", {"end": True})
    assert start.token_ids == [*tokenizer.encode("ab"), TURN_END, *[FILL] * 9]
    assert all(start.pinned) and len(start.pinned) == LENGTH


def test_a_model_without_turns_ends_with_its_first_stop_token(tokenizer):
    assert read_canvas(["a", {"end": True}], tokenizer, LENGTH, (7, 8)).token_ids[1] == 7
    with pytest.raises(DgemmaError, match="no stop token"):
        read_canvas(["a", {"end": True}], tokenizer, LENGTH, ())


def test_special_tokens_in_a_text_are_ordinary_text(read, tokenizer):
    assert tokenizer.decode(read("<turn|>").token_ids) == "<turn|>"
    assert TURN_END not in read("<turn|>").token_ids


def test_nothing_and_a_text_alone_are_canvases(read, tokenizer):
    assert read().token_ids == [] == read("").token_ids
    assert read_canvas("ab", tokenizer, LENGTH, STOPS) == read("ab")


@pytest.mark.parametrize(("parts", "message"), [
    ([3], r"canvas\[0\] is 3: a part is text"), (["a", {}], r"canvas\[1\] is \{\}: a part is text"),
    ([{"text": "a", "blank": 1}], "a part is text"), ([{"text": 1}], "a part is text"),
    ([{"text": "a", "pinned": 1}], "a part is text"), ([{"text": "a", "pin": True}], r"canvas\[0\] has 'pin'"),
    ([{"blank": 1, "pinned": True}], r"canvas\[0\] has 'pinned'"), ([{"blank": -1}], "from 0 to the canvas' 12"),
    ([{"blank": 13}], "from 0 to the canvas' 12"), ([{"blank": True}], "blank must be"),
    ([{"end": False}], "the end is"), ([{"end": True}, "a"], r"canvas\[0\] is .* nothing stands behind it"),
    (["a" * 12, {"end": True}], r"canvas has 13 tokens or more with canvas\[1\], the model's canvas 12.* prefix"),
    (["a" * 7, {"blank": 6}], r"canvas has 13 tokens"), ([None], "a part is text"), ([["a"]], "a part is text"),
], ids=str)
def test_what_is_no_canvas_is_named(read, parts, message):
    with pytest.raises(DgemmaError, match=message):
        read(*parts)


@pytest.mark.parametrize(("canvas", "parts"), [
    ("a", True), (["a"], True), ([{"blank": 1}], True), ([3, None], False), ([], False), ([3, "a"], True), (5, False),
], ids=str)
def test_parts_are_told_from_token_ids(canvas, parts):
    assert is_parts(canvas) is parts


# Between two texts


def test_a_suffix_stands_behind_the_blank_and_the_text_ends_with_it(tokenizer):
    count, start = middle_canvas("xy", 3, tokenizer, LENGTH)
    assert count == 3
    assert start.token_ids == [None] * 3 + tokenizer.encode("xy") + [FILL] * 7
    assert start.pinned == [False] * 3 + [True] * 9


@pytest.mark.parametrize(("suffix", "asked", "count", "seen"), [
    ("xy", 100, 9, 2),  # what fits: two tokens and the end
    ("x" * 50, 100, 6, 6), ("x" * 50, 4, 4, 8), ("x" * 8, 4, 4, 8)])
def test_at_least_half_of_the_canvas_is_the_suffixs(tokenizer, suffix, asked, count, seen):
    found, start = middle_canvas(suffix, asked, tokenizer, LENGTH)
    x = tokenizer.encode(suffix[:1])[0]
    assert found == count and len(start.token_ids) == len(start.pinned) == LENGTH
    assert start.token_ids[count] == x and sum(start.pinned) == LENGTH - count
    assert start.token_ids[count : count + seen] == tokenizer.encode(suffix[:seen])
