"""What a training step holds beside weights: the tensors autograd keeps, and what is worked with at the widest moment.

Works on a network's shape and on how a step is made (`Step`); no tensor is made and no network is needed. What the
cache takes `inference` counts; every other number follows `nn/block.py`, `kernels/attention.py`, `kernels/experts.py`,
`nn/adapters.py` and `train/losses.py` line by line: when those keep something else, the tests that compare with
autograd's own saved tensors say so. Knows nothing of weights, optimizers or devices but whether attention is fused
there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from dgemma.cache.store import READ_AT_ONCE
from dgemma.cache.visibility import reach
from dgemma.config import ModelConfig
from dgemma.kernels.experts import DENSE_EXPERTS, ROW_BLOCK
from dgemma.kernels.products import PIECE
from dgemma.memory.inference import kv_cache_bytes
from dgemma.nn.head import fits_whole, tile_width

WIDE = 4  # bytes of a float32: norms, routing, sums over experts and adapters work in it


@dataclass(frozen=True)
class Step:
    """One micro-batch through the network. Sizes of numbers are in bytes.

    ``stream`` is what the hidden states between blocks are kept in, ``product`` what a matrix product gives,
    ``attention`` what attention's products are made in, ``cached`` what keys and values are kept in. ``ranks`` are
    those of the adapters by the names of their matrices; None: everything is trained itself.
    """

    config: ModelConfig
    context: int
    batch: int = 1
    passes: int = 1
    causal_canvas: bool = True  # the clean canvas is read causally, too
    checkpointing: bool = True
    stream: int = 2
    product: int = 2
    attention: int = 2
    cached: int = 2
    ranks: Mapping[str, int] | None = field(default_factory=dict)
    dora: bool = False
    packed: bool = False
    fused: bool = False  # attention's weights are never in memory: on a GPU


@dataclass(frozen=True)
class Pass:
    """A pass over ``tokens`` tokens a row, with ``seen`` tokens before them in the cache."""

    tokens: int
    seen: int
    causal: bool


@dataclass(frozen=True)
class Moment:
    """What is held at one moment: for the backward pass, of keys and values, to work with, and of gradients so far."""

    name: str
    kept: int
    cache: int
    working: int
    gradients: int

    @property
    def total(self) -> int:
        return self.kept + self.cache + self.working + self.gradients


def context_passes(step: Step) -> list[Pass]:
    """How the context is read: in pieces, as `DiffusionTransformer.encode` does."""
    return [Pass(min(READ_AT_ONCE, step.context - start), start, True)
            for start in range(0, step.context, READ_AT_ONCE)]


def canvas_passes(step: Step) -> list[Pass]:
    """The canvas denoised, and read causally for the causal loss."""
    length = step.config.canvas_length
    return ([Pass(length, step.context, False)] * step.passes
            + [Pass(length, step.context, True)] * step.causal_canvas)


def kept_by_block(step: Step, index: int, part: Pass) -> dict[str, int]:
    """The bytes that autograd keeps of one block over one pass, by what they belong to; its input is in "norms"."""
    config, layer = step.config, step.config.layers[index]
    rows = step.batch * part.tokens
    hidden, inner = rows * config.hidden_size, rows * config.intermediate_size
    columns = reach(config, layer.kind, part.seen) + part.tokens
    queries = rows * config.num_attention_heads * layer.head_dim
    keys = rows * layer.num_key_value_heads * layer.head_dim

    # A norm keeps its input as float32: a copy if that is narrower, and then one for each norm that reads it.
    norms = (8 if step.stream < WIDE else 6) * WIDE * hidden
    shared_value = step.product == WIDE and not layer.has_v_proj
    head_norms = WIDE * (queries + keys * (1 if shared_value else 2))
    if step.ranks is None:  # the weights' own gradients need what they are multiplied with
        norms += 8 * WIDE * hidden
        head_norms += WIDE * (queries + keys)

    seen = step.batch * columns * layer.num_key_value_heads * layer.head_dim
    scores = rows * columns * config.num_attention_heads
    mask = scores // layer.num_key_value_heads * part.causal  # the heads that share keys stand below each other
    if step.fused:  # its inputs and its output
        attention = step.attention * (2 * queries + 2 * seen + mask) + WIDE * rows * config.num_attention_heads
    else:
        attention = step.attention * (queries + 2 * seen + scores) + mask
        if step.stream > step.product:  # under autocast the softmax is float32, and cast for the next product
            attention += WIDE * scores
    kept = {"norms": norms + head_norms, "attention": attention, "mlp": 3 * step.product * inner,
            "experts": _experts(step, index, rows), "products": 0}
    read: set[str] = set()
    for name, (place, lines, width, size, outputs) in _reads(step, index, rows).items():
        if step.ranks is not None and name not in step.ranks:
            continue
        elements, first = lines * width, place not in read
        read.add(place)
        if step.ranks is None:
            kept["products"] += step.product * elements * (first or size != step.product)
        else:
            # What it reads as it came, once for all that read it; DoRA and few experts make a float32 copy for each.
            copied = step.dora or (".experts." in name and _is_dense(config) and not step.packed)
            kept["products"] += WIDE * elements * (first or size < WIDE) if copied else size * elements * first
            kept["products"] += WIDE * (step.ranks[name] * lines + outputs * step.dora)
    return kept


def block_working(step: Step, index: int, part: Pass) -> int:
    """The most that the backward pass through one block holds beside what was kept: gradients on their way."""
    config, layer = step.config, step.config.layers[index]
    rows = step.batch * part.tokens
    columns = reach(config, layer.kind, part.seen) + part.tokens
    scores = rows * columns * config.num_attention_heads * (0 if step.fused else step.attention)
    routed = rows * config.top_k_experts * config.hidden_size * WIDE
    if _is_dense(config):
        routed = 3 * rows * config.num_experts * config.moe_intermediate_size * step.product
    # Gradients of the experts' rows: as the sum has them, times their weights, and of the rows that they came from.
    return max(2 * scores, 3 * routed) + 3 * rows * config.hidden_size * WIDE + (2 * WIDE * PIECE) * step.packed


def head_working(step: Step) -> int:
    """The most that the loss works with: the logits of a tile, several times over, and that tile of the table."""
    config, canvas = step.config, step.config.canvas_length
    most = 0
    for tokens in (step.batch * canvas, step.batch * (step.context - 1 + canvas * step.causal_canvas)):
        whole = fits_whole(tokens, config.vocab_size)
        width = config.vocab_size if whole else tile_width(tokens, config.vocab_size)
        table = width * config.hidden_size
        tile = tokens * width * (6 * WIDE if whole else 5 * WIDE if step.ranks is None else 2 * step.product)
        if step.packed:  # whole logits expand the whole table for the soft embeddings, a GPU every tile
            tile += WIDE * table * (whole or step.fused)
        elif not step.fused:  # a CPU's matrix library rearranges what it multiplies with, there and back
            tile += 2 * step.product * table
        most = max(most, tile + 3 * WIDE * tokens * config.hidden_size)
    return most


def widest(step: Step, gradients: int, first: int, optimizer: int) -> Moment:
    """The widest moment of a step.

    ``gradients`` bytes are those of all weights that are trained, ``first`` those that are there from the loss on;
    the passes share their weights, so all are there when the first pass is through. ``optimizer`` is what that works
    with when all else is gone.
    """
    layers = range(step.config.num_hidden_layers)
    context, canvas = context_passes(step), canvas_passes(step)
    unit = step.batch * step.config.hidden_size
    # The last norm's input, the hidden states and the losses' gradients in them
    head = (2 * WIDE + step.stream) * unit * (step.context + sum(part.tokens for part in canvas))
    once = _cache(step, step.context)
    whole = _cache(step, step.context + step.config.canvas_length) * step.causal_canvas

    def kept(part: Pass) -> int:
        if step.checkpointing:  # what goes into the blocks
            return step.stream * unit * part.tokens * len(layers)
        return sum(sum(kept_by_block(step, i, part).values()) for i in layers)

    def block(parts: list[Pass]) -> int:
        again = step.checkpointing
        return max((block_working(step, i, part) + again * sum(kept_by_block(step, i, part).values())
                    for part in parts for i in layers), default=0)

    if step.checkpointing:
        # Every piece keeps the cache as it found it, to be run again, and those are copies of each other.
        held = sum(_cache(step, part.seen + part.tokens) for part in context)
    else:
        held, whole = once, max(whole - once, 0)
    before, later = sum(map(kept, context)), sum(map(kept, canvas))
    everything = before + later + head
    # The preflight runs one block without checkpointing, on no more than two rows.
    looked_at = max(sum(sum(kept_by_block(step, i, part).values()) for part in (*context, *canvas)) for i in layers)
    looked_at = looked_at * min(step.batch, 2) // step.batch * step.checkpointing
    return max((
        Moment("the preflight", everything * min(step.batch, 2) // step.batch, held + whole, block(canvas) + looked_at,
               first),
        Moment("the loss", everything, held + whole, head_working(step), first),
        Moment("the first gradients", everything, held + whole, block(canvas), first),
        Moment("the backward pass through the canvas", everything - sum(map(kept, canvas[-1:])), held + whole + once,
               block(canvas), gradients),
        # By now the gradients of the context's keys and values have all come in.
        Moment("the backward pass through the context", before, held + once, block(context), gradients),
        Moment("the optimizer's step", 0, 0, optimizer, gradients),
    ), key=lambda moment: moment.total)


def _cache(step: Step, tokens: int) -> int:
    """Keys and values of so many tokens a row, in all layers."""
    return step.batch * kv_cache_bytes(step.config, tokens, step.cached)


def _is_dense(config: ModelConfig) -> bool:
    return config.num_experts <= DENSE_EXPERTS


def _routed(config: ModelConfig, rows: int) -> int:
    """The rows that all experts together work on: each takes a whole number of row blocks."""
    used = config.num_experts * (1 - (1 - config.top_k_experts / config.num_experts) ** rows)
    return int(rows * config.top_k_experts + used * (ROW_BLOCK - 1) / 2)


def _experts(step: Step, index: int, rows: int) -> int:
    config = step.config
    adapted = any(name.startswith(f"layers.{index}.experts.") for name in step.ranks or ())
    inner, hidden = config.moe_intermediate_size, config.hidden_size
    routing = rows * (WIDE * config.num_experts + 28 * config.top_k_experts)
    weights = 3 * config.num_experts * inner * hidden
    if _is_dense(config) and not step.packed:  # every token through every expert, their weights turned round
        return routing + 4 * step.product * rows * config.num_experts * inner + step.product * weights
    chosen = rows * config.top_k_experts
    if not adapted and step.ranks is not None:  # what goes in and, of plain ones, the gate and up products
        return routing + step.stream * rows * hidden + step.product * chosen * 2 * inner * (not step.packed)
    # The outputs twice: as they are weighted, and as they are summed up.
    kept = 3 * step.product * _routed(config, rows) * inner + 2 * WIDE * chosen * hidden
    return routing + kept + step.product * weights * (step.stream > step.product)


def _reads(step: Step, index: int, rows: int) -> dict[str, tuple[str, int, int, int, int]]:
    """Matrix -> what it reads: its place, how many rows of how many numbers, their size; how many numbers it gives."""
    config, layer = step.config, step.config.layers[index]
    hidden, queries = config.hidden_size, config.num_attention_heads * layer.head_dim
    keys, dense = layer.num_key_value_heads * layer.head_dim, config.intermediate_size
    inner = config.moe_intermediate_size
    dense_experts = _is_dense(config) and not step.packed
    routed = rows * config.num_experts if dense_experts else _routed(config, rows)
    into = rows if step.ranks is None and dense_experts else routed
    own = f"layers.{index}."
    found = {f"{own}self_attn.{name}_proj": ("attention input", rows, hidden, step.stream, rows * out)
             for name, out in (("q", queries), ("k", keys), ("v", keys)) if name != "v" or layer.has_v_proj}
    found[f"{own}self_attn.o_proj"] = ("attention output", rows, queries, step.stream, rows * hidden)
    found |= {f"{own}mlp.{name}_proj": ("mlp input", rows, hidden, step.stream, rows * dense)
              for name in ("gate", "up")}
    found[f"{own}mlp.down_proj"] = ("mlp inner", rows, dense, step.product, rows * hidden)
    found[f"{own}experts.gate_up_proj"] = ("expert rows", into, hidden, step.stream, 2 * routed * inner)
    found[f"{own}experts.down_proj"] = ("expert inner", routed, inner, step.product, routed * hidden)
    return found
