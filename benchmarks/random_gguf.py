"""A GGUF file with the 26B-A4B's shape and random weights, written straight as packed blocks.

    python benchmarks/random_gguf.py OUT.gguf [--layers 30] [--mix q4_k_m] [--vocab 262144] [--architecture gemma4]

What runs on it costs what the real file costs: same tensors, same types, same bytes. It says nothing sensible, but its
activations keep a healthy size through all layers and every expert gets its share. Architecture `diffusion-gemma` is
the model's own; `gemma4` has the same layers without the diffusion parts, for a llama.cpp that knows only those.

No float copy of a tensor is ever made: for each block type and row width one pool of random blocks is drawn, and every
tensor tiles it from an offset of its own. A pool holds a prime number of blocks, so that repeats do not line up with
rows.

Which tensor has which type in Q4_K_M (llama.cpp's rules; the counts are those of the real file):

- Vectors, scalars and the router are F32: 14 in each of 30 blocks, `output_norm`, `rope_freqs`, `self_cond_pre_norm`:
  423.
- Matrices are Q4_K unless said otherwise. Three kinds are promoted to Q6_K: `token_embd` (it is the head too); and, in
  places where n of them in a row satisfy `wants_more_bits(i, n)`, `attn_v` and the two down projections `ffn_down` and
  `ffn_down_exps`. For the latter i is the layer: 14 of 30. For `attn_v` i counts the `attn_v` tensors, of which the
  full layers have none: 13 of 25.
- Rows that are no multiple of 256 cannot be K-quants: Q4_K becomes Q5_0, Q6_K becomes Q8_0. That is every down
  projection: 2 x 14 are Q8_0; 2 x 16 and `self_cond_down` (never promoted) are Q5_0: 28 and 33.
- So Q6_K is left to `token_embd` and 13 `attn_v`: 14. All else is Q4_K: 194. Together 692 tensors, 16.8 GB.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGUFWriter
from gguf import GGMLQuantizationType as Type

DIFFUSION, CAUSAL = "diffusion-gemma", "gemma4"
MIXES = {"q4_k_m": 15, "q8_0": 7}  # general.file_type
POOL_BYTES = 32 << 20
LAYER_SCALAR = 0.7  # x <- 0.7 (x + two branches of size 1): settles where x has the size of its branches
BYTES_AT = 238  # the id of <0x00>
SPECIALS = {
    0: "<pad>", 1: "<eos>", 2: "<bos>", 3: "<unk>", 4: "<mask>", 46: "<|tool>", 47: "<tool|>", 48: "<|tool_call>",
    49: "<tool_call|>", 50: "<|tool_response>", 51: "<tool_response|>", 52: '<|"|>', 98: "<|think|>",
    100: "<|channel>", 101: "<channel|>", 105: "<|turn>", 106: "<turn|>",
}
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- if enable_thinking -%}{{ '<|turn>system\\n<|think|><turn|>\\n' }}{%- endif -%}
{%- for message in messages -%}
    {%- set role = 'model' if message.role == 'assistant' else message.role -%}
    {{ '<|turn>' ~ role ~ '\\n' }}
    {%- if message.content is string -%}{{ message.content | trim }}
    {%- else -%}{%- for part in message.content -%}{{ part.text | trim }}{%- endfor -%}
    {%- endif -%}
    {{ '<turn|>\\n' }}
{%- endfor -%}
{{ '<|turn>model\\n' if add_generation_prompt }}"""


@dataclass(frozen=True)
class Shape:
    """The 26B-A4B; tests make it small."""

    layers: int = 30
    vocab: int = 262_144
    hidden: int = 2816
    dense: int = 2112
    experts: int = 128
    experts_used: int = 8
    expert: int = 704
    heads: int = 16
    sliding_heads: int = 8  # key-value heads
    full_heads: int = 2
    sliding_dim: int = 256
    full_dim: int = 512
    window: int = 1024
    canvas: int = 256

    def is_sliding(self, layer: int) -> bool:
        """All layers but every sixth and the last."""
        return (layer + 1) % 6 != 0 and layer != self.layers - 1


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written: its shape in numpy's order, its type, and its contents if they are not random."""

    name: str
    shape: tuple[int, ...]
    type: Type
    values: Callable[[], np.ndarray] | None = None

    @property
    def nbytes(self) -> int:
        block, size = GGML_QUANT_SIZES[self.type]
        return int(np.prod(self.shape)) // block * size


def wants_more_bits(i: int, n: int) -> bool:
    """llama.cpp's choice of which i of n tensors are worth a larger type: the ends, and every third between."""
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


def tensor_specs(shape: Shape, mix: str = "q4_k_m", architecture: str = DIFFUSION, seed: int = 0) -> list[TensorSpec]:
    """Every tensor of the file in its order."""
    specs: list[TensorSpec] = []
    rng = np.random.default_rng([seed, 1])

    def matrix(name: str, *dims: int, promoted: bool = False) -> None:
        if mix == "q8_0":
            kind = Type.Q8_0
        elif dims[-1] % 256:
            kind = Type.Q8_0 if promoted else Type.Q5_0
        else:
            kind = Type.Q6_K if promoted else Type.Q4_K
        specs.append(TensorSpec(f"{name}.weight", dims, kind))

    def constant(name: str, size: int, value: float = 1.0) -> None:
        specs.append(TensorSpec(name, (size,), Type.F32, lambda: np.full(size, value, np.float32)))

    def rope_freqs() -> np.ndarray:  # what the full layers' frequencies are divided by: a quarter of them rotates
        pairs = np.arange(shape.full_dim // 2)
        return np.where(pairs < shape.full_dim // 8, 1.0, 1e30).astype(np.float32)

    def router(key: int) -> np.ndarray:  # logits of size 1 from a residual normed to sqrt(D): no expert is a favourite
        return np.random.default_rng([seed, 2, key]).standard_normal((shape.experts, shape.hidden), np.float32)

    matrix("token_embd", shape.vocab, shape.hidden, promoted=True)
    constant("output_norm.weight", shape.hidden)
    specs.append(TensorSpec("rope_freqs.weight", (shape.full_dim // 2,), Type.F32, rope_freqs))
    if architecture == DIFFUSION:
        constant("self_cond_pre_norm.weight", shape.hidden)
        matrix("self_cond_gate", shape.dense, shape.hidden)
        matrix("self_cond_up", shape.dense, shape.hidden)
        matrix("self_cond_down", shape.hidden, shape.dense)
    value_layers = [i for i in range(shape.layers) if shape.is_sliding(i)]
    for i in range(shape.layers):
        sliding, blk = shape.is_sliding(i), f"blk.{i}."
        head = shape.sliding_dim if sliding else shape.full_dim
        keys = head * (shape.sliding_heads if sliding else shape.full_heads)
        more = wants_more_bits(i, shape.layers)
        constant(f"{blk}attn_norm.weight", shape.hidden)
        matrix(f"{blk}attn_q", shape.heads * head, shape.hidden)
        matrix(f"{blk}attn_k", keys, shape.hidden)
        if sliding:
            more_v = wants_more_bits(value_layers.index(i), len(value_layers))
            matrix(f"{blk}attn_v", keys, shape.hidden, promoted=more_v)
        matrix(f"{blk}attn_output", shape.hidden, shape.heads * head)
        constant(f"{blk}attn_q_norm.weight", head)
        constant(f"{blk}attn_k_norm.weight", head)
        constant(f"{blk}post_attention_norm.weight", shape.hidden)
        constant(f"{blk}ffn_norm.weight", shape.hidden)
        matrix(f"{blk}ffn_gate", shape.dense, shape.hidden)
        matrix(f"{blk}ffn_up", shape.dense, shape.hidden)
        matrix(f"{blk}ffn_down", shape.hidden, shape.dense, promoted=more)
        for norm in ("post_ffw_norm", "post_ffw_norm_1", "pre_ffw_norm_2", "post_ffw_norm_2"):
            constant(f"{blk}{norm}.weight", shape.hidden)
        key = int(rng.integers(1 << 31))
        specs.append(TensorSpec(f"{blk}ffn_gate_inp.weight", (shape.experts, shape.hidden), Type.F32,
                                lambda key=key: router(key)))
        constant(f"{blk}ffn_gate_inp.scale", shape.hidden)
        matrix(f"{blk}ffn_gate_up_exps", shape.experts, 2 * shape.expert, shape.hidden)
        matrix(f"{blk}ffn_down_exps", shape.experts, shape.hidden, shape.expert, promoted=more)
        constant(f"{blk}ffn_down_exps.scale", shape.experts)
        constant(f"{blk}layer_output_scale.weight", 1, LAYER_SCALAR)
        if architecture == DIFFUSION:
            constant(f"{blk}enc_layer_output_scale.weight", 1, LAYER_SCALAR)
    return specs


def random_blocks(rng: np.random.Generator, kind: Type, count: int, std: float) -> np.ndarray:
    """``count`` blocks as bytes [count, block size], standing for numbers of mean 0 and standard deviation ``std``."""
    size = GGML_QUANT_SIZES[kind][1]
    raw = rng.integers(0, 256, (count, size), dtype=np.uint8)
    spread = rng.uniform(0.6, 1.4, count)  # of the block scales, their mean square not far from 1

    def put(at: int, scales: np.ndarray) -> None:
        raw[:, at : at + 2] = scales.astype("<f2").view(np.uint8).reshape(-1, 2)

    if kind == Type.Q4_K:  # d · scale · q - dmin · min, q of 0..15: its mean 7.5 is what the minimum takes away
        scale = rng.integers(24, 60, (count, 8))
        minimum = np.clip(scale + rng.integers(-3, 4, (count, 8)), 0, 63)
        d = std * spread / (4.61 * np.sqrt((scale**2).mean()))
        put(0, d)
        put(2, 7.5 * d)
        # Six bits each in 12 bytes: the first four lie whole in the low bits, the others' high two bits above them.
        raw[:, 4:8] = (scale[:, :4] | scale[:, 4:] >> 4 << 6).astype(np.uint8)
        raw[:, 8:12] = (minimum[:, :4] | minimum[:, 4:] >> 4 << 6).astype(np.uint8)
        raw[:, 12:16] = (scale[:, 4:] & 15 | (minimum[:, 4:] & 15) << 4).astype(np.uint8)
    elif kind == Type.Q6_K:  # d · scale · (q - 32), q of 0..63, signed 8-bit scales
        scale = rng.integers(48, 128, (count, 16)) * rng.choice([-1, 1], (count, 16))
        raw[:, 192:208] = scale.astype(np.int8).view(np.uint8)
        put(208, std * spread / (18.5 * np.sqrt((scale**2).mean())))
    elif kind == Type.Q5_0:  # d · (q - 16), q of 0..31; d of either sign, for the mean of q - 16 is not 0
        put(0, std * spread * rng.choice([-1, 1], count) / 9.25)
    elif kind == Type.Q8_0:  # d · q
        put(0, std * spread / 73.9)
    else:
        raise ValueError(f"no random blocks of type {kind.name}")
    return raw


class Pools:
    """One pool of random blocks for each block type and row width, drawn when it is first needed."""

    def __init__(self, specs: list[TensorSpec], seed: int):
        self._seed = seed
        self._pools: dict[tuple[Type, int], np.ndarray] = {}
        self._largest: dict[tuple[Type, int], int] = {}
        for spec in specs:
            if spec.values is None:
                key = (spec.type, spec.shape[-1])
                self._largest[key] = max(self._largest.get(key, 0), spec.nbytes)

    def stretches(self, spec: TensorSpec, rng: np.random.Generator) -> Iterator[memoryview]:
        """The bytes of a tensor: the pool from a random block on, round and round."""
        key = (spec.type, spec.shape[-1])
        if key not in self._pools:
            size = GGML_QUANT_SIZES[spec.type][1]
            count = _prime_below(max(min(POOL_BYTES, self._largest[key]) // size, 3))
            source = np.random.default_rng([self._seed, 3, int(spec.type), spec.shape[-1]])
            self._pools[key] = random_blocks(source, spec.type, count, spec.shape[-1] ** -0.5)
        pool = self._pools[key]
        at, left, flat = int(rng.integers(len(pool))) * pool.shape[1], spec.nbytes, memoryview(pool.reshape(-1))
        while left:
            part = flat[at : at + left]
            yield part
            left -= len(part)
            at = 0


def _prime_below(n: int) -> int:
    """The largest prime of at most ``n`` (which is at least 2)."""
    return next(p for p in range(n, 1, -1) if all(p % d for d in range(2, int(p**0.5) + 1)))


def vocabulary(size: int) -> tuple[list[str], list[int], list[str]]:
    """Tokens, their types and merges: specials and bytes at their ids, then characters, then words of merged letters.

    Digits merge with nothing: a text of n digits is n tokens.
    """
    normal, unknown, control, unused, byte = 1, 2, 3, 5, 6
    tokens = [SPECIALS.get(i, f"<unused{i}>") for i in range(BYTES_AT)]
    types = [control if i in SPECIALS else unused for i in range(BYTES_AT)]
    types[3] = unknown
    tokens += [f"<0x{i:02X}>" for i in range(256)]
    types += [byte] * 256
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    others = [chr(c) for c in range(33, 127) if chr(c) not in letters]
    tokens += ["\n", "▁", *letters, *others]
    if size < len(tokens):
        raise ValueError(f"a vocabulary needs {len(tokens)} tokens at least, for specials, bytes and characters")

    def pairs() -> Iterator[tuple[str, str]]:
        two = [a + b for a in letters for b in letters]
        yield from (("▁", a) for a in letters)
        yield from ((a, b) for a in letters for b in letters)
        yield from (("▁" + pair[0], pair[1]) for pair in two)
        yield from ((pair, a) for pair in two for a in letters)
        yield from (("▁" + pair, a) for pair in two for a in letters)
        yield from ((a, b) for a in two for b in two)

    merges = []
    for left, right in pairs():
        if len(tokens) == size:
            break
        tokens.append(left + right)
        merges.append(f"{left} {right}")
    if len(tokens) < size:
        raise ValueError(f"a vocabulary has {len(tokens)} tokens at most")
    types += [normal] * (size - len(types))
    return tokens, types, merges


def write_metadata(writer: GGUFWriter, shape: Shape, mix: str, architecture: str) -> None:
    sliding = [shape.is_sliding(i) for i in range(shape.layers)]
    writer.add_name(f"random weights, {shape.layers} layers of the 26B-A4B's shape")
    writer.add_file_type(MIXES[mix])
    writer.add_quantization_version(2)
    writer.add_vocab_size(shape.vocab)
    writer.add_context_length(262_144)
    writer.add_block_count(shape.layers)
    writer.add_embedding_length(shape.hidden)
    writer.add_embedding_length_per_layer_input(0)
    writer.add_feed_forward_length(shape.dense)
    writer.add_expert_count(shape.experts)
    writer.add_expert_used_count(shape.experts_used)
    writer.add_expert_feed_forward_length(shape.expert)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv([shape.sliding_heads if s else shape.full_heads for s in sliding])
    writer.add_key_length(shape.full_dim)
    writer.add_value_length(shape.full_dim)
    writer.add_key_length_swa(shape.sliding_dim)
    writer.add_value_length_swa(shape.sliding_dim)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_sliding_window(shape.window)
    writer.add_sliding_window_pattern(sliding)
    writer.add_shared_kv_layers(0)
    writer.add_rope_freq_base(1e6)
    writer.add_rope_freq_base_swa(1e4)
    writer.add_rope_dimension_count(shape.full_dim)
    writer.add_rope_dimension_count_swa(shape.sliding_dim)
    writer.add_final_logit_softcapping(30.0)
    if architecture == DIFFUSION:
        writer.add_causal_attention(False)
        writer.add_uint32("diffusion.canvas_length", shape.canvas)
        writer.add_uint32("diffusion.eb_max_steps", 48)
        writer.add_float32("diffusion.eb_t_min", 0.4)
        writer.add_float32("diffusion.eb_t_max", 0.8)
        writer.add_float32("diffusion.eb_entropy_bound", 0.1)
        writer.add_uint32("diffusion.eb_stability_threshold", 1)
        writer.add_float32("diffusion.eb_confidence_threshold", 0.005)
        writer.add_diffusion_shift_logits(False)

    tokens, types, merges = vocabulary(shape.vocab)
    writer.add_tokenizer_model("gemma4")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(i) for i in range(len(tokens))])
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(3)
    writer.add_pad_token_id(0)
    writer.add_mask_token_id(4)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def write(path: str | Path, layers: int = 30, mix: str = "q4_k_m", architecture: str = DIFFUSION, vocab: int = 262_144,
          seed: int = 0, shape: Shape | None = None, progress: Callable[[int, int], None] | None = None) -> int:
    """Write the file and return its size; what stood at ``path`` is replaced only when all of the new one is there.

    ``shape`` takes the place of ``layers`` and ``vocab``. ``progress(done, total)`` counts bytes of tensors.
    Same arguments, same bytes.
    """
    shape = shape or Shape(layers=layers, vocab=vocab)
    if mix not in MIXES:
        raise ValueError(f"mix must be one of {', '.join(MIXES)}, got {mix!r}")
    if architecture not in (DIFFUSION, CAUSAL):
        raise ValueError(f"architecture must be {DIFFUSION} or {CAUSAL}, got {architecture!r}")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    specs = tensor_specs(shape, mix, architecture, seed)
    pools, rng = Pools(specs, seed), np.random.default_rng([seed, 4])
    total, done = sum(spec.nbytes for spec in specs), 0
    writer = GGUFWriter(partial, architecture)
    try:
        write_metadata(writer, shape, mix, architecture)
        for spec in specs:
            writer.add_tensor_info(spec.name, spec.shape, np.dtype(np.float32), spec.nbytes, raw_dtype=spec.type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        with partial.open("r+b") as file:
            file.seek(0, os.SEEK_END)
            file.write(bytes(-file.tell() % writer.data_alignment))
            for spec in specs:
                if spec.values is None:
                    parts: Iterator[memoryview] = pools.stretches(spec, rng)
                else:
                    parts = iter([memoryview(spec.values()).cast("B")])
                for part in parts:
                    file.write(part)
                    done += len(part)
                    if progress:
                        progress(done, total)
                file.write(bytes(-spec.nbytes % writer.data_alignment))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            partial.unlink()
    return path.stat().st_size


def expected_bytes(shape: Shape, mix: str = "q4_k_m", architecture: str = DIFFUSION) -> int:
    """About what `write` will take on disk."""
    return sum(spec.nbytes for spec in tensor_specs(shape, mix, architecture)) + 60 * shape.vocab


class Ticker:
    """Progress on stderr, a line now and then."""

    def __init__(self) -> None:
        self._began = self._last = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._last > 5 or done == total:
            self._last = now
            rate = done / max(now - self._began, 1e-9)
            print(f"{done / 1e9:6.2f} of {total / 1e9:.2f} GB, {rate / 1e9:.2f} GB/s", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--mix", choices=MIXES, default="q4_k_m")
    parser.add_argument("--architecture", choices=[DIFFUSION, CAUSAL], default=DIFFUSION)
    parser.add_argument("--vocab", type=int, default=262_144)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--types", action="store_true", help="count the tensors of each type and write nothing")
    arguments = parser.parse_args()
    shape = Shape(layers=arguments.layers, vocab=arguments.vocab)
    if arguments.types:
        specs = tensor_specs(shape, arguments.mix, arguments.architecture)
        for kind in sorted({spec.type for spec in specs}):
            own = [spec for spec in specs if spec.type == kind]
            print(f"{kind.name:5}{len(own):5}{sum(spec.nbytes for spec in own) / 1e9:8.2f} GB")
        print(f"all  {len(specs):5}{sum(spec.nbytes for spec in specs) / 1e9:8.2f} GB")
        return
    size = write(arguments.out, mix=arguments.mix, architecture=arguments.architecture, seed=arguments.seed,
                 shape=shape, progress=Ticker())
    print(f"{arguments.out}: {size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
