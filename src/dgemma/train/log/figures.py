"""Curves as inline SVG that follows the page's colours, light or dark.

Works on names and numbers; knows nothing of runs. The same curves give the same bytes. Colours stand in the SVG as CSS
variables (``--c0`` …, ``--grid``; text takes the page's colour), so a page has to define them. The palette is Okabe
and Ito's, which people see apart however they see colours, and every curve is labelled where it ends.
"""

from __future__ import annotations

import html
import io
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from dgemma.errors import DgemmaError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = 6  # that a page defines
POINTS = 400  # of one curve at most
_INK, _GRID = "#010203", "#040506"  # stand for the page's colours while matplotlib draws
_SERIES = [f"#0a0b{16 + index:02x}" for index in range(COLOURS)]
_WIDTH, _HEIGHT = 6.4, 3.0  # inches of 72 px
_FONT = 9.5  # px
_LETTER = 0.56 * _FONT  # px, the mean width of a letter
_LABEL_LETTERS = 26
_MARKED_POINTS = 40  # a curve with more has no mark at each
_LOG_FROM = 30.0  # largest ÷ smallest value from which a loss is drawn on a logarithmic axis
_RC: dict[Any, Any] = {
    "figure.facecolor": "none", "axes.facecolor": "none", "svg.fonttype": "none",
    "text.parse_math": False, "font.family": "sans-serif", "font.size": _FONT,
    "text.color": _INK, "axes.edgecolor": _GRID, "axes.labelcolor": _INK, "xtick.color": _GRID, "ytick.color": _GRID,
    "xtick.labelcolor": _INK, "ytick.labelcolor": _INK, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": _GRID, "grid.linewidth": 0.6, "axes.axisbelow": True,
    "path.simplify": True, "lines.solid_capstyle": "round",
}


@dataclass(frozen=True)
class Curve:
    """A line through (x, y); NaN leaves a gap. ``low`` and ``high`` are a band around it, ``star`` is the index of a
    point that is ringed. A ``faint`` curve has no label."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    star: int | None = None
    star_label: str = ""
    faint: bool = False
    strength: float = 1.0  # opacity
    dashed: bool = False


@dataclass(frozen=True)
class Axis:
    """What stands along an axis: ``kind`` is "plain", "percent" (values are shares), "log" or "steps" (powers of 2)."""

    label: str
    kind: str = "plain"
    ticks: Sequence[float] = field(default_factory=tuple)


def smoothed(values: Sequence[float]) -> list[float]:
    """An exponential mean over about a fiftieth of the values, without its start's pull; NaN counts for nothing."""
    keep = 1 - 1 / max(1.0, len(values) / 50)
    total = weight = 0.0
    means = []
    for value in values:
        if math.isfinite(value):
            total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        means.append(total / weight if weight else math.nan)
    return means


def thinned(curve: Curve) -> Curve:
    """The curve with at most `POINTS` points: means over equal stretches of it."""
    if len(curve.x) <= POINTS:
        return curve
    edges = [round(i * len(curve.x) / POINTS) for i in range(POINTS + 1)]
    stretches = [slice(start, end) for start, end in pairwise(edges)]
    return replace(curve, x=[_mean(curve.x[part]) for part in stretches],
                   y=[_mean(curve.y[part]) for part in stretches])


def scale_of(curves: Sequence[Curve]) -> str:
    """The kind of axis that shows these values best: "log" or "plain"."""
    values = [value for curve in curves for value in curve.y if math.isfinite(value)]
    return "log" if values and min(values) > 0 and max(values) / min(values) > _LOG_FROM else "plain"


def draw(name: str, curves: Sequence[Curve], x: Axis, y: Axis, *, height: float = _HEIGHT) -> str:
    """One picture as an ``<svg>`` element; ``name`` says what it shows, for those who cannot see it.

    Raises DgemmaError where matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DgemmaError(f"a report needs matplotlib ({error}): pip install 'dgemma[train]'") from error

    with mpl.rc_context({**_RC, "svg.hashsalt": name}), warnings.catch_warnings():
        # Letters that matplotlib's font lacks: the browser has them, only their width is guessed.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = Figure(figsize=(_WIDTH, height), dpi=72)
        canvas = FigureCanvasSVG(figure)
        labels = [_short(curve.name) for curve in curves if not curve.faint]
        right = 1 - (14 + _LETTER * max(map(len, labels), default=0)) / (72 * _WIDTH)
        axes = figure.add_axes((50 / (72 * _WIDTH), 34 / (72 * height), right - 50 / (72 * _WIDTH),
                                1 - 60 / (72 * height)))
        for curve in map(thinned, curves):
            _add(axes, curve)
        _scale(axes, x, y)
        _label_ends(axes, [curve for curve in curves if not curve.faint])
        text = io.StringIO()
        canvas.print_svg(text, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _for_page(text.getvalue(), name)


def _add(axes: Axes, curve: Curve) -> None:
    colour = _SERIES[curve.colour % COLOURS]
    if curve.low and curve.high:
        axes.fill_between(curve.x, curve.low, curve.high, color=colour, alpha=0.16, linewidth=0)
    few = len(curve.x) <= _MARKED_POINTS and not curve.faint
    axes.plot(curve.x, curve.y, color=colour, linewidth=0.7 if curve.faint else 1.7,
              alpha=0.35 if curve.faint else curve.strength, linestyle="--" if curve.dashed else "-",
              marker="o" if few or len(curve.x) == 1 else "", markersize=3.2)
    if curve.star is not None and math.isfinite(curve.y[curve.star]):
        at = (curve.x[curve.star], curve.y[curve.star])
        axes.plot(*at, color=colour, marker="o", markersize=9, markerfacecolor="none", markeredgewidth=1.6)
        if curve.star_label:
            axes.annotate(_short(curve.star_label), at, xytext=(0, 9), textcoords="offset points", ha="center",
                          color=_INK)


def _scale(axes: Axes, x: Axis, y: Axis) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.set_title(y.label, loc="left", fontsize=_FONT, pad=8)
    axes.set_xlabel(x.label, labelpad=3)
    axes.tick_params(length=3, width=0.6)
    axes.margins(y=0.12)
    axes.autoscale_view()  # now, since labels are placed by it
    if x.kind == "steps":
        axes.set_xscale("log", base=2)
        axes.minorticks_off()
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    if x.ticks:
        axes.set_xticks(list(x.ticks))
    axes.xaxis.set_major_formatter(FuncFormatter(
        lambda value, _: f"{value:,g}" if value < 1e6 else f"{value / 1e6:g}M"))
    axes.grid(False, axis="x")
    if y.kind == "log":
        axes.set_yscale("log")
        axes.minorticks_off()
    elif y.kind == "percent":
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, -0.03), min(max(high, 0.05), 1.06))
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    if y.kind == "percent":
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %" if value <= 1 else ""))
    else:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))


def _label_ends(axes: Axes, curves: Sequence[Curve]) -> None:
    """Write each curve's name behind its last point, pushed apart where two would meet."""
    apart = _FONT + 2
    ends = []
    for curve in curves:
        last = next((value for value in reversed(curve.y) if math.isfinite(value)), None)
        if last is not None:
            ends.append((float(axes.transData.transform((curve.x[-1], last))[1]), curve))
    ends.sort(key=lambda end: end[0])
    bottom, top = axes.transAxes.transform([(0, 0), (0, 1)])[:, 1]
    places: list[float] = []
    for height, _ in ends:
        places.append(max(height, places[-1] + apart) if places else max(height, bottom))
    if places:
        ceiling = top + apart
        for index in reversed(range(len(places))):  # and down again from the top
            ceiling = places[index] = min(places[index], ceiling - apart)
    right = axes.transAxes.transform((1, 0))[0] + 6
    for place, (_, curve) in zip(places, ends, strict=True):
        at: Any = axes.transAxes.inverted().transform((right, place))
        axes.text(at[0], at[1], _short(curve.name), transform=axes.transAxes, va="center",
                  color=_SERIES[curve.colour % COLOURS], alpha=max(curve.strength, 0.6))


def _short(text: str) -> str:
    return text if len(text) <= _LABEL_LETTERS else text[: _LABEL_LETTERS - 1] + "…"


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def _for_page(svg: str, name: str) -> str:
    """matplotlib's file as an element: the page's colours and letters, and nothing that would reach beyond it."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)  # it would hold for the whole page
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', svg))
    svg = re.sub(r' id="([^"]+)"', lambda found: found[0] if found[1] in used else "", svg)
    svg = re.sub(r"font-family: [^;\"]*", "font-family: inherit", svg)
    for colour, variable in [(_INK, "currentColor"), (_GRID, "var(--grid)"),
                             *((colour, f"var(--c{index})") for index, colour in enumerate(_SERIES))]:
        svg = svg.replace(colour, variable)
    opening = f'<svg role="img" aria-label="{html.escape(name)}"'
    for size in ("width", "height"):  # the page's
        svg = re.sub(rf'(<svg[^>]*?) {size}="[^"]*"', r"\1", svg, count=1)
    return svg.replace("<svg", opening, 1).strip()
