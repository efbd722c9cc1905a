"""The models on this machine that the studio can load: bundled ones, the hub's cache, the user's own, training runs'.

Works on: folders and the files' headers. Knows nothing of: pages, what runs.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from dgemma.errors import CheckpointError, DgemmaError, describe
from dgemma.formats import short_count, size_text
from dgemma.inspect import inspect_checkpoint
from dgemma.memory import available_memory, machine_memory
from dgemma.memory.local import fits, memory_needed
from dgemma.studio.store import Store
from dgemma.weights.files import GGUFFiles, checkpoint_files, gguf_models, is_checkpoint
from dgemma.weights.hub.cache import GGUF, SAFETENSORS, LocalModel, local_models
from dgemma.weights.hub.transfer import size_of

Origin = Literal["bundled", "hub", "yours", "run"]
CONTEXT = 8192  # tokens that a conversation is reckoned with, or the longest that a model takes
_PATHS, _LAST = "model_paths", "last_model"  # of the store's settings
_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Here:
    """A model that is here. ``title`` is what it is called, ``model.name`` what loads it."""

    title: str
    origin: Origin
    model: LocalModel


@dataclass(frozen=True)
class Fit:
    """Whether a model fits this machine: ``verdict`` as `dgemma.memory.local.fits` has it, ``why`` in a sentence.

    ``facts`` is what it is, ``problem`` what keeps it from being loaded. ``needed`` counts bytes that it takes beside
    this program, None if nobody can tell.
    """

    verdict: str
    why: str
    facts: str = ""
    needed: int | None = None
    problem: str = ""


def run_folders(store: Store) -> tuple[Path, ...]:
    """Where training runs are looked for: those of the command line's present folder, and the studio's."""
    return Path("runs").absolute(), store.path.parent / "training" / "runs"


def models_here(store: Store, runs: Iterable[Path]) -> list[Here]:
    """All of them: bundled, of the hub, the user's, and the best checkpoints of training runs in these folders."""
    found = [Here(model.name, "bundled" if model.bundled else "hub", model) for model in local_models()]
    for path in own_paths(store):
        found += [Here(title_of(model.name), "yours", model) for model in _models_at(path)]
    for best in _bests(runs):
        found += [Here(title_of(model.name), "run", model) for model in _models_at(best)]
    return list({str(one.model.name): one for one in found}.values())


def adapters_here(runs: Iterable[Path]) -> list[Path]:
    """The adapters that training runs in these folders have made."""
    return [best for best in _bests(runs) if (best / _WEIGHTS).is_file()]


def own_paths(store: Store) -> list[Path]:
    """What the user has added."""
    return [Path(path) for path in store.setting(_PATHS, [])]


def add_path(store: Store, words: str) -> list[LocalModel]:
    """Add a folder, or a GGUF file, and return the models there. Raises DgemmaError where there are none."""
    if not words.strip():
        raise DgemmaError("which folder, or GGUF file?")
    path = Path(words.strip()).expanduser()
    if not path.exists():
        raise DgemmaError(f"{path}: no such file or folder")
    path = path.resolve()
    found = list(_models_at(path))
    if not found:
        raise DgemmaError(f"{path}: no model here: neither config.json with safetensors nor GGUF files, nor in "
                          "the folders in it")
    if path not in own_paths(store):
        store.set_setting(_PATHS, [*map(str, own_paths(store)), str(path)])
    return found


def forget_path(store: Store, path: Path) -> None:
    """Show what the user has added no more; its files stay."""
    store.set_setting(_PATHS, [str(one) for one in own_paths(store) if one != path and one not in path.parents])


def note_last(store: Store, name: str) -> None:
    """Remember what was loaded, for the next start."""
    store.set_setting(_LAST, name)


def last_model(store: Store, runs: Iterable[Path]) -> str | None:
    """What was loaded last, if it is still here; nothing is ever downloaded for it."""
    name = store.setting(_LAST)
    return name if any(here.model.name == name and here.model.complete for here in models_here(store, runs)) else None


def title_of(name: str) -> str:
    """What a model is called for people: a name as it is, of a path the file's or the folder's name."""
    path = Path(name)
    if not path.is_absolute():
        return name
    if path.suffix.lower() == ".gguf":
        return path.stem
    return f"{path.parent.name} ({path.name})" if path.name in ("best", "last") else path.name


def fit_of(model: LocalModel, device: torch.device) -> Fit:
    """Whether a model fits, from its files' headers. ``device``: where it would run. Never raises for a bad model."""
    available, total = machine_memory()
    if device.type == "cuda":
        available = available_memory(device)
        total = torch.cuda.get_device_properties(device).total_memory
    if not model.complete:
        needed = memory_needed(model)
        about = "not all of it has come yet" if needed is None else f"it will need about {size_text(needed)}"
        return Fit(fits(needed, available, total), about)
    try:
        facts, needed, parts, problem = _inspected(model.path, _stamp(model.path), device.type)
    except DgemmaError as error:
        return Fit("no", "it cannot be read", problem=str(error))
    verdict = fits(needed, available, total)
    there = "" if available is None or total is None else (
        f"; {size_text(available)} of {size_text(total)} are available" + (" on the GPU" * (device.type == "cuda")))
    return Fit(verdict, f"needs {size_text(needed)}: {parts}{there}", facts, needed, problem)


def _stamp(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_mtime_ns, stat.st_size


@functools.lru_cache(maxsize=200)
def _inspected(path: Path, stamp: tuple[int, int], device: str) -> tuple[str, int, str, str]:
    """What a model is, what it takes of memory, of what that is made, and what is wrong with it."""
    report = inspect_checkpoint(path, [CONTEXT])
    config = report.config
    longest = config.max_position_embeddings
    if longest < CONTEXT:
        report = inspect_checkpoint(path, [longest])
    kind = "bfloat16" if device == "cuda" else config.dtype
    need = next((need for need in report.memory if need.dtype in ("packed" if device == "cpu" else kind, kind)),
                report.memory[0])
    parts = [(need.weights, "weights"), (need.kv_cache, f"keys and values of {need.context:,} tokens"),
             (need.working, "to work with"), (need.vision, "to see pictures")]
    told = ", ".join(f"{size_text(size)} {what}" for size, what in parts if size)
    problem = describe(report.problems) if report.problems else ""
    stored = report.stored[0].dtype if report.stored and report.format != "gguf" else ""  # a GGUF's type is known
    about = [f"{short_count(sum(report.parameters.values()))} parameters", stored, f"{longest:,} tokens of context",
             *(["sees pictures"] if report.tower is not None else [])]
    return ", ".join(filter(None, about)), need.total - need.program, told, problem


def _bests(runs: Iterable[Path]) -> Iterator[Path]:
    for folder in runs:
        yield from sorted(path.resolve() for path in folder.glob("*/best") if path.is_dir())


def _models_at(path: Path) -> Iterator[LocalModel]:
    """The model that a file or folder is, or those in it and in the folders in it."""
    try:
        if path.is_file():
            yield from _of_files(path.parent, [path.name])
            return
        folders = [path, *sorted(inner for inner in path.iterdir() if inner.is_dir())] if path.is_dir() else []
        for folder in folders:
            yield from _of_files(folder, sorted(file.name for file in folder.iterdir() if file.is_file()))
    except OSError as error:
        raise CheckpointError(f"{error.filename or path}: cannot be read ({error.strerror or error})") from error


def _of_files(folder: Path, names: list[str]) -> Iterator[LocalModel]:
    if is_checkpoint(names):
        files = checkpoint_files(names)
        size = sum(size_of(folder / name) for name in files)
        yield LocalModel(str(folder), SAFETENSORS, None, size, size, True, folder, tuple(files))
    for gguf in gguf_models(names):
        yield _of_gguf(folder, gguf)


def _of_gguf(folder: Path, gguf: GGUFFiles) -> LocalModel:
    size = sum(size_of(folder / name) for name in gguf.files)
    return LocalModel(str(folder / gguf.files[0]), GGUF, gguf.tag, size, size if gguf.complete else None,
                      gguf.complete, folder / gguf.files[0], gguf.files)
