"""A run's folder: what was run, on what, and how far it came.

Works on recipes and files; knows nothing of networks and steps.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dgemma import __version__
from dgemma.bench import processor_text
from dgemma.errors import DgemmaError
from dgemma.files import atomic_write, json_bytes
from dgemma.machine import peak_memory
from dgemma.train.recipe import DATA, Recipe
from dgemma.weights.save import write_safetensors

STATE = "state.safetensors"
RECIPE = "recipe.yaml"


class RunFolder:
    """A run's folder as the run writes it (`dgemma.train.log.history` reads it): its files and its lock."""

    def __init__(self, folder: Path, recipe: Recipe):
        self.folder, self._recipe = folder, recipe
        self.settings = settings_of(recipe)

    def write(self, name: str, data: Any) -> None:
        """One JSON file; readers see the old one or the whole new one."""
        with atomic_write(self.folder / name) as beside:
            beside.write_bytes(json_bytes(data, indent=2) + b"\n")

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other processes from training in this folder; raises DgemmaError where one does."""
        path = self.folder / ".lock"
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except (OSError, NotImplementedError) as error:  # that of a lock that is held is an OSError, too
            if not os.access(path if path.exists() else self.folder, os.W_OK):
                raise DgemmaError(f"{path}: cannot be written") from error
            if isinstance(error, Timeout) and path.exists():
                raise DgemmaError(f"{self.folder}: another process is training in this folder") from error
            # Otherwise it is a file system without locks.
        try:
            yield
        finally:
            lock.release()

    def memory(self, device: torch.device) -> int:
        """The most bytes that this process has held so far, on the GPU if it trains on one."""
        if device.type == "cuda":
            return torch.cuda.max_memory_allocated(device)
        return peak_memory()

    def changes(self, before: Mapping[str, Any]) -> Iterator[str]:
        """What another recipe said differently, setting by setting."""
        old, new = dict(_flat(with_defaults(before, self._recipe))), dict(_flat(self.settings))
        for name in sorted(old.keys() | new.keys()):
            if located(old.get(name)) != located(new.get(name)):
                yield f"{name} was {old.get(name)!r}, is {new.get(name)!r}"

    def describe(self, device: torch.device, **facts: Any) -> None:
        """``run.json`` and ``recipe.yaml``, for the report and for people."""
        self.write("run.json", {
            "name": self._recipe.name,
            "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else processor_text(),
            "versions": {"dgemma": __version__, "torch": torch.__version__, "python": platform.python_version()},
            **facts, "peak_bytes": self.memory(device)})
        with atomic_write(self.folder / RECIPE) as beside:
            beside.write_text(yaml.safe_dump(self.settings, sort_keys=False), encoding="utf-8")

    def save(self, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
        """Write what a run that goes on needs in the place of the last state; raises DgemmaError where it cannot."""
        write_safetensors(self.folder / STATE, tensors, {"run": json.dumps(about)})

    def saved(self) -> tuple[dict[str, Any] | None, dict[str, Tensor]]:
        """What `save` was given last; None and nothing in a new folder. Raises DgemmaError for a damaged state."""
        path = self.folder / STATE
        if not path.exists():
            return None, {}
        try:
            with safe_open(path, "pt") as file:
                about = json.loads((file.metadata() or {})["run"])
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (it is no dict)
        except (SafetensorError, OSError, KeyError, ValueError, RecursionError) as error:
            raise DgemmaError(f"{path}: is damaged ({error}); remove it to start anew") from error
        return about, tensors


def is_finished(folder: Path, recipe: Recipe) -> bool:
    """Whether a folder holds the finished run of a recipe with these settings."""
    try:
        finished = json.loads((folder / "run.json").read_text(encoding="utf-8"))["finished"]
        settings = yaml.safe_load((folder / RECIPE).read_text(encoding="utf-8"))
        return bool(finished) and located(with_defaults(settings, recipe)) == located(settings_of(recipe))
    except FileNotFoundError:
        return False
    except (OSError, ValueError, KeyError, TypeError, RecursionError, yaml.YAMLError) as error:
        raise DgemmaError(f"{folder}: is no folder of a run ({error}); choose another --out") from error


def not_in_the_way(path: Path, folder: Path, recipe: Recipe) -> None:
    """Raises DgemmaError where a run in ``folder`` by the recipe at ``path`` would replace what no run has written."""
    if (folder / RECIPE).exists() and (folder / RECIPE).samefile(path) and yaml.safe_load(
            path.read_text(encoding="utf-8")) != settings_of(recipe):
        raise DgemmaError(f"{path}: a run in {folder} would write its own recipe in this one's place: choose another "
                          "--out folder")
    ours = any((folder / name).exists() for name in ("plan.json", "run.json", "metrics.jsonl", STATE))
    if found := [name for name in ("best", "last") if (folder / name).exists() and not ours]:
        raise DgemmaError(f"{folder / found[0]}: exists, and is no run's: choose another --out folder")


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """A recipe as plain values, every default said; files are named as seen from where the program runs."""
    settings = plain(dataclasses.asdict(recipe))
    kind = next(name for name, data in DATA.items() if isinstance(recipe.data, data))
    return {**{name: value for name, value in settings.items() if value is not None},
            "data": {"kind": kind, **settings["data"]}}


def with_defaults(settings: Mapping[str, Any], recipe: Recipe) -> dict[str, Any]:
    """The settings of an earlier run with those that did not exist then: it was as if they had their defaults."""
    filled = {**{name: value for name, value in _defaults(recipe).items() if value is not None}, **settings}
    for section in ("data", "objective", "optimizer", "evaluation", "adapter"):
        if getattr(recipe, section) is not None and isinstance(settings.get(section), Mapping):
            filled[section] = {**_defaults(getattr(recipe, section)), **settings[section]}
    return filled


def _defaults(settings: Any) -> dict[str, Any]:
    """The plain values that a section's settings have where nothing is said."""
    return plain({field.name: field.default for field in dataclasses.fields(settings)
                  if field.default is not dataclasses.MISSING})


def plain(value: Any) -> Any:
    """Mappings and lists as YAML writes them."""
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def located(value: Any) -> Any:
    """Settings that compare: what names a file or folder that is there (or a function in one), as where that lies."""
    if isinstance(value, Mapping):
        return {name: located(item) for name, item in value.items()}
    if isinstance(value, list):
        return [located(item) for item in value]
    if isinstance(value, str):
        file, colon, function = value.rpartition(":")
        for path, rest in ((value, ""), (file, colon + function)):
            if path and Path(path).exists():
                return f"{Path(path).resolve()}{rest}"
    return value


def _flat(settings: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value
