"""Running a recipe: the recipe that it goes on from first, then its variants one after the other, then one report.

Works on recipe files and folders of runs; each run is a `Trainer`'s.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

from dgemma.errors import DgemmaError
from dgemma.model import Parts
from dgemma.train.checks.plan import Plan, recipe_plan
from dgemma.train.data.sources import Source, few, longest_context, source_of
from dgemma.train.parallel.distributed import Ranks
from dgemma.train.recipe import Recipe, base_recipe, beginning, load_recipe
from dgemma.train.runs.run import RECIPE, located, settings_of, with_defaults
from dgemma.train.runs.state import parts_of

Report = Callable[[str], None]
Progress = Callable[[int, int], None]


def train(path: Path, out: Path, ranks: Ranks, report: Report = print, progress: Progress | None = None) -> bool:
    """Train by the recipe at ``path`` in the folder ``out``; whether it is finished (and not stopped).

    Variants have folders of their own in it. What is finished already, with the same settings, is not trained again.
    A recipe to go on from is trained beside ``out`` in a folder of its own name. ``progress(done_bytes, total_bytes)``
    is called while weights are read.
    """
    from dgemma.train.trainer import Trainer

    recipes = load_recipe(path)
    for recipe in recipes.values():
        beginning(recipe)  # all that is wrong with it is told before hours of training it
    folders = {name: out / name if name else out for name in recipes}
    for name, recipe in recipes.items():
        folder = folders[name]
        if is_finished(folder, recipe):
            report(f"{folder}: finished already; to go on raise max_steps, to begin anew choose another --out folder")
            continue
        _not_in_the_way(path, folder, recipe)
        base = _base_of(recipe, out, ranks, report, progress)
        if base is None and recipe.base is not None:
            return False
        if name:
            report(f"variant {name}")
        if not Trainer(recipe, folder, ranks=ranks, base=base, progress=progress).train():
            return False
    if len(recipes) > 1 and ranks.is_main:
        from dgemma.train.log.report import write_comparison

        title = next(iter(recipes.values())).name
        report(f"all variants are done; report in {write_comparison(out, folders, title=title)}")
    return True


def plans(path: Path, ranks: Ranks) -> dict[str, Plan]:
    """How much memory every variant of a recipe will take, by name; the data is read, weights are not."""
    found = {}
    for name, recipe in load_recipe(path).items():
        parts, source = glimpse(recipe)
        found[name] = recipe_plan(recipe, parts.config, parts.source, longest_context(source), ranks.device,
                                  ranks.world)
    return found


def glimpse(recipe: Recipe, report: Report = lambda text: None) -> tuple[Parts, Source]:
    """What a recipe begins with, weights aside, and its examples; of what is made on the way only a few."""
    parts = parts_of(beginning(recipe))  # its base may not be trained yet
    with tempfile.TemporaryDirectory() as folder:
        return parts, source_of(few(recipe), parts.tokenizer, parts.config, parts.generation_config, Path(folder),
                                report)


def is_finished(folder: Path, recipe: Recipe) -> bool:
    """Whether a folder holds the finished run of a recipe with these settings."""
    import yaml

    try:
        finished = json.loads((folder / "run.json").read_text(encoding="utf-8"))["finished"]
        settings = yaml.safe_load((folder / RECIPE).read_text(encoding="utf-8"))
        return bool(finished) and located(with_defaults(settings, recipe)) == located(settings_of(recipe))
    except FileNotFoundError:
        return False
    except (OSError, ValueError, KeyError, TypeError, RecursionError, yaml.YAMLError) as error:
        raise DgemmaError(f"{folder}: is no folder of a run ({error}); choose another --out") from error


def _base_of(recipe: Recipe, out: Path, ranks: Ranks, report: Report, progress: Progress | None) -> Path | None:
    """The best checkpoint of the recipe to go on from, trained first if need be; None if there is none, or if that was
    stopped."""
    if recipe.base is None:
        return None
    base = base_recipe(recipe.base)
    folder = out.parent / base.name
    if folder.resolve() == out.resolve():
        raise DgemmaError(f"{recipe.base}: its run would be in {out}, too: give it another name")
    if not is_finished(folder, base):
        report(f"first the recipe that it goes on from: {recipe.base}")
    return folder / "best" if train(recipe.base, folder, ranks, report, progress) else None


def _not_in_the_way(path: Path, folder: Path, recipe: Recipe) -> None:
    """Raises DgemmaError where a run in ``folder`` would replace what no run has written."""
    import yaml

    if (folder / RECIPE).exists() and (folder / RECIPE).samefile(path) and yaml.safe_load(
            path.read_text(encoding="utf-8")) != settings_of(recipe):
        raise DgemmaError(f"{path}: a run in {folder} would write its own recipe in this one's place: choose another "
                          "--out folder")
    ours = any((folder / name).exists() for name in ("plan.json", "run.json", "metrics.jsonl", "state.safetensors"))
    if found := [name for name in ("best", "last") if (folder / name).exists() and not ours]:
        raise DgemmaError(f"{folder / found[0]}: exists, and is no run's: choose another --out folder")
