"""The network's passes as something that can be handed in: whole, compiled, watched, or a test's own."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from dgemma.nn.transformer import DiffusionTransformer


class Patched(Protocol):
    """A picture ready for the tower: patches [rows, columns, 3p²]."""

    def patches(self) -> Tensor: ...


@dataclass(frozen=True)
class Passes:
    """What sees, what reads and what denoises. Whoever compiles, shards or watches these hands in his own around them.

    ``checkpointed`` are the layers to run again for their gradients (activation checkpointing): what is kept for these
    is a layer's input only. The cache of a pass says so to the network (`KVCache`). ``see`` gives the soft tokens
    [n, D] of each picture; None where there are no pictures.
    """

    encode: Callable[..., Tensor]  # as `DiffusionTransformer.encode`
    denoise: Callable[..., Tensor]  # as `DiffusionTransformer.denoise`
    checkpointed: Collection[int] = ()
    see: Callable[[Sequence[Patched]], list[Tensor]] | None = None

    @classmethod
    def of(cls, network: DiffusionTransformer, checkpointing: bool = False) -> Passes:
        """The network's own; with ``checkpointing``, of all layers."""
        vision = network.vision

        def see(pictures: Sequence[Patched]) -> list[Tensor]:
            assert vision is not None
            return vision([picture.patches() for picture in pictures])

        return cls(network.encode, network.denoise, range(len(network.layers)) if checkpointing else (),
                   None if vision is None else see)
