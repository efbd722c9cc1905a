"""An answer's denoising as a moving picture: an animated SVG, a GIF.

Works on: recordings. Knows nothing of: pages, files.

Text stands in lines of `COLUMNS` characters, as it would on a terminal; looks are those of the page (`static/film.js`).
"""

from __future__ import annotations

import io
import unicodedata
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape

import numpy as np

from dgemma.errors import DgemmaError
from dgemma.studio.recording import Canvas, Recording, Step

if TYPE_CHECKING:
    from PIL import ImageDraw, ImageFont

    Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

COLUMNS = 72
MOST_FRAMES = 120  # of a film; of more steps some are left out, the first and last of each canvas never
MOST_LINES = 80  # of a frame; what is below them is not seen
_SETTLED, _LEANING, _VAGUE = 0.1, 0.7, 2.0  # nats, as in the terminal
_STEP, _LAST = 180, 1800  # milliseconds that a step is shown for; the last one of a canvas
_CELL, _ROW, _MARGIN = 9, 21, 18  # pixels of a character, and around all of them

# Colours: of the text and of what is behind it, on light and on dark ground.
_LIGHT = {"ground": "#ffffff", "head": "#676773", "settled": "#1c1c22", "leaning": "#5b5b61", "vague": "#98989b",
          "noise": "#d2d2d3", "accepted": "#0f6f68", "behind": "#cfe9e7", "pinned": "#1c1c22", "frame": "#4f46e5",
          "changed": "#c2410c", "mark": "#72727d", "bar": "#c9c6f7"}
_DARK = {"ground": "#16161a", "head": "#a0a0ad", "settled": "#ececf1", "leaning": "#b0b0b6", "vague": "#76767c",
         "noise": "#3f3f44", "accepted": "#8fe5da", "behind": "#1b3c3a", "pinned": "#ececf1", "frame": "#8f8bff",
         "changed": "#fb923c", "mark": "#8b8b98", "bar": "#3a3880"}


@dataclass(frozen=True)
class Run:
    """Characters side by side that look the same; ``column`` and ``width`` in cells."""

    column: int
    text: str
    width: int
    look: str
    accepted: bool
    changed: bool


@dataclass(frozen=True)
class Frame:
    """A step as it is seen."""

    head: str
    lines: list[list[Run]]
    share: float  # of the canvas's steps that are done
    milliseconds: int


def frames_of(recording: Recording, stops: Collection[str], most: int = MOST_FRAMES) -> list[Frame]:
    """The frames of a film. Raises DgemmaError when no step was recorded."""
    moments = [(number, at) for number, canvas in enumerate(recording.canvases) for at in range(len(canvas.steps))]
    if not moments:
        raise DgemmaError("no step of this answer was recorded")
    ends = {(number, at) for number, canvas in enumerate(recording.canvases) if canvas.steps
            for at in (0, len(canvas.steps) - 1)}
    between = [moment for moment in moments if moment not in ends]
    room = max(most - len(ends), 0)
    if len(between) > room:
        between = [between[round(place)] for place in np.linspace(0, len(between) - 1, room)]
    shown = sorted(ends | set(between))
    return [_frame(recording, number, at, stops) for number, at in shown]


def _frame(recording: Recording, number: int, at: int, stops: Collection[str]) -> Frame:
    canvas = recording.canvases[number]
    step, last = canvas.steps[at], canvas.steps[-1].step
    several = f"canvas {number + 1}/{len(recording.canvases)} · " if len(recording.canvases) > 1 else ""
    before = canvas.steps[at - 1] if at else None
    return Frame(f"{several}step {step.step}/{last} · mean entropy {step.mean_entropy:.3f}",
                 _lines(_tokens(recording, canvas, step, before, stops)), (at + 1) / len(canvas.steps),
                 _LAST if at == len(canvas.steps) - 1 else _STEP)


def _tokens(recording: Recording, canvas: Canvas, step: Step, before: Step | None,
            stops: Collection[str]) -> Iterator[tuple[str, str, bool, bool]]:
    """Each token until the answer's end: its text, its look, whether it is believed now, and whether it is new."""
    for place, token in enumerate(step.token_ids.tolist()):
        entropy, pinned, special = float(step.entropies[place]), canvas.pinned[place], token in recording.special
        sure = pinned or entropy <= _LEANING
        look = ("pinned" if pinned else "settled" if entropy <= _SETTLED else "leaning" if sure else
                "vague" if entropy <= _VAGUE else "noise")
        if special and sure and not pinned:
            look = "mark"
        text = recording.texts[token]
        if special:
            text = text.strip("<>|").replace("|", "")
        elif sure:
            text = text.replace("\n", "↵\n")
        else:
            text = text.replace("\n", "↵")
        accepted = bool(step.accepted[place]) and not pinned and not (before is not None and before.accepted[place])
        yield text.replace("\ufffd", "·"), look, accepted, before is not None and bool(step.changed[place])
        if special and sure and recording.texts[token] in stops:
            return


def _lines(tokens: Iterator[tuple[str, str, bool, bool]]) -> list[list[Run]]:
    lines: list[list[tuple[str, int, tuple[str, bool, bool]]]] = [[]]
    column = 0
    for text, look, accepted, changed in tokens:
        for letter in text:
            if letter == "\n":
                lines.append([])
                column = 0
                continue
            width = _width(letter)
            if not width or not letter.isprintable():
                letter, width = ("·", 1) if not unicodedata.combining(letter) else (letter, 0)
            if column + width > COLUMNS:
                lines.append([])
                column = 0
            lines[-1].append((letter, width, (look, accepted, changed)))
            column += width
    return [_runs(line) for line in lines[:MOST_LINES]]


def _runs(line: Sequence[tuple[str, int, tuple[str, bool, bool]]]) -> list[Run]:
    made, column = [], 0
    for (look, accepted, changed), group in groupby(line, key=lambda cell: cell[2]):
        letters = list(group)
        width = sum(cell[1] for cell in letters)
        made.append(Run(column, "".join(cell[0] for cell in letters), width, look, accepted, changed))
        column += width
    return made


def _width(letter: str) -> int:
    if unicodedata.combining(letter):
        return 0
    return 2 if unicodedata.east_asian_width(letter) in "WF" else 1


def _size(frames: Sequence[Frame]) -> tuple[int, int]:
    """Pixels of a film: as wide as its widest line, a head above."""
    columns = max(34, *(run.column + run.width for frame in frames for line in frame.lines for run in line))
    return 2 * _MARGIN + columns * _CELL, 2 * _MARGIN + (max(len(frame.lines) for frame in frames) + 2) * _ROW


def to_svg(recording: Recording, stops: Collection[str], title: str = "") -> bytes:
    """An animated SVG that runs by itself, over and over; light or dark as its reader's screen is.

    Each step is a group of class "step" that is visible for its time. Raises DgemmaError when no step was recorded.
    """
    frames = frames_of(recording, stops)
    width, height = _size(frames)
    total = sum(frame.milliseconds for frame in frames)
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
             f'height="{height}" role="img">', f"<title>{escape(_printable(title) or 'A text is denoised')}</title>",
             f"<style>{_styles()}</style>", f'<rect class="ground" width="{width}" height="{height}" rx="14"/>']
    begins = 0
    for frame in frames:
        parts.append(f'<g class="step">{_animation(begins, begins + frame.milliseconds, total)}'
                     f'<text class="head" x="{_MARGIN}" y="{_MARGIN + 13}">{escape(frame.head)}</text>'
                     f'<rect class="bar" x="{_MARGIN}" y="{_MARGIN + 20}" height="3" rx="1.5" '
                     f'width="{frame.share * (width - 2 * _MARGIN):.1f}"/>')
        parts += [_svg_line(line, row) for row, line in enumerate(frame.lines) if line]
        parts.append("</g>")
        begins += frame.milliseconds
    return ("".join(parts) + "</svg>").encode()


def _animation(begins: int, ends: int, total: int) -> str:
    """Visible from one time to another of a film that begins again after ``total`` milliseconds."""
    states = [(0, "hidden")] if begins else []
    states += [(begins, "visible")] + ([(ends, "hidden")] if ends < total else [])
    return ('<animate attributeName="visibility" calcMode="discrete" repeatCount="indefinite" '
            f'dur="{total / 1000:g}s" values="{";".join(state for _, state in states)}" '
            f'keyTimes="{";".join(f"{time / total:.5f}" for time, _ in states)}"/>')


def _svg_line(line: Sequence[Run], row: int) -> str:
    top = _MARGIN + (row + 2) * _ROW
    behind, words = [], []
    for run in line:
        x, width = _MARGIN + run.column * _CELL, run.width * _CELL
        if run.accepted:
            behind.append(f'<rect class="behind" x="{x}" y="{top - 15}" width="{width}" height="{_ROW - 2}" rx="3"/>')
        if run.look == "pinned":
            behind.append(f'<rect class="frame" x="{x}" y="{top - 15}" width="{width}" height="{_ROW - 2}" rx="3"/>')
        if run.changed:
            behind.append(f'<rect class="changed" x="{x}" y="{top + 4}" width="{width}" height="1.5"/>')
        if run.text.strip():
            # textLength: characters stay in their cells whatever font there is
            words.append(f'<tspan class="{"accepted" if run.accepted else run.look}" x="{x}" textLength="{width}" '
                         f'lengthAdjust="spacingAndGlyphs">{escape(run.text)}</tspan>')
    return f'{"".join(behind)}<text xml:space="preserve" y="{top}">{"".join(words)}</text>'


def _styles() -> str:
    def colours(theme: dict[str, str]) -> str:
        words = "".join(f".{name}{{fill:{theme[name]}}}" for name in (
            "ground", "head", "settled", "leaning", "vague", "noise", "accepted", "behind", "pinned", "changed",
            "mark", "bar"))
        return f"{words}.frame{{stroke:{theme['frame']}}}"

    return ("text{font:15px ui-monospace,'DejaVu Sans Mono',Menlo,Consolas,monospace;white-space:pre}"
            ".head{font-size:12.5px}.step{visibility:hidden}.frame{fill:none;stroke-width:1.2}"
            f"{colours(_LIGHT)}@media(prefers-color-scheme:dark){{{colours(_DARK)}}}")


def _printable(text: str) -> str:
    """What XML can hold of a text, in a line."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())[:200]


def to_gif(recording: Recording, stops: Collection[str]) -> bytes:
    """A GIF of 64 colours and at most `MOST_FRAMES` frames that runs over and over.

    Raises DgemmaError when no step was recorded, or Pillow is not here.
    """
    try:
        from PIL import Image, ImageDraw
    except ImportError as error:
        raise DgemmaError("a GIF needs Pillow: pip install 'dgemma[studio]'") from error
    frames = frames_of(recording, stops)
    size = _size(frames)
    words, small = _font(15), _font(12)
    pictures = []
    for frame in frames:
        picture = Image.new("RGB", size, _LIGHT["ground"])
        _draw(ImageDraw.Draw(picture), frame, size[0], words, small)
        pictures.append(picture.quantize(64))
    out = io.BytesIO()
    # A frame that looks like the one before would be left out by Pillow, its time added to that; none does: of each
    # step the number is seen.
    pictures[0].save(out, "GIF", save_all=True, append_images=pictures[1:], loop=0, optimize=False,
                     duration=[frame.milliseconds for frame in frames])
    return out.getvalue()


def _draw(draw: ImageDraw.ImageDraw, frame: Frame, width: int, words: Font, small: Font) -> None:
    colour = _LIGHT.__getitem__
    draw.text((_MARGIN, _MARGIN), frame.head, colour("head"), font=small)
    draw.rectangle((_MARGIN, _MARGIN + 20, _MARGIN + frame.share * (width - 2 * _MARGIN), _MARGIN + 22), colour("bar"))
    for row, line in enumerate(frame.lines):
        top = _MARGIN + (row + 2) * _ROW - 15
        for run in line:
            x = _MARGIN + run.column * _CELL
            box = (x, top, x + run.width * _CELL - 1, top + _ROW - 3)
            if run.accepted:
                draw.rectangle(box, colour("behind"))
            if run.look == "pinned":
                draw.rectangle(box, outline=colour("frame"))
            if run.changed:
                draw.line((box[0], box[3] + 1, box[2], box[3] + 1), colour("changed"))
            ink = colour("accepted" if run.accepted else run.look)
            for letter in run.text:
                draw.text((x, top + 1), letter, ink, font=words)
                x += _width(letter) * _CELL


def _font(size: int) -> Font:
    """A font whose characters have one width, if the machine has one; else Pillow's own."""
    from PIL import ImageFont

    for name in ("DejaVuSansMono.ttf", "LiberationMono-Regular.ttf", "Menlo.ttc", "consola.ttf"):
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.load_default(size)
