"""A training recipe: one YAML file that says everything about a run.

Works on YAML and dataclasses; knows nothing of networks and how they train.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from dgemma.chat.pictures import BUDGETS
from dgemma.config import MODEL_TYPE, generation_config_from_dict, model_config_from_dict
from dgemma.errors import DgemmaError
from dgemma.fields import read_text
from dgemma.nn.adapters import AdapterConfig
from dgemma.tasks.extraction import KEYS, MOST_DISTRACTORS
from dgemma.tasks.sudoku import MIN_GIVENS
from dgemma.train.objective import Objective
from dgemma.weights.files import bundled_models

T = TypeVar("T")


def _require(settings: object, words: str, holds: Callable[[Any], bool], *names: str) -> None:
    """Raises ValueError for the first of these settings that has a value of which this does not hold."""
    for name in names:
        if (value := getattr(settings, name)) is not None and not holds(value):
            raise ValueError(f"{name} must be {words}, got {value}")


def _positive(number: int) -> bool:
    return number >= 1


@dataclass(frozen=True)
class ConversationData:
    """The user's conversations: files, folders or hub names, as `read_conversations` takes them.

    ``held_out`` names others to validate on; without them every so-manieth conversation is kept apart, a share of
    ``held_out_share`` of them. ``image_tokens`` are the most soft tokens of a picture (None: as many as its
    words need). The rest is as in `prepare`.
    """

    train: tuple[str, ...]
    held_out: tuple[str, ...] = ()
    held_out_share: float = 0.05
    max_context: int | None = None
    too_long: Literal["error", "truncate", "skip"] = "error"
    thinking: Literal["auto", "on", "off"] = "auto"
    fill: Literal["eos", "pad"] = "eos"
    skip_bad: bool = False
    image_tokens: int | None = None

    def __post_init__(self) -> None:
        _require(self, f"one of {', '.join(map(str, BUDGETS))}", lambda tokens: tokens in BUDGETS, "image_tokens")
        _require(self, "at least 0 and below 1", lambda share: 0 <= share < 1, "held_out_share")
        _require(self, "at least 1", _positive, "max_context")


@dataclass(frozen=True)
class SudokuData:
    """Puzzles made on the way: ``bases`` base puzzles, varied by symmetries; see `SudokuBatches`.

    ``plain``: nothing but puzzles. Without it every fifth batch holds puzzles inside conversations, or none at all.
    ``beyond_singles``: the least share of puzzles that naked and hidden singles alone do not solve; ``stuck``: the
    share of those in which all that singles give is filled in already. ``pictures``: the share of batches in which
    puzzles come as pictures, of which a share of ``photos`` are photographed, and a share of ``reading`` are asked what
    they say; the others are to be solved. ``scribbled``: of those that are read the share with random digits.
    """

    bases: int = 40_000
    givens: tuple[int, int] = (22, 46)
    easy_givens: int = 36
    curriculum_steps: int = 1500
    plain: bool = False
    beyond_singles: float = 0.0
    stuck: float = 0.0
    pictures: float = 0.0
    photos: float = 0.5
    reading: float = 0.5
    scribbled: float = 0.0

    def __post_init__(self) -> None:
        _require(self, "between 0 and 1", lambda share: 0 <= share <= 1, "beyond_singles", "stuck", "pictures",
                 "photos", "reading", "scribbled")
        if self.bases < 1 or self.curriculum_steps < 0:
            raise ValueError("bases must be at least 1 and curriculum_steps at least 0")
        if not MIN_GIVENS <= self.givens[0] <= self.givens[1] <= 80:
            raise ValueError(f"givens must be two numbers from {MIN_GIVENS} to 80, the smaller first, "
                             f"got {list(self.givens)}")


@dataclass(frozen=True)
class TextData:
    """Plain text, for a base model: files and folders of ``suffix`` files, or "python" for that Python's library."""

    paths: tuple[str, ...] = ("python",)
    suffix: str = ".py"
    context: tuple[int, int] = (16, 128)


@dataclass(frozen=True)
class ExtractionData:
    """Generated notes and the JSON that says what is in them; see `dgemma.tasks.extraction.conversations`."""

    count: int = 20_000
    held_out: int = 256
    keys: tuple[str, ...] = KEYS
    distractors: int = MOST_DISTRACTORS

    def __post_init__(self) -> None:
        if self.count < 1 or self.held_out < 0:
            raise ValueError("count must be at least 1 and held_out at least 0")
        if not self.keys or list(self.keys) != [key for key in KEYS if key in self.keys]:
            raise ValueError(f"keys must be some of {', '.join(KEYS)}, in that order, got {list(self.keys)}")
        if not 0 <= self.distractors <= MOST_DISTRACTORS:
            raise ValueError(f"distractors must be from 0 to {MOST_DISTRACTORS}, got {self.distractors}")


DATA = {"conversations": ConversationData, "sudoku": SudokuData, "text": TextData, "extraction": ExtractionData}
Data = ConversationData | SudokuData | TextData | ExtractionData


@dataclass(frozen=True)
class OptimizerSettings:
    """``adamw`` for everything, or ``muon`` for matrices (at ``muon_lr``) and AdamW (at ``lr``) for the rest.

    The rate rises over ``warmup_steps``; then "cosine" falls to 0 at the end, "linear" stays and falls to 0 over the
    last ``decay_fraction`` of the run, "constant" stays. ``clip`` is the most the gradient's norm may be. ``ema``
    above 0 keeps a running average of what is trained (its decay a step), which is evaluated and shipped.
    """

    kind: Literal["adamw", "muon"] = "adamw"
    lr: float = 1e-4
    muon_lr: float = 0.02
    betas: tuple[float, float] = (0.95, 0.99)
    weight_decay: float = 0.0
    warmup_steps: int = 20
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    decay_fraction: float = 0.5
    clip: float = 1.0
    ema: float = 0.0

    def __post_init__(self) -> None:
        _require(self, "above 0", lambda rate: not rate <= 0, "lr", "muon_lr", "clip")
        _require(self, "at least 0 and below 1", lambda decay: 0 <= decay < 1, "ema")
        _require(self, "above 0 and at most 1", lambda share: 0 < share <= 1, "decay_fraction")
        if any(not 0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be at least 0 and below 1, got {list(self.betas)}")
        if self.weight_decay < 0 or self.warmup_steps < 0:
            raise ValueError("weight_decay and warmup_steps must not be negative")


@dataclass(frozen=True)
class Evaluation:
    """What is looked at while a run goes on, every ``every`` steps and at its end.

    ``metric`` is one of `dgemma.train.eval.metrics`, or "file.py:function"; without one the validation loss decides
    which checkpoint is the best. Questions come from ``count`` held-out conversations (Sudoku: puzzles of each band),
    one for each turn to be learnt; ``examples`` held-out examples are measured. ``sweep``: at the end, the best
    checkpoint once more with at most so many denoising steps each. ``settings`` are sampler settings, ``temperature``,
    ``top_k`` and ``top_p``.
    """

    every: int = 200
    metric: str | None = None
    count: int = 64
    examples: int = 128
    max_tokens: int | None = None
    sweep: tuple[int, ...] = ()
    sweep_count: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _require(self, "at least 1", _positive, "every", "count", "examples", "max_tokens", "sweep_count")
        if any(steps < 1 for steps in self.sweep):
            raise ValueError(f"sweep: numbers of denoising steps are at least 1, got {list(self.sweep)}")
        if self.sweep and self.metric is None:
            raise ValueError("a sweep asks the metric's questions again: name a metric, or take the sweep out")


@dataclass(frozen=True)
class Recipe:
    """A whole run.

    ``model`` is what `dgemma.load` takes; ``{"recipe": FILE}`` for the best checkpoint of another recipe's run, which
    is made first; or a ``config.json`` for fresh weights, whose checkpoint gets ``generation`` for its
    ``generation_config.json``. ``adapter``: train that and nothing else. ``freeze`` are parts of parameters' names
    that stay as they are when everything is trained (None: the router and the vision tower, unless they are new to the
    model).
    ``vision`` gives the model a vision tower: that of a checkpoint folder or hub repository, or one of random weights,
    as a ``config.json`` describes it (``vision_config`` and what belongs to it: `VisionConfig`).
    ``micro_batch``: how many examples there are in memory at a time. ``dtype`` is that of the weights (None: the
    checkpoint's); ``autocast`` computes in bfloat16 with weights in float32. ``variants`` are other settings to train
    with besides, one run after the other: name -> what is different.
    """

    name: str
    model: str | dict[str, Any]
    data: Data
    vision: str | dict[str, Any] | None = None
    max_steps: int | None = None
    epochs: float | None = None
    batch_size: int = 8
    micro_batch: int | None = None
    seed: int = 0
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    autocast: bool = False
    compile: bool = False
    checkpointing: bool = False
    freeze: tuple[str, ...] | None = None
    save_every: int = 100
    wandb: str | None = None
    generation: dict[str, Any] = field(default_factory=dict)
    adapter: AdapterConfig | None = None
    objective: Objective = field(default_factory=Objective)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    evaluation: Evaluation = field(default_factory=Evaluation)

    @property
    def fresh(self) -> bool:
        """Whether the network begins with random weights."""
        return isinstance(self.model, dict) and "recipe" not in self.model

    @property
    def frozen(self) -> tuple[str, ...]:
        """Parts of the names of parameters that stay as they are where everything else is trained."""
        if self.freeze is not None:
            return self.freeze
        if self.fresh:
            return ()
        return (".router.", ".vision.") if self.vision is None else (".router.",)

    @property
    def trains_tower(self) -> bool:
        """Whether what sees pictures learns, too, by what the recipe says."""
        if self.adapter is not None:
            return any("vision" in target for target in self.adapter.targets)
        return not any(part in ".vision." for part in self.frozen)

    @property
    def base(self) -> Path | None:
        """The recipe file that this one goes on from."""
        return Path(self.model["recipe"]) if isinstance(self.model, dict) and not self.fresh else None


def load_recipe(path: Path) -> dict[str, Recipe]:
    """Read and check a recipe -> its variants by name, in order; one called "" where it has none.

    Raises DgemmaError naming the file and the setting that is wrong.
    """
    data = read_yaml(path)
    variants = data.pop("variants", None)
    if variants is None:
        return {"": recipe_of(data, path)}
    if not isinstance(variants, dict) or not variants:
        raise DgemmaError(f"{path}: variants: expected a mapping of names to other settings, found {variants!r}")
    found = {}
    for name, other in variants.items():
        if not isinstance(name, str) or not name or Path(name).name != name or name.startswith("."):
            raise DgemmaError(f"{path}: variants: {name!r} cannot be the name of a folder")
        if not isinstance(other, (dict, type(None))):
            raise DgemmaError(f"{path}: variants: {name}: expected a mapping of settings, found {other!r}")
        found[name] = recipe_of(_merged(data, other or {}), path, f"{path}: variants: {name}")
    return found


def base_recipe(path: Path) -> Recipe:
    """A recipe that others go on from: without variants, and with a whole checkpoint for its result."""
    found = load_recipe(path)
    if "" not in found:
        raise DgemmaError(f"{path}: has variants; a recipe to go on from has one result")
    if found[""].adapter is not None:
        raise DgemmaError(f"{path}: trains an adapter; a recipe to go on from makes a whole checkpoint: merge the "
                          "adapter (dgemma merge), and give the merged folder as the model")
    return found[""]


def beginning(recipe: Recipe) -> Recipe:
    """The recipe at the end of those that this one goes on from, which may be itself: what its network looks like.

    Raises DgemmaError for one that cannot be gone on from.
    """
    seen: set[Path] = set()
    while recipe.base is not None:
        if recipe.base.resolve() in seen:
            raise DgemmaError(f"{recipe.base}: model: a recipe cannot go on from itself")
        seen.add(recipe.base.resolve())
        recipe = base_recipe(recipe.base)
    return recipe


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; raises DgemmaError naming it."""
    try:
        data = yaml.safe_load(read_text(path, DgemmaError))
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a 40th of May
        raise DgemmaError(f"{path}: not valid YAML ({error})") from error
    if not isinstance(data, dict):
        raise DgemmaError(f"{path}: a recipe is a mapping of settings")
    return data


def recipe_of(data: Mapping[str, Any], path: Path, where: str | None = None) -> Recipe:
    """A recipe without variants from what its file says; files named in it are taken relative to ``path``'s folder."""
    where = where or str(path)
    data = dict(data)
    if "data" in data:
        data["data"] = _data_of(data["data"], f"{where}: data", path.parent)
    recipe = _build(Recipe, data, where)
    if Path(recipe.name).name != recipe.name or recipe.name.startswith("."):
        raise DgemmaError(f"{where}: name: {recipe.name!r} cannot be the name of a folder")
    for name in ("batch_size", "save_every", "max_steps", "micro_batch"):
        if (value := getattr(recipe, name)) is not None and value < 1:
            raise DgemmaError(f"{where}: {name} must be at least 1, got {value}")
    if not 0 <= recipe.seed < 2**63:
        raise DgemmaError(f"{where}: seed must be a whole number from 0 to 2^63 - 1, got {recipe.seed}")
    if (recipe.max_steps is None) == (recipe.epochs is None):
        raise DgemmaError(f"{where}: say how long to train: either max_steps or epochs")
    endless = isinstance(recipe.data, (SudokuData, TextData))
    if recipe.epochs is not None and (not 0 < recipe.epochs < math.inf or endless):
        raise DgemmaError(f"{where}: epochs must be above 0, and are for data that has an end: give max_steps")
    if isinstance(recipe.model, dict) and not recipe.fresh:
        if set(recipe.model) != {"recipe"} or not isinstance(recipe.model["recipe"], str):
            raise DgemmaError(f"{where}: model: with a recipe there is nothing else, found {recipe.model!r}")
        recipe = dataclasses.replace(recipe, model={"recipe": str(path.parent / recipe.model["recipe"])})
    elif recipe.fresh:
        if recipe.adapter is not None:
            raise DgemmaError(f"{where}: adapter: there is nothing to adapt in a model of random weights")
        config = model_config_from_dict({"model_type": MODEL_TYPE, **recipe.model},  # type: ignore[dict-item]
                                        f"{where}: model")
        generation_config_from_dict(recipe.generation, config, f"{where}: generation")
    if recipe.vision is not None:
        recipe = dataclasses.replace(recipe, vision=_tower_of(recipe, path.parent, f"{where}: vision"))
    if recipe.adapter is not None and recipe.freeze is not None:
        raise DgemmaError(f"{where}: freeze: with an adapter everything else is frozen already; take it out")
    if recipe.generation and not recipe.fresh:
        raise DgemmaError(f"{where}: generation is for new models; this one has settings of its own")
    if isinstance(recipe.model, str) and recipe.model not in bundled_models():
        recipe = dataclasses.replace(recipe, model=_beside(recipe.model, path.parent))
    file, colon, function = (recipe.evaluation.metric or "").rpartition(":")
    if colon:
        metric = f"{_beside(file, path.parent)}:{function}"
        recipe = dataclasses.replace(recipe, evaluation=dataclasses.replace(recipe.evaluation, metric=metric))
    return recipe


def _tower_of(recipe: Recipe, folder: Path, where: str) -> str | dict[str, Any]:
    """What a recipe says of the tower that its model is given, checked."""
    if recipe.fresh:
        raise DgemmaError(f"{where}: is for a model that there is; a new one has its tower in model: vision_config")
    if recipe.adapter is not None:
        raise DgemmaError(f"{where}: an adapter has no place for a tower: train everything, or give the tower first")
    if isinstance(recipe.vision, str):
        return _beside(recipe.vision, folder)
    if not isinstance(recipe.vision, dict) or "vision_config" not in recipe.vision:
        raise DgemmaError(f"{where}: expected a checkpoint's name, or a mapping with vision_config in it, found "
                          f"{recipe.vision!r}")
    return recipe.vision


def _data_of(data: Any, where: str, folder: Path) -> Data:
    if not isinstance(data, dict):
        raise DgemmaError(f"{where}: expected a mapping of settings, found {data!r}")
    data = dict(data)
    kind = data.pop("kind", "conversations")
    if kind not in DATA:
        raise DgemmaError(f"{where}: kind {kind!r} is unknown; there are {', '.join(DATA)}")
    for name in ("train", "held_out", "paths") if kind in ("conversations", "text") else ():
        if isinstance(data.get(name), str):
            data[name] = [data[name]]
        if isinstance(data.get(name), list):
            data[name] = [_beside(item, folder) if isinstance(item, str) else item for item in data[name]]
    return _build(DATA[kind], data, where)


def _beside(name: str, folder: Path) -> str:
    """A file's or folder's name as it is found in ``folder``; what is not there may be another kind of name."""
    try:
        return str(folder / name) if name and (folder / name).exists() else name
    except OSError:  # too long for a path
        return name


def _merged(data: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """``data`` with ``other``'s settings in their place, section by section; null takes a setting away."""
    merged = dict(data)
    for name, value in other.items():
        if value is None:
            merged.pop(name, None)
        elif isinstance(value, Mapping) and isinstance(merged.get(name), Mapping):
            merged[name] = _merged(merged[name], value)
        else:
            merged[name] = value
    return merged


def _build(kind: type[T], data: Any, where: str) -> T:
    if not isinstance(data, dict):
        raise DgemmaError(f"{where}: expected a mapping of settings, found {data!r}")
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(map(str, data)) - set(fields))
    if unknown:
        raise DgemmaError(f"{where}: unknown setting {', '.join(unknown)}; there are {', '.join(fields)}")
    missing = [f.name for f in fields.values() if f.name not in data and f.default is dataclasses.MISSING
               and f.default_factory is dataclasses.MISSING]
    if missing:
        raise DgemmaError(f"{where}: missing {', '.join(missing)}")
    hints = get_type_hints(kind)
    values = {name: _checked(value, hints[name], f"{where}: {name}") for name, value in data.items()}
    try:
        return kind(**values)
    except (TypeError, ValueError, DgemmaError) as error:
        raise DgemmaError(f"{where}: {error}") from error


def _checked(value: Any, hint: Any, where: str) -> Any:
    """``value`` as the field's type: mappings become dataclasses, lists tuples, and text such as 3e-3, which YAML does
    not take for a number, a number where one is wanted."""
    origin, inside = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        classes = tuple(part for part in inside if isinstance(part, type))
        if isinstance(value, classes) and not isinstance(value, bool):
            return value
        return _checked(value, [part for part in inside if part is not types.NoneType][-1], where)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _build(hint, value, where)
    if origin is Literal:
        if isinstance(value, bool):  # YAML's reading of on and off
            value = "on" if value else "off"
        if value not in inside:
            raise DgemmaError(f"{where} must be one of {', '.join(inside)}, got {value!r}")
        return value
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            number = float(value)
        except ValueError as error:
            raise DgemmaError(f"{where} must be a number, got {value!r}") from error
        if math.isnan(number):
            raise DgemmaError(f"{where} must be a number, got {value!r}")
        return number
    if origin is tuple:
        endless = inside[-1] is ...
        if not isinstance(value, (list, tuple)) or not (endless or len(value) == len(inside)):
            wanted = "a list" if endless else f"a list of {len(inside)}"
            raise DgemmaError(f"{where} must be {wanted}, got {value!r}")
        return tuple(_checked(item, inside[0] if endless else inside[i], f"{where}[{i}]")
                     for i, item in enumerate(value))
    wanted: Any = dict if origin in (dict, Mapping) else hint
    if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
        raise DgemmaError(f"{where} must be {wanted.__name__}, got {value!r}")
    return value
