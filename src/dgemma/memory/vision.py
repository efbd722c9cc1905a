"""What a vision tower takes of memory: its weights, and a pass over pictures.

Works on a tower's shape; `memory.inference` counts it with the network that it belongs to.
"""

from __future__ import annotations

from dataclasses import dataclass

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
        """The bytes it takes with a picture in it when the network is run in ``dtype``, or as stored ("packed")."""
        item = ITEM_SIZES.get(dtype)
        weights = self.nbytes if item is None else self.parameters * item
        return weights + tower_working_bytes(self.config, self.item_size if item is None else item)


def tower_working_bytes(config: VisionConfig, item_size: int, patches: int = MOST_PATCHES) -> int:
    """An estimate of what a pass over ``patches`` (None more than one pack) takes beside weights, at its widest moment.

    N·D·(2e + 20) for N patches (e: bytes per number; pixels and what is normed and rotated are float32), measured with
    the published tower's width, and 3·R·I·e of an MLP, which takes R patches at a time.
    """
    return (patches * config.hidden_size * (2 * item_size + 20)
            + 3 * min(CPU_ROWS, patches) * config.intermediate_size * item_size)
