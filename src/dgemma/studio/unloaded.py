"""What stands in the place of a model that is not in memory: it says so to whoever asks.

Works on: the protocols of `dgemma.serve.backend`. Knows nothing of: pages.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dgemma.config import ModelConfig
from dgemma.diffusion.request import Request
from dgemma.engine.registry import UnknownAdapterError
from dgemma.engine.service import Overloaded, RequestEvents, Stats, Weights
from dgemma.errors import DgemmaError
from dgemma.serve.backend import ServedModel, Serving

if TYPE_CHECKING:
    from dgemma.model import Prompt
    from dgemma.nn.loaded import LoadedAdapter

_RETRY_AFTER = 10.0  # seconds


class NoModel:
    """A model's tokenizer and settings without its network."""

    pictures = None

    def __init__(self, model: ServedModel, why: str):
        self.name, self.tokenizer, self.generation_config = model.name, model.tokenizer, model.generation_config
        self._config, self.why = model.config, why

    @property
    def config(self) -> ModelConfig:
        return self._config

    def prompt_ids(self, prompt: Prompt, *, thinking: bool = False,
                   tools: list[dict[str, Any]] | None = None) -> list[int]:
        raise refusal(self.why)

    def request(self, prompt: Prompt, *, max_tokens: int | None = None, seed: int | None = None,
                temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
                logit_bias: Mapping[int, float] | None = None, **options: Any) -> Request:
        raise refusal(self.why)


class NoEngine:
    """Answers nothing, and has no adapters."""

    healthy = False

    def __init__(self, why: str):
        self.why = why
        self.adapters = _NoAdapters()

    def start(self) -> None:
        """There is nothing to start."""

    async def stop(self, grace: float = 0.0) -> int:
        return 0

    def stats(self) -> Stats:
        return Stats()

    def weights(self) -> Weights:
        return Weights(0, "F32", 0, on_gpu=False)

    async def admit(self, request: Request) -> RequestEvents:
        raise refusal(self.why)

    def load_adapter(self, name: str, path: str | Path) -> bool:
        raise DgemmaError(self.why)

    def unload_adapter(self, name: str) -> None:
        raise UnknownAdapterError(f"there is no adapter {name!r}")


class _NoAdapters:
    def get(self, name: str) -> LoadedAdapter:
        raise UnknownAdapterError(f"there is no adapter {name!r}")

    def paths(self) -> dict[str, str]:
        return {}


def refusal(why: str) -> Overloaded:
    """The error for whoever asks; over HTTP a 503."""
    return Overloaded(why, _RETRY_AFTER, stopping=True)


def without_model(serving: Serving, why: str) -> Serving:
    """The same server without its model; ``why`` is told to whoever asks."""
    return dataclasses.replace(serving, model=NoModel(serving.model, why), backend=NoEngine(why))
