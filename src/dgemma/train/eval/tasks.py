"""Does the model do what its user wants? Held-out questions, answered with the sampler that ships, and scored.

Works on conversations and on anything that answers prompts as `dgemma.model.Model` does. Knows nothing of losses,
training steps or files.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

from dgemma.chat.messages import normalise_messages
from dgemma.diffusion.events import Generation
from dgemma.errors import DgemmaError
from dgemma.model import Model
from dgemma.tasks.evaluate import wilson_interval
from dgemma.train.data.conversations import Conversation, text_of
from dgemma.train.data.turns import Thinking, has_thoughts, without_thoughts
from dgemma.train.eval.metrics import Metric, Question, Values, metric_of
from dgemma.train.eval.validation import in_use

log = logging.getLogger(__name__)


class Answering(Protocol):
    """What answers questions: a `Model`, or the autoregressive baseline."""

    def generate_batch(self, prompts: Sequence[Any], *, seeds: Sequence[int] | None = None,
                       max_tokens: int | None = None, **options: Any) -> list[Generation]: ...


@dataclass(frozen=True)
class Sample:
    """One question, its answer and what that scored, as text for people. ``score`` is the metric's main value;
    ``error`` says why there is no answer."""

    prompt: str
    reference: str
    answer: str
    score: float
    values: Values
    where: str
    error: str | None = None


@dataclass(frozen=True)
class TaskScore:
    """How ``count`` questions were answered. ``values`` by name (``task/exact``, …); ``intervals`` (Wilson, 95 %) of
    those that are shares of right answers; ``main`` names the value to choose a checkpoint by. ``partial``: it was
    stopped before all questions were answered."""

    count: int
    main: str
    values: Values
    intervals: dict[str, tuple[float, float]]
    samples: list[Sample]
    partial: bool = False

    @property
    def value(self) -> float:
        """The main value; NaN when nothing was answered."""
        return self.values.get(self.main, float("nan"))


@dataclass(frozen=True)
class _Answered:
    place: int
    outcome: Generation | Exception
    values: Values


def questions_of(conversations: Iterable[Conversation], thinking: Thinking = "auto") -> list[Question]:
    """A question for every message of the assistant's that would be learnt from, after what the model gets in use.

    ``thinking`` as in `examples_of`: "auto" switches it on for conversations with thoughts in them.
    """
    questions = []
    for conversation in conversations:
        thinks = thinking == "on" or (thinking == "auto" and has_thoughts(conversation))
        for index in conversation.trained:
            before = conversation.messages[:index]
            before = before if thinking != "off" else [without_thoughts(message) for message in before]
            written = normalise_messages([conversation.messages[index]])[0]
            calls = [call["function"] for call in written.get("tool_calls", ())]
            questions.append(Question(before, text_of(written["content"]), calls, conversation.tools, thinks,
                                      f"{conversation.where}, message {index}"))
    return questions


def run_task(model: Answering, questions: Sequence[Question], metric: str | Metric, *, seed: int = 0, batch: int = 16,
             max_tokens: int | None = None, progress: Callable[[int, int], None] | None = None,
             stop: Callable[[], bool] | None = None, **settings: Any) -> TaskScore:
    """Ask every question, with seed ``seed + i`` for the i-th, and score the answers.

    ``max_tokens`` None: the checkpoint's own, since a network that is still learning may find no end.
    ``settings`` are sampler settings and other options of `generate_batch`. Beside the metric's there are
    ``task/steps_per_canvas``, ``task/tokens_per_forward``, ``task/seconds_per_answer`` (wall time, shared by a batch)
    and ``task/failed``: how many requests ended with an error, all of them counted as wrong. ``progress(done, count)``
    is called after each batch; ``stop`` is asked before each, and answers that were cancelled do not count.
    Raises DgemmaError when there are no questions, the metric cannot use one, or not a single request succeeds.
    """
    metric = metric if isinstance(metric, Metric) else metric_of(metric)
    if max_tokens is None and (generation := getattr(model, "generation_config", None)) is not None:
        max_tokens = generation.max_tokens
    if not questions or batch < 1:
        raise DgemmaError(f"a task needs at least one question and a batch of at least 1, got {len(questions)} and "
                          f"{batch}")
    for question in questions:
        metric.score(question, None)  # rather now than after an hour of answers
    answered: list[_Answered] = []
    partial, done, began = False, 0, time.perf_counter()
    with ExitStack() as stack:
        if (network := getattr(model, "network", None)) is not None:
            stack.enter_context(in_use(network))
        if isinstance(model, Model):
            model.prefixes.clear()  # what was read with earlier weights
            stack.callback(model.prefixes.clear)  # training needs the memory
        for places in _batches(questions, batch):
            if stop is not None and stop():
                partial = True
                break
            part = [questions[place] for place in places]
            outcomes = _ask(model, part, [seed + place for place in places], max_tokens, settings)
            for place, outcome in zip(places, outcomes, strict=True):
                if isinstance(outcome, Exception):
                    answered.append(_Answered(place, outcome, {}))
                elif outcome.finish_reason == "cancelled":
                    partial = True
                else:
                    answered.append(_Answered(place, outcome, metric.score(questions[place], outcome)))
            done += len(places)
            if progress is not None:
                progress(done, len(questions))
    answered.sort(key=lambda one: one.place)
    return _score(metric, questions, answered, time.perf_counter() - began, partial)


# ---- asking ----------------------------------------------------------------------------------------


def _batches(questions: Sequence[Question], batch: int) -> Iterator[list[int]]:
    """Places of questions that one call can answer: those with the same tools, all thinking or none."""
    groups: dict[tuple[bool, str], list[int]] = {}
    for place, question in enumerate(questions):
        groups.setdefault((question.thinking, json.dumps(question.tools, sort_keys=True)), []).append(place)
    for places in groups.values():
        for start in range(0, len(places), batch):
            yield places[start : start + batch]


def _ask(model: Answering, questions: Sequence[Question], seeds: Sequence[int], max_tokens: int | None,
         settings: dict[str, Any]) -> list[Generation | Exception]:
    """Every question's answer, or what went wrong with it: where a batch fails, each is asked alone."""
    options = dict(settings)
    if questions[0].thinking:
        options["thinking"] = True
    if questions[0].tools:
        options["tools"] = questions[0].tools
    try:
        return list(model.generate_batch([question.prompt for question in questions], seeds=list(seeds),
                                         max_tokens=max_tokens, **options))
    except Exception as error:  # out of memory, a prompt that is too long, …
        if len(questions) == 1:
            log.warning("no answer to %s: %s: %s", questions[0].where, type(error).__name__, error)
            return [error]
    return [_ask(model, [question], [own], max_tokens, settings)[0]
            for question, own in zip(questions, seeds, strict=True)]


# ---- scoring ---------------------------------------------------------------------------------------


def _score(metric: Metric, questions: Sequence[Question], answered: list[_Answered], seconds: float,
           partial: bool) -> TaskScore:
    failed = [one for one in answered if isinstance(one.outcome, Exception)]
    good = [one.outcome for one in answered if isinstance(one.outcome, Generation)]
    if failed and not good and not partial:
        first = failed[0]
        raise DgemmaError(f"not one of {len(failed)} questions was answered; {questions[first.place].where}: "
                          f"{first.outcome}") from (first.outcome if isinstance(first.outcome, Exception) else None)
    # A function of the user's says nothing about a request that failed: all that it measures is 0 then.
    known = list(dict.fromkeys(name for one in answered for name in one.values))
    rows = [one.values if not isinstance(one.outcome, Exception)
            else metric.score(questions[one.place], None) or dict.fromkeys(known, 0.0) for one in answered]
    main = metric.main or next(iter(known), metric.name)
    values = {f"task/{name}": value for name, value in (metric.summary(rows) if rows else {}).items()}
    intervals = {name: interval for name in values if (interval := _interval(rows, name.removeprefix("task/")))}
    canvases, steps = sum(len(one.steps) for one in good), sum(sum(one.steps) for one in good)
    if steps:
        values["task/steps_per_canvas"] = steps / canvases
        values["task/tokens_per_forward"] = sum(len(one.token_ids) for one in good) / steps
    if answered:
        values["task/seconds_per_answer"] = seconds / len(answered)
        values["task/failed"] = float(len(failed))
    samples = [_sample(questions[one.place], one.outcome, row, main)
               for one, row in zip(answered, rows, strict=True)]
    return TaskScore(len(answered), f"task/{main}", values, intervals, samples, partial)


def _interval(rows: Sequence[Values], name: str) -> tuple[float, float] | None:
    """The interval of a value that is 0 or 1 in every answer that has it."""
    found = [row[name] for row in rows if name in row]
    if not found or any(value not in (0, 1) for value in found):
        return None
    return wilson_interval(round(sum(found)), len(found))


def _sample(question: Question, outcome: Generation | Exception, values: Values, main: str) -> Sample:
    prompt, reference = _shown(question.prompt), _said(question.reference, question.tool_calls)
    score = values.get(main, 0.0)
    if isinstance(outcome, Exception):
        return Sample(prompt, reference, "", score, values, question.where, f"{type(outcome).__name__}: {outcome}")
    return Sample(prompt, reference, _said(outcome.text, outcome.tool_calls), score, values, question.where)


def _shown(prompt: Sequence[dict[str, Any]]) -> str:
    """The messages as text; a single user message is its content."""
    messages = normalise_messages(prompt)
    said = []
    for message in messages:
        content = message["content"]
        text = json.dumps(content, ensure_ascii=False) if isinstance(content, dict) else text_of(content)
        media = [part for part in content if part["type"] != "text"] if isinstance(content, list) else []
        text = "".join(f"[{part.get('path', part['type'])}]\n" for part in media) + text
        said.append(_said(text, [call["function"] for call in message.get("tool_calls", ())]))
    if [message["role"] for message in messages] == ["user"]:
        return said[0]
    return "\n".join(f"{message['role']}: {text}" for message, text in zip(messages, said, strict=True))


def _said(text: str, calls: Sequence[dict[str, Any]]) -> str:
    called = [f"{call['name']}({json.dumps(call['arguments'], ensure_ascii=False)})" for call in calls]
    return "\n".join([*([text] if text else []), *called])
