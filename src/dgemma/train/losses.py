"""Cross-entropy, the loss of every token: of whole logits, or of hidden states without holding [tokens, vocabulary].

Works on hidden states, an embedding table and target tokens. Knows nothing of canvases, noise or how losses are
weighted: it returns one loss per token, through which gradients flow, and whoever calls weighs and groups them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dgemma.kernels import PackedWeight, Weight, embedding, linear, mix_rows
from dgemma.nn.head import LOGITS, soft_cap, tile_width

_CACHED = 1 << 18  # logits that are worked on at a time, few enough for the processor's cache


def cross_entropy(logits: Tensor, targets: Tensor, observed: Tensor | None = None,
                  shift: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Of whole rows: logits [N, V], targets [N] -> losses [N] and the most probable tokens [N].

    ``shift`` [N] is added to the logit of token ``observed`` [N] before the softmax (not before the argmax).
    """
    predicted = logits.detach().argmax(-1)
    if observed is not None and shift is not None:
        logits = logits.scatter_add(1, observed.unsqueeze(1), shift.to(logits.dtype).unsqueeze(1))
    return F.cross_entropy(logits, targets, reduction="none"), predicted


def chunked_cross_entropy(hidden: Tensor, table: Weight, targets: Tensor, cap: float, observed: Tensor | None = None,
                          shift: Tensor | None = None, *, most: int = LOGITS) -> tuple[Tensor, Tensor]:
    """`cross_entropy` of the soft-capped logits of hidden states [N, D] over a table [V, D], a tile of it at a time.

    Gradients go to ``hidden`` and, where it is a tensor that wants one, to ``table``. No more than about ``most``
    logits exist at a time. Sums are float32 (float64 for float64).
    """
    width = tile_width(len(targets), table.shape[0], most)
    if observed is None or shift is None:
        observed, shift = targets, None
    return _ChunkedCrossEntropy.apply(hidden, table, targets, cap, observed, shift, width)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """One walk over the table gives the losses and, of a frozen table, each loss's gradient in its hidden state.

    That gradient is Σ_v (p_v - [v is the target]) · slope_v · T_v, slope being the soft cap's: an average of rows of
    the table under the softmax, which can be summed up beside the softmax's own sum (as in attention). What comes
    from above only scales it. Only a table that is trained has its logits made again on the way back.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, table: Weight, targets: Tensor, cap: float, observed: Tensor,
                shift: Tensor | None, width: int) -> tuple[Tensor, Tensor]:
        walk = _Walk(hidden, targets, observed, cap, ctx.needs_input_grad[0] and not ctx.needs_input_grad[1])
        for start in range(0, table.shape[0], width):
            part = table[start : start + width]
            raw = linear(hidden, part)
            ctx.dtype = raw.dtype  # of the products: under autocast it is not that of hidden
            walk.add(raw, start, part if isinstance(part, PackedWeight) else part.to(raw.dtype))
        losses, log_mass, pull = walk.result(table, shift)
        ctx.table, ctx.cap, ctx.width = (table if isinstance(table, PackedWeight) else None), cap, width
        if pull is not None:
            ctx.save_for_backward(pull)
        else:
            ctx.save_for_backward(hidden, None if isinstance(table, PackedWeight) else table, targets, observed, shift,
                                  log_mass)
        ctx.hidden_dtype = hidden.dtype
        ctx.mark_non_differentiable(walk.predicted)
        return losses, walk.predicted

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        factor = grads[0].unsqueeze(1)
        if not ctx.needs_input_grad[1]:
            return (ctx.saved_tensors[0] * factor).to(ctx.hidden_dtype), None, None, None, None, None, None
        hidden, table, targets, observed, shift, log_mass = ctx.saved_tensors
        narrow = hidden.to(ctx.dtype)
        grad_hidden = torch.zeros_like(hidden, dtype=log_mass.dtype) if ctx.needs_input_grad[0] else None
        grad_table = torch.empty_like(table)
        for start in range(0, len(table), ctx.width):
            part = table[start : start + ctx.width].to(ctx.dtype)
            scores = linear(narrow, part)
            scores = soft_cap(scores if scores.dtype == torch.float64 else scores.float(), ctx.cap)
            slope = 1 - (scores / ctx.cap).square()  # of the soft cap
            rows, columns = _inside(observed, start, scores.shape[1])
            if shift is not None:
                scores[rows, columns] += shift[rows].to(scores.dtype)
            p = scores.sub_(log_mass.unsqueeze(1)).exp_()
            rows, columns = _inside(targets, start, p.shape[1])
            p[rows, columns] -= 1
            scored = p.mul_(slope).mul_(factor).to(ctx.dtype)
            if grad_hidden is not None:
                grad_hidden += scored @ part
            grad_table[start : start + p.shape[1]] = scored.mT @ narrow
        grad_hidden = None if grad_hidden is None else grad_hidden.to(hidden.dtype)
        return grad_hidden, grad_table, None, None, None, None, None


class _Walk:
    """What is known of every row's softmax after some tiles, all [N], and the sum of slope-weighted rows [N, D].

    The target and the observed token are left out of the sums and come in at the end, in full precision: their part of
    the gradient is a difference that may be small.
    """

    def __init__(self, hidden: Tensor, targets: Tensor, observed: Tensor, cap: float, pulls: bool):
        self.targets, self.observed, self.cap = targets, observed, cap
        self.dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        self.peak = torch.full((len(hidden),), -torch.inf, dtype=self.dtype, device=hidden.device)
        self.mass = torch.zeros_like(self.peak)  # Σ e^(logit - peak)
        self.right, self.seen = torch.zeros_like(self.peak), torch.zeros_like(self.peak)  # their tanh
        self.predicted = torch.zeros_like(targets)
        self.pull = torch.zeros(hidden.shape, dtype=self.dtype, device=hidden.device) if pulls else None

    def add(self, raw: Tensor, start: int, part: Weight) -> None:
        """Take in the products [N, n] with the table's rows from ``start`` on, which are overwritten."""
        decay = torch.empty_like(self.peak)
        step = max(1, _CACHED // raw.shape[1])
        for first in range(0, len(raw), step):
            rows = slice(first, first + step)
            # tanh(x) as 2 σ(2x) - 1, many times faster and as near in float32 as a softmax wants it; its slope is
            # 4 σ (1 - σ).
            half = torch.sigmoid_(raw[rows].to(self.dtype).mul_(2 / self.cap))
            top, where = half.max(1)
            highest = (2 * top - 1) * self.cap
            before = self.peak[rows]
            self.predicted[rows] = torch.where(highest > before, where + start, self.predicted[rows])
            peak = torch.maximum(before, highest)
            decay[rows] = (before - peak).exp()
            weights = torch.add(-(self.cap + peak).unsqueeze(1), half, alpha=2 * self.cap).exp_()
            for tokens, kept in ((self.targets, self.right), (self.observed, self.seen)):
                inside, columns = _inside(tokens[rows], start, raw.shape[1])
                kept[first + inside] = 2 * half[inside, columns] - 1
                weights[inside, columns] = 0
            self.peak[rows] = peak
            self.mass[rows] = self.mass[rows] * decay[rows] + weights.sum(1)
            if self.pull is not None:
                raw[rows] = weights.mul_(half.addcmul_(half, half, value=-1)).mul_(4)
        if self.pull is None:
            return
        mix_rows(self.pull, decay, raw, part)

    def result(self, table: Weight, shift: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Losses and log of the mass [N], and each loss's gradient [N, D] if it was to be summed up."""
        same = self.targets == self.observed
        seen = self.cap * self.seen + (0 if shift is None else shift.to(self.dtype))
        right = torch.where(same, seen, self.cap * self.right)
        apart = torch.stack([self.peak + self.mass.log(), right, seen.masked_fill(same, -torch.inf)])
        log_mass = apart.logsumexp(0)
        if self.pull is not None:
            self.pull *= (self.peak - log_mass).exp().unsqueeze(1)
            wanted = torch.expm1(right - log_mass) * (1 - self.right.square())
            self.pull += wanted.unsqueeze(1) * embedding(self.targets, table).to(self.dtype)
            if shift is not None:
                other = torch.where(same, 0.0, (seen - log_mass).exp() * (1 - self.seen.square()))
                self.pull += other.unsqueeze(1) * embedding(self.observed, table).to(self.dtype)
        return log_mass - right, log_mass, self.pull


def _inside(tokens: Tensor, start: int, width: int) -> tuple[Tensor, Tensor]:
    """The rows whose token lies in a tile, and its place there."""
    rows = ((tokens >= start) & (tokens < start + width)).nonzero().squeeze(1)
    return rows, tokens[rows] - start
