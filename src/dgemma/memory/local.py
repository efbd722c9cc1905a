"""About how much memory a model on this machine needs, by the size of its files. Reads no tensor and needs no torch.

`dgemma.inspect` counts it exactly, from the files' headers.
"""

from __future__ import annotations

from dgemma.config import load_model_config
from dgemma.errors import CheckpointError
from dgemma.memory.machine import model_bytes
from dgemma.weights.hub.cache import GGUF, LocalModel

USUAL_VOCABULARY = 262_144  # tokens: the 26B model's


def memory_needed(model: LocalModel) -> int | None:
    """About how many bytes of memory running a model takes; None while nobody knows how large it is."""
    if model.full_size is None:
        return None
    return model_bytes(model.full_size, model.kind == GGUF, _vocabulary(model))


def fits(needed: int | None, available: int | None, total: int | None) -> str:
    """Whether so many bytes fit a machine's memory: yes, no, if other programs close; ? where nobody knows."""
    if needed is None or available is None or total is None:
        return "?"
    if needed <= available:
        return "yes"
    return "if other programs close" if needed <= total else "no"


def _vocabulary(model: LocalModel) -> int:
    """How many tokens a model knows; the usual number where only a long look into its files would tell."""
    if model.kind == GGUF:
        return USUAL_VOCABULARY
    try:
        return load_model_config(model.path).vocab_size
    except CheckpointError:  # it is there in part only, or not to be loaded anyway
        return USUAL_VOCABULARY
