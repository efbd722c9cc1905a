"""Which vision tower a model sees with: its checkpoint's own, one in a GGUF file beside it, one from elsewhere.

Works on names, configs and headers; a tower is read when somebody needs it (`Tower.load`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dgemma.config import ModelConfig, VisionConfig, load_model_config
from dgemma.errors import CheckpointError, DgemmaError
from dgemma.nn.vision import Vision
from dgemma.weights.files import hub_name
from dgemma.weights.gguf_vision import Mmproj, load_mmproj, open_mmproj, tower_beside
from dgemma.weights.load import empty_vision, load_vision, match_vision

if TYPE_CHECKING:
    from dgemma.weights.hub.transfer import Downloads


@dataclass(frozen=True)
class Tower:
    """A vision tower on disk. ``load(device, dtype)`` reads it; ``path`` is its GGUF file or its checkpoint folder.

    ``nbytes`` is what it takes as it is stored, where that is known.
    """

    path: Path
    config: VisionConfig
    load: Callable[[torch.device, torch.dtype | None], Vision]
    nbytes: int | None = None


def find_tower(source: Path, config: ModelConfig, mmproj: str | Path | None = None, vision: str | Path | None = None,
               downloads: Downloads | None = None) -> Tower | None:
    """The tower of the model whose checkpoint is ``source``; None where it has none.

    ``mmproj`` is a GGUF file with one, ``vision`` a checkpoint folder or hub repository of which only the tower is
    taken; without either it is the checkpoint's own, or what lies beside a GGUF file (`tower_beside`). ``downloads`` as
    in `locate`. Raises CheckpointError for a tower from elsewhere that is incomplete or does not fit.
    """
    if mmproj is not None and vision is not None:
        raise DgemmaError("mmproj and vision both say where the vision tower is: give one of them")
    if mmproj is not None:
        return _of_mmproj(open_mmproj(mmproj, config.hidden_size), config.hidden_size)
    if vision is not None:
        return _from_elsewhere(vision, config, downloads)
    if source.is_file():
        found = tower_beside(source, config.hidden_size)
        return found and _of_mmproj(found, config.hidden_size)
    return None if config.vision is None else _of_folder(source, config, config.vision)


def _of_mmproj(mmproj: Mmproj, width: int) -> Tower:
    return Tower(mmproj.file.path, mmproj.config, partial(load_mmproj, mmproj, width), mmproj.nbytes)


def _of_folder(folder: Path, config: ModelConfig, vision: VisionConfig) -> Tower:
    return Tower(folder, vision, partial(load_vision, folder, config))


def _from_elsewhere(name: str | Path, config: ModelConfig, downloads: Downloads | None) -> Tower:
    folder = _located(name, downloads)
    theirs = load_model_config(folder)
    if theirs.vision is None:
        raise CheckpointError(f"{folder}: this checkpoint has no vision tower: its config.json has no vision_config")
    if theirs.hidden_size != config.hidden_size:
        raise CheckpointError(f"{folder}: this vision tower is for another model: what it makes is "
                              f"{theirs.hidden_size:,} wide, and this model's embeddings are {config.hidden_size:,}")
    match_vision(folder, empty_vision(theirs.vision, theirs.hidden_size))
    return _of_folder(folder, replace(config, vision=theirs.vision), theirs.vision)


def _located(name: str | Path, downloads: Downloads | None) -> Path:
    """The folder of a checkpoint that a tower is taken from."""
    from dgemma.weights.hub.transfer import ProgressLines

    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise CheckpointError(f"{path}: this is a file; a vision tower is taken from a checkpoint folder or a hub "
                              "repository, or from a GGUF file with --mmproj (mmproj=)")
    on_hub = hub_name(name) if isinstance(name, str) else None
    if on_hub is None or on_hub[1]:
        raise CheckpointError(f"{name}: no such folder; a repository on the hub, whose vision tower is taken, is "
                              "written org/name")
    from dgemma.weights.hub.vision import locate_tower

    return locate_tower(on_hub[0], downloads or ProgressLines)
