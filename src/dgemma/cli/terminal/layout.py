"""Characters to rows of a terminal.

Works on: glyphs and a width. Knows nothing of: tokens, colours, cursors.

Prose breaks at spaces; code (indented or fenced) at the edge, as the terminal itself would break it. A row says whether
the terminal breaks after it by itself: printed so, a long word or a line of code is still one line when copied.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from rich.cells import cell_len

from dgemma.cli.terminal.drafts import DOT, Glyph

FENCE = "```"


class Cell(NamedTuple):
    """One grapheme: what stands at one place of the screen."""

    text: str
    width: int
    look: str


@dataclass(frozen=True)
class Margin:
    """What a stretch of text inherits from the text before it."""

    line_start: bool = True
    code: bool = False  # this line breaks at the edge
    fenced: bool = False


@dataclass(frozen=True)
class TextRow:
    """One row; `start` indexes the cells that it was made from, and `margin` is what held there."""

    cells: Sequence[Cell]
    start: int
    margin: Margin
    soft: bool  # the row is full: the terminal goes to the next one by itself


def to_cells(glyphs: Iterable[Glyph]) -> list[Cell]:
    """Characters joined to graphemes: marks, joined emoji, flags. A grapheme looks like its first character."""
    cells: list[Cell] = []
    open_text, open_look = "", ""
    for char, look in glyphs:
        if open_text and open_text != "\n" and char != "\n" and _joins(open_text, char):
            open_text += char
            continue
        if open_text:
            cells.append(_cell(open_text, open_look))
        open_text, open_look = char, look
    if open_text:
        cells.append(_cell(open_text, open_look))
    return cells


def join(cells: list[Cell], glyphs: Iterable[Glyph]) -> list[Cell]:
    """`cells` and what follows them; a mark may still belong to the last one."""
    if not cells:
        return to_cells(glyphs)
    *earlier, last = cells
    return [*earlier, *to_cells([*((char, last.look) for char in last.text), *glyphs])]


def wrap(cells: Sequence[Cell], width: int, margin: Margin = Margin()) -> list[TextRow]:
    """The rows of `cells` at a width; at least one, the last one without a line break after it."""
    rows: list[TextRow] = []
    start = 0
    while True:
        end = next((i for i in range(start, len(cells)) if cells[i].text == "\n"), len(cells))
        margin = _margin_of_line(cells, start, end, margin)
        _wrap_line(cells, start, end, width, margin, rows)
        if end == len(cells):
            return rows
        margin = Margin(fenced=margin.fenced)
        start = end + 1


def _wrap_line(cells: Sequence[Cell], start: int, end: int, width: int, margin: Margin, rows: list[TextRow]) -> None:
    """Append the rows of the one line `cells[start:end]`."""
    column, break_at = 0, start
    i = start
    while i < end:
        cell = cells[i]
        if not margin.code and i > start and _may_break(cells[i - 1], cell):
            break_at = i
        if column + cell.width > width and i > start:
            if margin.code:
                row_end, following = i, i
            elif cell.text == " ":  # spaces hang over the edge
                row_end = following = i
                while following < end and cells[following].text == " ":
                    following += 1
            else:
                row_end = following = break_at if break_at > start and i - break_at <= width // 2 else i
            # Only a row that is full, cut inside a word, may be left to the terminal.
            inside = cells[row_end - 1].text != " " or margin.code
            full = row_end == i and (margin.code or cell.text != " ") and inside
            while not margin.code and row_end - 1 > start and cells[row_end - 1].text == " ":
                row_end -= 1  # nothing to see, and in the way when copied
            rows.append(TextRow(cells[start:row_end], start, margin, soft=full))
            margin = replace(margin, line_start=False)
            start = break_at = i = following
            column = 0
            if start == end:
                return
            continue
        column += cell.width
        i += 1
    rows.append(TextRow(cells[start:end], start, margin, soft=False))


def _margin_of_line(cells: Sequence[Cell], start: int, end: int, margin: Margin) -> Margin:
    if not margin.line_start:
        return margin
    opening = "".join(cell.text for cell in cells[start : min(end, start + len(FENCE))])
    fence = opening == FENCE
    fenced = margin.fenced != fence
    return Margin(True, fenced or fence or opening.startswith("  "), fenced)


def _may_break(before: Cell, cell: Cell) -> bool:
    if cell.text == " ":
        return False
    return before.text == " " or before.width == 2 or cell.width == 2 or DOT in (before.text, cell.text)


def _cell(text: str, look: str) -> Cell:
    if text == "\n":
        return Cell(text, 0, look)
    width = min(cell_len(text), 2)
    return Cell(text, width, look) if width else Cell(f"◌{text}", 1, look)  # a mark with nothing to stand on


def _joins(cluster: str, char: str) -> bool:
    """Whether `char` belongs to the same grapheme as `cluster`."""
    if char.isascii():
        return False
    if cluster[-1] == "\u200d" or _zero_width(char):
        return len(cluster) < 16  # a heap of marks is no writing, and slows terminals down
    if 0x1F3FB <= ord(char) <= 0x1F3FF:  # skin tones
        return cell_len(cluster) == 2
    return len(cluster) == 1 and all(0x1F1E6 <= ord(one) <= 0x1F1FF for one in cluster + char)  # letters of a flag


@lru_cache(4096)
def _zero_width(char: str) -> bool:
    return unicodedata.combining(char) != 0 or cell_len(char) == 0
