"""What a checkpoint holds and what running it takes, from its configuration and its files' headers alone.

Works on a folder (config.json, generation_config.json, tokenizer files, safetensors headers) or a GGUF file (its
header). What is wrong is found by the same checks that `dgemma.load` makes. No tensor's data is read unless it is to be
checked for numbers that are not finite.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dgemma.chat.gguf_tokenizer import tokenizer_from_gguf
from dgemma.chat.tokenizer import Tokenizer
from dgemma.config import GenerationConfig, LayerConfig, ModelConfig, load_generation_config, load_model_config
from dgemma.errors import CheckpointError, Problem, describe
from dgemma.gguf.container import is_gguf
from dgemma.gguf.keys import network_name as gguf_network_name
from dgemma.gguf.reader import GGUFTensor
from dgemma.memory import program_bytes
from dgemma.memory.inference import MemoryNeed, memory_needs
from dgemma.memory.vision import TowerSize
from dgemma.weights.finite import check_finite
from dgemma.weights.gguf_model import match_gguf, open_gguf
from dgemma.weights.gguf_vision import Mmproj, open_mmproj, search_beside
from dgemma.weights.load import (
    DTYPES,
    Contents,
    Shape,
    StoredTensor,
    empty_vision,
    match,
    network_shapes,
    read_headers,
    stored_dtype,
    tensor_shapes,
)
from dgemma.weights.names import is_vision

PARTS: tuple[str, ...] = ("embedding", "attention", "dense MLP", "experts", "router and norms",
                          "self-conditioning", "vision")
NOT_FINITE = "tensors with numbers that are infinite or no numbers (NaN)"


@dataclass(frozen=True)
class LayerGroup:
    """Layers of one geometry; ``layers`` are their indices."""

    layers: tuple[int, ...]
    geometry: LayerConfig


@dataclass(frozen=True)
class StoredAs:
    """What the files hold in one dtype (safetensors' code), vision tensors included."""

    dtype: str
    tensors: int
    nbytes: int


@dataclass(frozen=True)
class PartStoredAs:
    """What the files hold of one of `PARTS` in one type."""

    part: str
    dtype: str
    tensors: int
    nbytes: int


@dataclass(frozen=True)
class TokenizerFacts:
    """``vocab_size`` counts ids, added tokens included."""

    vocab_size: int
    has_chat_template: bool


@dataclass(frozen=True)
class TowerFacts:
    """The vision tower that comes with the first picture; ``path`` is its GGUF file, or the checkpoint's folder.

    A soft token is of ``pooling_kernel_size``² patches, a patch of ``patch_size``² pixels; ``budgets`` are the most
    soft tokens that a picture may have.
    """

    path: Path
    layers: int
    width: int
    parameters: int
    nbytes: int
    patch_size: int
    pooling_kernel_size: int
    budgets: tuple[int, ...]


@dataclass(frozen=True)
class CheckpointReport:
    """Everything `inspect_checkpoint` finds. ``parameters`` counts each of `PARTS`; sizes are bytes.

    ``folder`` is the file for a GGUF, the first of ``files`` if it is in several parts; only there ``parts`` says what
    is stored how. ``notes`` are what to know that is no mistake. ``checked`` says whether the tensors' numbers were
    read; ``unread`` are the types of those that could not be.
    """

    folder: Path
    config: ModelConfig
    layers: tuple[LayerGroup, ...]
    parameters: dict[str, int]
    stored: tuple[StoredAs, ...]
    files: dict[str, int]
    memory: tuple[MemoryNeed, ...]
    generation: GenerationConfig
    tokenizer: TokenizerFacts | None
    problems: tuple[Problem, ...]
    format: str = "safetensors"
    parts: tuple[PartStoredAs, ...] = ()
    notes: tuple[str, ...] = ()
    checked: bool = False
    unread: tuple[str, ...] = ()
    tower: TowerFacts | None = None

    @property
    def text_parameters(self) -> int:
        return sum(self.parameters.values()) - self.parameters["vision"]

    @property
    def active_parameters(self) -> int:
        """Text parameters that one token passes through: all but the experts that are not chosen."""
        idle = self.config.num_experts - self.config.top_k_experts
        return self.text_parameters - self.parameters["experts"] * idle // self.config.num_experts

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON's types, totals included."""
        data = dataclasses.asdict(self)
        data["folder"] = str(self.folder)
        data["parameters"] = {**self.parameters, "text": self.text_parameters, "active": self.active_parameters,
                              "total": sum(self.parameters.values())}
        if self.tower is not None:
            data["tower"]["path"] = str(self.tower.path)
        for need, entry in zip(self.memory, data["memory"], strict=True):
            entry["total"] = need.total
        return data


def inspect_checkpoint(folder: Path, contexts: Sequence[int] | None = None, *, check: bool = False,
                       mmproj: Path | None = None,
                       progress: Callable[[int, int], None] | None = None) -> CheckpointReport:
    """Report on a checkpoint folder or a GGUF file; ``contexts`` are the lengths in tokens to estimate memory for.

    The vision tower is that which `dgemma.load` would take, with ``mmproj`` if it is given that.
    ``check`` reads all tensors, those of a vision tower too, and finds those with numbers that are not finite;
    ``progress(done, total)`` is told the bytes read.
    What is wrong with the weights, the tokenizer or the dtype stands in ``problems``. Raises CheckpointError when there
    is nothing to report on: no such folder, not a DiffusionGemma, no weight files, a configuration that cannot be read.
    """
    folder = Path(folder)
    of = _of_gguf if folder.is_file() and is_gguf(folder) else _of_folder
    report, tensors = of(folder, contexts, mmproj)
    if not check:
        return report
    sizes = {path: path.stat().st_size if path.is_file() else 0 for path in {tensor.file for tensor in tensors}}
    # What is cut off is among the problems already.
    found = check_finite([t for t in tensors if t.offset + t.nbytes <= sizes[t.file]], progress)
    broken = (Problem(NOT_FINITE, found.broken),) if found.broken else ()
    return replace(report, problems=(*report.problems, *broken), checked=True, unread=found.unread)


def _of_folder(folder: Path, contexts: Sequence[int] | None,
               mmproj: Path | None) -> tuple[CheckpointReport, list[StoredTensor | GGUFTensor]]:
    if not folder.is_dir():
        read_headers(folder)  # says what it is instead
    config = load_model_config(folder)
    contents = read_headers(folder)
    tensors: list[StoredTensor | GGUFTensor] = list(contents.tensors.values())
    shapes = network_shapes(config)
    parameters = count_parameters(shapes)
    chosen, problems = match(contents, shapes)
    tokenizer = _tokenizer_facts(lambda: Tokenizer.from_folder(folder), problems)
    if config.dtype is not None:
        try:
            stored_dtype(folder, config, chosen)
        except CheckpointError as error:
            problems.append(Problem("configuration", (str(error),)))
    notes = [contents.aside] if contents.aside else []
    files = list(contents.files)
    if mmproj is not None:
        size, tower = _of_mmproj(opened := open_mmproj(mmproj, config.hidden_size))
        tensors += opened.tensors.values()
        files += opened.file.files
    else:
        size, tower, wrong = _own_tower(folder, config, contents)
        notes += [wrong] if wrong else []
    memory = memory_needs(config, sum(parameters.values()), contexts, _program(tokenizer), tower=size)
    parameters["vision"] = tower.parameters if mmproj is not None and tower else sum(
        math.prod(tensor.shape) for tensor in contents.tensors.values() if is_vision(tensor.name))
    return CheckpointReport(
        folder, config, layer_groups(config), parameters,
        _stored((t.dtype if isinstance(t, StoredTensor) else t.type_name, t.nbytes) for t in tensors),
        _sizes(files), memory, load_generation_config(folder, config), tokenizer, tuple(problems),
        notes=tuple(notes), tower=tower), tensors


def _of_gguf(path: Path, contexts: Sequence[int] | None,
             mmproj: Path | None) -> tuple[CheckpointReport, list[GGUFTensor]]:
    model = open_gguf(path)
    config, file = model.config, model.file
    tensors = list(file.tensors.values())
    shapes = network_shapes(config)
    parameters = count_parameters(shapes)
    _, problems = match_gguf(model, shapes)
    tokenizer = _tokenizer_facts(lambda: tokenizer_from_gguf(file.metadata, file.path.name), problems)
    packed = sum(t.nbytes for t in tensors) if any(t.type_name not in DTYPES for t in tensors) else None
    found, wrong = search_beside(file.path, config.hidden_size) if mmproj is None else (
        open_mmproj(mmproj, config.hidden_size), None)
    size, tower = (None, None) if found is None else _of_mmproj(found)
    memory = memory_needs(config, sum(parameters.values()), contexts, _program(tokenizer), packed, size)
    by_part = [(_part(gguf_network_name(t.name) or ""), t.type_name, t.nbytes) for t in tensors]
    files = list(file.files)
    if found is not None:
        seeing = list(found.tensors.values())
        by_part += [("vision", t.type_name, t.nbytes) for t in seeing]
        tensors += seeing
        files += found.file.files
        parameters["vision"] = found.parameters
    parts = tuple(PartStoredAs(*total) for total in sorted(_totals(by_part), key=lambda total: PARTS.index(total[0])))
    return CheckpointReport(
        file.path, config, layer_groups(config), parameters, _stored((t.type_name, t.nbytes) for t in tensors),
        _sizes(files), memory, model.generation, tokenizer, tuple(problems), "gguf", parts,
        (wrong,) if wrong else (), tower=tower), tensors


def _of_mmproj(mmproj: Mmproj) -> tuple[TowerSize, TowerFacts]:
    """What a tower in a GGUF file takes, and what there is to say of it."""
    config = mmproj.config
    item = 4 if mmproj.packed else mmproj.dtype.itemsize
    return TowerSize(config, mmproj.parameters, mmproj.nbytes, item), TowerFacts(
        mmproj.file.path, config.num_hidden_layers, config.hidden_size, mmproj.parameters, mmproj.nbytes,
        config.patch_size, config.pooling_kernel_size, config.vision_soft_token_budgets)


def _own_tower(folder: Path, config: ModelConfig,
               contents: Contents) -> tuple[TowerSize | None, TowerFacts | None, str | None]:
    """The same of the tower in a checkpoint folder, or what keeps it from seeing, if it has one."""
    if config.vision is None or not any(map(is_vision, contents.tensors)):
        return None, None, None
    shapes = tensor_shapes(empty_vision(config.vision, config.hidden_size))
    chosen, problems = match(contents, shapes, vision=True)
    if problems:
        return None, None, f"pictures cannot be seen: the vision tower cannot be loaded\n{describe(problems)}"
    parameters, nbytes = sum(map(math.prod, shapes.values())), sum(tensor.nbytes for tensor in chosen.values())
    size = TowerSize(config.vision, parameters, nbytes, 4 if nbytes >= 4 * parameters else 2)
    return size, TowerFacts(folder, config.vision.num_hidden_layers, config.vision.hidden_size, parameters,
                            nbytes, config.vision.patch_size, config.vision.pooling_kernel_size,
                            config.vision.vision_soft_token_budgets), None


def _sizes(files: Iterable[Path]) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in files if path.is_file()}


def count_parameters(shapes: dict[str, Shape]) -> dict[str, int]:
    """Elements in each of `PARTS`, from `network_shapes`; no vision there, so that one is 0."""
    counts = dict.fromkeys(PARTS, 0)
    for name, shape in shapes.items():
        counts[_part(name)] += math.prod(shape)
    return counts


def layer_groups(config: ModelConfig) -> tuple[LayerGroup, ...]:
    """The layers by geometry, in the order in which each first appears."""
    groups: dict[LayerConfig, list[int]] = {}
    for index, layer in enumerate(config.layers):
        groups.setdefault(layer, []).append(index)
    return tuple(LayerGroup(tuple(indices), layer) for layer, indices in groups.items())


def _program(tokenizer: TokenizerFacts | None) -> int:
    return program_bytes(0 if tokenizer is None else tokenizer.vocab_size)


def _part(name: str) -> str:
    if name.startswith("embed_tokens."):
        return "embedding"
    if name.startswith("self_conditioning."):
        return "self-conditioning"
    for piece, part in ((".self_attn.", "attention"), (".mlp.", "dense MLP"), (".experts.", "experts")):
        if piece in name:
            return part
    return "router and norms"


def _stored(found: Iterable[tuple[str, int]]) -> tuple[StoredAs, ...]:
    return tuple(StoredAs(*total) for total in _totals(found))


def _totals(found: Iterable[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Every tensor's kind and bytes -> each kind with its number of tensors and their bytes; what takes most first."""
    tensors, sizes = Counter[Any](), Counter[Any]()
    for *kind, nbytes in found:
        tensors[tuple(kind)] += 1
        sizes[tuple(kind)] += nbytes
    return [(*kind, tensors[kind], size) for kind, size in sizes.most_common()]


def _tokenizer_facts(read: Callable[[], Tokenizer], problems: list[Problem]) -> TokenizerFacts | None:
    """None, and one more of the problems, when there is no tokenizer, or none that can be read."""
    try:
        tokenizer = read()
    except CheckpointError as error:
        problems.append(Problem("tokenizer", (str(error),)))
        return None
    return TokenizerFacts(tokenizer.vocab_size, tokenizer.has_chat_template)
