"""The gated expert MLPs of a mixture-of-experts layer, each token through its own few experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dgemma.kernels.packed import PackedWeight
from dgemma.kernels.products import Weight, expanded, gradient_dtype, linear, on_native, wants_gradient

# Up to this many experts, one matrix product over all of them beats many small ones (and torch.compile likes it).
DENSE_EXPERTS = 16
ROW_BLOCK = 16


def expert_mlp(x: Tensor, gate_up: Weight, down: Weight, weights: Tensor, experts: Tensor) -> Tensor:
    """Σ_k weights[n, k] · down_e(gelu(gate_e(x)) · up_e(x)) with e = experts[n, k].

    x [N, D]; gate_up [E, 2I, D] (gate rows first); down [E, D, I]; weights and experts [N, K]. Returns [N, D].
    """
    if isinstance(gate_up, Tensor) and isinstance(down, Tensor):
        if gate_up.shape[0] <= DENSE_EXPERTS:
            return dense_expert_mlp(x, gate_up, down, weights, experts)
        if x.device.type != "cpu" and not wants_gradient(x, weights, gate_up, down) and _aligned(gate_up, down):
            return sorted_expert_mlp(x, gate_up, down, weights, experts)
    elif isinstance(gate_up, PackedWeight) and isinstance(down, PackedWeight) and not wants_gradient(
            x, weights) and on_native(gate_up) and on_native(down):
        mixed = torch.ops.dgemma.packed_experts(x, gate_up.data, gate_up.type.code, down.data, down.type.code,
                                                down.shape[-1], weights, experts)
        return mixed.to(x.dtype)
    if wants_gradient(x, weights) and not any(isinstance(part, Tensor) and part.requires_grad
                                              for part in (gate_up, down)):
        return _FrozenExperts.apply(x, gate_up, down, weights, experts)  # type: ignore[return-value]
    return grouped_expert_mlp(x, gate_up, down, weights, experts)


def dense_expert_mlp(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    """Every token through every expert, the unchosen ones weighted by zero; same arguments as `expert_mlp`."""
    count, doubled, hidden = gate_up.shape
    gates = torch.zeros(x.shape[0], count, dtype=weights.dtype, device=x.device).scatter(1, experts, weights)
    gate_rows, up_rows = gate_up.chunk(2, dim=1)
    gate, up = x @ gate_rows.reshape(-1, hidden).T, x @ up_rows.reshape(-1, hidden).T
    inner = F.gelu(gate, approximate="tanh") * up
    inner = inner.view(-1, count, doubled // 2) * gates.unsqueeze(-1).to(x.dtype)
    return inner.flatten(1) @ down.transpose(1, 2).reshape(-1, hidden)


def grouped_expert_mlp(x: Tensor, gate_up: Weight, down: Weight, weights: Tensor, experts: Tensor) -> Tensor:
    """Tokens sorted by expert, one pair of matrix products per expert in use; same arguments as `expert_mlp`."""
    def run(rows: Tensor, expert: int) -> Tensor:
        gate, up = linear(rows, gate_up[expert]).chunk(2, dim=-1)
        return linear(F.gelu(gate, approximate="tanh") * up, down[expert])

    return mix_experts(x, gate_up.shape[0], run, weights, experts)


def _aligned(*matrices: Tensor) -> bool:
    """Whether `torch.nn.functional.grouped_mm` takes their rows, which must be of 16 bytes each."""
    return all(matrix.stride(1) * matrix.element_size() % 16 == 0 for matrix in matrices)


def sorted_expert_mlp(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    """Tokens sorted by expert and two products over all experts, with nothing brought to the host; as `expert_mlp`."""
    choices = experts.flatten()
    order = choices.argsort(stable=True)
    tokens = order // experts.shape[1]
    every = torch.arange(gate_up.shape[0], device=x.device)
    ends = torch.searchsorted(choices.index_select(0, order), every, right=True).to(torch.int32)
    both = F.grouped_mm(x.index_select(0, tokens), gate_up.mT, offs=ends)
    gate, up = both.chunk(2, dim=-1)
    out = F.grouped_mm(F.gelu(gate, approximate="tanh") * up, down.mT, offs=ends)
    scale = weights.flatten().index_select(0, order).unsqueeze(-1)
    mixed = torch.zeros(x.shape, dtype=torch.float32, device=x.device).index_add(0, tokens, out.float() * scale)
    return mixed.to(x.dtype)


def mix_experts(x: Tensor, count: int, run: Callable[[Tensor, int], Tensor], weights: Tensor,
                experts: Tensor) -> Tensor:
    """Σ_k weights[n, k] · run(x[n], experts[n, k]) [N, D]: ``run`` is called once for every expert in use.

    x [N, D]; ``run(rows [R, D], expert) -> [R, D]``; weights and experts [N, K], experts in 0..count - 1.
    """
    order, tokens, counts = _by_expert(experts, count)
    outputs = [run(part, expert)[:used] for expert, used, part in _blocks(x[tokens], counts)]
    # Weighted and summed in float32: eight bf16 additions per token would cost more precision than they save time.
    scale = weights.flatten()[order].unsqueeze(-1)
    mixed = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    mixed = mixed.index_add(0, tokens, torch.cat(outputs).float() * scale)
    return mixed.to(x.dtype)


def _by_expert(experts: Tensor, count: int) -> tuple[Tensor, Tensor, list[int]]:
    """Choices [N, K] sorted by expert: which they are [N · K], whose tokens' [N · K], and how many each expert has."""
    order = experts.flatten().argsort(stable=True)
    return order, order // experts.shape[1], torch.bincount(experts.flatten(), minlength=count).tolist()


def _blocks(rows: Tensor, counts: list[int]) -> Iterator[tuple[int, int, Tensor]]:
    """(expert, its count, its rows and some more) for every expert in use; ``rows`` are sorted by expert.

    A matrix library prepares a kernel for each shape it meets: few different row counts, few preparations. What comes
    out for the rows too many is to be dropped.
    """
    if torch.is_grad_enabled() and rows.requires_grad:
        # Cut once for all: the gradient of a slice is as large as what it was cut from, for every expert.
        for expert, part in enumerate(rows.split(counts)):
            if len(part):
                yield expert, len(part), F.pad(part, (0, 0, 0, -len(part) % ROW_BLOCK))
        return
    rows = F.pad(rows, (0, 0, 0, ROW_BLOCK))  # room behind the last; the others' rows too many are the next one's
    start = 0
    for expert, used in enumerate(counts):
        if used:
            yield expert, used, rows[start : start + -(-used // ROW_BLOCK) * ROW_BLOCK]
            start += used


class _FrozenExperts(torch.autograd.Function):
    """`expert_mlp` of experts that are not trained: gradients for the tokens and the router's weights only.

    Of plain experts the gate and up products are kept; of packed ones nothing, and the way there is that of inference.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate_up: Weight, down: Weight, weights: Tensor, experts: Tensor) -> Tensor:
        kept: list[Tensor] = []
        if isinstance(gate_up, PackedWeight) or isinstance(down, PackedWeight):
            mixed = expert_mlp(x, gate_up, down, weights, experts)
        else:
            used = (count for count in _by_expert(experts, len(gate_up))[2] if count)

            def run(rows: Tensor, expert: int) -> Tensor:
                both = F.linear(rows, gate_up[expert])
                kept.append(both[: next(used)])
                gate, up = both.chunk(2, dim=-1)
                return F.linear(F.gelu(gate, approximate="tanh") * up, down[expert])

            mixed = mix_experts(x, len(gate_up), run, weights, experts)
        ctx.gate_up, ctx.down = gate_up, down
        ctx.save_for_backward(x, weights, experts, torch.cat(kept) if kept else None)
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, experts, kept = ctx.saved_tensors
        order, tokens, counts = _by_expert(experts, ctx.gate_up.shape[0])
        scale = weights.flatten()[order].unsqueeze(1)
        dtype = gradient_dtype(ctx.gate_up, x)
        out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        of_weights = torch.empty(len(order), dtype=torch.float32, device=x.device)
        inputs = [part for _, _, part in _blocks(x[tokens], counts)] if kept is None else []
        start = 0
        for number, (expert, used, part) in enumerate(_blocks(gradients[0][tokens].to(dtype), counts)):
            rows = slice(start, start + used)
            both = linear(inputs[number], ctx.gate_up[expert])[:used] if kept is None else kept[rows]
            gate, up = both.float().chunk(2, dim=-1)
            active = F.gelu(gate, approximate="tanh")
            inner = (part @ expanded(ctx.down[expert], dtype))[:used].float()
            of_weights[rows] = (inner * active * up).sum(1)
            inner *= scale[rows]
            both = torch.cat([torch.ops.aten.gelu_backward(inner * up, gate, approximate="tanh"), inner * active], 1)
            both = F.pad(both.to(dtype), (0, 0, 0, -used % ROW_BLOCK))
            out.index_add_(0, tokens[rows], (both @ expanded(ctx.gate_up[expert], dtype))[:used].float())
            start += used
        by_choice = torch.empty_like(of_weights)
        by_choice[order] = of_weights
        return out.to(x.dtype), None, None, by_choice.view(weights.shape).to(weights.dtype), None
