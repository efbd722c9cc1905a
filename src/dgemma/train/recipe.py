"""A training recipe: one YAML file that says everything about a run."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from dgemma.errors import DgemmaError
from dgemma.train.objective import Objective

T = TypeVar("T")


@dataclass(frozen=True)
class DataSettings:
    """Where batches come from: ``bases`` base puzzles, varied by symmetries; see `SudokuBatches`."""

    bases: int = 40_000
    givens: tuple[int, int] = (22, 46)
    easy_givens: int = 36
    curriculum_steps: int = 1500


@dataclass(frozen=True)
class OptimizerSettings:
    """Muon for matrices, AdamW for the rest; warm-up, then constant, then a linear fall to zero."""

    muon_lr: float = 0.02
    adam_lr: float = 3e-3
    weight_decay: float = 0.1
    warmup_steps: int = 100
    decay_fraction: float = 0.3
    clip: float = 1.0


@dataclass(frozen=True)
class Recipe:
    """A whole run. ``model`` is a ``config.json`` (its text_config's fields may stand at the top)."""

    name: str
    task: str
    model: dict[str, Any]
    max_steps: int
    batch_size: int = 64
    seed: int = 0
    autocast: bool = True
    compile: bool = False
    save_every: int = 250
    evaluate_every: int = 1000
    evaluate_count: int = 64
    generation: dict[str, Any] = field(default_factory=dict)
    data: DataSettings = field(default_factory=DataSettings)
    objective: Objective = field(default_factory=Objective)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)


def load_recipe(path: Path) -> Recipe:
    """Read and check a recipe; raises DgemmaError naming the file and the setting that is wrong."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DgemmaError(f"{path}: cannot be read ({error.strerror})") from error
    except yaml.YAMLError as error:
        raise DgemmaError(f"{path}: not valid YAML ({error})") from error
    if not isinstance(data, dict):
        raise DgemmaError(f"{path}: a recipe is a mapping of settings")
    sections = {"data": DataSettings, "objective": Objective, "optimizer": OptimizerSettings}
    for name, kind in sections.items():
        if name in data:
            data[name] = _build(kind, data[name], f"{path}: {name}")
    recipe = _build(Recipe, data, str(path))
    if recipe.task != "sudoku":
        raise DgemmaError(f"{path}: task {recipe.task!r} is unknown; there is 'sudoku'")
    return recipe


def _build(kind: type[T], data: Any, where: str) -> T:
    if not isinstance(data, dict):
        raise DgemmaError(f"{where}: expected a mapping of settings, found {data!r}")
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(data) - set(fields))
    if unknown:
        raise DgemmaError(f"{where}: unknown setting {', '.join(map(str, unknown))}; there are {', '.join(fields)}")
    missing = [f.name for f in fields.values() if f.name not in data and f.default is dataclasses.MISSING
               and f.default_factory is dataclasses.MISSING]
    if missing:
        raise DgemmaError(f"{where}: missing {', '.join(missing)}")
    values = {}
    for name, value in data.items():
        default = fields[name].default
        if isinstance(default, float) and isinstance(value, (int, str)) and not isinstance(value, bool):
            try:  # YAML reads 3e-3 as text
                value = float(value)
            except ValueError as error:
                raise DgemmaError(f"{where}: {name} must be a number, got {value!r}") from error
        elif isinstance(default, (int, str)) and not isinstance(value, type(default)):
            raise DgemmaError(f"{where}: {name} must be {type(default).__name__}, got {value!r}")
        values[name] = tuple(value) if isinstance(value, list) else value
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:
        raise DgemmaError(f"{where}: {error}") from error
