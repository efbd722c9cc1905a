"""Writing a checkpoint with an adapter merged into it: safetensors to safetensors, or anything to GGUF.

Works on files, a few rows or one file at a time, and never holds a network; knows nothing of sampling.
"""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from dgemma.config import ModelConfig, load_model_config
from dgemma.errors import CheckpointError, DgemmaError, refuse
from dgemma.files import make_folder, name_beside
from dgemma.gguf import vision as vision_keys
from dgemma.gguf.keys import gguf_name
from dgemma.kernels.products import pieces
from dgemma.nn.adapters import Factors
from dgemma.nn.vision import Vision
from dgemma.weights.adapters import adapts_tower, read_adapter
from dgemma.weights.files import INDEX_FILE, weight_files
from dgemma.weights.gguf_model import open_gguf
from dgemma.weights.gguf_vision import pixel_order, plane_order
from dgemma.weights.load import empty_network, empty_vision, match, match_vision, read_headers, tensor_shapes
from dgemma.weights.names import trained_name, within_vision
from dgemma.weights.quantize import Change, Progress, Summary, check_space, convert, is_gguf_file
from dgemma.weights.save import write_safetensors
from dgemma.weights.towers import find_tower

_COMPANIONS = (".json", ".jinja", ".model", ".txt", ".md", "")  # what stands beside weights; no suffix: LICENSE


def merge_to_gguf(source: Path, adapter: Path, out: Path, mixture: str = "Q4_K_M", *, force: bool = False,
                  progress: Progress | None = None, tower: str | None = "BF16") -> Summary:
    """Write the checkpoint ``source`` (a folder or a GGUF file) with the adapter in it as the GGUF file ``out``.

    The vision tower goes to a file beside it, its matrices as ``tower`` (None: it is left out) and with what the
    adapter changes of it. The sum is taken in float32 and packed once, as `convert` packs. Raises what that and
    `read_adapter` raise.
    """
    config = open_gguf(source).config if is_gguf_file(source) else load_model_config(source)
    network = empty_network(config)
    if adapts_tower(adapter):
        network.attach_vision(_empty_tower(source, config))
    factors = read_adapter(adapter, network).factors
    return convert(source, out, mixture, force=force, progress=progress, changes=_changes(factors), tower=tower)


def merge_to_folder(source: Path, adapter: Path, out: Path, progress: Progress | None = None) -> int:
    """Write the safetensors checkpoint ``source`` with the adapter in it as the folder ``out``; returns its bytes.

    Files, dtypes and everything that the adapter does not touch stay as they are; the sum is taken in float32 and
    rounded to the weight's dtype. ``out`` appears when it is complete, and takes the memory of one file. Raises
    CheckpointError for a source or an adapter that cannot be used, DgemmaError when ``out`` cannot be written or is
    there already and not empty.
    """
    if is_gguf_file(source):
        raise DgemmaError(f"{source}: a GGUF file is merged into a GGUF file: give an OUT that ends in .gguf")
    config = load_model_config(source)
    network = empty_network(config)
    contents = read_headers(source)
    _, problems = match(contents, tensor_shapes(network))
    refuse(problems, f"{source}: this checkpoint cannot be merged")
    if adapts_tower(adapter):
        network.attach_vision(_empty_tower(source, config))
    factors = read_adapter(adapter, network).factors
    total = sum(tensor.nbytes for tensor in contents.tensors.values())
    done = 0

    def change(name: str, tensor: Tensor) -> Tensor:
        found = factors.get(name.removesuffix(".weight"))
        return tensor if found is None else _merged(tensor, found)

    with _new_folder(out) as beside:
        check_space(beside, total)
        for path in contents.files:
            (progress or (lambda name, done, total: None))(path.name, done, total)
            done += _rewrite(path, beside / path.name, change)
        copy_companions(source, beside)
    return total


def replace_weights(source: Path, weights: Mapping[str, Tensor], out: Path) -> None:
    """Write the safetensors checkpoint ``source`` with other ``weights``, by the network's names, into the folder
    ``out``, which is there and empty.

    Files, dtypes and every tensor that is not the network's stay as they are. Raises DgemmaError when ``out`` cannot
    be written.
    """
    contents = read_headers(source)
    check_space(out, sum(tensor.nbytes for tensor in contents.tensors.values()))
    for path in contents.files:
        _rewrite(path, out / path.name, lambda name, tensor: (
            weights[name].detach().to("cpu", tensor.dtype).contiguous() if name in weights else tensor))
    copy_companions(source, out)


def copy_companions(source: Path, out: Path) -> None:
    """Copy what stands beside the weights of a checkpoint folder into another."""
    unused = () if any(weight_files(source).values()) else (INDEX_FILE,)  # of a single file an index says nothing
    for path in source.iterdir():
        if path.is_file() and path.suffix in _COMPANIONS and path.name not in unused:
            shutil.copyfile(path, out / path.name)


def _empty_tower(source: Path, config: ModelConfig) -> Vision:
    """The shape of the vision tower that `convert` and `merge_to_folder` find; CheckpointError where there is none."""
    found = find_tower(source, config)
    if found is None:
        where = "no mmproj file beside this GGUF file fits it" if source.is_file() else "this checkpoint has none"
        raise CheckpointError(f"{source}: the adapter changes the vision tower, too, and {where}")
    vision = empty_vision(found.config, config.hidden_size)
    if not source.is_file():
        match_vision(source, vision)
    return vision


def _changes(factors: Mapping[str, Factors]) -> dict[str, Change]:
    """GGUF name -> the change of that tensor, also where gate and up experts are stored apart."""
    changes: dict[str, Change] = {}
    for name, change in factors.items():
        if seen := within_vision(f"{name}.weight"):
            changes[vision_keys.gguf_name(seen)] = _of_planes(change) if seen == vision_keys.PATCHES else \
                change.merged_rows
            continue
        stored = gguf_name(name if ".experts." in name else f"{name}.weight")
        changes[stored] = change.merged_rows
        if "gate_up_exps" not in stored:
            continue
        middle = change.b.shape[1] // 2
        for half, rows in (("gate", slice(middle)), ("up", slice(middle, None))):
            magnitude = None if change.magnitude is None else change.magnitude[:, rows].contiguous()
            part = Factors(change.a, change.b[:, rows].contiguous(), magnitude, change.scale)
            changes[stored.replace("gate_up_exps", f"{half}_exps")] = part.merged_rows
    return changes


def _of_planes(change: Factors) -> Change:
    """The change of the matrix over patches, of which files have rows in the order of a convolution."""
    def merged(rows: Tensor, start: int) -> Tensor:
        side = math.isqrt(rows.shape[1] // 3)
        found = change.merged_rows(pixel_order(rows.view(-1, 3, side, side)), start)
        return plane_order(found, side).flatten(1)

    return merged


def _rewrite(path: Path, out: Path, change: Callable[[str, Tensor], Tensor]) -> int:
    """Copy one safetensors file with its tensors changed; returns the bytes of its tensors.

    ``change`` gets the network's names."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as mapped:
            tensors = {name: mapped.get_tensor(name) for name in mapped.keys()}  # noqa: SIM118 (it is no dict)
            for name, tensor in tensors.items():
                tensors[name] = change(trained_name(name) or "", tensor)
            write_safetensors(out, tensors, mapped.metadata() or {"format": "pt"})
    except SafetensorError as error:
        raise DgemmaError(f"{path}: cannot be read ({error})") from error
    return sum(tensor.nbytes for tensor in tensors.values())


def _merged(tensor: Tensor, change: Factors) -> Tensor:
    out = torch.empty_like(tensor)
    flat = out.view(-1, out.shape[-1])
    for rows, numbers in pieces(tensor.view(-1, tensor.shape[-1])):
        flat[rows] = change.merged_rows(numbers, rows.start).to(out.dtype)
    return out


@contextlib.contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` that takes its place when the block succeeds, and goes when it does not."""
    beside = name_beside(out)
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise DgemmaError(f"{out}: this exists already; give the name of a new folder to write to")
        make_folder(beside)
        yield beside
        if out.exists():
            out.rmdir()
        beside.replace(out)
    except OSError as error:
        raise DgemmaError(f"{out}: cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
