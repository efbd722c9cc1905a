"""A small checkpoint folder of Gemma's own kind: heads as wide as the real ones, byte pairs over ▁ and lone bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from dgemma.config import FULL, SLIDING, model_config_from_dict
from dgemma.nn import DiffusionTransformer
from dgemma.weights.save import save_checkpoint

SPECIALS = {0: "<pad>", 1: "<eos>", 2: "<bos>", 3: "<unk>", 4: "<mask>", 5: "<|turn>", 6: "<turn|>", 7: "<|channel>",
            8: "<channel|>"}
TEMPLATE = "{{ bos_token }}{% for m in messages %}<|turn>{{ m.role }}\n{{ m.content }}<turn|>\n{% endfor %}"
GENERATION = {"eos_token_id": [1, 6], "max_denoising_steps": 12, "t_min": 0.3, "max_new_tokens": 64,
              "sampler_config": {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": 0.2}}


def config_dict(**changes: Any) -> dict[str, Any]:
    """A config.json; ``changes`` are of its text_config."""
    text = dict(vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=2,
                num_key_value_heads=1, head_dim=256, global_head_dim=512, num_global_key_value_heads=1,
                layer_types=[SLIDING, SLIDING, FULL], sliding_window=16, num_experts=4, top_k_experts=2,
                moe_intermediate_size=32, max_position_embeddings=4096)
    return {"model_type": "diffusion_gemma", "canvas_length": 32, "text_config": text | changes}


def tokenizer_json() -> dict[str, Any]:
    """Specials, the 256 bytes, a few letters and the pairs of them that merge."""
    vocab = {text: i for i, text in SPECIALS.items()}
    vocab |= {f"<0x{byte:02X}>": 16 + byte for byte in range(256)}
    merges = [("▁", "a"), ("a", "b"), ("▁a", "b"), ("c", "d"), ("ab", "cd")]
    for text in ["\n", "▁", "a", "b", "c", "d", "e", "é", *("".join(pair) for pair in merges)]:
        vocab.setdefault(text, 16 + 256 + len(vocab) - len(SPECIALS) - 256)
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": i, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
                          "normalized": False, "special": True} for i, text in SPECIALS.items()],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious",
                          "invert": False},
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                                                     {"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
                  "vocab": vocab, "merges": [list(pair) for pair in merges]},
    }


def write_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json(), ensure_ascii=False), encoding="utf-8")
    roles = {f"{role}_token": f"<{role}>" for role in ("bos", "eos", "pad", "unk", "mask")}
    (folder / "tokenizer_config.json").write_text(json.dumps(roles))
    (folder / "chat_template.jinja").write_text(TEMPLATE)


def write_checkpoint(folder: Path, seed: int = 0, dtype: torch.dtype = torch.bfloat16,
                     **changes: Any) -> DiffusionTransformer:
    """Write a random network of this kind, and return it as it was before it was rounded to ``dtype``."""
    from support.reference import random_network

    data = config_dict(**changes)
    network = random_network(model_config_from_dict(data), seed, feedback=0.2)
    save_checkpoint(network, folder, data, GENERATION, dtype)
    write_tokenizer(folder)
    return network
