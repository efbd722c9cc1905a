"""What a checkpoint folder holds and what running it takes, from its configuration and safetensors headers alone.

Works on config.json, generation_config.json, tokenizer files and headers; reads no tensor's data. What is wrong is
found by the same checks that `dgemma.load` makes.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dgemma.config import (
    FULL,
    SLIDING,
    GenerationConfig,
    LayerConfig,
    ModelConfig,
    load_generation_config,
    load_model_config,
)
from dgemma.errors import CheckpointError
from dgemma.kernels.experts import DENSE_EXPERTS
from dgemma.nn.head import VOCAB_TILE
from dgemma.nn.transformer import ENCODE_CHUNK
from dgemma.weights.load import Contents, Problem, Shape, _stored_dtype, empty_network, match, read_headers
from dgemma.weights.names import is_vision

PARTS: tuple[str, ...] = ("embedding", "attention", "dense MLP", "experts", "router and norms",
                          "self-conditioning", "vision")
ITEM_SIZES = {"bfloat16": 2, "float32": 4}
_CONTEXTS = (4_096, 32_768, 131_072)


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
class MemoryNeed:
    """Bytes to run the text network for one conversation of ``context`` tokens with every weight in ``dtype``."""

    dtype: str
    context: int
    weights: int
    kv_cache: int
    working: int

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache + self.working


@dataclass(frozen=True)
class TokenizerFacts:
    """``vocab_size`` counts ids, added tokens included."""

    vocab_size: int
    has_chat_template: bool


@dataclass(frozen=True)
class CheckpointReport:
    """Everything `inspect_checkpoint` finds. ``parameters`` counts each of `PARTS`; sizes are bytes."""

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
        for need, entry in zip(self.memory, data["memory"], strict=True):
            entry["total"] = need.total
        return data


def inspect_checkpoint(folder: Path, contexts: Sequence[int] | None = None) -> CheckpointReport:
    """Report on a checkpoint folder; ``contexts`` are the lengths in tokens to estimate memory for.

    What is wrong with the weights, the tokenizer or the dtype stands in ``problems``. Raises CheckpointError when there
    is nothing to report on: no such folder, not a DiffusionGemma, no weight files, a configuration that cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        read_headers(folder)  # says what it is instead
    config = load_model_config(folder)
    contents = read_headers(folder)
    shapes = network_shapes(config)
    parameters = count_parameters(shapes)
    chosen, problems = match(contents, shapes)
    tokenizer = None
    try:
        tokenizer = _tokenizer_facts(folder)
    except CheckpointError as error:
        problems.append(Problem("tokenizer", (str(error),)))
    if config.dtype is not None:
        try:
            _stored_dtype(folder, config, chosen)
        except CheckpointError as error:
            problems.append(Problem("configuration", (str(error),)))
    parameters["vision"] = sum(math.prod(t.shape) for name, t in contents.tensors.items() if is_vision(name))
    return CheckpointReport(
        folder=folder,
        config=config,
        layers=layer_groups(config),
        parameters=parameters,
        stored=_stored(contents),
        files={path.name: path.stat().st_size for path in contents.files if path.is_file()},
        memory=memory_needs(config, sum(parameters.values()) - parameters["vision"], contexts),
        generation=load_generation_config(folder, config),
        tokenizer=tokenizer,
        problems=tuple(problems),
    )


def network_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Our name -> shape of every tensor of the text network."""
    return {name: tuple(tensor.shape) for name, tensor in empty_network(config).state_dict().items()}


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


def memory_needs(config: ModelConfig, parameters: int, contexts: Iterable[int] | None = None) -> tuple[MemoryNeed, ...]:
    """The memory to run, for every dtype and context length; None: a few usual lengths up to the longest."""
    longest = config.max_position_embeddings
    lengths = [*(n for n in _CONTEXTS if n < longest), longest] if contexts is None else list(contexts)
    return tuple(
        MemoryNeed(dtype, length, parameters * size, kv_cache_bytes(config, length, size),
                   working_bytes(config, length, size))
        for dtype, size in ITEM_SIZES.items() for length in lengths)


def kv_cache_bytes(config: ModelConfig, tokens: int, item_size: int) -> int:
    """What `KVCache` holds for one row of ``tokens`` tokens.

    For every layer, keys and values of ``heads · head_dim`` for each token it keeps (sliding layers the last
    ``sliding_window - 1``, full layers all) and for one canvas, for which the cache leaves room.
    """
    kept = {SLIDING: min(tokens, config.sliding_window - 1), FULL: tokens}
    return sum(2 * layer.num_key_value_heads * layer.head_dim * (kept[layer.kind] + config.canvas_length) * item_size
               for layer in config.layers)


def working_bytes(config: ModelConfig, tokens: int, item_size: int) -> int:
    """An estimate of what a pass allocates beside weights and cache, at its widest moment.

    The widest pass has T = max(canvas, min(tokens, `ENCODE_CHUNK`)) rows: a canvas, or a piece of P prompt tokens.
    Its hidden states take T·D·(4e + 8) bytes (e: bytes per element; norms work in float32), and beside them the
    largest of three: the chosen experts' inputs and outputs, T·k·D·(3e + 8) (few experts: all of their inner
    activations and a copy of the layer's experts, (4T + 3D)·E·I·e); attention's queries and outputs,
    4·T·heads·head_dim·e, with the S tokens of context joined to the new ones, 2·KV heads·head_dim·S·e, and the
    prompt's masks, P·S·(10 + group·(1 + e)); the head's tile, C·tile·(e + 12) + 12·C·D.
    Measured on the plain CPU path: 0.7 to 1.2 of this.
    """
    canvas, hidden = config.canvas_length, config.hidden_size
    prompt = min(tokens, ENCODE_CHUNK)
    rows = max(canvas, prompt)
    if config.num_experts <= DENSE_EXPERTS:
        experts = (4 * rows + 3 * hidden) * config.num_experts * config.moe_intermediate_size * item_size
    else:
        experts = rows * config.top_k_experts * hidden * (3 * item_size + 8)
    attention = 0
    for layer in set(config.layers):
        seen = (tokens if layer.kind == FULL else min(tokens, config.sliding_window - 1 + prompt)) + canvas
        group = config.num_attention_heads // layer.num_key_value_heads
        joined = 2 * layer.num_key_value_heads * layer.head_dim * seen * item_size
        queries = 4 * rows * config.num_attention_heads * layer.head_dim * item_size
        attention = max(attention, queries + joined + prompt * seen * (10 + group * (1 + item_size)))
    head = canvas * min(VOCAB_TILE, config.vocab_size) * (item_size + 12) + 12 * canvas * hidden
    return rows * hidden * (4 * item_size + 8) + max(experts, attention, head)


def _part(name: str) -> str:
    if name.startswith("embed_tokens."):
        return "embedding"
    if name.startswith("self_conditioning."):
        return "self-conditioning"
    for piece, part in ((".self_attn.", "attention"), (".mlp.", "dense MLP"), (".experts.", "experts")):
        if piece in name:
            return part
    return "router and norms"


def _stored(contents: Contents) -> tuple[StoredAs, ...]:
    tensors, sizes = Counter[str](), Counter[str]()
    for tensor in contents.tensors.values():
        tensors[tensor.dtype] += 1
        sizes[tensor.dtype] += tensor.nbytes
    return tuple(StoredAs(dtype, tensors[dtype], size) for dtype, size in sizes.most_common())


def _tokenizer_facts(folder: Path) -> TokenizerFacts:
    """Raises CheckpointError when there is no tokenizer, or none that can be read."""
    from dgemma.chat import Tokenizer

    tokenizer = Tokenizer.from_folder(folder)
    return TokenizerFacts(tokenizer.vocab_size, tokenizer.has_chat_template)
