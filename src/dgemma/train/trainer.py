"""The training loop: one recipe, one folder of results, resumable at any step.

Works on what `trainee`, `sources`, `objective` and `optimizers` give it. The folder holds ``recipe.yaml``,
``state.safetensors`` (all that a resumed run needs), ``best/`` and ``last/`` (a checkpoint, or an adapter), the journal
with its TensorBoard mirror, and the report.

A step depends on the recipe and its number only: examples, noise and dropout are drawn from them, so a run that was
stopped trains on the same. So does one on more processes, but for dropout, which each of them draws for itself.
"""

from __future__ import annotations

import hashlib
import json
import math
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from dgemma.api import Model
from dgemma.config import SAMPLER_SETTINGS, GenerationConfig
from dgemma.errors import DgemmaError
from dgemma.files import make_folder, size_text
from dgemma.train.batch import Batch, collate
from dgemma.train.display import Display
from dgemma.train.distributed import Ranks, clip_gradients, collect, gathered, shard, spread
from dgemma.train.examples import Example
from dgemma.train.journal import Journal, writers_for
from dgemma.train.metrics import Metric, Question, metric_of
from dgemma.train.noise import Noise, keyed_noise, noise_key
from dgemma.train.objective import Totals, batch_loss, means, totals_of
from dgemma.train.optimizers import Optimizers, learning_rate_factor
from dgemma.train.plan import available_memory, recipe_plan
from dgemma.train.preflight import run_preflight
from dgemma.train.recipe import ConversationData, Recipe
from dgemma.train.run import Run
from dgemma.train.sources import Listed, fingerprint, longest_context, source_of
from dgemma.train.tasks import Answering, TaskScore, questions_of, run_task, step_sweep
from dgemma.train.trainee import Parts, begin, parts_of
from dgemma.train.trainee import restore as restore_folder
from dgemma.train.validation import validation_losses
from dgemma.weights.save import write_safetensors

STATE = "state.safetensors"
_RECORD_EVERY = 10  # steps whose means make one record
_SAMPLES = 16  # answers that are kept of an evaluation
_REQUEST_SETTINGS = ("temperature", "top_k", "top_p")  # of evaluation.settings, beside the sampler's


class Trainer:
    """Builds what a recipe names in ``folder``, or picks up where an earlier run stopped.

    ``base`` is the checkpoint of the recipe that this one goes on from. ``ranks`` are the processes that train
    together; all of them make a trainer. Raises DgemmaError for whatever cannot be used.
    """

    def __init__(self, recipe: Recipe, folder: Path, *, ranks: Ranks, base: Path | None = None,
                 display: Callable[[str, int, int, Console | None], Display] = Display):
        if ranks.world > 1 and (recipe.optimizer.kind == "muon" or recipe.compile):
            raise DgemmaError(f"recipe {recipe.name}: muon and compile work in one process only; this is one of "
                              f"{ranks.world}: use adamw, and compile: false")
        self.recipe, self.folder, self.ranks = recipe, make_folder(folder), ranks
        self.run = Run(folder, recipe)
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        self.best = self._best_loss = math.nan
        self.evaluated = -1  # the step of the last evaluation that was not cut off
        self._stopping = False
        self._asking: Model | None = None  # what answers questions just now
        with self.run.alone() if ranks.is_main else nullcontext():
            pass  # rather now than after reading all weights
        for name in ("best", "last"):
            if ranks.is_main:
                restore_folder(folder / name)
        parts = parts_of(recipe, base)
        self.source = source_of(recipe, parts.tokenizer, parts.config, parts.generation_config, folder, self._note)
        self.max_steps = self._length()
        evaluation = recipe.evaluation
        self.kept = self.source.held_out(evaluation.examples)
        self.metric = None if evaluation.metric is None else metric_of(evaluation.metric)
        self.questions = [] if self.metric is None else self._asked(self.metric, evaluation.count)
        if self.questions:
            self._check_settings(parts.generation_config)
        if self.max_steps < (rising := recipe.optimizer.warmup_steps):
            self._note(f"the learning rate rises for {rising} steps (optimizer.warmup_steps), and this run has "
                       f"{self.max_steps}: it never gets to its full height")
        self._plan(parts)
        self.trainee = begin(recipe, parts, ranks.device)
        self.network = self.trainee.network
        self._loss = torch.compile(batch_loss) if recipe.compile else batch_loss
        self._check()
        shard(self.network, ranks)
        self.optimizers = Optimizers(self.network, recipe.optimizer)
        self._resume()
        self._display = display(recipe.name, self.step, self.max_steps, None if ranks.is_main else Console(quiet=True))

    def train(self) -> bool:
        """Run until the end, or until Ctrl-C or SIGTERM, which save and stop after the step; whether it is finished."""
        recipe = self.recipe
        began, first = time.monotonic(), self.seconds
        with ExitStack() as stack:
            stack.enter_context(self._stoppable())
            if self.ranks.is_main:
                stack.enter_context(self.run.alone())
            journal = self._journal = stack.enter_context(self._open_journal()) if self.ranks.is_main else None
            if self.ranks.is_main:
                stack.enter_context(self._display)
            window: list[dict[str, float]] = []
            pace: deque[tuple[float, int]] = deque(maxlen=_RECORD_EVERY)
            saved, unsaved = self.step, False
            if self.evaluated != self.step and self._is_due():
                self._evaluate()  # what training has to beat, or what was cut off
                unsaved = self.step > 0
            while self.step < self.max_steps and not self.ranks.any(self._stopping):
                started = time.perf_counter()
                values, tokens = self._train_step()
                self.step += 1
                self.tokens += tokens
                self.seconds = first + time.monotonic() - began
                pace.append((time.perf_counter() - started, tokens))
                window.append(values)
                last = self.step >= self.max_steps
                if self.ranks.is_main:
                    spent = sum(seconds for seconds, _ in pace)
                    speed = sum(count for _, count in pace) / spent
                    self._display.step(self.step, values, spent / len(pace), speed, self.run.memory(self.ranks.device))
                    if journal is not None and (self.step % _RECORD_EVERY == 0 or last or self._stopping):
                        journal.record(self.step, "train", {**_means(window), "seconds_per_step": spent / len(pace),
                                                            "tokens_per_second": speed, "tokens": self.tokens})
                        window.clear()
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

    def stop(self, *_: object) -> None:
        """End the run after the step that it is in; asked for a second time, at once."""
        if self._stopping:
            raise KeyboardInterrupt
        self._stopping = True
        if self._asking is not None:
            self._asking.cancel()

    # ---- a step ------------------------------------------------------------------------------------

    def _train_step(self) -> tuple[dict[str, float], int]:
        """One step -> what it measured, and how many tokens it trained on."""
        recipe, settings = self.recipe, self.recipe.optimizer
        examples = self.source.batch(self.step)
        totals = totals_of([collate(examples)], recipe.objective)
        torch.manual_seed(noise_key(recipe.seed, self.step, 2**32 + self.ranks.rank) % 2**63)  # of dropout
        parts = []
        tokens = 0
        for share in self.ranks.share(examples, recipe.micro_batch or len(examples)):
            batch = collate(share.items)
            tokens += int(sum(batch.before[i] for i in batch.last) + batch.canvas.numel()) * bool(share.weight)
            noise = self._noise(share.start, len(share.items))
            loss, part = self._loss_of(batch, noise, totals)
            (loss * share.weight).backward()
            self.optimizers.gather()
            parts.append({name: value * share.weight for name, value in part.items()})
        norm = clip_gradients(self.optimizers.masters.values(), settings.clip)
        if not math.isfinite(norm):
            raise DgemmaError(f"training diverged at step {self.step}: the gradient is not finite; lower the learning "
                              f"rate and start again: {self.folder / STATE} is of an earlier step")
        factor = learning_rate_factor(self.step, self.max_steps, settings)
        self.optimizers.step(factor)
        sums = self.ranks.sum({**_added(parts), "tokens": torch.tensor(float(tokens))})
        values = means([{name: sums[name] for name in parts[0]}])
        loss = values.get("loss/pass1", values.get("loss/causal", math.nan))
        return {"loss": loss, **values, "gradient_norm": norm, "learning_rate": factor * (
            settings.muon_lr if settings.kind == "muon" else settings.lr)}, int(sums["tokens"].item())

    def _noise(self, start: int, count: int) -> Noise:
        keys = [noise_key(self.recipe.seed, self.step, start + place) for place in range(count)]
        config = self.network.config
        return keyed_noise(self.recipe.objective, keys, config.canvas_length, config.vocab_size).to(self.ranks.device)

    def _loss_of(self, batch: Batch, noise: Noise, totals: Totals | None) -> tuple[Tensor, dict[str, Tensor]]:
        device = self.ranks.device
        autocast = torch.autocast(device.type, torch.bfloat16) if self.recipe.autocast else nullcontext()
        with autocast:
            return self._loss(self.network, batch.to(device), self.recipe.objective, noise, totals)

    # ---- before and between steps ------------------------------------------------------------------

    def _asked(self, metric: Metric, count: int) -> list[Question]:
        """Questions, each of which the metric can use: rather an error now than after hours of training."""
        data = self.recipe.data
        thinking = data.thinking if isinstance(data, ConversationData) else "auto"
        questions = questions_of(self.source.questions(count), thinking)
        if not questions:
            raise DgemmaError(f"recipe {self.recipe.name}: evaluation: metric {metric.name!r} needs questions, and "
                              "nothing is held out to ask: name other conversations (held_out)")
        for question in questions:
            metric.score(question, None)
        return questions

    def _check_settings(self, generation: GenerationConfig) -> None:
        where, settings = f"recipe {self.recipe.name}: evaluation: settings", self.recipe.evaluation.settings
        if unknown := sorted(settings.keys() - {*SAMPLER_SETTINGS, *_REQUEST_SETTINGS}):
            raise DgemmaError(f"{where}: unknown setting {', '.join(unknown)}; there are "
                              f"{', '.join((*SAMPLER_SETTINGS, *_REQUEST_SETTINGS))}")
        try:
            generation.replace(**{name: value for name, value in settings.items() if name in SAMPLER_SETTINGS})
        except (TypeError, ValueError) as error:
            raise DgemmaError(f"{where}: {error}") from error

    def _is_due(self) -> bool:
        """Whether an evaluation belongs to this step."""
        return self.step % self.recipe.evaluation.every == 0 or self.step >= self.max_steps

    def _check(self) -> None:
        """The preflight, always: seconds now, or hours of training something else."""
        if not self.recipe.objective.denoising_weight:
            self._note("preflight: not run: nothing is denoised in this run")
            return
        began = time.monotonic()
        examples = _telling(self.source.batch(0))
        checks = run_preflight(self.network, examples, self.recipe.objective, seed=self.recipe.seed, required=True)
        self.run.write("preflight.json", [vars(check) for check in checks])
        self._note(f"preflight: {len(checks)} checks passed in {time.monotonic() - began:.1f} s")

    def _plan(self, parts: Parts) -> None:
        """Say how much memory will be needed, before anything takes it."""
        ranks = self.ranks
        plan = recipe_plan(self.recipe, parts.config, parts.source, longest_context(self.source), ranks.device,
                           ranks.world)
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
        recipe, settings = self.recipe, self.recipe.evaluation
        values: dict[str, float] = {}
        score: TaskScore | None = None
        with self._in_use():
            if self.kept:
                self._display.phase("validating", 0, 1)
                values = validation_losses(self.network, self.kept, recipe.objective, seed=recipe.seed,
                                           batch_size=recipe.micro_batch or recipe.batch_size, stop=self._stop_asked)
            if self.questions and self.metric is not None and not self._stop_asked():
                with self._answering() as model:
                    score = run_task(model, self.questions, self.metric, seed=recipe.seed,
                                     max_tokens=settings.max_tokens, stop=self._stop_asked,
                                     progress=lambda done, count: self._display.phase("evaluating", done, count),
                                     **settings.settings)
            if self._stop_asked():  # a part of an evaluation would be another measure
                return
            loss = values.get("validation/loss", math.nan)
            found = score.value if score is not None else -loss
            # Of equals (few questions, all of them wrong at first) the one with the lower loss.
            better = (not found <= self.best or (found == self.best and loss < self._best_loss)
                      if not math.isnan(found) else math.isnan(self.best))
            # At first a folder that cannot be written is an error, later it costs this checkpoint and not the run.
            if better and (better := self._export("best", required=self.step == 0)):
                self.best, self._best_loss = found, loss
            self.evaluated = self.step
        if not self.ranks.is_main:
            return
        self._display.evaluation(self.step, {**values, **(score.values if score is not None else {})}, better)
        if self._journal is not None:
            if values:
                self._journal.record(self.step, "validation", values)
            if score is not None:
                self._journal.record(self.step, "task", score.values, main=score.main, best=better,
                                     count=score.count, intervals=score.intervals)
                shown = sorted(score.samples, key=lambda sample: sample.score)[:_SAMPLES]  # the wrong ones first
                self._journal.record(self.step, "samples", {}, samples=[vars(sample) for sample in shown])

    def _sweep(self) -> bool:
        """The best checkpoint once more, with fewer and fewer denoising steps; whether it came to its end."""
        settings = self.recipe.evaluation
        if not settings.sweep or self.metric is None:
            return True
        options = {name: value for name, value in settings.settings.items() if name != "max_denoising_steps"}
        # In the network that is there: a second one might not fit beside it.
        exported = self.trainee.exported(self.folder / "best") if self.ranks.is_main else nullcontext()
        with self._in_use(), exported, self._answering() as model:
            questions = self._asked(self.metric, settings.sweep_count or settings.count) if self.ranks.is_main else []
            for index, limit in enumerate(settings.sweep):
                if self.ranks.is_main:
                    def report(done: int, count: int, index: int = index) -> None:
                        self._display.phase("step sweep", index * count + done, len(settings.sweep) * count)

                    for steps, score in step_sweep(model, questions, self.metric, (limit,), seed=self.recipe.seed,
                                                   max_tokens=settings.max_tokens,
                                                   stop=lambda: self._stopping, progress=report, **options):
                        if self._journal is not None:
                            self._journal.record(self.step, "sweep", {"max_steps": steps, **score.values},
                                                 main=score.main, count=score.count, intervals=score.intervals)
                if self._stop_asked():  # the others wait here
                    return False
        return True

    @contextmanager
    def _answering(self) -> Iterator[Answering]:
        """The network as what answers questions, for as long as it may be stopped in doing so."""
        model = self.trainee.model()
        self._asking = model if isinstance(model, Model) else None  # the control looks up between its batches only
        try:
            yield model
        finally:
            self._asking = None

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        """The network whole on this process, with averaged weights where there are any, as it would be shipped."""
        with self.optimizers.averaged(), gathered(self.network):
            yield

    def _export(self, name: str, required: bool = True) -> bool:
        """Write a checkpoint; whether that worked, which it must if it is ``required``."""
        problem = None
        if self.ranks.is_main:
            try:
                self.trainee.export(self.folder / name)
            except DgemmaError as error:
                problem = str(error)
        problem = self.ranks.from_main(problem)
        if problem is not None:
            if required:
                raise DgemmaError(problem)
            if self.ranks.is_main:
                self._display.note(f"{problem}; going on without this checkpoint")
        return problem is None

    def _judge(self) -> str:
        """The same for runs whose best checkpoints compare: those asked the same by the same metric."""
        settings = self.recipe.evaluation
        asked: Any = [settings.metric, settings.max_tokens, settings.settings,
                      [(q.prompt, q.reference, q.tool_calls, q.tools, q.thinking) for q in self.questions]]
        if not self.questions:
            objective = self.recipe.objective
            asked = [fingerprint(self.kept), objective.prediction, bool(objective.denoising_weight)]
        return hashlib.sha256(repr(asked).encode()).hexdigest()

    def _stop_asked(self) -> bool:
        return self.ranks.any(self._stopping)

    # ---- saving and resuming -----------------------------------------------------------------------

    def _save(self, required: bool) -> bool:
        """Write the state beside the last one and put it in its place; whether that worked.

        A failure (a full disk) costs nothing but this save unless it is ``required``.
        """
        tensors = collect(self.optimizers.tensors(), self.ranks)
        about = {"step": self.step, "tokens": self.tokens, "seconds": self.seconds,
                 "best": None if math.isnan(self.best) else self.best,
                 "best_loss": None if math.isnan(self._best_loss) else self._best_loss, "evaluated": self.evaluated,
                 "judge": self._judge(), "data": self._data(), "recipe": self.run.settings}
        problem = None
        if self.ranks.is_main:
            try:
                write_safetensors(self.folder / STATE, tensors, {"run": json.dumps(about)})
            except DgemmaError as error:
                problem = str(error)
        problem = self.ranks.from_main(problem)
        if problem is not None:
            if required:
                raise DgemmaError(f"{problem}; the last good state is that of an earlier step")
            if self.ranks.is_main:
                self._display.note(f"{problem}; going on, and trying again in {self.recipe.save_every} steps")
        return problem is None

    def _resume(self) -> None:
        path = self.folder / STATE
        about: dict[str, Any] | None = None
        tensors: dict[str, Tensor] = {}
        problem = None
        if self.ranks.is_main and path.exists():
            try:
                about, tensors = _read_state(path)
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
        if about.get("data", self._data()) != self._data():
            self._note("the conversations to train on have changed since")
        if about.get("judge", self._judge()) != self._judge():
            self._note("what the best checkpoint is chosen by has changed since: it is chosen anew from here on")
            self.best, self._best_loss, self.evaluated = math.nan, math.nan, -1
        for change in self.run.changes(about["recipe"]):
            self._note(f"the recipe has changed since: {change}")

    # ---- what others are told ----------------------------------------------------------------------

    def _note(self, text: str) -> None:
        """Say something before the display is there."""
        if self.ranks.is_main:
            print(text, flush=True)

    def _data(self) -> str | None:
        """The same for the same conversations to train on; None for what is made on the way."""
        return fingerprint(self.source.examples) if isinstance(self.source, Listed) else None

    def _length(self) -> int:
        if self.recipe.max_steps is not None:
            return self.recipe.max_steps
        assert self.recipe.epochs is not None and isinstance(self.source, Listed)
        return max(1, math.ceil(self.recipe.epochs * self.source.steps_per_epoch))

    @contextmanager
    def _stoppable(self) -> Iterator[None]:
        previous = {name: signal.signal(name, self.stop) for name in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for name, handler in previous.items():
                signal.signal(name, handler)

    @contextmanager
    def _open_journal(self) -> Iterator[Journal]:
        writers = writers_for(self.folder, self.step, wandb=self.recipe.wandb, name=self.recipe.name,
                              config=self.run.settings)
        with Journal(self.folder, self.step, writers=writers, warn=self._display.note) as journal:
            yield journal

    def _finish(self, finished: bool) -> None:
        from dgemma.train.report import write_report

        with self._in_use():
            self._export("last")
        if self.ranks.is_main:
            self.run.describe(self, finished)
            try:
                report = f"report in {write_report(self.folder)}"
            except DgemmaError as error:  # nothing is recorded yet, or the disk is full
                report = f"no report: {error}"
            what = "done" if finished else "stopped; run the same command again to go on"
            self._display.note(f"{what} at step {self.step:,}; results in {self.folder}, {report}")


def _telling(examples: list[Example]) -> list[Example]:
    """Few examples that show most: two canvases of one turn where there are such, or the first and the longest."""
    longest = max(examples, key=lambda example: example.context_length)
    turn = [example for example in examples if example.turn is longest.turn]
    return turn[-2:] if len(turn) > 1 else [examples[0]] if longest is examples[0] else [examples[0], longest]


def _added(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The sums and counts of micro-batches added up."""
    return {name: torch.stack([part[name].double() for part in parts]).sum(0) for name in parts[0]}


def _means(window: list[dict[str, float]]) -> dict[str, float]:
    """Of every value the mean over the steps that had it."""
    found: dict[str, list[float]] = {}
    for values in window:
        for name, value in values.items():
            if not math.isnan(value):
                found.setdefault(name, []).append(value)
    return {name: sum(those) / len(those) for name, those in found.items()}


def _read_state(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})["run"])
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (it is no dict)
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise DgemmaError(f"{path}: is damaged ({error}); remove it to start anew") from error
    return about, tensors
