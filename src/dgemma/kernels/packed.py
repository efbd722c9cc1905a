"""Weights that stay packed: what the network holds in place of a tensor when a checkpoint is quantised."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dgemma.gguf.blocks import BlockType, dequantize

_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


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
    def dtype(self) -> torch.dtype:
        """What its products are computed in."""
        return torch.float32

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def __len__(self) -> int:
        return self.data.shape[0]

    def __getitem__(self, rows: int | slice | Tensor) -> PackedWeight:
        """Rows of the first axis; without copying unless they are given by index."""
        return PackedWeight(self.data[rows], self.type)

    def plain(self) -> Tensor | None:
        """The same memory as a tensor of numbers, for the types that are just that (F32, F16, BF16)."""
        dtype = _PLAIN.get(self.type.name)
        if dtype is None:
            return None
        aligned = self.data.storage_offset() % dtype.itemsize == 0
        return self.data.view(dtype) if aligned else self.dequantize(dtype)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The numbers it stands for, bit for bit (before they are rounded to ``dtype``)."""
        return dequantize(self.data, self.type, dtype)
