"""dgemma: run, watch and train DiffusionGemma, a language model that writes by denoising a whole canvas of text.

    import dgemma
    model = dgemma.load("sudoku")
    print(model.generate("53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79").text)

Nothing heavy is imported until it is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dgemma.openmp import wait_passively

if TYPE_CHECKING:
    from dgemma.config import GenerationConfig, ModelConfig
    from dgemma.diffusion.events import CanvasCommitted, CanvasStarted, Denoised, Finished, Generation
    from dgemma.errors import CheckpointError, DgemmaError
    from dgemma.model import Model, load

wait_passively()  # OpenMP reads its settings once, when torch is loaded: before anything here does that

__version__ = "0.1.0"

_HOMES = {
    "load": "model", "Model": "model",
    "GenerationConfig": "config", "ModelConfig": "config",
    "CanvasStarted": "diffusion.events", "Denoised": "diffusion.events", "CanvasCommitted": "diffusion.events",
    "Finished": "diffusion.events", "Generation": "diffusion.events",
    "CheckpointError": "errors", "DgemmaError": "errors",
}

__all__ = ["CanvasCommitted", "CanvasStarted", "CheckpointError", "Denoised", "DgemmaError", "Finished", "Generation",
           "GenerationConfig", "Model", "ModelConfig", "load"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dgemma' has no attribute {name!r}")
    return getattr(import_module(f"dgemma.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
