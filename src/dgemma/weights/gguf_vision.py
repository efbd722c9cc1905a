"""A vision tower out of a GGUF file (``mmproj``): its tensors found, checked and put in place.

Works on GGUF headers and mapped data, as `gguf_model` does for the text network.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dgemma.config import VisionConfig
from dgemma.errors import CheckpointError, problems_of, refuse
from dgemma.gguf.blocks import BLOCK_TYPES, BlockType, dequantize
from dgemma.gguf.reader import GGUFFile, GGUFTensor, map_tensors, read_gguf
from dgemma.gguf.vision import PATCHES, check_mmproj, gguf_name, gguf_shape, is_ours, read_vision_config
from dgemma.kernels import PackedWeight
from dgemma.nn.layers import Packable
from dgemma.nn.packed import set_weights
from dgemma.nn.vision import Vision
from dgemma.weights.files import tower_files, tower_name, tower_rank
from dgemma.weights.gguf_model import stored_rows, unusable_types, wrong_shape
from dgemma.weights.load import DTYPES, check_dtype, empty_vision, tensor_shapes


@dataclass(frozen=True)
class Mmproj:
    """A GGUF file that holds a vision tower, all of it; ``tensors`` by our names."""

    file: GGUFFile
    config: VisionConfig
    tensors: dict[str, GGUFTensor]

    @property
    def type_name(self) -> str:
        """What most of its matrices are stored as."""
        sizes: Counter[str] = Counter()
        for tensor in self.tensors.values():
            sizes[tensor.type_name] += tensor.nbytes * (len(tensor.shape) == 2)  # not positions, nor norms: always F32
        return sizes.most_common(1)[0][0]

    @property
    def packed(self) -> bool:
        """Whether it has packed weights."""
        return any(tensor.type_name not in DTYPES for tensor in self.tensors.values())

    @property
    def dtype(self) -> torch.dtype:
        """What it is run in where that is not said and nothing is packed.

        bfloat16 for F16, too: the magnitudes within a tower are near float16's end, and weights that were trained in
        bfloat16 lose nothing by it.
        """
        return torch.float32 if self.type_name == "F32" else torch.bfloat16

    @property
    def parameters(self) -> int:
        return sum(tensor.nbytes // tensor.type.nbytes * tensor.type.block
                   for tensor in self.tensors.values() if tensor.type is not None)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


def open_mmproj(path: str | Path, width: int) -> Mmproj:
    """Read what a GGUF file says of its vision tower, and check that all of it is there.

    ``width`` is that of the text network's embeddings. Raises CheckpointError, with everything that is wrong, for what
    is not a tower of Gemma 4's kind, does not describe one completely, lacks a tensor, or was made for a text network
    of another width.
    """
    file = read_gguf(path)
    source = str(file.path)
    check_mmproj(file.metadata, source)
    config, own_width = read_vision_config(file.metadata, {name: t.shape for name, t in file.tensors.items()}, source)
    if own_width != width:
        raise CheckpointError(f"{source}: this vision tower is for another model: what it makes is {own_width:,} wide, "
                              f"and this model's embeddings are {width:,}")
    expected = {name: gguf_shape(name, shape, config)
                for name, shape in tensor_shapes(empty_vision(config, width)).items()}
    theirs = {name: gguf_name(name) for name in expected}
    chosen = {name: file.tensors[theirs[name]] for name in expected if theirs[name] in file.tensors}
    unknown = {name for name in file.tensors if is_ours(name)} - {*theirs.values()}
    refuse(problems_of({
        "damaged files": file.damaged,
        "missing tensors": [theirs[name] for name in expected if name not in chosen] if file.complete else (),
        "unexpected tensors": sorted(unknown),
        "wrong shapes": [wrong_shape(tensor, expected[name]) for name, tensor in chosen.items()
                         if tensor.shape != expected[name]],
        **unusable_types(chosen.values()),
    }), f"{source}: this vision tower cannot be loaded")
    return Mmproj(file, config, chosen)


def tower_beside(model: Path, width: int) -> Mmproj | None:
    """The vision tower that `search_beside` finds; a warning tells when there are some and none can be used."""
    found, refused = search_beside(model, width)
    if refused:
        warnings.warn(refused, stacklevel=3)
    return found


def search_beside(model: Path, width: int) -> tuple[Mmproj | None, str | None]:
    """The vision tower that belongs to a GGUF file by lying beside it (or at the top of its hub repository).

    Of several that fit, the one named after the model (`files.tower_name`), else by type as `files.TOWER_TYPES` has
    them, else the first by name. If there are some and none fits, what to say of them.
    """
    top = next((folder for folder in model.parents if folder.parent.name == "snapshots"), model.parent)
    names = {path.relative_to(top).as_posix() for folder in {top, model.parent} for path in folder.glob("*")
             if path.is_file()}
    fitting, refused = [], []
    for name in tower_files(names, model.relative_to(top).as_posix()):
        try:
            fitting.append(open_mmproj(top / name, width))
        except CheckpointError as error:
            refused.append(str(error))
    own = tower_name(model.name).lower()
    found = min(fitting, key=lambda found: (found.file.path.name.lower() != own, tower_rank(found.type_name)),
                default=None)
    if found is not None or not refused:
        return found, None
    return None, f"pictures cannot be seen: no vision tower beside {model.name} fits it:\n" + "\n".join(refused)


def load_mmproj(mmproj: Mmproj, width: int, device: torch.device | str = "cpu", dtype: torch.dtype | None = None,
                progress: Callable[[int, int], None] | None = None) -> Vision:
    """The vision tower of a GGUF file, in eval mode, without gradients.

    On the CPU, packed matrices stay as they are in the memory-mapped file; activations are float32 then, and so is
    everything that is not a matrix. ``dtype`` means nothing there: it is for towers without packed matrices (None: as
    `Mmproj.dtype` says) and for other devices, where everything is unpacked (None: bfloat16). ``progress(done, total)``
    counts bytes of the file. Raises ValueError for a ``dtype`` other than float32, bfloat16 and float16.
    """
    check_dtype(dtype)
    device = torch.device(device)
    progress = progress or (lambda done, total: None)
    vision = empty_vision(mmproj.config, width)
    shapes = tensor_shapes(vision)
    keep = mmproj.packed and device.type == "cpu"
    dtype = torch.float32 if keep else dtype or mmproj.dtype
    weights: dict[str, Tensor | PackedWeight] = {}
    total = 0
    for name, rows, kind, done, total in stored_rows({name: (tensor,) for name, tensor in mmproj.tensors.items()},
                                                     map_tensors(mmproj.file)):
        progress(done, total)
        if name == PATCHES:
            weights[name] = pixel_order(_numbers(rows.to(device), kind, dtype))
        elif keep and isinstance(_owner(vision, name), Packable):
            weights[name] = _as_stored(rows, kind)
        else:
            weights[name] = _numbers(rows.to(device), kind, dtype).view(shapes[name])
    progress(total, total)
    set_weights(vision, weights)
    return vision.eval()


def pixel_order(patches: Tensor) -> Tensor:
    """A convolution over patches [D, 3, p, p] as the matrix [D, 3p²] that takes (pixel row, pixel column, colour)."""
    return patches.permute(0, 2, 3, 1).flatten(1).contiguous()


def plane_order(matrix: Tensor, patch_size: int) -> Tensor:
    """The inverse of `pixel_order`."""
    return matrix.view(-1, patch_size, patch_size, 3).permute(0, 3, 1, 2).contiguous()


def _owner(vision: nn.Module, name: str) -> nn.Module:
    return vision.get_submodule(name.rpartition(".")[0])


def _as_stored(rows: Tensor, kind: BlockType) -> PackedWeight:
    """A matrix beside packed ones; F16 as bfloat16, for the sake of what it is multiplied with (`Mmproj.dtype`)."""
    if kind.name == "F16":
        return PackedWeight(dequantize(rows, kind, torch.bfloat16).view(torch.uint8), BLOCK_TYPES["BF16"])
    return PackedWeight(rows, kind)


def _numbers(rows: Tensor, kind: BlockType, dtype: torch.dtype) -> Tensor:
    """Rows as numbers: the same memory where they are that already."""
    if DTYPES.get(kind.name) == dtype and rows.storage_offset() % dtype.itemsize == 0:
        return rows.view(dtype)
    return dequantize(rows, kind, dtype)
