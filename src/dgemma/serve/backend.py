"""What the routes stand on: a model that makes requests, and a backend that answers them, both as protocols.

`dgemma.model.Model` and `dgemma.engine.service.Service` are those of a single process. Knows nothing of: the formats.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dgemma.chat.tokenizer import Tokenizer
from dgemma.config import GenerationConfig, ModelConfig
from dgemma.diffusion.request import Request, longest_prompt
from dgemma.engine.registry import UnknownAdapterError
from dgemma.engine.service import RequestEvents, Stats, Weights
from dgemma.serve.errors import ApiError
from dgemma.serve.metrics import Metrics
from dgemma.serve.settings import Settings

if TYPE_CHECKING:
    from dgemma.model import Prompt
    from dgemma.nn.loaded import LoadedAdapter


class SeenPictures(Protocol):
    """What became of the pictures so far: how many the tower saw, and how many were known; the memory of those kept."""

    @property
    def seen(self) -> int: ...

    @property
    def reused(self) -> int: ...

    @property
    def nbytes(self) -> int: ...


class ServedModel(Protocol):
    """What makes a request of what a client says."""

    name: str
    tokenizer: Tokenizer
    generation_config: GenerationConfig

    @property
    def config(self) -> ModelConfig: ...

    @property
    def pictures(self) -> SeenPictures | None:
        """What sees pictures and films; None for a model that takes none."""
        ...

    def prompt_ids(self, prompt: Prompt, *, thinking: bool = False,
                   tools: list[dict[str, Any]] | None = None) -> list[int]:
        """The token ids that a prompt becomes. Raises DgemmaError."""
        ...

    def request(self, prompt: Prompt, *, max_tokens: int | None = None, seed: int | None = None,
                temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
                logit_bias: Mapping[int, float] | None = None, **options: Any) -> Request:
        """The checked request (`Model.request`). Raises DgemmaError."""
        ...


class Adapters(Protocol):
    """The adapters that are offered now."""

    def get(self, name: str) -> LoadedAdapter:
        """The adapter that has the name; raises `UnknownAdapterError`."""
        ...

    def paths(self) -> dict[str, str]:
        """Where each was read, by its name."""
        ...


class Backend(Protocol):
    """What answers requests."""

    @property
    def adapters(self) -> Adapters: ...

    @property
    def healthy(self) -> bool:
        """Whether it answers, or would if there was room."""
        ...

    def stats(self) -> Stats: ...

    def weights(self) -> Weights: ...

    async def admit(self, request: Request) -> RequestEvents:
        """Take a request, and return its events. Raises `Overloaded`, or ValueError for one that cannot be run."""
        ...

    def load_adapter(self, name: str, path: str | Path) -> bool:
        """Offer an adapter under a name; whether in place of another one. Raises DgemmaError."""
        ...

    def unload_adapter(self, name: str) -> None:
        """Offer an adapter no more. Raises `UnknownAdapterError`."""
        ...


@dataclass(frozen=True)
class Serving:
    """All that a route works with."""

    model: ServedModel
    backend: Backend
    settings: Settings
    metrics: Metrics

    def names(self) -> list[str]:
        """What requests may call the model and its adapters."""
        return [*self.settings.served_names, *self.backend.adapters.paths()]

    def adapter(self, name: str | None) -> LoadedAdapter | None:
        """The adapter that a name asks for, None for the model alone; raises `ApiError` (404) for unknown names."""
        if name is None or name in self.settings.served_names:
            return None
        try:
            return self.backend.adapters.get(name)
        except UnknownAdapterError as error:
            raise self.unknown_model(name) from error

    def unknown_model(self, name: str, param: str = "model") -> ApiError:
        """The error that says which names there are."""
        return ApiError(404, f"the model {name!r} does not exist here: this server has "
                        f"{', '.join(map(repr, self.names()))}", param, "model_not_found")

    @property
    def context_limit(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        network = self.model.config.max_position_embeddings
        return network if self.settings.max_model_len is None else min(self.settings.max_model_len, network)

    @property
    def longest_prompt(self) -> int:
        """Tokens of the longest prompt that an answer can be made to."""
        return min(self.context_limit - 1, longest_prompt(self.model.config))

    def too_long(self, tokens: int, param: str, counted: bool = True) -> ApiError:
        """The error for a prompt of so many tokens, or at least so many, in the words that clients look for."""
        limit, most = self.context_limit, self.longest_prompt
        kept = f" ({limit - most} of them are kept for the answer)" if limit - most > 1 else ""
        return ApiError(400, f"This model's maximum context length is {limit} tokens{kept}. However, your prompt has "
                        f"{'' if counted else 'at least '}{tokens} tokens: shorten it", param,
                        "context_length_exceeded",
                        anthropic_message=f"prompt is too long: {tokens} tokens > {most} maximum")


Current = Callable[[], Serving]  # what answers now: a route asks once, so a request stays with what it began with


class Served:
    """What answers now, which can become another one while the server runs: a `Current`."""

    def __init__(self, serving: Serving):
        self._now = serving

    def __call__(self) -> Serving:
        return self._now

    def replace(self, serving: Serving) -> Serving:
        """Answer with this from now on; what answered before, whose requests go on with it."""
        before, self._now = self._now, serving
        return before
