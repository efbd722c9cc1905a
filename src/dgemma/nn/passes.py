"""The network's two passes as something that can be handed in: whole, compiled, watched, or a test's own."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from torch import Tensor

from dgemma.nn.transformer import DiffusionTransformer


@dataclass(frozen=True)
class Passes:
    """What reads and what denoises. Whoever compiles, shards or watches these hands in his own around them.

    ``checkpointed`` are the layers to run again for their gradients (activation checkpointing): what is kept for these
    is a layer's input only. The cache of a pass says so to the network (`KVCache`).
    """

    encode: Callable[..., Tensor]  # as `DiffusionTransformer.encode`
    denoise: Callable[..., Tensor]  # as `DiffusionTransformer.denoise`
    checkpointed: Collection[int] = ()

    @classmethod
    def of(cls, network: DiffusionTransformer, checkpointing: bool = False) -> Passes:
        """The network's own; with ``checkpointing``, of all layers."""
        return cls(network.encode, network.denoise, range(len(network.layers)) if checkpointing else ())
