"""What a network would compute, in a few bytes: keys and values are only good for the network that made them.

Works on a network's modules and tensors; knows nothing of requests.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgemma.nn import DiffusionTransformer

WHOLE = 16 << 20  # bytes of plain weights up to which every number of them counts
SAMPLES = 16  # numbers of each tensor that count beyond


def fingerprint(network: DiffusionTransformer, whole: int = WHOLE) -> bytes:
    """Another one as soon as the network's weights, adapters or what it keeps keys and values in have changed.

    It sees which modules and tensors there are, where their memory is, how often autograd saw them change, and numbers
    of them: all of a network of up to ``whole`` bytes, `SAMPLES` of each tensor of a larger one. So it misses only what
    changes few numbers of a large network behind autograd's back (``weight.data[0, 0] = 1``, numpy): who does that says
    ``model.prefixes.clear()``. An adapter that takes turns with others on the network must not be on it meanwhile.
    """
    marks: list[Any] = [network.cache_type]
    plain: list[Tensor] = []
    for module in network.modules():
        marks.append((type(module), tuple(module._forward_hooks), tuple(module._forward_pre_hooks)))
        for name, value in _parts(module):
            if isinstance(value, float):
                marks.append((name, value))
                continue
            tensor = _local(value)
            marks.append((name, tensor.data_ptr(), tensor._version if not tensor.is_inference() else None,
                          tensor.dtype, tuple(tensor.shape), tensor.stride()))
            if name not in getattr(module, "packed", ()):  # of a mapped file, each number would be a read of the disk
                plain.append(tensor)
    return hashlib.blake2b(repr([marks, _sums(plain, whole)]).encode(), digest_size=16).digest()


def _parts(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """A module's own tensors and settings."""
    for tensors in (module._parameters, module._buffers):
        yield from ((name, tensor) for name, tensor in tensors.items() if tensor is not None)
    yield from ((name, value) for name, value in vars(module).items() if isinstance(value, float))


def _local(tensor: Tensor) -> Tensor:
    """What of a tensor is in this process: a sharded one's part."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[attr-defined]


@torch.no_grad()
def _sums(tensors: list[Tensor], most: int) -> list[list[int]]:
    """Two sums over the numbers that count, as their bytes are, for each device and type.

    In the second each word stands with an odd factor of its own, modulo 2^64: no change of one goes unnoticed.
    """
    whole = sum(tensor.nbytes for tensor in tensors) <= most
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        if tensor.device.type != "meta" and tensor.numel():
            groups.setdefault((tensor.device, tensor.dtype), []).append(_chosen(tensor.detach(), whole))
    sums = []
    for chosen in groups.values():
        numbers = torch.cat(chosen).view(torch.uint8)
        words = F.pad(numbers, (0, -len(numbers) % 8)).view(torch.int64)
        factors = torch.arange(1, 2 * len(words), 2, device=words.device)
        sums.append(torch.stack([words.sum(), words.mul(factors).sum()]).tolist())
    return sums


def _chosen(tensor: Tensor, whole: bool) -> Tensor:
    """Numbers of a tensor, spread over its rows and columns."""
    if whole or tensor.numel() <= SAMPLES:
        return tensor.reshape(-1)
    if not tensor.is_contiguous():
        return tensor[tuple(slice(None, None, max(size // 2, 1)) for size in tensor.shape)].reshape(-1)
    step = tensor.numel() // SAMPLES
    return tensor.view(-1)[:: step | 1]  # an even one would often stay in one column
