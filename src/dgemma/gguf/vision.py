"""What a vision tower is called in a GGUF file (``mmproj``): llama.cpp's keys and names of tensors, both ways.

Works on plain metadata, names and shapes; knows nothing of files or tensors' data. Keys that llama.cpp does not know
begin with ``dgemma.`` and may be absent. The tokens that stand for pictures are the tokenizer's affair.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from dgemma.config import BUDGETS, LARGEST_SIZE, MOST_LAYERS, VisionConfig
from dgemma.errors import CheckpointError
from dgemma.fields import shown
from dgemma.gguf.keys import ARCHITECTURE_KEY, Keys

ARCHITECTURE = "clip"  # of all of llama.cpp's towers
PROJECTOR = "gemma4v"
PATCHES = "vision_tower.patch_embedder.input_proj.weight"

_VISION = "clip.vision"
_PROJECTOR_KEYS = (f"{_VISION}.projector_type", "clip.projector_type")  # the second where a file holds one tower only
_OWN = "dgemma.vision"
POSITIONS = "v.position_embd.weight"
_STANDARD = ("v.std_bias", "v.std_scale")
_BOUNDS = ("input_min", "input_max", "output_min", "output_max")

_TOP = {
    PATCHES: "v.patch_embd.weight",
    "vision_tower.patch_embedder.position_embedding_table": POSITIONS,
    "vision_tower.std_bias": _STANDARD[0],
    "vision_tower.std_scale": _STANDARD[1],
    "embed_vision.embedding_projection.weight": "mm.input_projection.weight",
}
_PROJECTIONS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_out",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_BLOCK = {
    **{f"{ours}.linear.weight": f"{theirs}.weight" for ours, theirs in _PROJECTIONS.items()},
    **{f"{ours}.{bound}": f"{theirs}.{bound}" for ours, theirs in _PROJECTIONS.items() for bound in _BOUNDS},
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "input_layernorm.weight": "ln1.weight",
    "post_attention_layernorm.weight": "attn_post_norm.weight",
    "pre_feedforward_layernorm.weight": "ln2.weight",
    "post_feedforward_layernorm.weight": "ffn_post_norm.weight",
}
_LAYER = re.compile(r"vision_tower\.encoder\.layers\.(\d+)\.(.+)")


def gguf_name(vision_name: str) -> str:
    """Where a tensor of ours (`dgemma.nn.vision.Vision`) stands in a file; KeyError for a name that is not a tower's.

    No name of theirs stands for two of ours, so that a reader asks for those that it expects.
    """
    layer = _LAYER.fullmatch(vision_name)
    return f"v.blk.{layer[1]}.{_BLOCK[layer[2]]}" if layer else _TOP[vision_name]


def gguf_shape(vision_name: str, shape: tuple[int, ...], config: VisionConfig) -> tuple[int, ...]:
    """The shape that a tensor of ours has in a file: patches as a convolution [D, 3, p, p], a number by itself [1]."""
    if vision_name == PATCHES:
        return shape[0], 3, config.patch_size, config.patch_size
    return shape or (1,)


def is_ours(gguf_name: str) -> bool:
    """Whether a tensor belongs to the vision tower: a file may hold one for sound, too (``a.``, ``mm.a.``)."""
    return gguf_name.startswith(("v.", "mm.")) and not gguf_name.startswith("mm.a.")


def check_mmproj(metadata: Mapping[str, Any], source: str) -> None:
    """Raise CheckpointError, saying what it is instead, unless the file holds a vision tower of Gemma 4's kind."""
    architecture = metadata.get(ARCHITECTURE_KEY)
    if architecture != ARCHITECTURE:
        raise CheckpointError(f"{source}: this is no vision tower (mmproj): its architecture is {shown(architecture)}, "
                              f"not {ARCHITECTURE!r}")
    if metadata.get("clip.has_vision_encoder") is False:
        raise CheckpointError(f"{source}: this file holds no vision tower (clip.has_vision_encoder is false)")
    projector = next((metadata[key] for key in _PROJECTOR_KEYS if key in metadata), None)
    if projector != PROJECTOR:
        raise CheckpointError(f"{source}: a vision tower with projector_type {shown(projector)} is not one of "
                              f"DiffusionGemma's; dgemma reads {PROJECTOR!r}")


def read_vision_config(metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]],
                       source: str) -> tuple[VisionConfig, int]:
    """A tower's shape, and the width of what it makes, from a file's keys; what these do not say from its ``shapes``.

    ``shapes`` are those of its tensors by name. The ids of picture tokens are left as they are by default. Raises
    CheckpointError naming every key that is missing or makes no sense.
    """
    keys, own, default = Keys(metadata, source, _VISION, "a vision tower"), Keys(metadata, source, _OWN, ""), \
        VisionConfig()
    heads, hidden = keys.size("attention.head_count"), keys.size("embedding_length")
    head_dim = shapes.get("v.blk.0.attn_q_norm.weight", (hidden // heads,))[0]
    kv_heads = shapes.get("v.blk.0.attn_k.weight", (heads * head_dim,))[0] // max(head_dim, 1)
    if not keys.missing and (not 4 <= head_dim <= LARGEST_SIZE or head_dim % 4 or not kv_heads or heads % kv_heads):
        keys.wrong.append(f"{keys.full('attention.head_count')} {heads}, with heads of {head_dim} and {kv_heads} for "
                          "keys and values: a head is a multiple of 4 numbers, and those for keys divide the others")
    table = shapes.get(POSITIONS, ())
    config = VisionConfig(
        hidden_size=hidden,
        intermediate_size=keys.size("feed_forward_length"),
        num_hidden_layers=keys.size("block_count", most=MOST_LAYERS),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=keys.number("attention.layer_norm_epsilon", default.rms_norm_eps),
        rope_theta=own.number("rope_theta", default.rope_theta),
        patch_size=keys.size("patch_size", default.patch_size, most=256),
        pooling_kernel_size=keys.size("projector.scale_factor", default.pooling_kernel_size, most=256),
        position_embedding_size=table[1] if len(table) == 3 and 1 <= table[1] <= LARGEST_SIZE
        else default.position_embedding_size,
        standardize=any(name in shapes for name in _STANDARD),
        use_clipped_linears=any(name.endswith(_BOUNDS) for name in _of_blocks(shapes)),
        vision_soft_tokens_per_image=own.size("soft_tokens_per_image", default.vision_soft_tokens_per_image),
        vision_soft_token_budgets=_budgets(own),
    )
    width = keys.size("projection_dim")
    keys.wrong += own.wrong
    keys.finish()
    return config, width


def _budgets(own: Keys) -> tuple[int, ...]:
    value = own.get("soft_token_budgets")
    if value is None:
        return BUDGETS
    if not isinstance(value, list) or not value or value != [budget for budget in BUDGETS if budget in value]:
        own.wrong.append(f"{own.full('soft_token_budgets')} must be some of {list(BUDGETS)}, got {shown(value)}")
        return BUDGETS
    return tuple(value)


def vision_metadata(config: VisionConfig, width: int) -> dict[str, int | float | bool | str | list]:
    """The inverse of `check_mmproj` and `read_vision_config`: every key with its value, for whoever writes a file.

    llama.cpp wants a picture's size and how its numbers are scaled, and does not use either for these towers.
    """
    keys: dict[str, int | float | list[float]] = {
        "image_size": 224,
        "patch_size": config.patch_size,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "block_count": config.num_hidden_layers,
        "projection_dim": width,
        "attention.head_count": config.num_attention_heads,
        "attention.layer_norm_epsilon": config.rms_norm_eps,
        "image_mean": [0.0] * 3,
        "image_std": [1.0] * 3,
        "projector.scale_factor": config.pooling_kernel_size,
    }
    return {
        ARCHITECTURE_KEY: ARCHITECTURE,
        "general.type": "mmproj",
        "clip.has_vision_encoder": True,
        _PROJECTOR_KEYS[0]: PROJECTOR,
        **{f"{_VISION}.{name}": value for name, value in keys.items()},
        f"{_OWN}.rope_theta": float(config.rope_theta),
        f"{_OWN}.soft_tokens_per_image": config.vision_soft_tokens_per_image,
        **({} if config.vision_soft_token_budgets == BUDGETS else
           {f"{_OWN}.soft_token_budgets": list(config.vision_soft_token_budgets)}),
    }


def _of_blocks(names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith("v.blk.")]
