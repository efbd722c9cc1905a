"""A training recipe: one YAML file that says everything about a run."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_origin, get_type_hints

import yaml

from dgemma.config import generation_config_from_dict, model_config_from_dict
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
    """A whole run. ``model`` is a ``config.json``, ``generation`` the checkpoint's ``generation_config.json``."""

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
    except (OSError, UnicodeDecodeError) as error:
        raise DgemmaError(f"{path}: cannot be read ({error})") from error
    except yaml.YAMLError as error:
        raise DgemmaError(f"{path}: not valid YAML ({error})") from error
    if not isinstance(data, dict):
        raise DgemmaError(f"{path}: a recipe is a mapping of settings")
    sections = {"data": DataSettings, "objective": Objective, "optimizer": OptimizerSettings}
    for name, kind in sections.items():
        if name in data:
            data[name] = _build(kind, data[name], f"{path}: {name}")
    recipe = _build(Recipe, data, str(path))
    for name in ("max_steps", "batch_size", "save_every", "evaluate_every", "evaluate_count"):
        if getattr(recipe, name) < 1:
            raise DgemmaError(f"{path}: {name} must be at least 1, got {getattr(recipe, name)}")
    config = model_config_from_dict({"model_type": "diffusion_gemma", **recipe.model}, f"{path}: model")
    generation_config_from_dict(recipe.generation, config, f"{path}: generation")
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
    hints = get_type_hints(kind)
    values = {name: _checked(value, hints[name], f"{where}: {name}") for name, value in data.items()}
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:
        raise DgemmaError(f"{where}: {error}") from error


def _checked(value: Any, hint: Any, where: str) -> Any:
    """``value`` if it is of the field's type: an int where a float is wanted, and text such as 3e-3, which YAML does
    not take for a number, are made one."""
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError as error:
            raise DgemmaError(f"{where} must be a number, got {value!r}") from error
    if get_origin(hint) is tuple:
        if not isinstance(value, list) or len(value) != 2 or any(type(item) is not int for item in value):
            raise DgemmaError(f"{where} must be two whole numbers, got {value!r}")
        return tuple(value)
    wanted = get_origin(hint) or hint
    if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
        raise DgemmaError(f"{where} must be {wanted.__name__}, got {value!r}")
    return value
