"""The network's two passes as something that can be handed in: whole, compiled, watched, or a test's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from dgemma.cache import Cache
from dgemma.nn.transformer import DiffusionTransformer


class Encode(Protocol):
    """As `DiffusionTransformer.encode`."""

    def __call__(self, inputs: Tensor, cache: Cache, *args, **kwargs) -> Tensor: ...


class Denoise(Protocol):
    """As `DiffusionTransformer.denoise`."""

    def __call__(self, canvas_ids: Tensor, cache: Cache, soft: Tensor | None = None) -> Tensor: ...


@dataclass(frozen=True)
class Passes:
    """What reads and what denoises. Nobody puts another pass on a network: he hands these in."""

    encode: Encode
    denoise: Denoise

    @classmethod
    def of(cls, network: DiffusionTransformer) -> Passes:
        return cls(network.encode, network.denoise)
