"""Muon for the matrices, AdamW for everything else.

Muon (Jordan et al. 2024, "Muon: an optimizer for hidden layers"): momentum, then the update is replaced by its
nearest orthogonal matrix through a Newton-Schulz iteration. `torch.optim.Muon` takes two-dimensional parameters only;
this one also takes stacks of matrices (the fused experts) and runs all matrices of one shape in one batch, which is
what makes it cheap for a small model on a CPU.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

# Coefficients of the quintic that drives all singular values towards 1 (same source).
_A, _B, _C = 3.4445, -4.7750, 2.0315


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """[N, R, C] -> about U·Vᵀ of each matrix's singular value decomposition, bfloat16."""
    x = matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        square = x @ x.mT
        x = _A * x + (_B * square + _C * square @ square) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Updates matrices [R, C] and stacks of them [E, R, C]; ``lr`` is the RMS of an update relative to the weight
    scale √max(1, R / C), ``weight_decay`` is decoupled."""

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):  # type: ignore[override]
        for group in self.param_groups:
            shapes: dict[tuple[int, int], list[tuple[nn.Parameter, Tensor]]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes[parameter.shape[-2], parameter.shape[-1]].append((parameter, parameter.grad))
            for (rows, columns), parameters in shapes.items():
                updates = []
                for parameter, gradient in parameters:
                    state = self.state[parameter]
                    if "momentum" not in state:
                        state["momentum"] = torch.zeros_like(parameter)
                    buffer = state["momentum"]
                    buffer.lerp_(gradient, 1 - group["momentum"])
                    # Nesterov: look one step ahead along the momentum.
                    updates.append(gradient.lerp(buffer, group["momentum"]).view(-1, rows, columns))
                directions = orthogonalise(torch.cat(updates)).float()
                scale = max(1.0, rows / columns) ** 0.5
                start = 0
                for (parameter, _), update in zip(parameters, updates, strict=True):
                    direction = directions[start : start + len(update)].view_as(parameter)
                    start += len(update)
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(direction, alpha=-group["lr"] * scale)


def is_matrix(name: str, shape: Sequence[int]) -> bool:
    """Whether a parameter is one for Muon: a matrix, or a stack of them, but not the embedding table."""
    return len(shape) >= 2 and "embed_tokens" not in name
