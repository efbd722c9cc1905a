"""A recipe from a few choices, and those that come with the package.

Works on: `dgemma.train.recipe`. Knows nothing of: pages, processes.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import dgemma
from dgemma.errors import DgemmaError
from dgemma.files import atomic_write, make_folder
from dgemma.train.eval.metrics import METRICS
from dgemma.train.recipe import load_recipe
from dgemma.weights.files import bundled_models

ASKED = "asked.yaml"  # in a run's folder: the recipe as it was written; the run's own recipe.yaml says every default
KINDS = {"conversations": "My data", "sudoku": "Sudokus, made on the way",
         "extraction": "Notes to JSON, made on the way"}
GOALS = {"": "the lowest loss on held-out examples", "exact": "answers that are equal to the reference",
         "contains": "answers that contain the reference", "json": "JSON records with the right fields",
         "tool_calls": "the right tool calls", "sudoku": "solved Sudokus"}


@dataclass(frozen=True)
class Choices:
    """What the form asks; `settings` says what recipe that makes."""

    name: str = "my-run"
    kind: str = "conversations"
    train: tuple[str, ...] = ()  # files, folders, names on the hub
    held_out_share: float = 0.1
    skip_bad: bool = False
    model: str = "sudoku"
    adapter: bool = True
    rank: int = 16
    targets: tuple[str, ...] = ("attention", "mlp")
    goal: str = ""
    epochs: float = 3
    steps: int = 300  # for data that has no end
    batch_size: int = 8
    micro_batch: int = 1
    checkpointing: bool = True
    lr: float = 1e-4
    every: int = 25
    count: int = 16
    seed: int = 0

    @property
    def settings(self) -> dict[str, Any]:
        """The recipe as plain values, without what is as always."""
        made: dict[str, Any] = {"name": self.name, "model": self.model}
        if self.kind == "conversations":
            made["data"] = {"train": list(self.train), "held_out_share": self.held_out_share}
            made["data"] |= {"skip_bad": True} if self.skip_bad else {}
        else:
            made["data"] = {"kind": self.kind}
        if self.kind == "conversations":
            made["epochs"] = self.epochs
        else:
            made["max_steps"] = self.steps
        made |= {"batch_size": self.batch_size, "micro_batch": min(self.micro_batch, self.batch_size)}
        if self.checkpointing:
            made["checkpointing"] = True
        if self.seed:
            made["seed"] = self.seed
        if self.adapter:
            made["adapter"] = {"r": self.rank, "alpha": 2 * self.rank, "targets": list(self.targets)}
        elif self.model in bundled_models():
            made["freeze"] = []  # a model this small learns a new router, too
        made["optimizer"] = {"lr": self.lr}
        made["evaluation"] = {"every": self.every}
        if self.goal:
            made["evaluation"] |= {"metric": self.goal, "count": self.count}
        return made

    @property
    def text(self) -> str:
        return yaml_text(self.settings)


def choices_for(model: str) -> Choices:
    """What to begin with: a model as small as the bundled ones is trained whole, and fast."""
    if model in bundled_models():
        return Choices(model=model, adapter=False, micro_batch=8, checkpointing=False, lr=1e-3)
    return Choices(model=model)


def yaml_text(settings: dict[str, Any]) -> str:
    """Settings as a recipe's text."""
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, default_flow_style=None)


def goals() -> dict[str, str]:
    """What a run can be judged by: the name of the metric ("" for none), and what it says."""
    return {name: text for name, text in GOALS.items() if not name or name in METRICS}


def recipe_folder() -> Path | None:
    """Where the package's own recipes are: beside its code, or in the checkout that it runs from."""
    package = Path(dgemma.__file__).parent
    places = (package / "recipes", package.parents[1] / "recipes")
    return next((place for place in places if (place / "sudoku.yaml").is_file()), None)


@dataclass(frozen=True)
class Ready:
    """A recipe of the package's, with what it is for."""

    path: Path
    title: str
    about: str


_READY = (
    ("sudoku-finetune", "Sudoku", "A small model that has only read Python learns Sudoku in several ways beside each "
                                  "other. About an hour on two cores, the long variant more."),
    ("extraction", "Notes to JSON", "The same small model learns to turn short business texts into records. About 70 "
                                    "minutes of one core."),
    ("sudoku-pictures", "Sudokus in pictures", "Gives the bundled Sudoku model eyes: it reads and solves puzzles in "
                                               "pictures. Hours."),
)


def ready_recipes() -> list[Ready]:
    """The package's recipes that can be begun from the page, as far as they are there."""
    folder = recipe_folder()
    found = [] if folder is None else [Ready(folder / f"{name}.yaml", title, about) for name, title, about in _READY]
    return [one for one in found if one.path.is_file()]


def name_in(text: str) -> str:
    """The name that a recipe gives itself; raises DgemmaError for a text that is no mapping with a name."""
    try:
        data = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DgemmaError(f"the recipe is not valid YAML ({error})") from error
    name = data.get("name") if isinstance(data, dict) else None
    if not isinstance(name, str) or not name or Path(name).name != name or name.startswith("."):
        raise DgemmaError("the recipe needs a name that can be that of a folder, such as name: my-run")
    return name


def write_recipe(folder: Path, text: str, beside: Sequence[Path] = ()) -> Path:
    """Write a recipe into a folder, with others that it goes on from, and check it.

    Raises DgemmaError for what cannot be a recipe, with the setting that is wrong.
    """
    make_folder(folder)
    for other in beside:
        shutil.copyfile(other, folder / other.name)
    path = folder / ASKED
    with atomic_write(path) as written:
        written.write_text(text, encoding="utf-8")
    load_recipe(path)
    return path


def bases_of(text: str) -> list[Path]:
    """The package's recipes that a recipe goes on from, by their names."""
    found: list[Path] = []
    folder, data = recipe_folder(), yaml.safe_load(text)
    while folder is not None and isinstance(data, dict) and isinstance(data.get("model"), dict):
        name = data["model"].get("recipe")
        path = folder / str(name)
        if not isinstance(name, str) or Path(name).name != name or not path.is_file() or path in found:
            break
        found.append(path)
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    return found


def steps_of(path: Path) -> int | None:
    """How many steps a recipe's run will take; None where that depends on its data, or there are several runs."""
    recipes = list(load_recipe(path).values())
    return recipes[0].max_steps if len(recipes) == 1 else None


def changed(choices: Choices, **values: Any) -> Choices:
    """Other choices; a value that a field cannot have (an emptied number) is left as it was."""
    return dataclasses.replace(choices, **{name: value for name, value in values.items() if value is not None})
