"""Which files make a checkpoint, by their names: those that ship, safetensors with their index, GGUF files and parts.

Works on names and paths; reads no tensor. A repository on the hub is named as its folders and files are.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from dgemma.errors import CheckpointError
from dgemma.fields import is_there, read_json, shown
from dgemma.gguf.container import PART, part_names

BUNDLED_FOLDER = Path(__file__).resolve().parents[1] / "models"
_HUB_NAME = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?::(?P<tag>[^:\\\s]+))?")
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_QUANTISATION = re.compile(r"(?<![A-Z0-9])((?:UD-)?(?:(?:I?Q|TQ)\d+(?:_[A-Z0-9]+)*|BF16|FP?16|FP?32|"
                           r"(?:MX|NV)FP4(?:_MOE)?))(?![A-Z0-9])", re.IGNORECASE)
# GGUF files that hold no language model: a vision tower, and statistics that quantising takes.
_TOWER = "mmproj"
_NO_MODEL = (_TOWER, "imatrix")
# Of several vision towers: what they are trained in before what is as good and larger, or smaller and less good.
TOWER_TYPES = ("BF16", "F16", "F32", "Q8_0")
PREFERRED = "Q4_K_M"  # of several quantisations, the one that most people run
_LONGEST_NAME = 255  # bytes, of a file
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True)
class GGUFFiles:
    """One model among GGUF files: a single file, or the parts that it was split into, in order.

    ``stem`` is the name without ``.gguf`` and the part's number, ``parts`` how many files there should be.
    """

    stem: str
    files: tuple[str, ...]
    parts: int

    @property
    def complete(self) -> bool:
        return len(self.files) == self.parts

    @property
    def tag(self) -> str:
        """The quantisation as the file's name (or that of its folder) tells it; the bare name if it does not."""
        name = PurePosixPath(self.stem)
        for text in (name.name, *(str(parent.name) for parent in name.parents)):
            if found := _QUANTISATION.findall(text):
                return found[-1].upper()
        return name.name

    @property
    def missing(self) -> list[str]:
        """The names of the parts that are not among the files."""
        if self.parts == 1:
            return []
        present = {file.lower() for file in self.files}
        return [name for name in part_names(self.stem, self.parts) if name.lower() not in present]


def bundled_models() -> list[str]:
    """The names of the models that ship with the package, sorted."""
    return sorted(path.parent.name for path in BUNDLED_FOLDER.glob("*/config.json"))


def bundled_path(name: str) -> Path:
    return BUNDLED_FOLDER / name


def hub_name(name: str) -> tuple[str, str | None] | None:
    """``org/name`` or ``org/name:tag`` as repository and tag; None for what cannot be a name on the hub."""
    found = _HUB_NAME.fullmatch(name)
    return (found["repo"], found["tag"]) if found else None


def gguf_models(names: Iterable[str]) -> list[GGUFFiles]:
    """The models among files of these names, with ``/`` between folders; parts of one model are put together."""
    groups: dict[tuple[str, int], list[str]] = {}
    for name in sorted(names):
        base = PurePosixPath(name).name.lower()
        if not base.endswith(".gguf") or any(word in base for word in _NO_MODEL):
            continue
        part = PART.fullmatch(name)
        key = (part["stem"], int(part["count"])) if part else (name[: -len(".gguf")], 0)
        groups.setdefault(key, []).append(name)
    return [GGUFFiles(stem, tuple(files), max(parts, 1)) for (stem, parts), files in sorted(groups.items())]


def tower_files(names: Iterable[str], model: str) -> list[str]:
    """Of files of these names, the vision towers (mmproj) for the GGUF file ``model``, the first choice first.

    They are beside it, or at the top of its repository. The tower that is named after the model (`tower_name`) comes
    before others, and then `TOWER_TYPES` decides, as far as names tell the type.
    """
    here = PurePosixPath(model).parent
    own = tower_name(model).lower()

    def order(name: str) -> tuple[bool, int, bool, str]:
        path = PurePosixPath(name)
        return path.name.lower() != own, tower_rank(GGUFFiles(str(path.with_suffix("")), (name,), 1).tag), \
            path.parent != here, name

    return sorted((name for name in names if _TOWER in PurePosixPath(name).name.lower()
                   and name.lower().endswith(".gguf") and PurePosixPath(name).parent in (here, PurePosixPath("."))),
                  key=order)


def tower_name(model: str) -> str:
    """What the vision tower that belongs to one GGUF file, or to the first part of one, is called."""
    name = PurePosixPath(model).name
    part = PART.fullmatch(name)
    return f"{_TOWER}-{part['stem'] if part else PurePosixPath(name).stem}.gguf"


def tower_rank(type_name: str) -> int:
    """The place of a type among `TOWER_TYPES`; the last for any other."""
    return TOWER_TYPES.index(type_name) if type_name in TOWER_TYPES else len(TOWER_TYPES)


def find_tagged(models: Sequence[GGUFFiles], tag: str, loose: bool = True) -> list[GGUFFiles]:
    """The models that ``tag`` names: by quantisation, else by file name, else (``loose``) by any part of the name."""
    wanted = tag.lower()

    def names(model: GGUFFiles) -> set[str]:
        full = {model.stem.lower(), *(file.lower() for file in model.files)}
        return full | {PurePosixPath(name).name for name in full}

    return ([model for model in models if model.tag.lower() == wanted]
            or [model for model in models if wanted in names(model)]
            or [model for model in models if loose and wanted in model.stem.lower()])


def tag_of(model: GGUFFiles, models: Sequence[GGUFFiles]) -> str:
    """What to write after ``org/name:`` to mean this one of the models: its quantisation, or its file's name."""
    if sum(other.tag == model.tag for other in models) == 1:
        return model.tag
    return PurePosixPath(model.files[0]).name


def choose_gguf(models: Sequence[GGUFFiles], tag: str | None, repo: str, place: str) -> GGUFFiles:
    """The one model of a repository that ``tag`` names; without a tag the only one, or the usual one.

    Raises CheckpointError, listing what there is in ``place``, when it names none or several.
    """
    found = find_tagged(models, tag) if tag is not None else list(models)
    if tag is None and len(found) > 1:
        found = [model for model in found if model.tag == PREFERRED] or found
    if len(found) == 1:
        return found[0]
    tags = ", ".join(tag_of(model, models) for model in found or models)
    if not found:
        raise CheckpointError(f"{repo}: there is no GGUF file {tag!r} {place}; there are {tags}")
    raise CheckpointError(f"{repo}: {'several' if tag is None else f'{tag!r} can mean several'} GGUF models {place}: "
                          f"{tags}; name one, as in {repo}:{tag_of(found[0], models)}")


def checkpoint_files(names: Iterable[str]) -> list[str]:
    """Of a repository's files, those of its checkpoint in safetensors form: what is fetched, and removed, as one.

    No PyTorch pickles, no card and its pictures, nothing in folders; of the weights those that are read.
    """
    chosen = [name for name in names if "/" not in name and name.endswith((".json", ".jinja", ".safetensors"))]
    if SINGLE_FILE not in chosen:
        return chosen
    sharded = INDEX_FILE in chosen and any(_SHARD.fullmatch(name) for name in chosen)
    return [name for name in chosen if not name.endswith(".safetensors") or (name != SINGLE_FILE) == sharded]


def is_checkpoint(names: Iterable[str]) -> bool:
    """Whether files of these names are, or belong to, a checkpoint in safetensors form."""
    names = set(names)
    return "config.json" in names and (SINGLE_FILE in names or INDEX_FILE in names)


def weight_files(folder: Path) -> dict[Path, tuple[str, ...]]:
    """The safetensors files of a checkpoint folder, each with the tensors that the index says are in it.

    Where there is an index it says which files count, and a ``model.safetensors`` that it does not name is left aside
    (`stray_weights` tells); unless none of the files that it names are there, as where all small files of another
    checkpoint were copied. A single ``model.safetensors`` has no index, so its tuple is empty. The files need not
    exist. Raises CheckpointError when the folder does not exist, is a file, or names no safetensors.
    """
    if not folder.exists():
        raise CheckpointError(f"{folder}: no such folder")
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: this is a file; give the folder that holds config.json and the weights")
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    if not is_there(index):
        if single.is_file():
            return {single: ()}
        others = sorted(path.name for pattern in ("*.safetensors", "*.bin", "*.gguf") for path in folder.glob(pattern))
        found = f"; found {', '.join(others[:5])}" if others else ""
        raise CheckpointError(f"{folder}: no weights here: neither {SINGLE_FILE} nor {INDEX_FILE}{found}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(f, str) for f in weight_map.values()):
        raise CheckpointError(f"{index}: 'weight_map' must say for every tensor which file holds it")
    shards: dict[str, list[str]] = {}
    for tensor, file in weight_map.items():
        shards.setdefault(file, []).append(tensor)
    for file in shards:
        parts = PurePosixPath(file)
        if not file.isprintable() or "\\" in file or parts.is_absolute() or {"..", ""} & {*parts.parts, file} or (
                max(map(len, map(os.fsencode, parts.parts)), default=0) > _LONGEST_NAME):
            raise CheckpointError(f"{index}: 'weight_map' must name files in this folder, not {shown(file)}")
    if single.is_file() and not any((folder / file).is_file() for file in shards):
        return {single: ()}
    return {folder / file: tuple(shards[file]) for file in sorted(shards)}


def stray_weights(folder: Path, used: Iterable[Path]) -> str | None:
    """What to say of weights in a checkpoint folder that are not ``used``; None where there are none.

    A file that belongs to no model by its name (an adapter, a vision tower) is not meant.
    """
    used = list(used)
    names = [path.name for path in folder.iterdir() if path.is_file()]
    strays = [name for name in names if name.endswith(".safetensors") and folder / name not in used
              and not name.startswith(("adapter", "mmproj"))]
    strays += [name for model in gguf_models(names) for name in model.files]
    if INDEX_FILE in names and used == [folder / SINGLE_FILE] and SINGLE_FILE not in read_json(
            folder / INDEX_FILE).get("weight_map", {}).values():
        strays.append(INDEX_FILE)
    if not strays:
        return None
    listed = ", ".join(sorted(strays)[:5]) + (f" and {len(strays) - 5} more" if len(strays) > 5 else "")
    return (f"{folder}: the weights are those of {used[0].name if len(used) == 1 else INDEX_FILE}; what else is there "
            f"is left aside: {listed}")
