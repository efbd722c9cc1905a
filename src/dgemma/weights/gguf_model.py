"""A network out of a GGUF file: its tensors found, checked and put in place, packed where they are packed.

Works on GGUF headers and mapped data; knows nothing of tokens or sampling. Like `load`, it checks everything before any
data is read and says everything that is wrong.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dgemma.config import FULL, GenerationConfig, ModelConfig
from dgemma.errors import Problem, problems_of, refuse
from dgemma.gguf.blocks import BLOCK_TYPES, BlockType, dequantize
from dgemma.gguf.codebooks import missing_grid
from dgemma.gguf.keys import (
    ROPE_FREQS,
    TOKENS,
    check_architecture,
    gguf_name,
    read_generation_config,
    read_model_config,
    rotary_fraction,
)
from dgemma.gguf.reader import GGUFFile, GGUFTensor, map_tensors, read_gguf, read_tensor
from dgemma.kernels.packed import PackedWeight
from dgemma.nn import DiffusionTransformer
from dgemma.weights.load import DTYPES, Shape, check_dtype, empty_network, network_shapes

_PIECE = 16 << 20  # bytes unpacked at a time
_MOST_FREQS = 1 << 16


@dataclass(frozen=True)
class GGUFModel:
    """A GGUF file that describes a DiffusionGemma."""

    file: GGUFFile
    config: ModelConfig
    generation: GenerationConfig


def open_gguf(path: str | Path) -> GGUFModel:
    """Read what a GGUF file (any part of it) says of its model.

    Raises CheckpointError for what is not a DiffusionGemma or does not describe one completely. Data that is missing is
    found by `match_gguf`.
    """
    file = read_gguf(path)
    source = str(file.path)
    check_architecture(file.metadata, source)
    embedding = file.tensors.get("token_embd.weight")
    freqs = file.tensors.get(ROPE_FREQS)
    rotary = 1.0
    if freqs is not None and freqs.type is not None and len(freqs.shape) == 1 and freqs.shape[0] <= _MOST_FREQS:
        data = read_tensor(freqs)
        if data is not None:
            rotary = rotary_fraction(dequantize(data, freqs.type).tolist(), source)
    config = read_model_config(file.metadata, embedding.shape[0] if embedding else None, rotary, source)
    return GGUFModel(file, config, read_generation_config(file.metadata, config, source))


def is_matrix(name: str, shape: Shape) -> bool:
    """Whether a tensor of ours may be packed; the others are few numbers that count: norms, scales, routers."""
    return len(shape) > 1 and not name.endswith("router.proj.weight")


def match_gguf(model: GGUFModel, expected: Mapping[str, Shape]) -> tuple[dict[str, tuple[GGUFTensor, ...]],
                                                                         list[Problem]]:
    """Find the tensor for every name of ours in ``expected``, and everything that keeps the file from loading.

    Where gate and up experts are stored apart, a name has two tensors.
    """
    tensors = model.file.tensors
    chosen: dict[str, tuple[GGUFTensor, ...]] = {}
    missing, shapes = [], []
    used = {ROPE_FREQS}
    for name, shape in expected.items():
        theirs = [gguf_name(name)]
        apart = [theirs[0].replace("gate_up_exps", f"{half}_exps") for half in ("gate", "up")]
        if theirs[0] not in tensors and apart[0] != theirs[0] and any(half in tensors for half in apart):
            theirs, shape = apart, (shape[0], shape[1] // 2, shape[2])
        if theirs[0] not in tensors and name.endswith("encoder_layer_scalar"):
            theirs = [gguf_name(name.replace("encoder_layer_scalar", "layer_scalar"))]
        found = [tensors[part] for part in theirs if part in tensors]
        missing.extend(part for part in theirs if part not in tensors and part not in missing)
        shapes.extend(wrong_shape(tensor, shape) for tensor in found if tensor.shape != shape)
        used.update(theirs)
        if len(found) == len(theirs):
            chosen[name] = tuple(found)
    full = next((layer for layer in model.config.layers if layer.kind == FULL), None)
    if full is not None:
        freqs = tensors.get(ROPE_FREQS)
        if freqs is None:
            missing.append(ROPE_FREQS)
        elif freqs.shape != (full.head_dim // 2,):
            shapes.append(wrong_shape(freqs, (full.head_dim // 2,)))
    listed = model.file.metadata.get(TOKENS)
    tokens = len(listed) if isinstance(listed, list) else 0  # anything else is for the tokenizer's reader to say
    second = {name for name in tensors if name not in used and name.endswith((".scale", ".input_scale"))
              and (scaled := tensors.get(f"{name.rpartition('.')[0]}.weight")) and scaled.type_name == "NVFP4"}
    found_problems = {
        "damaged files": model.file.damaged,
        "missing tensors": missing if model.file.complete else (),
        "unexpected tensors": sorted(f"{t.name} in {t.file.name}" for t in tensors.values()
                                     if t.name not in used and t.name not in second),
        "second scales of NVFP4 tensors, which dgemma does not apply (another quantisation of the model will do)":
            sorted(second),
        "wrong shapes": shapes,
        **unusable_types(tensors.values()),
        "gate and up experts of different types": [
            f"{parts[0].name} is {parts[0].type_name}, {parts[1].name} {parts[1].type_name}"
            for parts in chosen.values() if len({part.type_name for part in parts}) > 1],
        "tokenizer": [f"{tokens} tokens, but the embedding has {model.config.vocab_size}"]
        if tokens > model.config.vocab_size else (),
    }
    return chosen, problems_of(found_problems)


def unusable_types(tensors: Iterable[GGUFTensor]) -> dict[str, list[str]]:
    """What is wrong with tensors' types, by kind of problem."""
    unknown: dict[str, list[str]] = defaultdict(list)
    known = set()
    for tensor in tensors:
        known.add(tensor.type_name)
        if tensor.type is None:
            unknown[tensor.type_name].append(tensor.name)
    return {
        f"unsupported types (supported: {', '.join(BLOCK_TYPES)})": [
            f"{kind}: {names[0]}" + (f" and {len(names) - 1} more tensors" if len(names) > 1 else "")
            for kind, names in unknown.items()],
        "codebooks": [why for kind in sorted(known) if (why := missing_grid(kind))],
    }


def wrong_shape(tensor: GGUFTensor, expected: Shape) -> str:
    """What to say of a tensor that is not of the expected shape."""
    return f"{tensor.name} in {tensor.file.name}: expected {list(expected)}, found {list(tensor.shape)}"


def load_gguf_network(model: GGUFModel, device: torch.device | str = "cpu", dtype: torch.dtype | None = None,
                      progress: Callable[[int, int], None] | None = None, *,
                      keep_packed: bool = False, cache_type: str | None = None) -> DiffusionTransformer:
    """The text network of a GGUF file, in eval mode, without gradients.

    On the CPU, packed matrices stay as they are in the memory-mapped file and are computed with as they are:
    activations are float32 then, and so is everything that is not a matrix. ``dtype`` means nothing there: it is for
    files without packed matrices, where None is the embedding's, and for other devices, where everything is unpacked
    into it, tensor by tensor (None is bfloat16 if anything was packed); unless they are to ``keep_packed``, for
    training an adapter, where memory counts more than speed. ``cache_type`` is the network's; None is "bf16" if
    matrices stay packed. ``progress(done, total)`` counts bytes of the file.
    Raises CheckpointError with everything that is wrong, ValueError for a ``dtype`` other than float32, bfloat16 and
    float16.
    """
    check_dtype(dtype)
    device = torch.device(device)
    progress = progress or (lambda done, total: None)
    shapes = network_shapes(model.config)
    chosen, problems = match_gguf(model, shapes)
    refuse(problems, f"{model.file.path}: this GGUF file cannot be loaded")
    types = {name: parts[0].type for name, parts in chosen.items() if is_matrix(name, shapes[name])}
    packed = any(kind is not None and kind.name not in DTYPES for kind in types.values())
    stays = packed and (device.type == "cpu" or keep_packed)
    network = empty_network(model.config, cache_type or ("bf16" if stays else None))
    if stays:
        from dgemma.nn.packed import set_weights

        weights = packed_weights(model, chosen, shapes, progress)
        if device.type != "cpu":
            weights = {name: PackedWeight(weight.data.to(device), weight.type) if isinstance(weight, PackedWeight)
                       else weight.to(device) for name, weight in weights.items()}
        set_weights(network, weights)
    else:
        embedding = types["embed_tokens.weight"]
        dtype = dtype or (torch.bfloat16 if packed or embedding is None else DTYPES[embedding.name])
        network.load_state_dict(unpacked_weights(model, chosen, shapes, device, dtype, progress), assign=True)
    return network.eval()


def packed_weights(model: GGUFModel, chosen: Mapping[str, tuple[GGUFTensor, ...]], shapes: Mapping[str, Shape],
                   progress: Callable[[int, int], None]) -> dict[str, Tensor | PackedWeight]:
    """Our name -> a packed view of the mapped file for matrices, a float32 tensor for the rest."""
    data = map_tensors(model.file)
    weights: dict[str, Tensor | PackedWeight] = {}
    for name, rows, kind, done, total in stored_rows(chosen, data):
        progress(done, total)
        if is_matrix(name, shapes[name]):
            weights[name] = PackedWeight(rows, kind)
        else:
            weights[name] = dequantize(rows, kind)
    progress(total, total)
    return weights


def unpacked_weights(model: GGUFModel, chosen: Mapping[str, tuple[GGUFTensor, ...]], shapes: Mapping[str, Shape],
                     device: torch.device, dtype: torch.dtype,
                     progress: Callable[[int, int], None]) -> dict[str, Tensor]:
    """Our name -> a tensor of ``dtype`` on ``device``; on the CPU a view of the mapped file where that is one."""
    data = map_tensors(model.file)
    weights: dict[str, Tensor] = {}
    for name, rows, kind, done, total in stored_rows(chosen, data):
        progress(done, total)
        stored = DTYPES.get(kind.name)
        if stored == dtype and device.type == "cpu" and rows.storage_offset() % dtype.itemsize == 0:
            weights[name] = rows.view(dtype)
            continue
        out = torch.empty(shapes[name], dtype=dtype, device=device)
        flat, target = rows.reshape(-1, rows.shape[-1]), out.view(-1, shapes[name][-1])
        step = max(1, _PIECE // rows.shape[-1])
        for start in range(0, len(flat), step):
            target[start : start + step] = dequantize(flat[start : start + step].to(device), kind, dtype)
            progress(done + start * rows.shape[-1], total)
        weights[name] = out
    progress(total, total)
    return weights


def stored_rows(chosen: Mapping[str, tuple[GGUFTensor, ...]],
                data: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, BlockType, int, int]]:
    """For every name of ours the packed rows, uint8 [..., row bytes], their type, and the bytes before them and in all.

    In the order in which they lie in the files.
    """
    total = sum(part.nbytes for parts in chosen.values() for part in parts)
    done = 0
    for name, parts in sorted(chosen.items(), key=lambda item: (str(item[1][0].file), item[1][0].offset)):
        kind = parts[0].type
        assert kind is not None  # `match_gguf` finds those
        rows = [data[part.name].view(*part.shape[:-1], kind.row_bytes(part.shape[-1])) for part in parts]
        # Gate and up experts stored apart are joined, which copies them: ours are one tensor.
        yield name, rows[0] if len(rows) == 1 else torch.cat(rows, dim=1), kind, done, total
        done += sum(part.nbytes for part in parts)
