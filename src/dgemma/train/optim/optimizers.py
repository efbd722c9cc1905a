"""The optimizers of a run as one: AdamW or Muon, float32 masters of narrower parameters, a running average, a schedule.

Works on parameters and their gradients; knows nothing of losses and data.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dgemma.errors import DgemmaError
from dgemma.nn.layers import multiplies
from dgemma.train.recipe import OptimizerSettings

# Coefficients of the quintic that drives all singular values towards 1 (same source).
_A, _B, _C = 3.4445, -4.7750, 2.0315


def learning_rate_factor(step: int, max_steps: int, settings: OptimizerSettings) -> float:
    """What the rates are multiplied by at a step (from 0): see `OptimizerSettings`."""
    warm = min(1.0, (step + 1) / max(1, settings.warmup_steps))
    if settings.schedule == "cosine":
        done = (step - settings.warmup_steps) / max(1, max_steps - settings.warmup_steps)
        return warm * 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, done))))
    if settings.schedule == "linear":
        decay = max(1, int(settings.decay_fraction * max_steps))
        return min(warm, max(0.0, (max_steps - step) / decay))
    return warm


class Optimizers:
    """What `settings` ask for over a network's trainable parameters.

    Parameters narrower than float32 are trained through float32 masters: a step of 1e-4 of a bfloat16 number would be
    rounded away.
    """

    def __init__(self, network: nn.Module, settings: OptimizerSettings):
        self.settings = settings
        self.parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
        self.masters = {name: p if p.dtype in (torch.float32, torch.float64) else
                        nn.Parameter(p.detach().float()) for name, p in self.parameters.items()}
        matrices = {name for name, p in self.masters.items() if multiplies(name, p.shape)}
        muon = matrices if settings.kind == "muon" else set()
        self.all: list[torch.optim.Optimizer] = []
        if muon:
            self.all.append(Muon([self.masters[name] for name in self.masters if name in muon], lr=settings.muon_lr,
                                 weight_decay=settings.weight_decay))
        # What is no matrix (norms, scales) is not pulled towards 0; Muon's matrices have that pull, embeddings do not.
        decayed = [p for name, p in self.masters.items() if name in matrices - muon]
        others = [p for name, p in self.masters.items() if name not in matrices]
        groups = [{"params": those, "weight_decay": decay}
                  for those, decay in ((decayed, settings.weight_decay), (others, 0.0)) if those]
        if groups:
            self.all.append(torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas))
        self.average = ({name: p.detach().clone() for name, p in self.masters.items()} if settings.ema else {})
        self.steps = 0

    @torch.no_grad()
    def gather(self) -> None:
        """Take a micro-batch's gradients over from narrower parameters: the step's sum is float32, in the masters."""
        for name, parameter in self.parameters.items():
            if (master := self.masters[name]) is not parameter and parameter.grad is not None:
                new, parameter.grad = parameter.grad.float(), None
                master.grad = new if master.grad is None else master.grad.add_(new)

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """One step of the masters' gradients with the rates times ``factor``; they are gone afterwards."""
        self.gather()
        for optimizer in self.all:
            for group in optimizer.param_groups:
                group["lr"] = optimizer.defaults["lr"] * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        for name, parameter in self.parameters.items():
            if (master := self.masters[name]) is not parameter:
                parameter.copy_(master)
        self.steps += 1
        # A young average forgets faster: it would hold on to where the run began.
        decay = min(self.settings.ema, self.steps / (self.steps + 10))
        for name, average in self.average.items():
            average.lerp_(self.masters[name], 1 - decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within it the network has the averages for its weights, where there are any."""
        if not self.average:
            yield
            return
        kept = {name: self.parameters[name].detach().clone() for name in self.average}
        self._load(self.average)
        try:
            yield
        finally:
            self._load(kept)

    @torch.no_grad()
    def _load(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            self.parameters[name].copy_(tensor)

    def tensors(self) -> dict[str, Tensor]:
        """All that a resumed run needs, by name: what is trained (float32), the average, the optimizers' memory."""
        found = {f"parameters/{name}": p.detach() for name, p in self.masters.items()}
        found |= {f"average/{name}": average for name, average in self.average.items()}
        for optimizer in self.all:
            for name, parameter in self.masters.items():
                found |= {f"memory/{key}/{name}": value for key, value in optimizer.state.get(parameter, {}).items()}
        return found

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], steps: int) -> None:
        """Take up the `tensors` of a run after so many steps; raises DgemmaError when they are of other parameters."""
        own = {name: tensor for name, tensor in self.tensors().items() if not name.startswith("memory/")}
        wrong = [name for name in own.keys() | {name for name in tensors if not name.startswith("memory/")}
                 if name not in own or name not in tensors or own[name].shape != tensors[name].shape]
        if wrong:
            raise DgemmaError("was made by another model, or with other parameters to train: "
                              f"{min(wrong)} and {len(wrong) - 1} more differ")
        owners = {id(p): optimizer for optimizer in self.all for group in optimizer.param_groups
                  for p in group["params"]}
        memory = [(name.split("/", 2)[1:], tensor) for name, tensor in tensors.items() if name.startswith("memory/")]
        if any((key == "momentum") != isinstance(owners[id(self.masters[of])], Muon) for (key, of), _ in memory):
            raise DgemmaError(f"holds another optimizer's memory than that of {self.settings.kind}")
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
        for (key, of), tensor in memory:
            parameter = self.masters[of]
            # AdamW counts its steps in a number on the CPU.
            owners[id(parameter)].state[parameter][key] = (
                tensor.clone() if key == "step" else tensor.to(parameter.device, copy=True))
        self.steps = steps
        self._load({name: p.detach() for name, p in self.masters.items()})


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
    """Updates matrices [R, C] and stacks of them [E, R, C] (the fused experts), all of one shape in one batch, which is
    what makes it cheap for a small model on a CPU; `torch.optim.Muon` takes matrices only.

    Jordan et al. 2024, "Muon: an optimizer for hidden layers": momentum, then the update is replaced by its nearest
    orthogonal matrix through a Newton-Schulz iteration. ``lr`` is the RMS of an update relative to the weight
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
                directions = orthogonalise(torch.cat(updates)).float().split([len(update) for update in updates])
                scale = max(1.0, rows / columns) ** 0.5
                for (parameter, _), direction in zip(parameters, directions, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(direction.view_as(parameter), alpha=-group["lr"] * scale)
