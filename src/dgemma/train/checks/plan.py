"""The memory plan of a training run, before anything is loaded: `dgemma train --plan`.

Turns a recipe into the question that `dgemma.memory.training` answers, and its answer into a table and advice. Knows
nothing of data, files of a run or printing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dgemma.config import ModelConfig, load_model_config
from dgemma.errors import CheckpointError, DgemmaError, describe
from dgemma.gguf.container import is_gguf
from dgemma.gguf.keys import gguf_name
from dgemma.memory.training import TrainingRun, Use, network_of, training_memory
from dgemma.nn.adapters import AdapterConfig
from dgemma.train.objective import Objective
from dgemma.train.recipe import Recipe
from dgemma.weights import gguf_model
from dgemma.weights.load import DTYPES, match, network_shapes, read_headers, stored_dtype, tensor_shapes
from dgemma.weights.quantize import MIXTURES, mixture_types


@dataclass(frozen=True)
class Advice:
    """A change, on top of those before it, and what the whole then takes."""

    change: str
    total: int


@dataclass(frozen=True)
class MemoryPlan:
    """The memory of one process (of ``run.ranks``) of a training run, at its widest moment."""

    run: TrainingRun
    lines: tuple[Use, ...]

    @classmethod
    def of(cls, run: TrainingRun) -> MemoryPlan:
        return cls(run, training_memory(run))

    @property
    def total(self) -> int:
        return sum(line.nbytes for line in self.lines)

    def text(self, available: int | None = None) -> str:
        """A small table in GB (10⁹ bytes); with what to change if ``available`` bytes are not enough."""
        width = max(len(line.name) for line in self.lines) + 2
        rows = [f"{line.name:<{width}}{line.nbytes / 1e9:8.2f} GB  {line.reason}" for line in self.lines]
        each = f"on each of {self.run.ranks} devices" if self.run.ranks > 1 else ""
        rows.append(f"{'total':<{width}}{self.total / 1e9:8.2f} GB  {each}".rstrip())
        if available is not None:
            fits = "it fits" if self.total <= available else "it does not fit"
            rows.append(f"{'available':<{width}}{available / 1e9:8.2f} GB  {fits}")
            advice = self.advice(available)
            if advice:
                rows.append("To make it fit, each on top of the one before:")
                rows += [f"  {step.change:<60}{step.total / 1e9:8.2f} GB" for step in advice]
                if advice[-1].total > available:
                    rows.append("  That is still not enough: a larger device, or more of them.")
        return "\n".join(rows)

    def advice(self, available: int) -> tuple[Advice, ...]:
        """What to change so that the run takes at most ``available`` bytes; nothing if it does.

        Cheap changes first; each comes on top of those before it, those that would gain nothing are left out.
        """
        found: list[Advice] = []
        best = self
        for change, alter in _CHANGES:
            if best.total <= available:
                break
            for changed in alter(best.run):
                plan = MemoryPlan.of(changed)
                if plan.total < best.total:
                    best = plan
                    found.append(Advice(change(changed), plan.total))
                if best.total <= available:
                    break
        return tuple(found)

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON's types."""
        run = {field.name: getattr(self.run, field.name) for field in dataclasses.fields(self.run)
               if field.name not in ("config", "weights", "adapter")}
        run["adapter"] = None if self.run.adapter is None else dataclasses.asdict(self.run.adapter)
        run["weights"] = sorted(set(self.run.weights.values()))
        return {"total": self.total, "lines": [dataclasses.asdict(line) for line in self.lines], "run": run}


def memory_plan(config: ModelConfig, *, weights: str | Mapping[str, str] = "BF16",
                adapter: AdapterConfig | None = None, objective: Objective | None = None,
                **settings: Any) -> MemoryPlan:
    """The memory that training a network of this shape takes.

    ``weights`` is a mixture of `weights.quantize` ("Q4_K_M", "BF16"), "F32", or the types of all tensors
    (`stored_types`); ``settings`` are the others of `TrainingRun`, of which ``context`` must be there: it counts the
    tokens before the canvas of the longest example, ``micro_batch`` the examples at a time. Raises DgemmaError for what
    cannot be.
    """
    objective = objective or Objective()
    types = mixture(config, weights) if isinstance(weights, str) else dict(weights)
    if settings.get("patches"):  # the tower is in what the network is computed in, packed ones in bfloat16
        own = types["embed_tokens.weight"] if types["embed_tokens.weight"] in DTYPES else "BF16"
        types |= {name: own for name in tensor_shapes(network_of(config, True)) if name not in types}
    passes = objective.passes if objective.denoising_weight else 0
    causal_canvas = bool(objective.causal_weight) and objective.causal_on != "prompt"
    return MemoryPlan.of(TrainingRun(config, types, adapter, passes=passes, causal_canvas=causal_canvas, **settings))


def recipe_plan(recipe: Recipe, config: ModelConfig, source: Path | None, context: int, device: torch.device,
                ranks: int = 1, soft_tokens: int = 0) -> MemoryPlan:
    """The plan of a recipe's run on a checkpoint (None: fresh weights) with contexts of up to so many tokens, of which
    in some ``soft_tokens`` are pictures'."""
    weights: str | Mapping[str, str] = _type_name(getattr(torch, recipe.dtype or "float32"))
    if source is not None and (recipe.dtype is None or source.is_file()):
        weights = stored_types(source)
    micro = min(recipe.micro_batch or recipe.batch_size, recipe.batch_size)
    return memory_plan(config, weights=weights, adapter=recipe.adapter, context=context, micro_batch=micro,
                       accumulation=-(-recipe.batch_size // (micro * ranks)), checkpointing=recipe.checkpointing,
                       objective=recipe.objective, optimizer=recipe.optimizer.kind, ema=recipe.optimizer.ema > 0,
                       autocast=recipe.autocast, device=device.type, ranks=ranks, tower=recipe.trains_tower,
                       patches=0 if config.vision is None else
                       micro * soft_tokens * config.vision.pooling_kernel_size**2)


def mixture(config: ModelConfig, name: str) -> dict[str, str]:
    """Our name -> type of every tensor in a mixture, as `dgemma quantize` writes it, or with all of them F32 or F16."""
    shapes = network_shapes(config)
    if name.upper() in DTYPES:
        return dict.fromkeys(shapes, name.upper())
    if name.upper() not in MIXTURES:
        raise DgemmaError(f"memory plan: weights must be one of {', '.join((*DTYPES, *MIXTURES))}, got {name!r}")
    theirs = mixture_types({gguf_name(own): shape for own, shape in shapes.items()}, name.upper())
    return {own: theirs[gguf_name(own)].name for own in shapes}


def stored_types(path: Path) -> dict[str, str]:
    """The types that the network of a checkpoint folder or a GGUF file holds its tensors in, from the headers alone.

    Raises CheckpointError for what cannot be loaded.
    """
    if path.is_file() and is_gguf(path):
        model = gguf_model.open_gguf(path)
        shapes = network_shapes(model.config)
        parts, problems = gguf_model.match_gguf(model, shapes)
        types = {name: tensors[0].type_name if gguf_model.is_matrix(name, shapes[name]) else "F32"
                 for name, tensors in parts.items()}
    else:
        config = load_model_config(path)
        stored, problems = match(read_headers(path), network_shapes(config))
        types = {} if problems else dict.fromkeys(stored, _type_name(stored_dtype(path, config, stored)))
    if problems:
        raise CheckpointError(f"{path}: this checkpoint cannot be loaded\n{describe(problems)}")
    return types


def _type_name(dtype: torch.dtype) -> str:
    return next(name for name, own in DTYPES.items() if own == dtype)


def _halved_batches(run: TrainingRun) -> list[TrainingRun]:
    runs, size = [], run.micro_batch
    while size > 1:
        size = -(-size // 2)
        examples = run.micro_batch * run.accumulation
        runs.append(dataclasses.replace(run, micro_batch=size, accumulation=-(-examples // size)))
    return runs


def _halved_ranks(run: TrainingRun) -> list[TrainingRun]:
    runs, adapter = [], run.adapter
    while adapter is not None and adapter.r > 4:
        adapter = dataclasses.replace(adapter, r=adapter.r // 2, alpha=adapter.alpha / 2)
        runs.append(dataclasses.replace(run, adapter=adapter))
    return runs


def _fewer_targets(run: TrainingRun) -> list[TrainingRun]:
    runs, adapter = [], run.adapter
    for dropped in ("experts", "mlp"):
        if adapter is not None and dropped in adapter.targets and len(adapter.targets) > 1:
            adapter = dataclasses.replace(adapter, targets=tuple(t for t in adapter.targets if t != dropped))
            runs.append(dataclasses.replace(run, adapter=adapter))
    return runs


def _packed_base(run: TrainingRun) -> list[TrainingRun]:
    if run.packed or run.adapter is None:
        return []
    tower = {name: kind for name, kind in run.weights.items() if name.startswith("vision.")}
    return [dataclasses.replace(run, weights={**mixture(run.config, "Q4_K_M"), **tower})]


# What to try, in this order: what costs nothing but time first, what changes the result last.
_CHANGES = (
    (lambda run: "checkpointing: on", lambda run: [dataclasses.replace(run, checkpointing=True)]),
    (lambda run: f"micro-batches of {run.micro_batch}, {run.accumulation} of them accumulated", _halved_batches),
    (lambda run: "the base packed as Q4_K_M", _packed_base),
    (lambda run: f"rank {run.adapter.r}", _halved_ranks),
    (lambda run: f"adapters on {', '.join(run.adapter.targets)} only", _fewer_targets),
)
