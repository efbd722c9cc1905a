"""Reading a network from a Hugging Face checkpoint folder (safetensors, one file or many).

Works on safetensors headers and tensors; knows nothing of tokens or sampling. The headers are checked first, all of
them, so that a checkpoint which does not fit is refused with everything that is wrong and before any data is read.
"""

from __future__ import annotations

import math
import re
import struct
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dgemma.config import ModelConfig, VisionConfig
from dgemma.errors import CheckpointError, Problem, problems_of, refuse
from dgemma.fields import is_whole, parse_json_value, shown
from dgemma.files import read_pieces
from dgemma.nn import DiffusionTransformer
from dgemma.nn.vision import Vision
from dgemma.weights.files import INDEX_FILE, SINGLE_FILE, stray_weights, weight_files
from dgemma.weights.names import (
    checkpoint_name,
    is_tied_copy,
    is_vision,
    network_name,
    vision_checkpoint_name,
    vision_name,
)

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# Bytes of a number in each of safetensors' dtypes, but for those that are narrower than a byte.
_WIDTHS = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
           "U16": 2, "I16": 2, "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
           "C64": 8}
_PIECE = 16 << 20  # bytes read at a time where data is converted or moved to a device
_HEADER_LIMIT = 100_000_000  # safetensors' own

Shape = tuple[int, ...]


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor stands: ``dtype`` is safetensors' code (``BF16``), ``offset`` where its data begins."""

    name: str
    file: Path
    dtype: str
    shape: Shape
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Contents:
    """What a checkpoint's weight files hold, as far as their headers can be read.

    ``unread`` are the tensors that the index places in files that are missing or damaged; None when a file without
    an index could not be read, so that nobody knows what it should hold. ``aside`` says which other weights the folder
    has, if any, that do not count.
    """

    files: tuple[Path, ...]
    tensors: dict[str, StoredTensor]
    unread: frozenset[str] | None
    damaged: tuple[str, ...]
    aside: str | None = None


def load_network(folder: Path, config: ModelConfig, device: torch.device | str = "cpu",
                 dtype: torch.dtype | None = None, progress: Callable[[int, int], None] | None = None, *,
                 cache_type: str | None = None) -> DiffusionTransformer:
    """The text network of a checkpoint folder, in eval mode, without gradients.

    ``dtype`` None means the stored one (that of config.json, else that of the embedding). On the CPU, tensors that
    are stored in that dtype stay in the memory-mapped file (privately: writing to them leaves the file alone), the
    others are converted piece by piece, so memory stays within the size of the weights. ``cache_type`` is the
    network's. ``progress(done, total)`` is told the bytes read of the file, from (0, total) to (total, total). A
    warning tells of weights in the folder that do not count.
    Raises CheckpointError, with everything that is wrong, when files or tensors are missing, damaged or do not fit
    ``config``; ValueError for a ``dtype`` other than float32, bfloat16 and float16.
    """
    check_dtype(dtype)
    folder, device = Path(folder), torch.device(device)
    contents = read_headers(folder)
    network = empty_network(config, cache_type)
    chosen, problems = match(contents, tensor_shapes(network))
    refuse(problems, f"{folder}: this checkpoint cannot be loaded")
    dtype = dtype or stored_dtype(folder, config, chosen)
    if contents.aside:
        warnings.warn(contents.aside, stacklevel=2)
    network.load_state_dict(_read(chosen, device, dtype, progress or (lambda done, total: None)), assign=True)
    return network.eval()


def load_vision(folder: Path, config: ModelConfig, device: torch.device | str = "cpu",
                dtype: torch.dtype | None = None,
                progress: Callable[[int, int], None] | None = None) -> Vision:
    """The vision tower of a checkpoint folder, in eval mode, without gradients.

    ``dtype`` None means the stored one (that of the last projection); the rest is as in `load_network`. Only the
    tower's tensors are read. Raises CheckpointError, too, when the checkpoint has no tower.
    """
    check_dtype(dtype)
    folder, device = Path(folder), torch.device(device)
    if config.vision is None:
        raise CheckpointError(f"{folder}: this checkpoint has no vision tower: its config.json has no vision_config")
    vision = empty_vision(config.vision, config.hidden_size)
    chosen = match_vision(folder, vision)
    dtype = dtype or DTYPES[chosen["embed_vision.embedding_projection.weight"].dtype]
    vision.load_state_dict(_read(chosen, device, dtype, progress or (lambda done, total: None)), assign=True)
    return vision.eval()


def match_vision(folder: Path, vision: Vision) -> dict[str, StoredTensor]:
    """The tensor of a checkpoint folder for every name of ours of a tower; CheckpointError unless all are there."""
    contents = read_headers(folder)
    if not any(map(is_vision, (*contents.tensors, *(contents.unread or ())))) and not contents.damaged:
        raise CheckpointError(f"{folder}: the vision tower is not in this checkpoint, only its config is")
    chosen, problems = match(contents, tensor_shapes(vision), vision=True)
    refuse(problems, f"{folder}: the vision tower cannot be loaded")
    return chosen


def check_dtype(dtype: torch.dtype | None) -> None:
    """Raises ValueError for a dtype that a network is not run in."""
    if dtype is not None and dtype not in DTYPES.values():
        raise ValueError(f"dtype must be float32, bfloat16 or float16, got {str(dtype).removeprefix('torch.')}")


def empty_network(config: ModelConfig, cache_type: str | None = None) -> DiffusionTransformer:
    """A network of this shape without any memory behind its tensors (on the ``meta`` device), no gradients."""
    with _OnMeta():
        return DiffusionTransformer(config, cache_type).requires_grad_(False)


def empty_vision(config: VisionConfig, text_width: int) -> Vision:
    """A vision tower of this shape, like `empty_network`."""
    with _OnMeta():
        return Vision(config, text_width).requires_grad_(False)


def tensor_shapes(network: nn.Module) -> dict[str, Shape]:
    """Our name -> shape of every tensor of a network."""
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def network_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Our name -> shape of every tensor of the text network of this shape."""
    return tensor_shapes(empty_network(config))


def read_headers(folder: Path) -> Contents:
    """Read the header of every weight file; files that cannot be read become ``damaged`` lines, not errors.

    Raises CheckpointError when the folder has no weight files at all.
    """
    files = weight_files(folder)
    tensors: dict[str, StoredTensor] = {}
    unread: set[str] | None = set()
    damaged = []
    for path, listed in files.items():
        try:
            entries, complaint = read_header(path)
        except CheckpointError as error:
            damaged.append(str(error))
            unread = None if unread is None or not listed else unread.union(listed)
            continue
        damaged.extend(complaint)
        tensors.update({name: tensor for name, tensor in entries.items() if name in listed or name not in tensors})
    aside = stray_weights(folder, files)
    if damaged and aside and folder / SINGLE_FILE not in files and (folder / SINGLE_FILE).is_file():
        damaged.append(f"{folder}: there is a {SINGLE_FILE}, too: to use that one, take the index away")
    return Contents(tuple(files), tensors, None if unread is None else frozenset(unread), tuple(damaged), aside)


def match(contents: Contents, expected: Mapping[str, Shape],
          vision: bool = False) -> tuple[dict[str, StoredTensor], list[Problem]]:
    """Find the tensor for every name of ours in ``expected``, and everything that keeps the checkpoint from loading.

    Vision tensors are left aside, or with ``vision`` all others. The other name of a tied tensor counts only where the
    first one is absent.
    """
    named, spelt = (vision_name, vision_checkpoint_name) if vision else (network_name, checkpoint_name)
    own: dict[str, StoredTensor] = {}
    copies: dict[str, StoredTensor] = {}
    unexpected = []
    for name, tensor in contents.tensors.items():
        ours = named(name)
        if is_vision(name) != vision or (vision and ours is None):
            continue
        if ours is None or ours not in expected:
            unexpected.append(f"{_plain(name)} in {tensor.file.name}")
        else:
            (copies if is_tied_copy(name) else own)[ours] = tensor
    chosen = {**copies, **own}
    known = None if contents.unread is None else {named(name) for name in contents.unread}
    missing = [spelt(name) for name in expected if known is not None and name not in {*chosen, *known}]
    found = {
        "damaged files": contents.damaged,
        "missing tensors": missing,
        "unexpected tensors": sorted(unexpected),
        "wrong shapes": [f"{t.name} in {t.file.name}: expected {list(expected[name])}, found {list(t.shape)}"
                         for name, t in chosen.items() if t.shape != expected[name]],
        "unsupported dtypes": [f"{t.name} in {t.file.name}: unsupported dtype {t.dtype} (F32, BF16 and F16 are "
                               "supported)" for t in chosen.values() if t.dtype not in DTYPES],
    }
    return chosen, problems_of(found)


def read_header(path: Path, size: int | None = None) -> tuple[dict[str, StoredTensor], list[str]]:
    """The tensors that a safetensors file's header describes, and what is wrong with the file's size if anything.

    ``size`` is the whole file's where no more than its header is here. Raises CheckpointError.

    The format: 8 bytes little-endian header length N, N bytes of JSON, data; offsets count from the data's start.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2) if size is None else size
            file.seek(0)
            start, header = _parse_header(file, size, path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file, but {INDEX_FILE} lists it") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    metadata = header.pop("__metadata__", None)
    texts = metadata.values() if isinstance(metadata, dict) else [None]
    if metadata is not None and not all(isinstance(text, str) for text in texts):
        raise CheckpointError(f"{path}: corrupt header: '__metadata__' must be an object of texts, not "
                              f"{shown(metadata)}")
    tensors = {}
    for name, entry in header.items():
        tensors[name] = _stored_tensor(name, entry, path, start)
    end, before = start, ""
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.offset, tensor.nbytes)):
        if tensor.offset != end:
            what = f"lies over that of {shown(before)}" if tensor.offset < end else "does not follow on what is before"
            raise CheckpointError(f"{path}: corrupt safetensors file: the data of {shown(tensor.name)} {what}")
        end, before = tensor.offset + tensor.nbytes, tensor.name
    if size == end:
        return tensors, []
    what = "truncated" if size < end else "longer than it should be"
    return tensors, [f"{path}: {what}: {size:,} bytes, its header says {end:,}; copy or download it again"]


def _stored_tensor(name: str, entry: Any, path: Path, start: int) -> StoredTensor:
    """One entry of a header; its data's offsets count from ``start``."""
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not isinstance(dtype, str) or not re.fullmatch(r"\w{1,40}", dtype) or not (
            _are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2):
        raise CheckpointError(f"{path}: corrupt header: no sound dtype, shape and offsets for {_plain(name)}")
    first, last = offsets
    tensor = StoredTensor(name, path, dtype, tuple(shape), start + first, last - first)
    width = _WIDTHS.get(dtype)
    if last < first or (width is not None and tensor.nbytes != math.prod(shape) * width):
        raise CheckpointError(f"{path}: corrupt header: {_plain(name)} is {dtype} {shown(shape)} but has "
                              f"{tensor.nbytes} bytes")
    return tensor


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(is_whole(number) and 0 <= number < 1 << 62 for number in value)


def _plain(name: str) -> str:
    """A tensor's name for a message: as it is if it looks like one."""
    return name if name.isprintable() and 0 < len(name) < 200 else shown(name)


def _parse_header(file: BinaryIO, size: int, path: Path) -> tuple[int, dict[str, Any]]:
    """Where the data starts, and the header's JSON object."""
    lead = file.read(8)
    if lead == b"version ":
        raise CheckpointError(f"{path}: a Git LFS pointer, not the weights themselves; fetch them with `git lfs pull`")
    length = struct.unpack("<Q", lead)[0] if len(lead) == 8 else 0
    if not 2 <= length <= _HEADER_LIMIT:
        raise CheckpointError(f"{path}: not a safetensors file ({size:,} bytes, no sound header)")
    if 8 + length > size:
        raise CheckpointError(f"{path}: truncated: {size:,} bytes, its header alone takes {8 + length:,}; copy or "
                              "download it again")
    header = parse_json_value(file.read(length), f"{path}: corrupt header")
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: corrupt header: not a JSON object")
    return 8 + length, header


def stored_dtype(folder: Path, config: ModelConfig, chosen: Mapping[str, StoredTensor]) -> torch.dtype:
    """What the config says that weights are, else what the embedding is; CheckpointError for what is not supported."""
    if config.dtype is None:
        return DTYPES[chosen["embed_tokens.weight"].dtype]
    named = str(config.dtype).removeprefix("torch.")
    for dtype in DTYPES.values():
        if str(dtype) == f"torch.{named}":
            return dtype
    raise CheckpointError(f"{folder / 'config.json'}: unsupported dtype {named!r} (float32, bfloat16 and float16 are "
                          "supported)")


def _read(chosen: Mapping[str, StoredTensor], device: torch.device, dtype: torch.dtype,
          progress: Callable[[int, int], None]) -> dict[str, Tensor]:
    """Our name -> tensor, file by file in the order of the data."""
    from safetensors import SafetensorError, safe_open

    total = sum(tensor.nbytes for tensor in chosen.values())
    done = 0
    progress(done, total)
    read: dict[str, Tensor] = {}
    for path in sorted({tensor.file for tensor in chosen.values()}):
        here = sorted(((name, t) for name, t in chosen.items() if t.file == path), key=lambda item: item[1].offset)
        try:
            with safe_open(path, "pt") as mapped:
                for name, stored in here:
                    source = DTYPES[stored.dtype]
                    if device.type == "cpu" and source == dtype:
                        read[name] = mapped.get_tensor(stored.name)
                        done += stored.nbytes
                        progress(done, total)
                        continue
                    read[name] = torch.empty(stored.shape, dtype=dtype, device=device)
                    before = done
                    for filled in _fill(read[name].view(-1), stored):
                        done = before + filled
                        progress(done, total)
        except SafetensorError as error:
            raise CheckpointError(f"{path}: corrupt safetensors file: {error}") from error
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    return read


def _fill(target: Tensor, stored: StoredTensor, most: int = _PIECE) -> Iterator[int]:
    """Fill ``target`` [numel] from a file, converting ``most`` bytes at a time; yields the bytes read so far.

    Its buffer goes when it ends.
    """
    first = 0
    for piece in read_pieces(stored.file, stored.offset, stored.nbytes, most, stored.name):
        numbers = torch.frombuffer(piece, dtype=DTYPES[stored.dtype])
        target[first : first + len(numbers)].copy_(numbers)
        first += len(numbers)
        yield first * numbers.element_size()


class _OnMeta(TorchFunctionMode):
    """Puts the parameters that a module makes of itself on the ``meta`` device and leaves them without a value.

    Only those: under ``torch.device("meta")`` the network's constructor could not compute its plain numbers. And
    initialising meta tensors would import torch's compiler, a second for nothing.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init" and "tensor" in kwargs:
            return kwargs["tensor"]
        if func in (torch.empty, torch.ones, torch.zeros) and kwargs.get("device") is None:
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)
