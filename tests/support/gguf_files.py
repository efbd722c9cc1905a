"""GGUF files for the tests, written with the `gguf` package: networks of ours under the names of the format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import GGUFWriter

from dgemma.config import GenerationConfig
from dgemma.gguf.keys import ROPE_FREQS, config_metadata, gguf_name, rope_freqs
from dgemma.nn import DiffusionTransformer
from dgemma.weights.gguf_model import is_matrix

# A vocabulary of 50 in Gemma's manner: specials, five bytes only, characters, merges.
TOKENS = ["<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>", "<|tool_response>", "<0xF0>", "<0x9F>", "<0x99>",
          "<0x82>", "\n", "▁", *"abcdefghijklmnopqrstuvwxyz", "\n\n", "▁t", "he", "▁the", "▁▁", "in", "ing", "0", "1",
          "é", "."]
TYPES = [3, 3, 3, 2, 3, 3, 4, 6, 6, 6, 6] + [1] * 39
MERGES = ["\n \n", "▁ t", "h e", "▁t he", "▁ ▁", "i n", "in g"]
TEMPLATE = ("{{ bos_token }}{% for message in messages %}<|turn>{{ message.role }}\n{{ message.content }}<turn|>\n"
            "{% endfor %}{% if add_generation_prompt %}<|turn>model\n{% endif %}")


def tokenizer_metadata() -> dict[str, Any]:
    assert len(TOKENS) == len(TYPES) == 50
    return {"tokenizer.ggml.model": "gemma4", "tokenizer.ggml.tokens": TOKENS, "tokenizer.ggml.token_type": TYPES,
            "tokenizer.ggml.merges": MERGES, "tokenizer.ggml.bos_token_id": 2, "tokenizer.ggml.eos_token_id": 1,
            "tokenizer.ggml.unknown_token_id": 3, "tokenizer.ggml.padding_token_id": 0,
            "tokenizer.chat_template": TEMPLATE}


def tensors_of(network: DiffusionTransformer) -> dict[str, np.ndarray]:
    """GGUF name -> float32 array, `rope_freqs` included."""
    tensors = {gguf_name(name): tensor.float().numpy() for name, tensor in network.state_dict().items()}
    freqs = rope_freqs(network.config)
    return tensors if freqs is None else {**tensors, ROPE_FREQS: np.array(freqs, np.float32)}


def metadata_of(network: DiffusionTransformer, generation: GenerationConfig | None = None) -> dict[str, Any]:
    data = config_metadata(network.config, generation or GenerationConfig(eos_token_id=network.config.eos_token_id))
    return {**data, **tokenizer_metadata()}


def write(path: Path, metadata: dict[str, Any], tensors: dict[str, np.ndarray], types: dict[str, Type] | None = None,
          architecture: str = "diffusion-gemma", **options: Any) -> Path:
    """A GGUF file; ``types`` names the block types of tensors that are not to be F32; bytes are packed already."""
    writer = GGUFWriter(path, architecture, **options)
    for key, value in metadata.items():
        add(writer, key, value)
    for name, values in tensors.items():
        kind = (types or {}).get(name, Type.F32)
        if values.dtype == np.uint8:
            writer.add_tensor(name, values, raw_dtype=kind)
        elif kind == Type.F32:
            writer.add_tensor(name, np.ascontiguousarray(values))
        elif kind == Type.F16:
            writer.add_tensor(name, values.astype(np.float16))
        else:
            writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(values), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_network(path: Path, network: DiffusionTransformer, kind: Type = Type.F32, change: Any = None,
                  metadata: dict[str, Any] | None = None, **options: Any) -> Path:
    """A network's GGUF file, its matrices in ``kind``; ``change(metadata, tensors)`` may break things first."""
    metadata = metadata_of(network) if metadata is None else dict(metadata)
    tensors = tensors_of(network)
    matrices = {gguf_name(name) for name, tensor in network.state_dict().items()
                if is_matrix(name, tuple(tensor.shape))}
    if change is not None:
        change(metadata, tensors)
    types = dict.fromkeys(matrices, kind)
    return write(path, metadata, tensors, types | options.pop("types", {}), **options)


def add(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
