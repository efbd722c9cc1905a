"""Adapters that take turns on one network: activating one points the network's modules at its numbers.

No weight changes and nothing is copied, so a turn costs less than a microsecond a matrix. Works on modules; knows
nothing of files or requests.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from dgemma import seeds
from dgemma.nn.adapters import AdapterConfig, ExpertAdapter, Factors, LowRank
from dgemma.nn.block import Experts

# Name -> the module and the attribute of every matrix that may have an adapter, as `adapters.adaptable` gives them.
Places = Mapping[str, tuple[nn.Module, str]]


@dataclass(frozen=True, eq=False)  # one is itself: another of the same name has other numbers
class LoadedAdapter:
    """An adapter with a name, ready to be put on the network that it was made for."""

    name: str
    parts: Mapping[nn.Module, nn.Module | None]  # every adaptable module of the network and what this puts there
    nbytes: int

    def activate(self) -> None:
        """Make the network compute with this adapter and no other."""
        for module, part in self.parts.items():
            module.adapter = part  # type: ignore[assignment]

    def deactivate(self) -> None:
        """Make the network compute without any adapter."""
        for module in self.parts:
            module.adapter = None  # type: ignore[assignment]


def loadable(name: str, places: Places, config: AdapterConfig, factors: Mapping[str, Factors]) -> LoadedAdapter:
    """The adapter of these factors for the network of these places, which may be working meanwhile."""
    parts: dict[nn.Module, nn.Module | None] = {module: None for module, _ in places.values()}
    plain = replace(config, dora=False)  # the magnitudes are known: no lengths of rows are needed
    generator = seeds.generator(0)
    # In inference mode nobody counts a tensor's versions, which DoRA's lengths are kept by.
    with torch.inference_mode(False), torch.no_grad():
        for place, known in factors.items():
            module, attribute = places[place]
            adapter = LowRank(getattr(module, attribute), plain, place, generator)
            adapter.scale = known.scale
            adapter.a.copy_(known.a)
            adapter.b.copy_(known.b)
            if known.magnitude is not None:
                adapter.magnitude = nn.Parameter(known.magnitude.to(adapter.b.device, copy=True))
            if isinstance(module, Experts):
                both = parts[module] = parts[module] or ExpertAdapter()
                setattr(both, attribute, adapter)
            else:
                parts[module] = adapter
    for part in filter(None, parts.values()):
        part.requires_grad_(False).eval()
    return LoadedAdapter(name, parts, adapter_bytes(factors))


def adapter_bytes(factors: Mapping[str, Factors]) -> int:
    """The memory of a loaded adapter: its numbers in float32, and DoRA's lengths, which the first pass works out."""
    return 4 * sum(known.a.numel() + known.b.numel() + (0 if known.magnitude is None else 2 * known.magnitude.numel())
                   for known in factors.values())
