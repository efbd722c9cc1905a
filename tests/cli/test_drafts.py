"""From tokens to characters, and from characters to rows."""

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from dgemma.chat.thoughts import split_thoughts
from dgemma.cli.terminal.drafts import LOOKS, Place, looks_of, printable, spell
from dgemma.cli.terminal.layout import join, to_cells, wrap
from dgemma.cli.terminal.view import CanvasView, Part, status_line
from dgemma.diffusion.events import CanvasCommitted, CanvasStarted, Denoised

SPECIALS = ["<|channel>", "<channel|>", "<turn|>", "<pad>", "<|tool_call>", '<|"|>']


def pieces(*tokens):
    table = [(token.encode() if isinstance(token, str) else token, token in SPECIALS) for token in tokens]
    return list(range(len(table))), table.__getitem__


def spelled(*tokens, looks=None, place=None, committed=False):
    ids, piece_of = pieces(*tokens)
    looks = looks or ["settled"] * len(ids)
    return spell(zip(ids, looks, strict=True), place or Place(), piece_of, committed)


def text(spelling):
    return "".join(char for char, _ in spelling.glyphs)


def test_bytes_are_decoded_together():
    day = "日".encode()
    assert text(spelled("a", day[:1], day[1:], "b")) == "a日b"
    assert spelled(day[:1], day[1:], looks=["settled", "vague"]).glyphs == [("日", "vague")]
    assert text(spelled("a", day[:1], "b")) == "a·b"
    assert text(spelled("a", day[:1], "b", committed=True)) == "a�b"
    assert text(spelled(day[:2], "x", looks=["settled", "noise"])) == "··"
    first = spelled("a", day[:2], committed=True)
    assert (text(first), first.after.bytes) == ("a", day[:2])
    assert text(spelled(day[2:], "b", place=first.after, committed=True)) == "日b"
    assert text(spelled(b"\xff", b"\xfe\xfd", "é")) == "··é"


def test_noise_has_the_shape_of_its_token():
    assert text(spelled("The", " quick", "\n", " ", " <turn|>", looks=["noise"] * 5)) == "··· ······· ·······"
    assert text(spelled("<turn|>", "internationalisation", "日本", looks=["noise"] * 3)) == "·" + "·" * 8 + "····"


def test_line_breaks_only_where_they_are_firm():
    assert text(spelled("a", "\n", "b", looks=["settled", "vague", "settled"])) == "a↵b"
    assert text(spelled("a", "\n", "b", looks=["settled", "new", "settled"])) == "a↵\nb"
    assert text(spelled("\n\n", "a", "\r\n", "\n")) == "a\n\n"


def test_after_the_end_there_is_nothing():
    ended = spelled("a", "<turn|>", "b", "<pad>")
    assert (text(ended), ended.ended, ended.length) == ("a", True, 1)
    unsure = spelled("a", "<turn|>", "b", looks=["settled", "vague", "settled"])
    assert (text(unsure), unsure.ended, unsure.length) == ("a·b", False, 3)


def test_thoughts_lose_their_markers():
    tokens = ["<|channel>", "thought", "\n", "I think.", "\n", "<channel|>", "\n", "So", " be", "\n", "it."]
    result = spelled(*tokens, committed=True)
    assert text(result) == "I think.\n\nSo be\nit."
    assert {look for _, look in result.glyphs[:8]} == {"thought"}
    assert {look for _, look in result.glyphs[10:]} == {"settled"}
    assert text(spelled("<|channel>", "thought", "\n", "<channel|>", "Hi", committed=True)) == "Hi"
    assert text(spelled("<|channel>", "thong", committed=True)) == "thong"
    part = spelled("<|channel>", "tho", committed=True).after
    assert text(spelled("ught", "\n", "x", place=part, committed=True)) == "x"


@given(
    st.lists(
        st.sampled_from(["a", " b", "\n", "c d", "é", "<|channel>", "<channel|>", "thought", "."]),
        max_size=12,
    )
)
def test_thoughts_agree_with_the_parser(tokens):
    result = spelled(*tokens, committed=True)
    _, answer = split_thoughts("".join(tokens))
    shown = "".join(char for char, look in result.glyphs if look != "thought")
    assert "".join(shown.split()) == "".join(answer.split())


@settings(max_examples=60)
@given(st.lists(st.binary(max_size=6), max_size=12), st.data(), st.integers(2, 30))
def test_nothing_steers_the_terminal_and_rows_fit(tokens, data, width):
    looks = [data.draw(st.sampled_from(LOOKS)) for _ in tokens]
    result = spelled(*tokens, looks=looks)
    cells = to_cells(result.glyphs)
    rows = wrap(cells, width)
    for row in rows:
        assert sum(cell.width for cell in row.cells) <= width
        line = "".join(cell.text for cell in row.cells)
        assert not {unicodedata.category(char) for char in line} & {"Cc", "Cs", "Zl", "Zp"}
    kept = "".join(cell.text for row in rows for cell in row.cells).replace(" ", "")
    assert kept == "".join(cell.text for cell in cells).replace(" ", "").replace("\n", "")


def rows_of(string, width):
    glyphs = [(char, "settled") for char in string]
    return [("".join(c.text for c in row.cells), row.soft) for row in wrap(to_cells(glyphs), width)]


def test_wrapping():
    assert rows_of("the quick brown fox", 10) == [("the quick", False), ("brown fox", False)]
    assert rows_of("the quick  ", 9) == [("the quick", False)]
    assert rows_of("abcdefghijkl", 5) == [("abcde", True), ("fghij", True), ("kl", False)]
    assert rows_of("日本語文", 5) == [("日本", True), ("語文", False)]
    assert rows_of("  code that is long", 10) == [("  code tha", True), ("t is long", False)]
    assert rows_of("```\na b c d e f\n```\na b c d e f", 7) == [
        ("```", False), ("a b c d", True), (" e f", False), ("```", False), ("a b c d", False), ("e f", False)
    ]  # fmt: skip
    assert rows_of("", 5) == [("", False)]
    assert rows_of("a\n", 5) == [("a", False), ("", False)]


@pytest.mark.parametrize("grapheme", ["👩‍🚀", "🇩🇪", "👍🏽", "❤️", "é", "1️⃣", "👨‍👩‍👧‍👦"])
def test_graphemes_stay_whole(grapheme):
    cells = to_cells([(char, "settled") for char in f"a{grapheme}b"])
    assert [cell.text for cell in cells] == ["a", grapheme, "b"]
    assert cells[1].width == cell_len(grapheme)


def test_a_mark_joins_the_canvas_before():
    cells = to_cells([("e", "settled")])
    assert [cell.text for cell in join(cells, [("\u0301", "settled"), ("x", "vague")])] == ["e\u0301", "x"]
    assert [cell.text for cell in to_cells([("\u0301", "settled")])] == ["◌\u0301"]


def step(token_ids, entropies, accepted, number=1):
    return Denoised(0, 0, number, token_ids, token_ids, entropies, accepted, [True] * len(token_ids), 0.8, 1.0)


def test_looks():
    entropies = [0.0, 0.0, 0.05, 0.5, 1.5, 4.0, 0.0]
    first = step([1] * 7, entropies, [True, False, False, False, False, False, True])
    pinned = [False] * 6 + [True]
    assert looks_of(first, pinned, None) == [
        "new",
        "settled",
        "settled",
        "leaning",
        "vague",
        "noise",
        "pinned",
    ]
    second = step([2] + [1] * 6, entropies, [True, True] + [False] * 5)
    assert looks_of(second, pinned, first)[:3] == ["fixed", "new", "settled"]


def test_the_status_line_sheds_what_does_not_fit():
    parts = [Part("step 3/48", 0), Part("bar", 2, joined=True), Part("0.1 nats", 1)]
    shown = ["".join(segment.text for segment in status_line(parts, width)) for width in (30, 23, 12, 4)]
    assert shown == ["step 3/48 · bar 0.1 nats", "step 3/48 · 0.1 nats", "step 3/48", "step"]


def test_rates_are_labelled_for_what_they_are():
    ids, piece_of = pieces("a", "b", "<turn|>", "<pad>")
    view = CanvasView(piece_of)

    def status():
        view.frame(80, 24)
        return "".join(segment.text for segment in view.status(80))

    view.apply(CanvasStarted(0, 0, ids, [False] * 4, 5, 48))
    assert status() == "canvas 1 · step 0/48 · 0.0 s"
    view.apply(step(ids, [0.0] * 4, [True] * 4))
    assert "4/4 settled (2.0/s)" in status()  # what follows the stop token is not counted in the rate
    assert "tok/s" not in status()
    view.apply(CanvasCommitted(0, 0, [0, 1], 1, 2.0))
    assert status() == "canvas 1 · committed after 1 step · 1.0 tok/s · 2.0 s"


def test_printable():
    assert printable("a\tb\r\nc\x1b[2J\u202e") == "a\tb\nc␛[2J"
