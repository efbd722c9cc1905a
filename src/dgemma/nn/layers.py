"""The pieces every block is made of: RMSNorm, rotary embedding, gated MLP, self-conditioning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgemma.config import LayerConfig, ModelConfig
from dgemma.gguf.blocks import BlockType
from dgemma.kernels import PackedWeight, linear, rms_norm


class RMSNorm(nn.Module):
    """`rms_norm` with a learned weight [dim], used as it is (no +1)."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """The norm of x [..., dim], added to ``residual`` where there is one."""
        return rms_norm(x, self.weight, self.eps, residual)


def inverse_frequencies(layer: LayerConfig, device: torch.device | None = None) -> Tensor:
    """RoPE's θ^(-2i/head_dim) [head_dim / 2], float32; zero past the rotated fraction of a full layer's head."""
    half = layer.head_dim // 2
    exponent = torch.arange(half, dtype=torch.float32, device=device) * 2 / layer.head_dim
    rotated = torch.arange(half, device=device) < int(layer.rotary_fraction * layer.head_dim // 2)
    return torch.where(rotated, 1.0 / (layer.rope_theta**exponent), 0.0)


def rope_tables(positions: Tensor, layer: LayerConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [B, T, 1, head_dim] for positions [B, T] (halves repeated: the half-split layout)."""
    angles = positions[..., None].float() * inverse_frequencies(layer, positions.device)
    angles = torch.cat([angles, angles], dim=-1).unsqueeze(2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


class Packable(nn.Module):
    """A module whose weights may be packed: it holds their blocks as buffers, under the weights' own names.

    So they move between devices with the module and stand in ``state_dict()``, as uint8 [..., N, row bytes].
    """

    packed: Mapping[str, BlockType] = MappingProxyType({})  # the weights that are, and how

    def pack(self, name: str, weight: PackedWeight) -> None:
        """Put a packed weight in the place of a parameter; nothing is copied."""
        del self._parameters[name]
        self.register_buffer(name, weight.data)
        self.packed = {**self.packed, name: weight.type}

    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)
        return PackedWeight(cast(Tensor, found), self.packed[name]) if name in self.packed else found


def multiplies(name: str, shape: Sequence[int]) -> bool:
    """Whether a parameter is a matrix that inputs are multiplied with, or a stack of them: no table of embeddings."""
    return len(shape) >= 2 and "embed_tokens" not in name and "embedding_table" not in name


class Embedding(Packable, nn.Embedding):
    """A table of a row for every token, which may be packed."""


class Linear(Packable, nn.Linear):
    """A matrix product without bias whose weight [N, K] may be packed.

    ``adapter``, if there is one, adds to what the weight gives (`dgemma.nn.adapters`).
    """

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)
        self.adapter: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        out = linear(x, self.weight)
        return out if self.adapter is None else self.adapter(out, x, self.weight)


class GatedMLP(nn.Module):
    """down(gelu(gate(x)) · up(x)), gelu in its tanh form."""

    def __init__(self, hidden: int, inner: int):
        super().__init__()
        self.gate_proj = Linear(hidden, inner)
        self.up_proj = Linear(hidden, inner)
        self.down_proj = Linear(inner, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


class SelfConditioning(GatedMLP):
    """Mixes the previous step's soft embeddings into the canvas' embeddings, at every step, zeros included."""

    def __init__(self, config: ModelConfig):
        super().__init__(config.hidden_size, config.intermediate_size)
        self.eps = config.rms_norm_eps
        self.pre_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, embeddings: Tensor, soft: Tensor) -> Tensor:  # type: ignore[override]
        """embeddings and soft [B, C, D] -> [B, C, D]."""
        return rms_norm(embeddings + super().forward(self.pre_norm(soft)), None, self.eps)
