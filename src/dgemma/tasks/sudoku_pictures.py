"""Pictures of Sudoku puzzles: clean as on a screen, or as somebody's photo of paper.

Works on puzzles and Pillow's images; knows nothing of models. Every picture follows from its puzzle and a generator of
random numbers. Digits are drawn from the fonts that come with matplotlib (the `train` extra), or by a pen.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

# Fonts that no training picture shows: what is read in them was not learnt by heart.
HELD_OUT = ("STIXGeneral", "STIXGeneralBol", "DejaVuSansMono", "DejaVuSansMono-Bold", "cmss10", "cmb10")
SEEN = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique", "DejaVuSansMono-Oblique",
         "DejaVuSansMono-BoldOblique", "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic",
         "DejaVuSerif-BoldItalic", "STIXGeneralItalic", "STIXGeneralBolIta", "cmr10", "cmtt10", "cmti10")
_PEN_SHARE = 0.25  # of photos: filled in by hand

# The strokes of a pen in a box of 1 x 1, y downwards; some digits are written in two ways.
_STROKES: dict[int, list[list[list[tuple[float, float]]]]] = {
    1: [[[(0.3, 0.25), (0.55, 0.0), (0.55, 1.0)]], [[(0.5, 0.0), (0.5, 1.0)]]],
    2: [[[(0.12, 0.25), (0.3, 0.02), (0.7, 0.03), (0.85, 0.28), (0.6, 0.6), (0.1, 1.0), (0.9, 0.98)]]],
    3: [[[(0.12, 0.12), (0.5, 0.0), (0.82, 0.22), (0.45, 0.46), (0.88, 0.72), (0.5, 1.0), (0.1, 0.88)]]],
    4: [[[(0.4, 0.0), (0.08, 0.62), (0.92, 0.62)], [(0.66, 0.35), (0.64, 1.0)]],
        [[(0.68, 1.0), (0.68, 0.0), (0.06, 0.68), (0.95, 0.68)]]],
    5: [[[(0.85, 0.02), (0.25, 0.02), (0.18, 0.45), (0.55, 0.36), (0.88, 0.66), (0.5, 1.0), (0.1, 0.9)]]],
    6: [[[(0.75, 0.0), (0.3, 0.35), (0.12, 0.72), (0.45, 1.0), (0.85, 0.75), (0.5, 0.5), (0.16, 0.72)]]],
    7: [[[(0.1, 0.03), (0.88, 0.03), (0.4, 1.0)]],
        [[(0.1, 0.03), (0.88, 0.03), (0.4, 1.0)], [(0.3, 0.5), (0.78, 0.5)]]],
    8: [[[(0.5, 0.48), (0.18, 0.22), (0.5, 0.0), (0.82, 0.22), (0.5, 0.48), (0.12, 0.76), (0.5, 1.0), (0.88, 0.76),
          (0.5, 0.48)]]],
    9: [[[(0.82, 0.26), (0.5, 0.5), (0.15, 0.28), (0.5, 0.0), (0.82, 0.26), (0.74, 1.0)]],
        [[(0.82, 0.24), (0.5, 0.5), (0.15, 0.28), (0.5, 0.0), (0.82, 0.24), (0.8, 0.7), (0.45, 1.0), (0.15, 0.92)]]],
}


@dataclass(frozen=True)
class DrawnPuzzle:
    """An RGB picture of a puzzle. ``corners`` [4, 2]: where its grid's lie (x, y), from the top left, anticlockwise."""

    image: Image.Image
    corners: np.ndarray

    def cells(self, points: np.ndarray) -> np.ndarray:
        """Where points [N, 2] of the picture lie on the grid, in cells (column, row) [N, 2]; 0 to 9 are within."""
        square = np.array([(0, 0), (0, 9), (9, 9), (9, 0)], float)
        return _projected(np.asarray(points, float), _perspective(self.corners, square))


def picture(puzzle: np.ndarray, rng: np.random.Generator, *, photo: bool, held_out: bool = False) -> DrawnPuzzle:
    """A puzzle [81] (0: blank) as a picture of 250 to 1100 pixels a side.

    ``photo``: on paper, turned, in perspective, under uneven light, blurred, through JPEG. ``held_out``: in fonts that
    no picture without it shows.
    """
    cell = int(rng.integers(26, 64))
    page = _page(np.asarray(puzzle).reshape(9, 9), cell, rng, by_hand=photo and rng.random() < _PEN_SHARE,
                 names=HELD_OUT if held_out else SEEN)
    return _photographed(page, rng) if photo else page


# ---- the page --------------------------------------------------------------------------------------


def _page(grid: np.ndarray, cell: int, rng: np.random.Generator, by_hand: bool, names: tuple[str, ...]) -> DrawnPuzzle:
    """The grid [9, 9] with a margin around it, upright."""
    paper, ink, line = _colours(rng)
    margin = rng.integers(0, cell * 2, size=4) + 2  # left, top, right, bottom
    side = 9 * cell
    image = Image.new("RGB", (side + int(margin[0] + margin[2]), side + int(margin[1] + margin[3])), paper)
    draw = ImageDraw.Draw(image)
    left, top = int(margin[0]), int(margin[1])
    _shade_boxes(draw, (left, top), cell, paper, rng)
    thin, thick = (1, max(2, cell // int(rng.integers(10, 24)))) if rng.random() < 0.8 else (1, 1)
    faint = _mixed(line, paper, rng.uniform(0, 0.7))
    for number in sorted(range(10), key=lambda number: number % 3 == 0):  # the thick ones over the thin
        wide, colour = (thick, line) if number % 3 == 0 else (thin, faint)
        at = number * cell
        draw.line([(left + at, top), (left + at, top + side)], colour, wide)
        draw.line([(left, top + at), (left + side, top + at)], colour, wide)
    size = rng.uniform(0.5, 0.82) * cell  # of a digit's height, roughly
    font = ImageFont.truetype(str(_font(str(rng.choice(names)))), round(size * 1.15))
    # Fifteen fonts are few: what is learnt from is wider or narrower, slanted, and bolder than they are.
    stretch, slant = (1.0, 0.0) if names is HELD_OUT else (float(rng.uniform(0.75, 1.25)), float(rng.normal(0, 0.1)))
    bold = int(names is not HELD_OUT and rng.random() < 0.2) * max(1, cell // 40)
    printed: dict[int, Image.Image] = {}
    pen = max(1, round(cell * rng.uniform(0.04, 0.1)))
    shifts = rng.normal(0, 0.05 if by_hand else 0.015, (9, 9, 2)) * cell  # of blanks, too: one digit moves no other
    for row, column in np.argwhere(grid > 0):
        digit, shift = int(grid[row, column]), shifts[row, column]
        centre = (left + (column + 0.5) * cell + shift[0], top + (row + 0.5) * cell + shift[1])
        if by_hand:
            _write(draw, digit, centre, size * 0.85, pen, ink, rng)
        else:
            if digit not in printed:
                printed[digit] = _printed(str(digit), font, cell, stretch, slant, bold)
            image.paste(ink, (round(centre[0]) - cell, round(centre[1]) - cell), printed[digit])
    square = np.array([(0, 0), (0, side), (side, side), (side, 0)], float)
    return DrawnPuzzle(image, square + np.array((left, top)))


def _printed(digit: str, font: ImageFont.FreeTypeFont, cell: int, stretch: float, slant: float,
             bold: int) -> Image.Image:
    """Where a digit's ink is, in the middle of a square twice as wide as a cell; ``bold``: pixels of ink around it."""
    box = font.getbbox(digit, stroke_width=bold)
    mask = Image.new("L", (2 * cell, 2 * cell))
    at = (cell - (box[0] + box[2]) / 2, cell - (box[1] + box[3]) / 2)
    ImageDraw.Draw(mask).text(at, digit, 255, font, stroke_width=bold)
    if stretch == 1 and not slant:
        return mask
    turn = (1 / stretch, slant, cell - cell / stretch - slant * cell, 0, 1, 0)
    return mask.transform(mask.size, Image.Transform.AFFINE, turn, Image.Resampling.BILINEAR)


def _colours(rng: np.random.Generator) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Of the paper, the digits and the lines: dark on light, or now and then the reverse."""
    light, dark, line = rng.integers(215, 256, 3), rng.integers(0, 90, 3), rng.integers(0, 140, 3)
    if rng.random() < 0.1:
        light, dark, line = 255 - light, 255 - dark, 255 - line
    return tuple(map(int, light)), tuple(map(int, dark)), tuple(map(int, line))


def _mixed(one: tuple[int, ...], other: tuple[int, ...], share: float) -> tuple[int, ...]:
    """One colour with a share of another."""
    return tuple(round(a + (b - a) * share) for a, b in zip(one, other, strict=True))


def _shade_boxes(draw: ImageDraw.ImageDraw, corner: tuple[int, int], cell: int, paper: tuple[int, ...],
                 rng: np.random.Generator) -> None:
    """Every second box a little darker, as some papers print it."""
    if rng.random() < 0.8:
        return
    shade = tuple(max(0, part - int(rng.integers(8, 30))) for part in paper)
    for box in range(1, 9, 2):
        x, y = corner[0] + box % 3 * 3 * cell, corner[1] + box // 3 * 3 * cell
        draw.rectangle([x, y, x + 3 * cell, y + 3 * cell], fill=shade)


@cache
def _font(name: str) -> Path:
    """The file of one of matplotlib's fonts."""
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"


def _write(draw: ImageDraw.ImageDraw, digit: int, centre: tuple[float, float], height: float, pen: int,
           ink: tuple[int, ...], rng: np.random.Generator) -> None:
    """A digit by hand: its strokes, no two times alike."""
    ways = _STROKES[digit]
    width = height * rng.uniform(0.5, 0.8)
    slant = rng.normal(0.08, 0.1)
    for stroke in ways[int(rng.integers(len(ways)))]:
        points = np.array(stroke) - 0.5 + rng.normal(0, 0.03, (len(stroke), 2))
        points[:, 0] -= slant * points[:, 1]
        smooth = _smooth(points) if digit not in (1, 4, 7) else points
        path = [(centre[0] + x * width, centre[1] + y * height) for x, y in smooth]
        draw.line(path, ink, pen, joint="curve")
        for x, y in (path[0], path[-1]):
            draw.ellipse([x - pen / 2, y - pen / 2, x + pen / 2, y + pen / 2], fill=ink)


def _smooth(points: np.ndarray, between: int = 8) -> np.ndarray:
    """A curve through points [N, 2] (Catmull and Rom, 1974) -> [(N - 1)·between + 1, 2]."""
    padded = np.concatenate([points[:1], points, points[-1:]])
    t = np.linspace(0, 1, between, endpoint=False)[:, None]
    pieces = []
    for before, start, end, after in zip(padded, padded[1:], padded[2:], padded[3:], strict=False):
        pieces.append(0.5 * (2 * start + (end - before) * t + (2 * before - 5 * start + 4 * end - after) * t**2
                             + (3 * start - before - 3 * end + after) * t**3))
    return np.concatenate([*pieces, points[-1:]])


# ---- the photo -------------------------------------------------------------------------------------


def _photographed(sheet: DrawnPuzzle, rng: np.random.Generator) -> DrawnPuzzle:
    """A page as a camera sees it: on something, turned, in perspective, in some light, a little out of focus."""
    page = sheet.image
    width, height = page.size
    room = rng.uniform(0.02, 0.15, 4) * max(width, height)  # left, top, right, bottom
    size = (int(width + room[0] + room[2]), int(height + room[1] + room[3]))
    corners = np.array([(0, 0), (0, height), (width, height), (width, 0)], float)
    seen = corners + rng.normal(0, 0.02, (4, 2)) * (width, height)
    angle = np.radians(rng.normal(0, 3))
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    middle = np.array([width, height]) / 2
    seen = (seen - middle) @ turn + middle + room[:2]
    seen = np.clip(seen, 1, np.array(size) - 1)
    coefficients = _perspective(seen, corners)
    table = tuple(int(part) for part in rng.integers(40, 220, 3))
    laid = page.transform(size, Image.Transform.PERSPECTIVE, coefficients, Image.Resampling.BILINEAR, fillcolor=table)
    laid = laid.filter(ImageFilter.GaussianBlur(rng.uniform(0, 0.004) * min(page.size)))
    tint = rng.uniform(0.92, 1.08, 3).astype(np.float32)
    pixels = np.array(laid, np.float32)
    pixels *= _light(size, rng)[..., None]
    pixels *= tint
    pixels += _grain(pixels.shape, rng) * np.float32(rng.uniform(1, 8))
    shot = Image.fromarray(pixels.clip(0, 255, out=pixels).astype(np.uint8))
    stored = BytesIO()
    shot.save(stored, "JPEG", quality=int(rng.integers(35, 95)))
    return DrawnPuzzle(Image.open(stored).convert("RGB"), _projected(sheet.corners, _perspective(corners, seen)))


def _perspective(points: np.ndarray, images: np.ndarray) -> list[float]:
    """The eight coefficients, as Pillow has them, of the projection that takes points [4, 2] to others."""
    rows, wanted = [], []
    for (x, y), (u, v) in zip(points, images, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        wanted += [u, v]
    return np.linalg.solve(np.array(rows), np.array(wanted)).tolist()


def _projected(points: np.ndarray, coefficients: list[float]) -> np.ndarray:
    """Points [N, 2] under a projection."""
    a, b, c, d, e, f, g, h = coefficients
    x, y = points[:, 0], points[:, 1]
    return np.stack([a * x + b * y + c, d * x + e * y + f], axis=1) / (g * x + h * y + 1)[:, None]


def _light(size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """How bright each pixel is lit [H, W]: falling off to one side, and now and then under a shadow's soft edge."""
    x, y = (np.arange(side, dtype=np.float32) / np.float32(side) - np.float32(0.5) for side in size)
    cosine, sine = np.float32(np.cos(angle := rng.uniform(0, 2 * np.pi))), np.float32(np.sin(angle))
    brightness, fall = np.float32(rng.uniform(0.75, 1.05)), np.float32(rng.uniform(0, 0.4))
    light = (brightness + fall * sine * y)[:, None] + (fall * cosine * x)[None]
    if rng.random() < 0.4:
        edge, softness, depth = rng.uniform(-0.4, 0.4), rng.uniform(0.01, 0.1), rng.uniform(0.1, 0.4)
        across = (sine * x)[None] - (cosine * y)[:, None]
        # A logistic step, by tanh: exp would overflow far from the edge.
        light *= 1 - np.float32(depth / 2) * (1 + np.tanh((across - np.float32(edge)) / np.float32(2 * softness)))
    return light


def _grain(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """A sensor's noise, normal with deviation 1: numbers drawn once, from anywhere in them on."""
    count, numbers = int(np.prod(shape)), _normals()
    start = int(rng.integers(len(numbers) - count))
    return numbers[start : start + count].reshape(shape)


@cache
def _normals() -> np.ndarray:
    return np.random.default_rng(0).standard_normal(1 << 22, np.float32)  # more than any picture has
