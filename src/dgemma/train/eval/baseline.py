"""The autoregressive baseline: the same network, used as a model that writes one token after the other.

Works on a network and its tokenizer: the encoder, which is causal, reads the prompt and then its own answer. Knows
nothing of canvases' noise, training or tasks. A network for it is trained with the causal loss only, on the same
examples (`Objective(denoising_weight=0, causal_on="response")`): what diffusion is claimed to gain, it gains over this.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dgemma import seeds
from dgemma.chat.tokenizer import Tokenizer
from dgemma.config import SAMPLER_SETTINGS, GenerationConfig, ModelConfig
from dgemma.diffusion.events import FinishReason, Generation
from dgemma.diffusion.request import Request
from dgemma.errors import DgemmaError
from dgemma.model import Model, Prompt
from dgemma.nn import DiffusionTransformer
from dgemma.nn.passes import Passes

# The denoising sampler's own settings are taken, so that one evaluation can ask both models, and change nothing.
_OPTIONS = frozenset({"thinking", "system", "tools", *SAMPLER_SETTINGS})


@dataclass(eq=False)
class _Row:
    """One answer while it is written."""

    request: Request
    room: int  # most tokens it may have
    began: float = field(default_factory=time.perf_counter)
    token_ids: list[int] = field(default_factory=list)
    token: int = 0  # the last one, a stop token too
    passes: int = 0
    seconds: float = 0.0
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None

    def __post_init__(self) -> None:
        self.generator = seeds.generator(self.request.seed)

    def take(self, token: int) -> None:
        """The next token; none is taken once the answer is finished."""
        if self.finish_reason is not None:
            return
        self.token = token
        self.passes += 1
        if token in self.request.settings.eos_token_id:
            self.finish_reason, self.stop_token_id = "stop", token
        else:
            self.token_ids.append(token)
            if len(self.token_ids) == self.room:
                self.finish_reason = "length"
        self.seconds = time.perf_counter() - self.began


class CausalModel:
    """A network with its tokenizer and settings, answering left to right: `dgemma.model.Model` as far as evaluation
    needs it, with ``generate_batch`` and the same attributes."""

    def __init__(self, network: DiffusionTransformer, tokenizer: Tokenizer, generation_config: GenerationConfig,
                 name: str, passes: Passes | None = None):
        # For what has nothing to do with the sampler: prompts, the check of requests, the text of an answer.
        self._model = Model(network, tokenizer, generation_config, name)
        self.network, self.tokenizer, self.name = network, tokenizer, name
        self.generation_config = generation_config
        self._passes = passes or Passes.of(network)

    @property
    def config(self) -> ModelConfig:
        return self.network.config

    def generate_batch(self, prompts: Sequence[Prompt], *, seeds: Sequence[int] | None = None,
                       max_tokens: int | None = None, temperature: float = 0.0, **options: Any) -> list[Generation]:
        """Answer many prompts in shared forward passes; answer i depends on prompt i and seed i only.

        ``max_tokens`` None: the checkpoint's own, since a baseline that is still learning may find no end.
        ``temperature`` 0 takes the most probable token, any other draws from the softmax of logits divided by it.
        ``options``: ``thinking``, ``system`` and ``tools``; the denoising sampler's settings are checked and have no
        effect. ``steps`` are the passes that gave a token, that over the prompt included, for each stretch of a
        canvas's length: they compare with a canvas's denoising steps. Raises DgemmaError on a bad argument.
        """
        if unknown := sorted(set(options) - _OPTIONS):
            raise DgemmaError(f"the autoregressive baseline has no {', '.join(unknown)}; it takes seeds, max_tokens, "
                              "temperature, thinking, system and tools")
        if seeds is not None and len(seeds) != len(prompts):
            raise DgemmaError(f"there are {len(prompts)} prompts but {len(seeds)} seeds")
        rows = []
        for index, prompt in enumerate(prompts):
            request = self._model.request(prompt, temperature=temperature,
                                          max_tokens=self.generation_config.max_tokens if max_tokens is None
                                          else max_tokens,
                                          seed=None if seeds is None else seeds[index], **options)
            positions = self.config.max_position_embeddings - len(request.prompt_ids)
            rows.append(_Row(request, min(request.settings.max_tokens, positions)))
        if rows:
            self._write(rows)
        return [self._generation(row) for row in rows]

    @torch.no_grad()
    def _write(self, rows: list[_Row]) -> None:
        """Fill every row's answer."""
        lengths = [len(row.request.prompt_ids) for row in rows]
        tokens = torch.zeros(len(rows), max(lengths), dtype=torch.long)
        for index, row in enumerate(rows):
            tokens[index, : lengths[index]] = torch.tensor(row.request.prompt_ids)
        cache = self.network.new_cache(len(rows))
        hidden = self._passes.encode(tokens.to(self.network.device), cache, lengths)
        last = hidden[range(len(rows)), [length - 1 for length in lengths]]  # [B, D]
        while True:
            for row, token in zip(rows, self._draw(rows, self.network.logits(last)), strict=True):
                row.take(token)
            if all(row.finish_reason for row in rows):
                return
            # Rows that are done are fed on, unread: no row sees another, and every pass has one shape.
            tokens = torch.tensor([[row.token] for row in rows], device=self.network.device)
            last = self._passes.encode(tokens, cache)[:, 0]

    def _draw(self, rows: list[_Row], logits: Tensor) -> list[int]:
        """Every row's next token from logits [B, V]."""
        temperature = rows[0].request.sampling.temperature
        if not temperature:
            return logits.argmax(-1).tolist()
        probabilities = (logits / temperature).softmax(-1).cpu()
        return [int(torch.multinomial(probabilities[index], 1, generator=row.generator))
                for index, row in enumerate(rows)]

    def _generation(self, row: _Row) -> Generation:
        reader = self._model.reader(row.request)
        reader.feed(row.token_ids)
        answer = reader.finish()
        canvas, rest = divmod(row.passes, self.config.canvas_length)
        return Generation(
            text=answer.text, reasoning=answer.reasoning, tool_calls=answer.tool_calls, token_ids=row.token_ids,
            finish_reason=row.finish_reason or "stop", steps=[self.config.canvas_length] * canvas + [rest] * bool(rest),
            tokens_per_forward=len(row.token_ids) / row.passes, prompt_tokens=len(row.request.prompt_ids),
            seconds=row.seconds, seed=row.request.seed, stop_token_id=row.stop_token_id)
