"""What a query sees: the one place that decides it, for every cache.

Reading, a token sees itself and what stands before it, in sliding layers within the window; a picture's tokens see all
of their picture as well, in the layers that `ModelConfig.picture_attention` names.
Denoising, every token of a canvas sees all of the canvas and the same stretch of what was read. Works on positions and
on columns, [B, T] and [B, S]; -1 is an empty column, or padding among the queries.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dgemma.config import FULL, ModelConfig
from dgemma.kernels.attention import LAST, Visible

# For each row the columns [start, stop) of a pass that are a picture's, in order.
Spans = Sequence[Sequence[tuple[int, int]]]


def reach(config: ModelConfig, kind: str, length: int, spare: int = 0) -> int:
    """How many of ``length`` tokens a canvas, or the next token, sees in layers of a kind; in sliding ones ``spare``
    more are counted."""
    return length if kind == FULL else min(length, config.sliding_window - 1 + spare)


def causal(config: ModelConfig, kind: str, positions: Tensor, columns: Tensor, spans: Spans | None = None) -> Visible:
    """What tokens being read at ``positions`` [B, T] see of ``columns`` [B, S], their own among these."""
    padding = positions < 0  # sees everything: an empty softmax is NaN
    last, how = positions, config.picture_attention
    first = torch.zeros_like(positions) if kind == FULL else (positions - (config.sliding_window - 1)).clamp(min=0)
    if any(spans or ()) and (how == "full" or (how == "sliding" and kind != FULL)):
        starts, last = _picture_bounds(positions, spans or ())
        first = first.minimum(starts) if how == "full" else first
    return Visible(first.masked_fill(padding, -1), last.masked_fill(padding, LAST), columns)


def canvas(config: ModelConfig, kind: str, lengths: Sequence[int], context: Tensor, width: int) -> Visible | None:
    """What canvases of ``width`` tokens behind rows of these lengths see; None: all rows see all there is.

    ``context`` [B, S] are the columns of what was read, all that is within a row's reach among them; the canvas' own
    follow on them.
    """
    seen = [reach(config, kind, length) for length in lengths]
    if all(count == context.shape[1] for count in seen):
        return None
    first = torch.tensor([length - count for length, count in zip(lengths, seen, strict=True)], device=context.device)
    columns = torch.cat([context, behind(lengths, width, context.device)], dim=1)
    return Visible(first.unsqueeze(1), torch.full_like(first, LAST).unsqueeze(1), columns)


def behind(lengths: Sequence[int], width: int, device: torch.device) -> Tensor:
    """The positions [B, width] of what follows on rows of these lengths."""
    return torch.tensor(lengths, device=device).unsqueeze(1) + torch.arange(width, device=device)


def _picture_bounds(positions: Tensor, spans: Spans) -> tuple[Tensor, Tensor]:
    """The first and last position [B, T] of the picture that each token belongs to, its own where it is none's."""
    starts, ends = positions.clone(), positions.clone()
    for row, own in enumerate(spans):
        for start, stop in own:
            starts[row, start:stop] = positions[row, start]
            ends[row, start:stop] = positions[row, stop - 1]
    return starts, ends


def pieces(width: int, most: int, spans: Spans | None) -> Iterator[slice]:
    """``width`` columns in pieces of ``most`` each, or more where a picture would be cut."""
    start = 0
    while start < width:
        stop = min(start + most, width)
        cut = True
        while cut:
            cut = [end for own in spans or () for begin, end in own if begin < stop < end]
            stop = max(cut, default=stop)
        yield slice(start, stop)
        start = stop


def within(columns: slice, spans: Spans | None) -> Spans | None:
    """The spans of a piece of a pass, counted from its first column."""
    return spans and [[(start - columns.start, stop - columns.start) for start, stop in own
                       if columns.start <= start < columns.stop] for own in spans]
