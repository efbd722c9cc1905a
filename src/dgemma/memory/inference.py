"""What a network takes of this machine's memory when it answers: its weights, a request, a step.

Works on a network's shape, and on a network for what of its weights is in memory already. `memory.machine` says what
there is.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from dgemma.cache.pages import PAGE
from dgemma.cache.store import READ_AT_ONCE, token_bytes
from dgemma.cache.visibility import reach
from dgemma.config import ModelConfig
from dgemma.kernels.attention import COLUMNS, SCORES
from dgemma.kernels.experts import DENSE_EXPERTS
from dgemma.memory.machine import available_memory
from dgemma.memory.vision import ITEM_SIZES, TowerSize
from dgemma.nn import DiffusionTransformer
from dgemma.nn.head import VOCAB_TILE

_CONTEXTS = (4_096, 32_768, 131_072)


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes to run a model for one conversation of ``context`` tokens with every weight in ``dtype``.

    ``dtype`` is "packed" for weights as a GGUF file has them, which is how they are run on the CPU. ``vision`` is what
    the vision tower takes, which comes with the first picture.
    """

    dtype: str
    context: int
    weights: int
    kv_cache: int
    working: int
    program: int = 0  # this program, its libraries and the tokenizer
    vision: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache + self.working + self.program + self.vision


def memory_needs(config: ModelConfig, parameters: int, contexts: Iterable[int] | None = None,
                 program: int = 0, packed: int | None = None, tower: TowerSize | None = None
                 ) -> tuple[MemoryNeed, ...]:
    """The memory to run, for every dtype and context length; None: a few usual lengths up to the longest.

    ``packed`` are the bytes of weights that have packed ones among them: these are run as they are on the CPU, and in
    bfloat16 on a GPU. ``tower`` is what sees pictures.
    """
    longest = config.max_position_embeddings
    lengths = [*(n for n in _CONTEXTS if n < longest), longest] if contexts is None else list(contexts)
    # Packed, activations are float32 and the cache is bfloat16.
    ways = [(dtype, parameters * size, size, size) for dtype, size in ITEM_SIZES.items()] if packed is None else [
        ("packed", packed, 2, 4), ("bfloat16", 2 * parameters, 2, 2)]
    return tuple(MemoryNeed(dtype, length, weights, kv_cache_bytes(config, length, cached),
                            working_bytes(config, length, item), program,
                            0 if tower is None else tower.needed(dtype))
                 for dtype, weights, cached, item in ways for length in lengths)


def kv_cache_bytes(config: ModelConfig, tokens: int, cache_type: str | int) -> int:
    """What `KVCache` holds for one row of ``tokens`` tokens, kept in ``cache_type`` (or so many bytes per element).

    For every layer a key and a value of ``heads · head_dim`` for each token it keeps: sliding layers the last
    ``sliding_window - 1``, full layers all. Nothing is reserved beyond.
    """
    return sum(_cache_bytes(config, tokens, cache_type))


def sequence_bytes(config: ModelConfig, tokens: int, cache_type: str | int) -> int:
    """The most memory that the pages of a sequence of ``tokens`` tokens take, and a pass over them.

    Sliding layers hold up to a page more than their window, and the context of one layer at a time may be copied into
    the blocks that attention wants. ``cache_type`` as in `token_bytes`.
    """
    layers = _cache_bytes(config, tokens, cache_type, spare=PAGE - 1)
    return sum(layers) + max(layers)


def _cache_bytes(config: ModelConfig, tokens: int, cache_type: str | int, spare: int = 0) -> list[int]:
    """Keys and values of one row, layer by layer."""
    return [2 * layer.num_key_value_heads * token_bytes(layer.head_dim, cache_type)
            * reach(config, layer.kind, tokens, spare) for layer in config.layers]


def working_bytes(config: ModelConfig, tokens: int, item_size: int) -> int:
    """An estimate of what a pass allocates beside weights and cache, at its widest moment.

    The widest pass has T = max(canvas, min(tokens, `READ_AT_ONCE`)) rows: a canvas, or a piece of the prompt. Its
    hidden states take T·D·(4e + 8) bytes (e: bytes per element; norms work in float32), and beside them the largest
    of three: the chosen experts' inputs and outputs, T·k·D·(3e + 8) (few experts: all of their inner activations and
    a copy of the layer's experts, (4T + 3D)·E·I·e); attention's queries and outputs, T·heads·head_dim·(4e + 16), with
    the scores of one tile, 12 each, and the keys and values of one block, 4·KV heads·head_dim·`COLUMNS`·e, neither of
    which grows with the context; the head's tile, C·tile·(e + 12) + 12·C·D.
    """
    canvas, hidden = config.canvas_length, config.hidden_size
    rows = max(canvas, min(tokens, READ_AT_ONCE))
    if config.num_experts <= DENSE_EXPERTS:
        experts = (4 * rows + 3 * hidden) * config.num_experts * config.moe_intermediate_size * item_size
    else:
        experts = rows * config.top_k_experts * hidden * (3 * item_size + 8)
    attention = 0
    for layer in set(config.layers):
        columns = min(tokens + canvas, COLUMNS)
        queries = rows * config.num_attention_heads * layer.head_dim * (4 * item_size + 16)
        block = 4 * layer.num_key_value_heads * layer.head_dim * columns * item_size
        scores = 12 * min(rows * config.num_attention_heads * columns, SCORES)
        attention = max(attention, queries + block + scores)
    head = canvas * min(VOCAB_TILE, config.vocab_size) * (item_size + 12) + 12 * canvas * hidden
    return rows * hidden * (4 * item_size + 8) + max(experts, attention, head)


def request_memory(network: DiffusionTransformer, available: int | None = None, seeing: int = 0) -> int:
    """Memory for the requests that a network answers and for what they leave to be read again, in bytes.

    Four fifths of what is free once the network is there, with all its weights in memory, and what sees pictures for it
    (``seeing`` bytes that this has yet to take); ``available`` is what a CPU's machine has (None: what it has now).
    """
    if available is None or network.device.type == "cuda":
        available = available_memory(network.device)
    free = (8 << 30 if available is None else available) - mapped_bytes(network) - seeing
    return max(free * 4 // 5, 64 << 20)


def mapped_bytes(network: nn.Module, maps: Path = Path("/proc/self/maps")) -> int:
    """Bytes of a network's weights, or a tower's, that are not memory of this process, but of files mapped into it.

    Their pages count as free memory, whether they have been read yet or not, although every step needs them. Where the
    system does not tell what is mapped, all weights count.
    """
    tensors = list(_weights(network))
    try:
        regions = _mapped_files(maps)
    except OSError:
        return sum(tensor.nbytes for tensor in tensors)
    starts = [start for start, _ in regions]
    found = 0
    for tensor in tensors:
        place = bisect_right(starts, tensor.data_ptr()) - 1
        if place >= 0 and tensor.data_ptr() < regions[place][1]:
            found += tensor.nbytes
    return found


def _weights(network: nn.Module) -> Iterator[Tensor]:
    """Every tensor of a network that is in this machine's memory, packed ones too, each memory once."""
    seen: set[int] = set()
    for module in network.modules():
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if tensor.device.type == "cpu" and tensor.data_ptr() not in seen:
                seen.add(tensor.data_ptr())
                yield tensor


def _mapped_files(maps: Path) -> list[tuple[int, int]]:
    """Where files are mapped into this process' memory: beginnings and ends, in order."""
    regions = []
    for line in maps.read_text().splitlines():
        # "7f00-7f10 rw-p 00000000 08:01 INODE PATH"
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[4] != "0" and not fields[5].startswith(("/dev/zero", "/memfd:", "/dev/shm")):
            start, end = (int(number, 16) for number in fields[0].split("-"))
            regions.append((start, end))
    return sorted(regions)
