"""Weights that stay packed: what the network holds in place of a tensor when a checkpoint is quantised."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dgemma.kernels.blocks import BlockType


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A matrix (or a stack of them) in ggml blocks: ``data`` uint8 [..., N, row bytes] stands for [..., N, K].

    ``data`` may be a view of a memory-mapped file; it is only read.
    """

    data: Tensor
    type: BlockType

    @property
    def shape(self) -> torch.Size:
        return torch.Size([*self.data.shape[:-1], self.type.row_width(self.data.shape[-1])])

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def __getitem__(self, rows: int | slice) -> PackedWeight:
        """Rows (of the first axis), without copying."""
        return PackedWeight(self.data[rows], self.type)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The numbers it stands for."""
        from dgemma.kernels.blocks import dequantize

        return dequantize(self.data, self.type).to(dtype)
