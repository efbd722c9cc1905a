"""The network's two passes as something that can be handed in: whole, compiled, watched, or a test's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from dgemma.nn.transformer import DiffusionTransformer


@dataclass(frozen=True)
class Passes:
    """What reads and what denoises. Whoever compiles, shards or watches these hands in his own around them."""

    encode: Callable[..., Tensor]  # as `DiffusionTransformer.encode`
    denoise: Callable[..., Tensor]  # as `DiffusionTransformer.denoise`

    @classmethod
    def of(cls, network: DiffusionTransformer) -> Passes:
        """The network's own."""
        return cls(network.encode, network.denoise)
