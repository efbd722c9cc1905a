"""Low-rank adapters on a frozen network: LoRA (Hu et al. 2021) and DoRA (Liu et al. 2024), on its matrices and experts.

Works on the network's `Linear`s and `Experts`, whose weights may be plain or packed and are never changed but by
`merge`. Both passes of the network use the same modules, so they share one adapter. Knows nothing of files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dgemma import seeds
from dgemma.errors import DgemmaError
from dgemma.kernels import PackedWeight, Weight, linear
from dgemma.kernels.experts import DENSE_EXPERTS, mix_experts
from dgemma.kernels.products import pieces
from dgemma.nn.block import Experts, Router
from dgemma.nn.layers import Linear
from dgemma.nn.transformer import DiffusionTransformer

Number = TypeVar("Number", int, float)

# What `AdapterConfig.targets` may say for several matrices at once: an expression of their names. "vision" is the
# tower's attention and what takes it to the text network; the others are the text network's.
GROUPS = {name: re.compile(expression) for name, expression in {
    "attention": r"(?!vision\.).*\bself_attn\..*", "mlp": r"(?!vision\.).*\bmlp\..*",
    "self_conditioning": r"(.*\.)?self_conditioning\..*", "experts": r".*\bexperts\..*",
    "vision": r"vision\.(embed_vision\.|.*\.self_attn\.).*", "embed_vision": r"vision\.embed_vision\..*"}.items()}


@dataclass(frozen=True)
class AdapterConfig:
    """What is adapted, and how: W becomes W + s·B·A with A [r, K], B [N, r] and s = alpha / r (``rslora``: / √r).

    ``targets`` are keys of `GROUPS`, or the last parts of matrices' names ("q_proj", "mlp.down_proj",
    "layers.3.self_attn.o_proj", "experts.gate_up_proj"). ``dora`` learns the length of every row of the sum, too.
    ``dropout`` is of what A reads, while training. ``rank_pattern`` and ``alpha_pattern`` hold other ranks and alphas
    for names that end in a match of their key, a regular expression; the first that matches counts.
    Raises DgemmaError for numbers that make no sense.
    """

    r: int = 16
    alpha: float = 32
    targets: tuple[str, ...] = ("attention", "mlp")
    dora: bool = False
    rslora: bool = False
    dropout: float = 0.0
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for rank in (self.r, *self.rank_pattern.values()):
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
                raise DgemmaError(f"an adapter's rank r must be a whole number from 1, got {rank!r}")
        for alpha in (self.alpha, *self.alpha_pattern.values()):
            if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
                raise DgemmaError(f"an adapter's alpha must be a number, got {alpha!r}")
        if not 0 <= self.dropout < 1:
            raise DgemmaError(f"an adapter's dropout must be at least 0 and less than 1, got {self.dropout!r}")
        if isinstance(self.targets, str) or not self.targets:
            raise DgemmaError(f"an adapter's targets must be a list of names, got {self.targets!r}")

    def rank_of(self, name: str) -> int:
        return _pattern_value(self.rank_pattern, name, self.r)

    def alpha_of(self, name: str) -> float:
        return _pattern_value(self.alpha_pattern, name, self.alpha)

    def scale_of(self, name: str) -> float:
        rank = self.rank_of(name)
        return self.alpha_of(name) / (rank**0.5 if self.rslora else rank)

    def names(self, adaptable: Iterable[str]) -> list[str]:
        """Which of the ``adaptable`` names are targeted; raises DgemmaError for a target that is none of them."""
        adaptable = list(adaptable)
        chosen: set[str] = set()
        for target in self.targets:
            found = {name for name in adaptable if (GROUPS[target].fullmatch(name) if target in GROUPS
                                                    else f".{name}".endswith(f".{target}"))}
            if not found and target in ("vision", "embed_vision"):
                raise DgemmaError(f"there is no {target!r} to adapt here: the tower is there where the model has one "
                                  "and there are pictures in the conversations")
            if not found:
                raise DgemmaError(f"there is nothing called {target!r} to adapt in this network; targets are "
                                  f"{', '.join(GROUPS)}, or names such as {', '.join(adaptable[:3])}")
            chosen |= found
        return [name for name in adaptable if name in chosen]


def _pattern_value(patterns: Mapping[str, Number], name: str, default: Number) -> Number:
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), default)


def adaptable(network: DiffusionTransformer) -> dict[str, tuple[nn.Module, str]]:
    """Name -> the module and the attribute of every matrix, or stack of them, that may have an adapter."""
    found: dict[str, tuple[nn.Module, str]] = {}
    routers = {id(module.proj) for module in network.modules() if isinstance(module, Router)}
    for name, module in network.named_modules():
        if isinstance(module, Linear) and id(module) not in routers:
            found[name] = (module, "weight")
        elif isinstance(module, Experts):
            found |= {f"{name}.{part}": (module, part) for part in ("gate_up_proj", "down_proj")}
    return found


def attach(network: DiffusionTransformer, config: AdapterConfig, seed: int = 0) -> None:
    """Give the network adapters that change nothing yet (B is zero), and freeze everything else.

    ``seed`` draws A. Raises DgemmaError when the network has adapters already or a target is not in it.
    """
    if adapters(network):
        raise DgemmaError("this network has an adapter already: detach or merge it first")
    places = adaptable(network)
    names = config.names(places)
    generator = seeds.generator(seed)
    network.requires_grad_(False)
    with torch.inference_mode(False):  # tensors made within it could never be trained
        for name in names:
            module, attribute = places[name]
            adapter = LowRank(getattr(module, attribute), config, name, generator)
            if isinstance(module, Experts):
                module.adapter = module.adapter or ExpertAdapter()
                setattr(module.adapter, attribute, adapter)
            else:
                module.adapter = adapter
            module.train(module.training)  # the adapter too


def adapters(network: DiffusionTransformer) -> dict[str, LowRank]:
    """Name of the matrix -> its adapter; empty when the network has none."""
    found = {}
    for name, (module, attribute) in adaptable(network).items():
        adapter = getattr(module.adapter, attribute) if isinstance(module.adapter, ExpertAdapter) else module.adapter
        if isinstance(adapter, LowRank):
            found[name] = adapter
    return found


def adapter_parameters(network: DiffusionTransformer) -> dict[str, nn.Parameter]:
    """Every adapter's parameters, float32, under names such as ``layers.0.self_attn.q_proj.a``."""
    return {f"{name}.{key}": parameter for name, adapter in adapters(network).items()
            for key, parameter in adapter.named_parameters()}


@torch.no_grad()
def install(network: DiffusionTransformer, config: AdapterConfig, factors: Mapping[str, Factors]) -> None:
    """Give the network an adapter whose numbers are known already, in place of the one that it may have.

    ``factors`` are those of every name that ``config`` targets. Where the adapter that is there has the same shapes,
    its parameters stay and take the numbers: an optimizer keeps hold of them.
    """
    def shapes(known: Mapping[str, Factors]) -> dict[str, tuple[torch.Size | None, ...]]:
        return {name: (f.a.shape, f.b.shape, None if f.magnitude is None else f.magnitude.shape)
                for name, f in known.items()}

    if shapes({name: adapter.factors for name, adapter in adapters(network).items()}) != shapes(factors):
        detach(network)
        attach(network, config)
    for name, adapter in adapters(network).items():
        adapter.scale, adapter.dropout = factors[name].scale, config.dropout
        for key, parameter in adapter.named_parameters():
            parameter.copy_(getattr(factors[name], key))
        adapter.forget()


def detach(network: DiffusionTransformer) -> None:
    """Take the adapters away; the network is what it was before, and frozen."""
    for module, _ in adaptable(network).values():
        module.adapter = None  # type: ignore[assignment]


@torch.no_grad()
def merge(network: DiffusionTransformer) -> None:
    """Add the adapters to the weights, rounded to the weights' dtype, and take them away.

    Raises DgemmaError, and changes nothing, when one is on a packed weight.
    """
    places, found = adaptable(network), adapters(network)
    weights = {name: getattr(*places[name]) for name in found}
    if packed := [name for name, weight in weights.items() if isinstance(weight, PackedWeight)]:
        raise DgemmaError(f"{packed[0]} is packed, and an adapter cannot be merged into packed weights in place: "
                          "`dgemma merge` writes a file of the merged weights")
    for name, weight in weights.items():
        flat = weight.view(-1, weight.shape[-1])
        for rows, numbers in pieces(flat):
            flat[rows] = found[name].factors.merged_rows(numbers, rows.start).to(weight.dtype)
    detach(network)


@torch.no_grad()
def _row_lengths(weight: Weight, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """‖w + s·(B·A)‖ of every row [N], a few rows of weight [N, K] at a time."""
    return torch.cat([torch.addmm(numbers, b[rows], a, alpha=scale).norm(dim=1) for rows, numbers in pieces(weight)])


@dataclass(frozen=True)
class Factors:
    """What an adapter adds to a matrix [N, K], or to a stack of them [E, N, K]: s·B·A, and DoRA's magnitude.

    a [r, K] or [E, r, K]; b [N, r] or [E, N, r]; magnitude [N] or [E, N], None without DoRA.
    """

    a: Tensor
    b: Tensor
    magnitude: Tensor | None
    scale: float

    def merged_rows(self, numbers: Tensor, start: int) -> Tensor:
        """Rows of the weight (of a stack: one matrix after the other) from ``start`` on, float32 [n, K], adapted."""
        height = self.b.shape[-2]
        a, b = self.a.view(-1, *self.a.shape[-2:]), self.b.view(-1, *self.b.shape[-2:])
        magnitude = None if self.magnitude is None else self.magnitude.view(-1, height)
        merged = []
        while len(numbers):
            matrix, first = divmod(start, height)
            count = min(height - first, len(numbers))
            rows = slice(first, first + count)
            out = torch.addmm(numbers[:count], b[matrix][rows], a[matrix], alpha=self.scale)
            if magnitude is not None:
                out *= (magnitude[matrix][rows] / out.norm(dim=1)).unsqueeze(1)
            merged.append(out)
            numbers, start = numbers[count:], start + count
        return torch.cat(merged)


class LowRank(nn.Module):
    """One matrix' adapter, a [r, K] and b [N, r], or a stack's, a [E, r, K] and b [E, N, r], all float32.

    With DoRA the adapted matrix is m · (W + s·B·A) / ‖W + s·B·A‖, row by row, magnitude m [N] or [E, N] learned; the
    length is held constant in gradients (the paper's section 4.3).
    """

    def __init__(self, weight: Weight, config: AdapterConfig, name: str, generator: torch.Generator):
        super().__init__()
        *stack, outputs, inputs = weight.shape
        rank, device = config.rank_of(name), weight.device
        self.scale, self.dropout = config.scale_of(name), config.dropout
        bound = inputs**-0.5  # as `nn.Linear` draws its weights
        drawn = torch.empty(*stack, rank, inputs, device="cpu").uniform_(-bound, bound, generator=generator)
        self.a = nn.Parameter(drawn.to(device))
        self.b = nn.Parameter(torch.zeros(*stack, outputs, rank, device=device))
        self.magnitude: nn.Parameter | None = None
        self._lengths: dict[int | None, tuple[Any, Tensor]] = {}
        if config.dora:
            lengths = torch.stack([self._length(weight[e], e) for e in range(stack[0])]) if stack else (
                self._length(weight, None))
            self.magnitude = nn.Parameter(lengths)

    @property
    def factors(self) -> Factors:
        """The numbers, sharing the parameters' memory, without their gradients."""
        magnitude = None if self.magnitude is None else self.magnitude.detach()
        return Factors(self.a.detach(), self.b.detach(), magnitude, self.scale)

    def forward(self, out: Tensor, x: Tensor, weight: Weight) -> Tensor:
        """What x [..., K] gives with the adapted matrix, ``out`` [..., N] being what it gives with weight [N, K]."""
        return self.adapted(out, self.dropped(x), weight, self.a, self.b, None)

    def adapted(self, out: Tensor, x: Tensor, weight: Weight, a: Tensor, b: Tensor, expert: int | None) -> Tensor:
        """`forward` with x dropped already and one matrix' a and b; ``expert`` says which of a stack."""
        if self.magnitude is None:
            return _LowRankSum.apply(out, x, a, b, self.scale)  # type: ignore[return-value]
        changed = out.float() + F.linear(F.linear(x.float(), a) * self.scale, b)
        return (changed * self.gain(weight, expert)).to(out.dtype)

    def dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout) if self.training and self.dropout else x

    def gain(self, weight: Weight, expert: int | None) -> Tensor:
        """DoRA's factor of every output [N] of one matrix [N, K]."""
        assert self.magnitude is not None
        magnitude = self.magnitude if expert is None else self.magnitude[expert]
        return magnitude / self._length(weight, expert)

    def forget(self) -> None:
        """Let go of what is remembered of the factors; for who changes them behind autograd's back, or the scale."""
        self._lengths.clear()

    def _length(self, weight: Weight, expert: int | None) -> Tensor:
        """The rows' lengths; kept as long as nobody trains and A, B and the matrix stay what they are."""
        a, b = (self.a, self.b) if expert is None else (self.a[expert], self.b[expert])
        if torch.is_grad_enabled():
            self._lengths.clear()
            return _row_lengths(weight, a, b, self.scale)
        matrix = weight.data if isinstance(weight, PackedWeight) else weight
        state = (*map(_state, (self.a, self.b, matrix)), self.scale)
        if expert not in self._lengths or self._lengths[expert][0] != state:
            self._lengths[expert] = (state, _row_lengths(weight, a, b, self.scale))
        return self._lengths[expert][1]


def _state(tensor: Tensor) -> tuple[int, int | None]:
    """Where a tensor is, and how often autograd has seen it change (which nobody counts of some)."""
    return tensor.data_ptr(), None if tensor.is_inference() else tensor._version


class _LowRankSum(torch.autograd.Function):
    """out + s · x·Aᵀ·Bᵀ in float32, in out's dtype: out [..., N], x [..., K], a [r, K], b [N, r].

    What is kept for the way back is x as it came, which all matrices that read it share, and x·Aᵀ.
    """

    @staticmethod
    def forward(ctx: Any, out: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            low = F.linear(x.float(), a) * scale
            ctx.scale = scale
            ctx.save_for_backward(x, low, a, b)
            return (out.float() + F.linear(low, b)).to(out.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, low, a, b = ctx.saved_tensors
        gradient = gradients[0].reshape(-1, b.shape[0]).float()
        of_low = (gradient @ b).mul_(ctx.scale)
        of_x = (of_low @ a).to(x.dtype).view(x.shape) if ctx.needs_input_grad[1] else None
        return (gradients[0], of_x, of_low.mT @ x.reshape(-1, x.shape[-1]).float(),
                gradient.mT @ low.reshape(-1, low.shape[-1]), None)


class ExpertAdapter(nn.Module):
    """The adapters of a layer's experts; takes the place of `expert_mlp`, by the same two ways."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj: LowRank | None = None
        self.down_proj: LowRank | None = None

    def forward(self, x: Tensor, gate_up: Weight, down: Weight, weights: Tensor, experts: Tensor) -> Tensor:
        """As `kernels.expert_mlp`."""
        if isinstance(gate_up, Tensor) and isinstance(down, Tensor) and gate_up.shape[0] <= DENSE_EXPERTS:
            return self._dense(x, gate_up, down, weights, experts)
        first, second = _product(self.gate_up_proj, gate_up), _product(self.down_proj, down)

        def run(rows: Tensor, expert: int) -> Tensor:
            gate, up = first(rows, expert).chunk(2, dim=-1)
            return second(F.gelu(gate, approximate="tanh") * up, expert)

        return mix_experts(x, gate_up.shape[0], run, weights, experts)

    def _dense(self, x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """Every token through every expert, as `dense_expert_mlp` and in the same order of sums."""
        count, doubled, hidden = gate_up.shape
        gates = torch.zeros(x.shape[0], count, dtype=weights.dtype, device=x.device).scatter(1, experts, weights)
        halves = [(x @ half.reshape(-1, hidden).T).view(-1, count, doubled // 2) for half in gate_up.chunk(2, dim=1)]
        if self.gate_up_proj is not None:
            both = torch.cat(halves, dim=-1)
            every = self.gate_up_proj.dropped(x).unsqueeze(1).expand(-1, count, -1)
            halves = list(_adapted_all(self.gate_up_proj, both, every, gate_up).chunk(2, dim=-1))
        gate, up = (half.flatten(1) for half in halves)  # in one row, for gelu rounds by how its input lies in memory
        inner = (F.gelu(gate, approximate="tanh") * up).view(-1, count, doubled // 2)
        inner = inner * gates.unsqueeze(-1).to(x.dtype)
        out = inner.flatten(1) @ down.transpose(1, 2).reshape(-1, hidden)
        # What the adapter changes is added to the experts' sum: nothing, exactly, as long as B is zero.
        if self.down_proj is None:
            return out
        if self.down_proj.magnitude is None:
            low = torch.einsum("nei,eri->ner", self.down_proj.dropped(inner).float(), self.down_proj.a)
            low = low * self.down_proj.scale
            return (out.float() + torch.einsum("ner,edr->nd", low, self.down_proj.b)).to(x.dtype)
        apart = torch.einsum("nei,edi->ned", inner, down)
        changed = _adapted_all(self.down_proj, apart, self.down_proj.dropped(inner), down)
        return (out.float() + (changed.float() - apart.float()).sum(1)).to(x.dtype)


def _product(adapter: LowRank | None, weight: Weight) -> Callable[[Tensor, int], Tensor]:
    """The function (rows [R, K], expert) -> [R, N] of a stack of matrices and the adapter on it."""
    if adapter is None:
        return lambda rows, expert: linear(rows, weight[expert])
    # Taken apart once: the gradient of an index is as large as the whole stack, for every expert.
    a, b = adapter.a.unbind(), adapter.b.unbind()
    return lambda rows, expert: adapter.adapted(linear(rows, weight[expert]), adapter.dropped(rows), weight[expert],
                                                a[expert], b[expert], expert)


def _adapted_all(adapter: LowRank, out: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """`LowRank.adapted` of all experts at once: out [M, E, N], x [M, E, K], weight [E, N, K] -> [M, E, N]."""
    low = torch.einsum("mek,erk->mer", x.float(), adapter.a) * adapter.scale
    changed = out.float() + torch.einsum("mer,enr->men", low, adapter.b)
    if adapter.magnitude is not None:
        changed = changed * torch.stack([adapter.gain(weight[e], e) for e in range(len(weight))])
    return changed.to(out.dtype)
