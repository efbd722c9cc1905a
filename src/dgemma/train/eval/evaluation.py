"""What is looked at while a run goes on: losses on held-out examples, and questions answered by the shipped sampler.

Works on a recipe's evaluation section and a source of examples; knows nothing of steps, folders and checkpoints.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

from dgemma.config import SAMPLER_SETTINGS, GenerationConfig
from dgemma.diffusion.request import SamplingParams
from dgemma.errors import DgemmaError
from dgemma.nn import DiffusionTransformer
from dgemma.train.data.sources import Source, fingerprint
from dgemma.train.eval.metrics import Metric, Question, metric_identity, metric_of
from dgemma.train.eval.tasks import Answering, TaskScore, questions_of, run_task
from dgemma.train.eval.validation import validation_losses
from dgemma.train.recipe import ConversationData, Recipe

_LOOKS = 0.05  # seconds between two looks at whether to stop
_REQUEST_SETTINGS = ("temperature", "top_k", "top_p")  # of evaluation.settings, beside the sampler's

Stop = Callable[[], bool]
Progress = Callable[[int, int], None]


class Evaluator:
    """The examples and questions of a recipe, which stay the same for the whole run.

    ``generation`` are the checkpoint's settings. Raises DgemmaError for a metric or settings that cannot be used, and
    for questions that the metric cannot judge: rather now than after hours of training.
    """

    def __init__(self, recipe: Recipe, source: Source, generation: GenerationConfig):
        self.recipe, self.settings, self._source = recipe, recipe.evaluation, source
        self.kept = source.held_out(self.settings.examples)
        self.metric = None if self.settings.metric is None else metric_of(self.settings.metric)
        self.questions = [] if self.metric is None else self._asked(self.metric, self.settings.count)
        if self.questions:
            self._check_settings(generation)

    def losses(self, network: DiffusionTransformer, stop: Stop) -> dict[str, float]:
        """`validation_losses` of the held-out examples; nothing where there are none, or where it was stopped."""
        recipe = self.recipe
        return validation_losses(network, self.kept, recipe.objective, seed=recipe.seed, stop=stop,
                                 batch_size=recipe.micro_batch or recipe.batch_size) if self.kept else {}

    def score(self, model: Answering, stop: Stop, progress: Progress, limit: int | None = None) -> TaskScore | None:
        """What the metric says to the model's answers; None without a metric.

        With a ``limit`` to a sweep's questions, with at most so many denoising steps a canvas; None where it was
        stopped in the middle, too.
        """
        if self.metric is None:
            return None
        swept = {} if limit is None else {"max_denoising_steps": limit}
        with _stoppable(model, stop):
            found = run_task(model, self._swept if swept else self.questions, self.metric, seed=self.recipe.seed,
                             stop=stop, progress=progress, max_tokens=self.settings.max_tokens,
                             **{**self.settings.settings, **swept})
        return None if swept and found.partial else found

    @cached_property
    def _swept(self) -> list[Question]:
        settings = self.settings
        assert self.metric is not None
        return self._asked(self.metric, settings.sweep_count or settings.count)

    def judge(self) -> str:
        """The same for runs whose best checkpoints compare: those asked the same by the same metric."""
        settings = self.settings
        metric = None if settings.metric is None else metric_identity(settings.metric)
        asked: Any = [metric, settings.max_tokens, settings.settings,
                      [(q.prompt, q.reference, q.tool_calls, q.tools, q.thinking) for q in self.questions]]
        if not self.questions:
            objective = self.recipe.objective
            asked = [fingerprint(self.kept), objective.prediction, bool(objective.denoising_weight)]
        return hashlib.sha256(repr(asked).encode()).hexdigest()

    def _asked(self, metric: Metric, count: int) -> list[Question]:
        """Questions, each of which the metric can use."""
        data = self.recipe.data
        thinking = data.thinking if isinstance(data, ConversationData) else "auto"
        questions = questions_of(self._source.questions(count), thinking)
        if not questions:
            raise DgemmaError(f"recipe {self.recipe.name}: evaluation: metric {metric.name!r} needs questions, and "
                              "nothing is held out to ask: name other conversations (held_out)")
        for question in questions:
            metric.score(question, None)
        return questions

    def _check_settings(self, generation: GenerationConfig) -> None:
        where, settings = f"recipe {self.recipe.name}: evaluation: settings", self.settings.settings
        if unknown := sorted(settings.keys() - {*SAMPLER_SETTINGS, *_REQUEST_SETTINGS}):
            raise DgemmaError(f"{where}: unknown setting {', '.join(unknown)}; there are "
                              f"{', '.join((*SAMPLER_SETTINGS, *_REQUEST_SETTINGS))}")
        of_request = {name: value for name, value in settings.items() if name in _REQUEST_SETTINGS}
        if not self.recipe.objective.denoising_weight and (unknown := sorted(of_request.keys() - {"temperature"})):
            raise DgemmaError(f"{where}: an autoregressive model is asked without {', '.join(unknown)}")
        try:
            generation.replace(**{name: value for name, value in settings.items() if name in SAMPLER_SETTINGS})
            SamplingParams(**of_request)
        except (TypeError, ValueError) as error:
            raise DgemmaError(f"{where}: {error}") from error


@contextmanager
def _stoppable(model: Answering, stop: Stop) -> Iterator[None]:
    """While this lasts the answers that are being made end once ``stop`` says so, where the model can end them: the
    baseline looks up between its batches only."""
    cancel, over = getattr(model, "cancel", None), threading.Event()

    def watch() -> None:
        while not over.wait(_LOOKS):
            if stop() and cancel is not None:
                cancel()  # again and again: it ends only what has begun

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
