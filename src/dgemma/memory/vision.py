"""What a vision tower takes of memory: its weights, and a pass over pictures.

Works on a tower's shape; `memory.inference` counts it with the network that it belongs to.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from dgemma.config import VisionConfig
from dgemma.nn.vision import CPU_ROWS, MOST_PATCHES

ITEM_SIZES = {"bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class TowerSize:
    """A vision tower in numbers: ``nbytes`` as it is stored, ``item_size`` those of a number that it computes then."""

    config: VisionConfig
    parameters: int
    nbytes: int
    item_size: int

    def needed(self, dtype: str) -> int:
        """The bytes it takes with a picture in it when the network is run in ``dtype``, or as stored ("packed").

        What is run as stored is run on a CPU; else it may be a GPU, which takes more patches at a time.
        """
        item = ITEM_SIZES.get(dtype)
        if item is None:
            return self.nbytes + self.working("cpu")
        return self.parameters * item + replace(self, item_size=item).working("cuda")

    def working(self, device: torch.device | str) -> int:
        """What a pass over pictures takes beside its weights on such a device; one runs at a time."""
        tile = CPU_ROWS if torch.device(device).type == "cpu" else MOST_PATCHES
        return tower_working_bytes(self.config, self.item_size, tile=tile)


def tower_working_bytes(config: VisionConfig, item_size: int, patches: int = MOST_PATCHES, tile: int = CPU_ROWS) -> int:
    """An estimate of what a pass over ``patches`` (none more than one pack) takes beside weights, at its widest moment.

    Of all N patches: N·(D·(6e + 4) + 8·3p²), what a block takes and gives, keys and values among it, and the pixels
    twice in float32. Of a tile's R: R·(3·I·e + 10·D), an MLP and what is normed in float32 (e: bytes per number).
    Measured with two layers of the published tower's width.
    """
    rows = min(tile, patches)
    return (patches * (config.hidden_size * (6 * item_size + 4) + 8 * 3 * config.patch_size**2)
            + rows * (3 * config.intermediate_size * item_size + 10 * config.hidden_size))


def tower_kept_bytes(config: VisionConfig, item_size: int, patches: int) -> int:
    """An estimate of what a pass keeps for its gradients: of every patch and block 12·D + 4·I numbers (what products
    and norms read, queries, keys and values)."""
    numbers = config.num_hidden_layers * (12 * config.hidden_size + 4 * config.intermediate_size)
    return patches * numbers * item_size
