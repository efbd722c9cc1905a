"""Converting a checkpoint to a GGUF file with packed weights, a few rows at a time; its vision tower to one beside it.

Works on safetensors folders and GGUF files: reads pieces of tensors, packs them, writes them. Holds neither a network
nor a whole tensor. `mixture_type` decides which tensor gets which type, by llama.cpp's rules.
"""

from __future__ import annotations

import math
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dgemma.config import ARCHITECTURE, VisionConfig, load_generation_config, load_model_config
from dgemma.errors import CheckpointError, DgemmaError, refuse
from dgemma.files import atomic_write, free_space, read_pieces
from dgemma.formats import size_text
from dgemma.gguf import keys
from dgemma.gguf import vision as vision_keys
from dgemma.gguf.blocks import BLOCK_TYPES, BlockType, dequantize
from dgemma.gguf.container import is_gguf
from dgemma.gguf.quantize import quantize
from dgemma.gguf.reader import read_gguf
from dgemma.gguf.tokenizer import mended_types, tokenizer_metadata
from dgemma.gguf.writer import TensorEntry, header, padding
from dgemma.weights.files import TOWER_TYPES, tower_name
from dgemma.weights.gguf_model import match_gguf, open_gguf
from dgemma.weights.gguf_vision import plane_order, tower_beside
from dgemma.weights.load import DTYPES, StoredTensor, empty_vision, match, match_vision, network_shapes, read_headers
from dgemma.weights.names import is_vision

_PIECE = 4 << 20  # weights converted at a time


@dataclass(frozen=True)
class Mixture:
    """What most matrices become, what the sensitive ones do, and llama.cpp's number for the whole."""

    name: str
    base: str
    better: str
    file_type: int


MIXTURES: dict[str, Mixture] = {mixture.name: mixture for mixture in (
    Mixture("Q4_K_M", "Q4_K", "Q6_K", 15),
    Mixture("Q5_K_M", "Q5_K", "Q6_K", 17),
    Mixture("Q6_K", "Q6_K", "Q6_K", 18),
    Mixture("Q8_0", "Q8_0", "Q8_0", 7),
    Mixture("BF16", "BF16", "BF16", 32),
)}
_TOWERS = (Mixture("F16", "F16", "F16", 1), Mixture("F32", "F32", "F32", 0))  # what towers may be, too
# For rows that are no whole number of 256-weight blocks: the next larger type in blocks of 32.
_NARROW = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}

# progress(tensor's name, bytes of the source read so far, all of them)
Progress = Callable[[str, int, int], None]
# A change of a tensor on its way: rows as float32 [n, K] and the first one's place among all rows -> the rows to write
Change = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class TypeTotal:
    """What the tensors of one type come to."""

    tensors: int
    weights: int
    nbytes: int


@dataclass(frozen=True)
class Summary:
    """What was written: totals by type, the file's size, and what a user should know about it.

    ``requantized`` are the types that were packed already in the source and were packed anew; ``left_out`` tensors of
    the source that no file holds (a vision tower that was not wanted); ``tower`` is the file that the vision tower went
    to, ``tower_bytes`` its size.
    """

    types: dict[str, TypeTotal]
    nbytes: int
    seconds: float
    left_out: int
    requantized: tuple[str, ...]
    tower: Path | None = None
    tower_bytes: int = 0

    @property
    def weights(self) -> int:
        return sum(total.weights for total in self.types.values())

    @property
    def bits_per_weight(self) -> float:
        return 8 * sum(total.nbytes for total in self.types.values()) / self.weights


def convert(source: Path, out: Path, mixture: str = "Q4_K_M", *, name: str | None = None, force: bool = False,
            progress: Progress | None = None, changes: Mapping[str, Change] | None = None,
            tower: str | None = "BF16") -> Summary:
    """Write the checkpoint ``source`` (a safetensors folder or a GGUF file) as the GGUF file ``out``.

    ``mixture`` is a key of `MIXTURES`; ``name`` what the file calls the model (default: what the source is called).
    Tensors that have the right type already are copied byte for byte, but for those that ``changes`` (by GGUF name)
    has a function for; of a convolution this gets whole filters as rows. The vision tower, if the source has one, goes
    to a file of its own beside ``out`` (`files.tower_name`), its matrices as ``tower``, one of `files.TOWER_TYPES`
    (None: it is left out). A file appears when it is complete, and whatever interrupts this, nothing unfinished is left
    behind. Raises CheckpointError for a source that is damaged, incomplete or not a DiffusionGemma, and DgemmaError
    when a file exists (without ``force``), is the source, or cannot be written.
    """
    began = time.monotonic()
    source, out = Path(source), Path(out)
    if mixture not in MIXTURES:
        raise DgemmaError(f"there is no type {mixture}; there are {', '.join(MIXTURES)}")
    if tower is not None and tower not in TOWER_TYPES:
        raise DgemmaError(f"there is no type {tower} for a vision tower; there are {', '.join(TOWER_TYPES)}")
    of_file = is_gguf_file(source)
    _check_out(source, out, force)
    opened = _open_gguf(source) if of_file else _open_folder(source)
    seeing = None if tower is None else _tower_of_gguf(source) if of_file else _tower_of_folder(source)
    beside = out.with_name(tower_name(out.name))
    if seeing is not None and seeing.file is not None and beside.exists() and beside.samefile(seeing.file):
        if any(tensor.name in (changes or {}) for tensor in seeing.tensors):
            raise DgemmaError(f"{beside}: this is the source's own vision tower, which is to be changed: give another "
                              "name to write to")
        seeing = None  # it is where it should be
    metadata = {**opened.metadata, **_file_type(MIXTURES[mixture].file_type)}
    if name:
        metadata["general.name"] = name
    chosen = mixture_types({tensor.name: tensor.shape for tensor in opened.tensors}, mixture)
    files = [_Target(out, metadata, opened.tensors, chosen)]
    if seeing is not None and tower is not None:
        _check_out(source, beside, force)
        types = {tensor.name: BLOCK_TYPES[tower_type(tensor.name, tensor.shape, tower)] for tensor in seeing.tensors}
        file_type = _file_type(next(kind.file_type for kind in (*MIXTURES.values(), *_TOWERS) if kind.name == tower))
        named = {key: metadata[key] for key in ("general.name",) if key in metadata}
        files.append(_Target(beside, {**seeing.metadata, **named, **file_type}, seeing.tensors, types))
    check_space(out, sum(target.size for target in files))
    tell, done = progress or (lambda name, done, total: None), 0
    total = sum(tensor.nbytes for target in files for tensor in target.tensors)
    for target in files:
        done = _write(target, changes or {}, lambda name, done: tell(name, done, total), done)
    requantized = {tensor.type.name for tensor in opened.tensors if tensor.type.name not in DTYPES
                   and (tensor.type != chosen[tensor.name] or tensor.name in (changes or {}))}
    return Summary(_totals(files[0].entries), files[0].size, time.monotonic() - began,
                   0 if seeing is not None else opened.left_out, tuple(sorted(requantized)),
                   beside if seeing is not None else None, sum(target.size for target in files[1:]))


def _file_type(number: int) -> dict[str, int]:
    return {"general.file_type": number, "general.quantization_version": 2}


def tower_type(name: str, shape: tuple[int, ...], type_name: str) -> str:
    """The type of a vision tower's tensor (by its GGUF name) where matrices are to be ``type_name``.

    As llama.cpp has it: norms, the table of positions and what standardises stay F32. The convolution over patches is
    never packed; it and matrices whose rows are no whole number of blocks are BF16 then, which loses nothing of what
    was trained in that.
    """
    if len(shape) < 2 or name == vision_keys.POSITIONS:
        return "F32"
    block = BLOCK_TYPES[type_name].block
    return type_name if block == 1 or (len(shape) == 2 and shape[-1] % block == 0) else "BF16"


def is_gguf_file(source: Path) -> bool:
    """Whether a checkpoint is a GGUF file and not a folder; raises CheckpointError for any other file."""
    if source.is_file() and not is_gguf(source):
        raise CheckpointError(f"{source}: this file is no GGUF file; for safetensors give the folder that holds them")
    return source.is_file()


def mixture_types(shapes: Mapping[str, tuple[int, ...]], mixture: str) -> dict[str, BlockType]:
    """The type of every tensor (by its GGUF name) of a model in a mixture; ``shapes`` in the order of the layers.

    As llama.cpp has it: vectors and the router stay F32. The embedding, which is the head too, gets the better type,
    and so do the down projections and the value projections of the first and last eighth and every third between;
    value projections are counted by themselves, for full layers have none.
    """
    kind = MIXTURES[mixture]
    values = [name for name in shapes if name.endswith(".attn_v.weight")]
    layers = 1 + max((found[0] for name in shapes if (found := keys.block_and_part(name))), default=0)

    def chosen(name: str, shape: tuple[int, ...]) -> str:
        block = keys.block_and_part(name)
        if len(shape) < 2 or name.endswith(("_norm.weight", ".ffn_gate_inp.weight")):
            return "F32"
        if name == "token_embd.weight":
            better = True
        elif name.endswith(".attn_v.weight"):
            better = _worth_more(values.index(name), len(values))
        elif block and block[1] in ("ffn_down.weight", "ffn_down_exps.weight"):
            better = _worth_more(block[0], layers)
        else:
            better = False
        return fitting(kind.better if better else kind.base, shape[-1])

    return {name: BLOCK_TYPES[chosen(name, shape)] for name, shape in shapes.items()}


def fitting(type_name: str, width: int) -> str:
    """The type itself, or the one that takes its place where rows are ``width`` long and no whole number of blocks."""
    if width % BLOCK_TYPES[type_name].block == 0:
        return type_name
    return _NARROW[type_name] if width % 32 == 0 else "F16"


def _worth_more(i: int, n: int) -> bool:
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


def _totals(entries: Sequence[TensorEntry]) -> dict[str, TypeTotal]:
    """By type, those that take most first."""
    totals: dict[str, TypeTotal] = {}
    for entry in entries:
        before = totals.get(entry.type.name, TypeTotal(0, 0, 0))
        totals[entry.type.name] = TypeTotal(before.tensors + 1, before.weights + entry.weights,
                                            before.nbytes + entry.nbytes)
    return dict(sorted(totals.items(), key=lambda item: -item[1].nbytes))


def _check_out(source: Path, out: Path, force: bool) -> None:
    if out.is_dir():
        raise DgemmaError(f"{out}: this is a folder; give the name of the file to write, such as {out / 'model.gguf'}")
    if not out.parent.is_dir():
        raise DgemmaError(f"{out}: cannot be written: there is no folder {out.parent}")
    if out.exists():
        parts = read_gguf(source).files if source.is_file() else source.glob("*")
        if any(part.exists() and out.samefile(part) for part in parts):
            raise DgemmaError(f"{out}: this is the checkpoint itself; give another name to write to")
        if not force:
            raise DgemmaError(f"{out}: this file exists; --force replaces it")


def check_space(out: Path, size: int) -> None:
    """Raises DgemmaError when the disk has not ``size`` bytes free for ``out``."""
    try:
        free = free_space(out.parent)
    except OSError:
        return  # writing will tell
    if free < size:
        raise DgemmaError(f"{out}: {size_text(size)} are needed, and {size_text(free)} are free on that disk")


@dataclass(frozen=True)
class _Stored(TensorEntry):
    """A tensor of the source, under its GGUF name; ``values`` if it stands in no file but is made here."""

    file: Path
    offset: int
    called: str  # the source's own name for it
    values: bytearray | None = None


@dataclass(frozen=True)
class _Opened:
    """A source: its tensors in the order to write them in, and the metadata of the file to be.

    ``file`` is where a vision tower of its own stands.
    """

    metadata: dict[str, Any]
    tensors: list[_Stored]
    left_out: int = 0
    file: Path | None = None


@dataclass(frozen=True)
class _Target:
    """A file to be written."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Sequence[_Stored]
    types: Mapping[str, BlockType]

    @cached_property
    def entries(self) -> list[TensorEntry]:
        return [TensorEntry(tensor.name, tensor.shape, self.types[tensor.name]) for tensor in self.tensors]

    @cached_property
    def head(self) -> bytes:
        return header(self.metadata, self.entries)

    @property
    def size(self) -> int:
        return len(self.head) + sum(entry.nbytes + padding(entry.nbytes) for entry in self.entries)


def _write(target: _Target, changes: Mapping[str, Change], progress: Callable[[str, int], None], done: int) -> int:
    """Write a file; ``done`` are the bytes of the source read before it, and with what it took returned."""
    with atomic_write(target.path) as beside, beside.open("wb") as file:
        file.write(target.head)
        for tensor, entry in zip(target.tensors, target.entries, strict=True):
            progress(tensor.name, done)
            for nbytes, data in _pieces(tensor, entry.type, changes.get(tensor.name)):
                file.write(data.numpy())  # type: ignore[arg-type]  (a buffer)
                done += nbytes
                progress(tensor.name, done)
            file.write(bytes(padding(entry.nbytes)))
    return done


def _pieces(tensor: _Stored, type: BlockType, change: Change | None) -> Iterator[tuple[int, Tensor]]:
    """The tensor's bytes as ``type``, a few rows at a time, each with the bytes of the source that it took.

    Raises CheckpointError for NaN and infinite numbers.
    """
    # A row of a convolution is a whole filter.
    width = math.prod(tensor.shape[1:]) if len(tensor.shape) == 4 else tensor.shape[-1]
    row_bytes, step = tensor.type.row_bytes(width), max(1, _PIECE // width)
    pieces = [tensor.values] if tensor.values is not None else read_pieces(
        tensor.file, tensor.offset, tensor.nbytes, step * row_bytes, tensor.called)
    for index, piece in enumerate(pieces):
        data = torch.frombuffer(piece, dtype=torch.uint8).view(-1, row_bytes)
        if change is not None:
            yield data.nbytes, _packed(change(_numbers(data, tensor).float(), index * step), tensor, type)
        else:
            yield data.nbytes, data.view(-1) if type == tensor.type else _packed(_numbers(data, tensor), tensor, type)


def _numbers(data: Tensor, tensor: _Stored) -> Tensor:
    plain = DTYPES.get(tensor.type.name)
    return data.view(plain) if plain else dequantize(data, tensor.type)


def _packed(numbers: Tensor, tensor: _Stored, type: BlockType) -> Tensor:
    """Rows of the source as ``type``, uint8 [nbytes]."""
    low, high = numbers.aminmax()
    largest = float(torch.maximum(-low, high))
    if not largest <= (65504 if type.name == "F16" else 3.4e38):
        what = f"numbers as large as {largest:g}, which {type.name} cannot hold" if largest < torch.inf else \
            "numbers that are infinite or no numbers (NaN)"
        raise CheckpointError(f"{tensor.file}: {tensor.called} holds {what}")
    return quantize(numbers, type).view(-1)


def _open_gguf(path: Path) -> _Opened:
    """A GGUF source. What it says of itself is kept, but for what is true of its packing only.

    Tokens with a role that are typed as text are mended.
    """
    model = open_gguf(path)
    _, problems = match_gguf(model, network_shapes(model.config))
    refuse(problems, f"{path}: this checkpoint cannot be converted")
    metadata = _kept(model.file.metadata)
    if types := mended_types(metadata):
        metadata[keys.TOKEN_TYPES] = types
    tensors = [_Stored(name, tensor.shape, tensor.type, tensor.file, tensor.offset, name)
               for name, tensor in model.file.tensors.items() if tensor.type is not None]
    return _Opened(metadata, tensors)


def _kept(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What a file says of itself, but for how it lies there."""
    return {key: value for key, value in metadata.items()
            if not key.startswith(("split.", "quantize.", "general.alignment"))}


def _open_folder(folder: Path) -> _Opened:
    """A safetensors source."""
    config = load_model_config(folder)
    generation = load_generation_config(folder, config)
    contents = read_headers(folder)
    expected = network_shapes(config)
    chosen, problems = match(contents, expected)
    refuse(problems, f"{folder}: this checkpoint cannot be converted")
    tensors = [_Stored(keys.gguf_name(name), stored.shape, BLOCK_TYPES[stored.dtype], stored.file, stored.offset,
                       stored.name) for name, stored in ((name, chosen[name]) for name in expected)]
    freqs = keys.rope_freqs(config)
    if freqs:
        tensors.insert(0, _Stored(keys.ROPE_FREQS, (len(freqs),), BLOCK_TYPES["F32"], folder, 0, keys.ROPE_FREQS,
                                  bytearray(struct.pack(f"<{len(freqs)}f", *freqs))))
    metadata = {
        keys.ARCHITECTURE_KEY: ARCHITECTURE,
        "general.type": "model",
        "general.name": _folder_name(folder),
        **keys.config_metadata(config, generation),
        **tokenizer_metadata(folder, config.vocab_size),
    }
    return _Opened(metadata, tensors, sum(is_vision(name) for name in contents.tensors))


def _tower_of_gguf(path: Path) -> _Opened | None:
    """The vision tower beside a GGUF source, if there is one."""
    found = tower_beside(path, open_gguf(path).config.hidden_size)
    if found is None:
        return None
    tensors = [_Stored(tensor.name, tensor.shape, tensor.type, tensor.file, tensor.offset, tensor.name)
               for tensor in found.tensors.values() if tensor.type is not None]
    return _Opened(_kept(found.file.metadata), tensors, file=found.file.path)


def _tower_of_folder(folder: Path) -> _Opened | None:
    """The vision tower of a safetensors source, if its config describes one and its files hold it."""
    config = load_model_config(folder)
    if config.vision is None or not any(map(is_vision, read_headers(folder).tensors)):
        return None
    vision = empty_vision(config.vision, config.hidden_size)
    tensors = []
    for name, stored in match_vision(folder, vision).items():
        shape = vision_keys.gguf_shape(name, stored.shape, config.vision)
        tensors.append(_Stored(vision_keys.gguf_name(name), shape, BLOCK_TYPES[stored.dtype], stored.file,
                               stored.offset, stored.name,
                               _planes(stored, config.vision) if name == vision_keys.PATCHES else None))
    return _Opened(vision_keys.vision_metadata(config.vision, config.hidden_size), tensors)


def _planes(stored: StoredTensor, config: VisionConfig) -> bytearray:
    """The bytes of the matrix over patches in the order of a convolution."""
    data = next(read_pieces(stored.file, stored.offset, stored.nbytes, stored.nbytes, stored.name))
    matrix = torch.frombuffer(data, dtype=DTYPES[stored.dtype]).view(stored.shape)
    return bytearray(plane_order(matrix, config.patch_size).view(torch.uint8).numpy())


def _folder_name(folder: Path) -> str:
    """What a checkpoint's folder is called; in the hub's cache that is a repository's name."""
    folder = folder.resolve()
    if folder.parent.name == "snapshots":
        return folder.parents[1].name.split("--")[-1]
    return folder.name
