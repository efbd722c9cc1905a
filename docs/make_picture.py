"""A picture of the live canvas for a page: four moments of one recorded canvas, as an SVG.

    python docs/make_picture.py answer.jsonl docs/canvas.svg --columns 2

The moments are the first step, half settled, nearly settled and the last step, unless `--steps` names others.
"""

from __future__ import annotations

import argparse
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.segment import Segment, Segments
from rich.table import Table
from rich.terminal_theme import TerminalTheme

from dgemma.cli.terminal.drafts import PieceOf
from dgemma.cli.terminal.view import CanvasView
from dgemma.diffusion.events import Denoised, Event
from dgemma.diffusion.trace import read_trace

THEME = TerminalTheme(
    (17, 20, 27),
    (214, 219, 229),
    [(40, 44, 52), (224, 108, 117), (126, 211, 107), (229, 192, 90), (97, 175, 239), (209, 130, 230),
     (86, 190, 205), (171, 178, 191)],
)  # fmt: skip
FONT_FACES = re.compile(r"@font-face \{.*?\}\s*", re.DOTALL)  # pages that show SVGs load nothing for them


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trace", type=Path)
    parser.add_argument("svg", type=Path)
    parser.add_argument("--canvas", type=int, default=0, help="which canvas of the answer, from 0")
    parser.add_argument("--steps", type=lambda text: [int(n) for n in text.split(",")], help="such as 1,6,9,12")
    parser.add_argument("--width", type=int, default=72, help="of one moment, in characters")
    parser.add_argument("--columns", type=int, default=1, help="moments side by side")
    args = parser.parse_args()
    trace = read_trace(args.trace)
    record_svg(
        trace.events,
        trace.piece_of,
        args.svg,
        args.steps,
        args.canvas,
        width=args.width,
        columns=args.columns,
    )


def record_svg(
    events: Iterable[Event],
    piece_of: PieceOf,
    path: Path,
    steps: Sequence[int] | None = None,
    canvas: int = 0,
    *,
    width: int = 72,
    columns: int = 1,
    title: str = "dgemma",
) -> None:
    """Write an SVG of some `steps` of one canvas, each as `LiveCanvas` shows it on a terminal of that width."""
    events = [event for event in events if getattr(event, "canvas", canvas) <= canvas]
    denoised = [event for event in events if isinstance(event, Denoised) and event.canvas == canvas]
    if not denoised:
        raise SystemExit(f"canvas {canvas} has no steps in this trace")
    steps = steps or moments(denoised)
    view = CanvasView(piece_of)
    shown: list[RenderableType] = []
    for event in events:
        view.apply(event)
        if isinstance(event, Denoised) and event.canvas == canvas and event.step in steps:
            if event is denoised[-1]:
                view.drawn()  # nothing counts as new in the end: the text as it will stay
            shown.append(_still(view, width))
        view.drawn()
    grid = Table.grid(padding=(0, 3))
    for _ in range(columns):
        grid.add_column(width=width)
    for i in range(0, len(shown), columns):
        grid.add_row(*(Padding(still, (0, 0, 1, 0)) for still in shown[i : i + columns]))
    console = Console(
        record=True,
        width=columns * (width + 3) - 3,
        file=io.StringIO(),
        force_terminal=True,
        color_system="standard",
        legacy_windows=False,
    )
    console.print(grid)
    svg = FONT_FACES.sub("", console.export_svg(title=title, theme=THEME))
    path.write_text(svg.replace("Fira Code", "ui-monospace, Menlo, DejaVu Sans Mono"), encoding="utf-8")


def moments(steps: Sequence[Denoised]) -> list[int]:
    """Four steps that tell the story: noise, half, nearly, solved."""

    def first(share: float) -> int:
        return next((s.step for s in steps if sum(s.accepted) >= share * len(s.accepted)), steps[-1].step)

    chosen = {steps[0].step, first(0.4), first(0.8), steps[-1].step}
    late = (s.step for s in reversed(steps) if s.step not in chosen)  # a fast model settles much at once
    while len(chosen) < min(4, len(steps)):
        chosen.add(next(late))
    return sorted(chosen)


def _still(view: CanvasView, width: int) -> RenderableType:
    """What is on the screen, with its status line on top as a caption."""
    *text, status = view.frame(width, 60)
    newline = [Segment.line()]
    return Group(*(Segments([*line, *newline]) for line in [status, [], *text]))


if __name__ == "__main__":
    main()
