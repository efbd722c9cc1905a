"""Putting weights into a network, packed ones too (`dgemma.nn.layers.Packable`), and which are there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from dgemma.kernels import PackedWeight
from dgemma.nn.layers import Packable


def set_weights(network: nn.Module, weights: Mapping[str, Tensor | PackedWeight]) -> None:
    """Give a network all its weights, by the names of its ``state_dict()``, without copying them.

    Raises ValueError when a packed weight is not of the shape of the parameter it stands for, RuntimeError (as
    ``load_state_dict`` does) when a name is missing or unknown.
    """
    expected = dict(network.named_parameters())
    if unknown := {name for name, weight in weights.items() if not isinstance(weight, Tensor)} - expected.keys():
        raise RuntimeError(f"there is no {', '.join(sorted(unknown))} in this network, or it is packed already")
    for name, weight in weights.items():
        if isinstance(weight, Tensor):
            continue
        if weight.shape != expected[name].shape:
            raise ValueError(f"{name}: expected {list(expected[name].shape)}, got packed {list(weight.shape)}")
        owner, _, attribute = name.rpartition(".")
        module = network.get_submodule(owner)
        if not isinstance(module, Packable):
            raise ValueError(f"{name} cannot be packed")
        module.pack(attribute, weight)
    network.load_state_dict({name: weight if isinstance(weight, Tensor) else weight.data
                             for name, weight in weights.items()}, assign=True)


def all_packed(network: nn.Module) -> Iterator[PackedWeight]:
    """Every packed weight of a network."""
    return (getattr(module, name) for module in network.modules() if isinstance(module, Packable)
            for name in module.packed)


def packed_bytes(network: nn.Module) -> int:
    """The bytes of a network's packed weights: 0 when it has none."""
    return sum(weight.nbytes for weight in all_packed(network))


def weight_bytes(network: nn.Module) -> Counter[str]:
    """The bytes of a network's weights by type, as GGUF calls them: F32, BF16, Q4_K, …"""
    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    found: Counter[str] = Counter()
    for parameter in network.parameters():
        found[names.get(parameter.dtype, str(parameter.dtype))] += parameter.nbytes
    for weight in all_packed(network):
        found[weight.type.name] += weight.nbytes
    return found
