"""The training loop: one recipe, one folder of results, resumable at any step.

Works on what `state`, `sources`, `step` and `optimizers` give it, in any thread; knows nothing of signals and
terminals: who listens is told (`dgemma.train.log.events`). The folder holds ``recipe.yaml``, ``state.safetensors`` (all
that a resumed run needs), ``best/`` and ``last/`` (a checkpoint, or an adapter), the journal with its TensorBoard
mirror, and the report.

A step depends on the recipe and its number only: examples, noise and dropout are drawn from them, so a run that was
stopped trains on the same. So does one on more processes, but for dropout, which each of them draws for itself.
"""

from __future__ import annotations

import dataclasses
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from dgemma.errors import DgemmaError
from dgemma.files import make_folder
from dgemma.formats import size_text
from dgemma.memory import available_memory, release_freed
from dgemma.model import Parts
from dgemma.train.checks.plan import MemoryPlan, recipe_plan
from dgemma.train.checks.preflight import require, run_preflight
from dgemma.train.data.examples import Example
from dgemma.train.data.sources import (
    Listed,
    fingerprint,
    longest_context,
    most_soft_tokens,
    shows_pictures,
    source_of,
)
from dgemma.train.eval.evaluation import Evaluator
from dgemma.train.eval.metrics import means
from dgemma.train.eval.tasks import TaskScore
from dgemma.train.log import events
from dgemma.train.log.events import Event, Listener
from dgemma.train.log.journal import Journal, writers_for
from dgemma.train.log.report import write_comparison, write_report
from dgemma.train.optim.optimizers import Optimizers
from dgemma.train.parallel.distributed import Ranks, collect, gathered, shard, spread
from dgemma.train.recipe import Recipe, base_recipe, beginning, load_recipe
from dgemma.train.runs.run import STATE, RunFolder, is_finished, not_in_the_way
from dgemma.train.runs.state import begin, glimpse, parts_of
from dgemma.train.runs.state import restore as restore_folder
from dgemma.train.step import Stepper

# Settings that make another model of the same steps.
_TRAINED = ("model", "vision", "data", "objective", "optimizer", "adapter", "freeze", "batch_size", "seed", "dtype",
            "generation")
_RECORD_EVERY = 10  # steps whose means make one record


class Stop(Protocol):
    """What says that a run is to end, such as a `threading.Event`."""

    def is_set(self) -> bool: ...


def train(path: Path, out: Path, ranks: Ranks, listeners: Sequence[Listener] = (), stop: Stop | None = None) -> bool:
    """Train by the recipe at ``path`` in the folder ``out``; whether it is finished (and not stopped).

    The recipe that it goes on from comes first, beside ``out`` in a folder of its own name. Variants have folders of
    their own in ``out`` and at the end one report. What is finished already, with the same settings, is not trained
    again.
    """
    def note(text: str) -> None:
        for listener in listeners:
            listener(events.Noted(text))

    recipes = load_recipe(path)
    for recipe in recipes.values():
        beginning(recipe)  # all that is wrong with it is told before hours of training it
    folders = {name: out / name if name else out for name in recipes}
    for name, recipe in recipes.items():
        folder = folders[name]
        if is_finished(folder, recipe):
            note(f"{folder}: finished already; to go on raise max_steps, to begin anew choose another --out folder")
            continue
        not_in_the_way(path, folder, recipe)
        base = None
        if recipe.base is not None:
            first = base_recipe(recipe.base)
            beside = out.parent / first.name
            if beside.resolve() == out.resolve():
                raise DgemmaError(f"{recipe.base}: its run would be in {out}, too: give it another name")
            if not is_finished(beside, first):
                note(f"first the recipe that it goes on from: {recipe.base}")
            if not train(recipe.base, beside, ranks, listeners, stop):
                return False
            base = beside / "best"
        if name:
            note(f"variant {name}")
        if not Trainer(recipe, folder, ranks=ranks, base=base, listeners=listeners, stop=stop).train():
            return False
    if len(recipes) > 1 and ranks.is_main:
        title = next(iter(recipes.values())).name
        note(f"all variants are done; report in {write_comparison(out, folders, title=title)}")
    return True


def plans(path: Path, ranks: Ranks) -> dict[str, MemoryPlan]:
    """How much memory every variant of a recipe will take, by name; the data is read, weights are not."""
    found = {}
    for name, recipe in load_recipe(path).items():
        parts, source = glimpse(recipe)
        found[name] = recipe_plan(recipe, parts.config, parts.source, longest_context(source), ranks.device,
                                  ranks.world, most_soft_tokens(source))
    return found


class Trainer:
    """Builds what a recipe names in ``folder``, or picks up where an earlier run stopped.

    ``base`` is the checkpoint of the recipe that this one goes on from. ``ranks`` are the processes that train
    together; all of them make a trainer, and each tells listeners of its own. From then on no other process can train
    in the folder, until `train` has ended or `close` is called. Once ``stop`` is set on any of them, `train` ends after
    the step that it is in. Raises DgemmaError for whatever cannot be used.
    """

    def __init__(self, recipe: Recipe, folder: Path, *, ranks: Ranks, base: Path | None = None,
                 listeners: Sequence[Listener] = (), stop: Stop | None = None):
        if ranks.world > 1 and (recipe.optimizer.kind == "muon" or recipe.compile):
            raise DgemmaError(f"recipe {recipe.name}: muon and compile work in one process only; this is one of "
                              f"{ranks.world}: use adamw, and compile: false")
        self.recipe, self.folder, self.ranks = recipe, make_folder(folder), ranks
        self.run = RunFolder(folder, recipe)
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        self.best = self._best_loss = math.nan
        self.evaluated = -1  # the step of the last evaluation that was not cut off
        self._listeners, self._stop = list(listeners), stop or threading.Event()
        with ExitStack() as held:
            if ranks.is_main:
                held.enter_context(self.run.alone())  # until `train` is over
                for name in ("best", "last"):
                    restore_folder(folder / name)
            self._prepare(base)
            self._held = held.pop_all()

    def _prepare(self, base: Path | None) -> None:
        """All that a step needs, checked."""
        recipe, folder, ranks = self.recipe, self.folder, self.ranks
        parts = parts_of(recipe, base)
        self.source = source_of(recipe, parts.tokenizer, parts.config, parts.generation_config, folder, self._note)
        if shows_pictures(self.source):
            self._check_pictures()
        has_tower = shows_pictures(self.source) or (recipe.fresh and parts.config.vision is not None)
        if ranks.world > 1 and has_tower and recipe.trains_tower:
            raise DgemmaError(f"recipe {recipe.name}: a vision tower learns in one process only so far; this is one of "
                              f"{ranks.world}: leave it as it is (freeze, or an adapter's targets)")
        self.max_steps = self._length()
        self.evaluator = Evaluator(recipe, self.source, parts.generation_config)
        if self.max_steps < (rising := recipe.optimizer.warmup_steps):
            self._note(f"the learning rate rises for {rising} steps (optimizer.warmup_steps), and this run has "
                       f"{self.max_steps}: it never gets to its full height")
        self._plan(parts)
        # Of several, no process could hold the whole network on its device: blocks go there one by one, as a part each.
        whole_on = ranks.device if ranks.world == 1 or parts.gguf is not None else torch.device("cpu")
        self.state = begin(recipe, parts, whole_on, lambda done, total: self._tell(events.Loading(done, total)),
                           shows_pictures(self.source))
        self.network = self.state.network
        self.passes = self.state.seeing(shard(self.network, ranks, recipe.checkpointing))
        self._check()
        self.optimizers = Optimizers(self.network, recipe.optimizer)
        self.stepper = Stepper(recipe, self.network, self.passes, self.source, self.optimizers, ranks, self.max_steps)
        if self.stepper.compiled is not None and self.stepper.compiled.shape is None:
            self._note("compile: nothing is: this data comes in batches of many lengths")
        self._resume()

    def train(self) -> bool:
        """Run until the end, or until it is stopped, which saves after the step; whether it is finished."""
        recipe = self.recipe
        began, first = time.monotonic(), self.seconds
        with self._held as stack:
            if self.ranks.is_main:
                stack.enter_context(self._open_journal())
            self._tell(events.Started(recipe.name, self.step, self.max_steps))
            window: list[dict[str, float]] = []
            pace: deque[tuple[float, int]] = deque(maxlen=_RECORD_EVERY)
            saved, unsaved = self.step, False
            if self.evaluated != self.step and self._is_due():
                self._evaluate()  # what training has to beat, or what was cut off
                unsaved = self.step > 0
            while self.step < self.max_steps and not self._stop_asked():
                started = time.perf_counter()
                try:
                    values, tokens = self.stepper.take(self.step)
                except DgemmaError as error:
                    if (self.folder / STATE).exists():
                        raise DgemmaError(f"{error} ({self.folder / STATE} is of an earlier step)") from error
                    raise
                self.step += 1
                self.tokens += tokens
                self.seconds = first + time.monotonic() - began
                pace.append((time.perf_counter() - started, tokens))
                last = self.step >= self.max_steps
                window.append(values)
                spent = sum(seconds for seconds, _ in pace)
                each, speed = spent / len(pace), sum(count for _, count in pace) / spent
                memory = self.run.memory(self.ranks.device)
                self._tell(events.Stepped(self.step, values, each, speed, memory))
                if self.step % _RECORD_EVERY == 0 or last or self._stop.is_set():
                    known = [{name: value for name, value in one.items() if not math.isnan(value)} for one in window]
                    self._tell(events.Averaged(self.step, {**means(known), "seconds_per_step": each,
                                                           "tokens_per_second": speed, "tokens": self.tokens,
                                                           "memory_bytes": memory}))
                    window.clear()
                if self.step % _RECORD_EVERY == 0 and self.ranks.device.type == "cpu":
                    release_freed()
                if self._is_due():
                    self._evaluate()
                if self.step % recipe.save_every == 0 and not last:
                    unsaved = not self._save(required=False)
                    saved = saved if unsaved else self.step
            if saved != self.step or unsaved:
                self._save(required=True)
            finished = self.step >= self.max_steps and self.evaluated == self.step and self._sweep()
            self._finish(finished)
        return finished

    def close(self) -> None:
        """Let go of the folder, as `train` does at its end: for a trainer that does not train."""
        self._held.close()

    # ---- before and between steps ------------------------------------------------------------------

    def _is_due(self) -> bool:
        """Whether an evaluation belongs to this step."""
        return self.step % self.recipe.evaluation.every == 0 or self.step >= self.max_steps

    def _check(self) -> None:
        """The preflight, always: seconds now, or hours of training something else."""
        began, recipe, config = time.monotonic(), self.recipe, self.network.config
        examples = _telling(self._first_seen(), recipe.micro_batch or recipe.batch_size, config.sliding_window)
        checks = run_preflight(self.network, examples, recipe.objective, passes=self.passes, seed=recipe.seed,
                               past_window=longest_context(self.source) >= config.sliding_window)
        if self.ranks.is_main:
            self.run.write("preflight.json", [vars(check) for check in checks])
        failed = not all(check.passed for check in checks)
        if self.ranks.any(failed):  # all of them end, with what each has found
            require(checks)
            raise DgemmaError("preflight: another process found that this run would go wrong")
        self._note(f"preflight: {len(checks)} checks passed in {time.monotonic() - began:.1f} s")

    def _first_seen(self) -> list[Example]:
        """The first batch with pictures in it, or the first one."""
        source, steps = self.source, 1
        if shows_pictures(source):
            steps = source.steps_per_epoch if isinstance(source, Listed) else 100
        batches = (source.batch(step) for step in range(steps))
        return next((batch for batch in batches if any(one.sights for one in batch)), source.batch(0))

    def _check_pictures(self) -> None:
        """Raises DgemmaError for what cannot be done with pictures yet."""
        recipe = self.recipe
        if recipe.evaluation.metric is not None and not recipe.objective.denoising_weight:
            raise DgemmaError(f"recipe {recipe.name}: evaluation: an autoregressive model is not asked about pictures "
                              "yet: take the metric out")

    def _plan(self, parts: Parts) -> None:
        """Say how much memory will be needed, before anything takes it."""
        ranks = self.ranks
        plan = recipe_plan(self.recipe, parts.config, parts.source, longest_context(self.source), ranks.device,
                           ranks.world, most_soft_tokens(self.source))
        available = available_memory(ranks.device)
        if ranks.is_main:
            self.run.write("plan.json", plan.as_dict())
        text = f"memory: about {size_text(plan.total)} will be needed"
        if available is not None:
            text += f", {size_text(available)} are available"
            if plan.total > available:
                text += ": it may not fit; `dgemma train --plan` says what to change"
        self._note(text)

    def _evaluate(self) -> None:
        values: dict[str, float] = {}
        score: TaskScore | None = None
        problem = None
        with self._in_use() as tensors:
            if self.ranks.is_main:  # the others wait: two that found different things would part ways
                try:
                    values, score = self._measured()
                except DgemmaError as error:
                    problem = str(error)
            if self._stop_asked():  # a part of an evaluation would be another measure
                return
            loss = values.get("validation/loss", math.nan)
            problem, found, loss = self.ranks.from_main((problem, -loss if score is None else score.value, loss))
            if problem is not None:
                raise DgemmaError(problem)
            # Of equals (few questions, all of them wrong at first) the one with the lower loss.
            better = (not found <= self.best or (found == self.best and loss < self._best_loss)
                      if not math.isnan(found) else math.isnan(self.best))
            # At first a folder that cannot be written is an error, later it costs this checkpoint and not the run.
            if better and (better := self._export("best", tensors, required=self.step == 0)):
                self.best, self._best_loss = found, loss
            self.evaluated = self.step
        self._tell(events.Evaluated(self.step, values, score, better))

    def _measured(self) -> tuple[dict[str, float], TaskScore | None]:
        """The losses and the task's score, as far as nobody asked to stop."""
        self._tell(events.Working("validating", 0, 1))
        values = self.evaluator.losses(self.network, self._stop.is_set)
        if not self.evaluator.questions or self._stop.is_set():
            return values, None
        return values, self.evaluator.score(self.state.model(), self._stop.is_set, self._progress("evaluating"))

    def _sweep(self) -> bool:
        """The best checkpoint once more, with fewer and fewer denoising steps; whether it came to its end."""
        limits = self.recipe.evaluation.sweep
        if not limits:
            return True
        # In the network that is there: a second one might not fit beside it.
        exported = self.state.exported(self.folder / "best") if self.ranks.is_main else nullcontext()
        with self._in_use(), exported:
            for index, limit in enumerate(limits):
                if self.ranks.is_main:
                    shown = self._progress("step sweep", index, len(limits))
                    score = self.evaluator.score(self.state.model(), self._stop.is_set, shown, limit)
                    if score is not None:
                        self._tell(events.Swept(self.step, limit, score))
                if self._stop_asked():  # the others wait here
                    return False
        return True

    def _progress(self, what: str, part: int = 0, parts: int = 1) -> Callable[[int, int], None]:
        """What shows how far a part of several, all equally long, has come."""
        return lambda done, count: self._tell(events.Working(what, part * count + done, parts * count))

    @contextmanager
    def _in_use(self) -> Iterator[dict[str, Tensor]]:
        """The network whole on this process, with averaged weights where there are any, as it would be shipped; its
        tensors by name."""
        with self.optimizers.averaged(), gathered(self.network) as tensors:
            yield tensors

    def _export(self, name: str, tensors: Mapping[str, Tensor], required: bool = True) -> bool:
        """Write a checkpoint; whether that worked, which it must if it is ``required``."""
        return self._written(lambda: self.state.export(self.folder / name, tensors), required, "",
                             "going on without this checkpoint")

    def _written(self, write: Callable[[], None], required: bool, at_worst: str, otherwise: str) -> bool:
        """Have the main process write something; whether that worked. All of them raise if it is ``required``."""
        problem = None
        if self.ranks.is_main:
            try:
                write()
            except DgemmaError as error:
                problem = str(error)
        problem = self.ranks.from_main(problem)
        if problem is not None:
            if required:
                raise DgemmaError(f"{problem}{at_worst}")
            self._note(f"{problem}; {otherwise}")
        return problem is None

    def _stop_asked(self) -> bool:
        """Whether any of the processes is to stop: then all do, at the same step."""
        return self.ranks.any(self._stop.is_set())

    # ---- saving and resuming -----------------------------------------------------------------------

    def _save(self, required: bool) -> bool:
        """Write the state beside the last one and put it in its place; whether that worked.

        A failure (a full disk) costs nothing but this save unless it is ``required``.
        """
        tensors = collect(self.optimizers.tensors(), self.ranks)
        about = {"step": self.step, "tokens": self.tokens, "seconds": self.seconds,
                 "best": None if math.isnan(self.best) else self.best,
                 "best_loss": None if math.isnan(self._best_loss) else self._best_loss, "evaluated": self.evaluated,
                 "judge": self.evaluator.judge(), "data": self._data, "recipe": self.run.settings}
        saved = self._written(lambda: self.run.save(tensors, about), required,
                              "; the last good state is that of an earlier step",
                              f"going on, and trying again in {self.recipe.save_every} steps")
        if saved:
            self._tell(events.Saved(self.step))
        return saved

    def _resume(self) -> None:
        path = self.folder / STATE
        about, tensors, problem = None, {}, None
        if self.ranks.is_main:
            try:
                about, tensors = self.run.saved()
            except DgemmaError as error:
                problem = str(error)
        problem, about = self.ranks.from_main((problem, about))
        if problem is not None:
            raise DgemmaError(problem)
        if about is None:
            return
        try:
            self.optimizers.load(spread(tensors, self.network, self.ranks), about["step"])
        except DgemmaError as error:
            raise DgemmaError(f"{path}: {error}; choose another --out folder, or remove it to start anew") from error
        self.step, self.tokens, self.seconds = about["step"], about["tokens"], about["seconds"]
        self.best, self._best_loss = (math.nan if (value := about.get(name)) is None else value
                                      for name in ("best", "best_loss"))
        self.evaluated = about.get("evaluated", self.step)
        self._note(f"resuming at step {self.step:,}")
        if about.get("data", self._data) != self._data:
            self._note("the conversations to train on have changed since")
        if about.get("judge", self.evaluator.judge()) != self.evaluator.judge():
            self._note("what the best checkpoint is chosen by has changed since: it is chosen anew from here on")
            self.best, self._best_loss, self.evaluated = math.nan, math.nan, -1
        changes = list(self.run.changes(about["recipe"]))
        for change in changes:
            self._note(f"the recipe has changed since: {change}")
        trained = [change for change in changes if change.partition(".")[0].partition(" ")[0] in _TRAINED]
        if self.step >= self.max_steps and trained:
            raise DgemmaError(f"{self.folder}: has taken its {self.step} steps with other settings ({trained[0]}): "
                              "raise max_steps to go on with these, or choose another --out folder")

    # ---- what others are told ----------------------------------------------------------------------

    def _tell(self, event: Event) -> None:
        for listener in self._listeners:
            listener(event)

    def _note(self, text: str) -> None:
        self._tell(events.Noted(text))

    @cached_property
    def _data(self) -> str | None:
        """The same for the same conversations to train on; None for what is made on the way."""
        return fingerprint(self.source.examples) if isinstance(self.source, Listed) else None

    def _length(self) -> int:
        if self.recipe.max_steps is not None:
            return self.recipe.max_steps
        assert self.recipe.epochs is not None and isinstance(self.source, Listed)
        return max(1, math.ceil(self.recipe.epochs * self.source.steps_per_epoch))

    @contextmanager
    def _open_journal(self) -> Iterator[None]:
        """While this lasts the journal listens, before anybody else."""
        writers = writers_for(self.folder, self.step, wandb=self.recipe.wandb, name=self.recipe.name,
                              config=self.run.settings)
        with Journal(self.folder, self.step, writers=writers, warn=self._note) as journal:
            self._listeners.insert(0, journal)
            yield

    def _finish(self, finished: bool) -> None:
        with self._in_use() as tensors:
            self._export("last", tensors)
        report, problem = None, ""
        if self.ranks.is_main:
            self.run.describe(
                self.ranks.device, model=self.state.name, parameters=sum(p.numel() for p in self.network.parameters()),
                trainable=sum(p.numel() for p in self.optimizers.parameters.values()), processes=self.ranks.world,
                steps=self.step, validation_examples=len(self.evaluator.kept), questions=len(self.evaluator.questions),
                **({"examples": len(self.source.examples)} if isinstance(self.source, Listed) else {}),
                seconds=self.seconds, tokens=self.tokens, finished=finished)
            try:
                report = write_report(self.folder)
            except DgemmaError as error:  # nothing is recorded yet, or the disk is full
                problem = str(error)
        self._tell(events.Ended(self.step, finished, self.folder, report, problem))


def _telling(examples: list[Example], most: int, window: int) -> list[Example]:
    """Few examples that show most: two canvases of one turn where there are such, or the first and the longest.

    They take no more than a micro-batch of at ``most`` so many does, and of a prompt the end only: what lies past the
    window the checks make themselves. Where there are pictures, there are some in these.
    """
    longest = max(examples, key=lambda example: (bool(example.sights), example.context_length))
    turn = [example for example in examples if example.turn is longest.turn]
    chosen = turn[-2:] if len(turn) > 1 else [examples[0]] if longest is examples[0] else [examples[0], longest]
    return [dataclasses.replace(example, turn=example.turn.ending(window)) for example in chosen[-most:]]
