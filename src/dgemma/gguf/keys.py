"""What DiffusionGemma is called in a GGUF file: the keys that describe it and the names of its tensors, both ways.

Works on plain metadata and names; knows nothing of files or tensors' data. Keys that llama.cpp does not know begin with
``dgemma.`` and may be absent.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from dgemma.config import (
    ARCHITECTURE,
    FULL,
    LARGEST_SIZE,
    MOST_LAYERS,
    MOST_TOKENS,
    SLIDING,
    GenerationConfig,
    LayerConfig,
    ModelConfig,
)
from dgemma.errors import CheckpointError, problems_of, refuse
from dgemma.fields import is_number, is_whole, shown
from dgemma.tokenizer_files import STOPS

ROPE_FREQS = "rope_freqs.weight"
UNROTATED = 1e30  # what a frequency is divided by where a head does not turn

# The keys of a file's kind and of its tokenizer.
ARCHITECTURE_KEY = "general.architecture"
TOKENIZER_MODEL, TOKENS, TOKEN_TYPES, MERGES = (f"tokenizer.ggml.{name}" for name in ("model", "tokens", "token_type",
                                                                                      "merges"))
CHAT_TEMPLATE = "tokenizer.chat_template"
# Our own keys.
EOS_TOKEN_IDS = "dgemma.eos_token_ids"
MAX_NEW_TOKENS = "dgemma.max_new_tokens"

_TOP = {
    "embed_tokens.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "self_conditioning.pre_norm.weight": "self_cond_pre_norm.weight",
    "self_conditioning.gate_proj.weight": "self_cond_gate.weight",
    "self_conditioning.up_proj.weight": "self_cond_up.weight",
    "self_conditioning.down_proj.weight": "self_cond_down.weight",
}
_BLOCK = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    "pre_feedforward_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "post_feedforward_layernorm_1.weight": "post_ffw_norm_1.weight",
    "pre_feedforward_layernorm_2.weight": "pre_ffw_norm_2.weight",
    "router.proj.weight": "ffn_gate_inp.weight",
    "router.scale": "ffn_gate_inp.scale",
    "experts.gate_up_proj": "ffn_gate_up_exps.weight",
    "experts.down_proj": "ffn_down_exps.weight",
    "router.per_expert_scale": "ffn_down_exps.scale",
    "post_feedforward_layernorm_2.weight": "post_ffw_norm_2.weight",
    "post_feedforward_layernorm.weight": "post_ffw_norm.weight",
    "layer_scalar": "layer_output_scale.weight",
    "encoder_layer_scalar": "enc_layer_output_scale.weight",
}
_TOP_OURS = {theirs: ours for ours, theirs in _TOP.items()}
_BLOCK_OURS = {theirs: ours for ours, theirs in _BLOCK.items()}
_BLOCK_NAME = re.compile(r"blk\.(\d+)\.(.+)", re.DOTALL)
_LAYER_NAME = re.compile(r"layers\.(\d+)\.(.+)", re.DOTALL)

_ELSEWHERE = {
    "clip": "it is a vision or audio tower (mmproj), which goes beside a model; give the model's own file",
    "gemma4": "Gemma 4 writes left to right; llama.cpp, Ollama and LM Studio run it",
    **dict.fromkeys(("dream", "llada", "llada-moe", "rnd1"),
                    "a diffusion model of another kind; llama.cpp's llama-diffusion-cli runs it"),
}


def block_and_part(gguf_name: str) -> tuple[int, str] | None:
    """A tensor's layer and its name within that: "blk.3.attn_q.weight" -> (3, "attn_q.weight"); None elsewhere."""
    found = _BLOCK_NAME.fullmatch(gguf_name)
    return found and (int(found[1]), found[2])


def gguf_name(network_name: str) -> str:
    """Where a tensor of ours stands in a GGUF file; KeyError for a name that is not the network's."""
    layer = _LAYER_NAME.fullmatch(network_name)
    return f"blk.{layer[1]}.{_BLOCK[layer[2]]}" if layer else _TOP[network_name]


def network_name(gguf_name: str) -> str | None:
    """Our name for a GGUF file's tensor; None when it is not one of the network's."""
    block = block_and_part(gguf_name)
    if block is None:
        return _TOP_OURS.get(gguf_name)
    ours = _BLOCK_OURS.get(block[1])
    return ours and f"layers.{block[0]}.{ours}"


def rope_freqs(config: ModelConfig) -> list[float] | None:
    """What `ROPE_FREQS` holds: 1 for every frequency by which full layers rotate; None without a full layer."""
    full = next((layer for layer in config.layers if layer.kind == FULL), None)
    if full is None:
        return None
    rotated = int(full.rotary_fraction * full.head_dim // 2)  # as `inverse_frequencies` has it
    return [1.0] * rotated + [UNROTATED] * (full.head_dim // 2 - rotated)


def rotary_fraction(freqs: Sequence[float], source: str) -> float:
    """The inverse of `rope_freqs`; raises CheckpointError for values of any other form."""
    rotated = next((i for i, value in enumerate(freqs) if value != 1.0), len(freqs))
    odd = next((value for value in freqs[rotated:] if not value >= UNROTATED / 10), None if rotated else freqs[0])
    if odd is not None:
        raise CheckpointError(f"{source}: {ROPE_FREQS} must hold ones and then {UNROTATED:g}s (full layers rotate by "
                              f"the first frequencies and no others), found {odd:g}")
    head_dim = 2 * len(freqs)
    fraction = 2 * rotated / head_dim
    while int(fraction * head_dim // 2) < rotated:  # rounding must not lose one
        fraction = math.nextafter(fraction, 2)
    return fraction


def check_architecture(metadata: Mapping[str, Any], source: str) -> None:
    """Raise CheckpointError, saying what else would run it, unless the file holds a DiffusionGemma."""
    architecture = metadata.get(ARCHITECTURE_KEY)
    if architecture == ARCHITECTURE and metadata.get("general.type", "model") == "model":
        return
    if architecture is None:
        raise CheckpointError(f"{source}: this GGUF file names no architecture ({ARCHITECTURE_KEY}), so it is no "
                              f"model; dgemma runs architecture {ARCHITECTURE!r}")
    kind = metadata.get("general.type", "model")
    if kind == "adapter":
        what = "it is an adapter in GGUF form, which dgemma does not read"
    elif kind != "model" and architecture != "clip":
        what = f"its general.type is {shown(kind)}; dgemma runs models"
    else:
        what = _ELSEWHERE.get(str(architecture), "if it is a language model, llama.cpp may run it")
        if str(architecture).startswith("gemma4-"):
            what = _ELSEWHERE["gemma4"]
    raise CheckpointError(f"{source}: architecture {shown(architecture)} is not DiffusionGemma: {what}. dgemma runs "
                          f"architecture {ARCHITECTURE!r} only")


def token_id_key(role: str) -> str:
    """The key for the token with a role, which is ggml's word for it."""
    return f"tokenizer.ggml.{role}_token_id"


def stop_ids(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """The tokens that end an answer: our own key's, else those of the tokenizer's keys and of the chat format."""
    own = metadata.get(EOS_TOKEN_IDS)
    if isinstance(own, list) and own and all(map(_is_token, own)):
        return tuple(own)
    named: list[Any] = [metadata.get(token_id_key(role)) for role in ("eos", "eot")]
    found = [token_id for token_id in named if _is_token(token_id)]
    tokens = metadata.get(TOKENS)
    if isinstance(tokens, list):
        for stop in STOPS:
            if stop in tokens:
                found.append(tokens.index(stop))
    return tuple(dict.fromkeys(found)) or (1,)


def read_model_config(metadata: Mapping[str, Any], vocab_size: int | None, rotary: float,
                      source: str) -> ModelConfig:
    """The network's shape from a file's keys.

    ``vocab_size`` is that of the embedding, if the keys do not say; ``rotary`` the `rotary_fraction` of full layers.
    Raises CheckpointError naming every key that is missing or makes no sense.
    """
    keys = Keys(metadata, source, ARCHITECTURE, "a DiffusionGemma")
    count = keys.size("block_count", most=MOST_LAYERS)
    heads = keys.size("attention.head_count")
    hidden = keys.size("embedding_length")
    sliding = keys.each("attention.sliding_window_pattern", count, bool)
    kv_heads = keys.each("attention.head_count_kv", count, int)
    full_dim = keys.size("attention.key_length")
    sliding_dim = keys.size("attention.key_length_swa", default=full_dim)
    for name, wanted in (("attention.value_length", full_dim), ("attention.value_length_swa", sliding_dim),
                         ("rope.dimension_count", full_dim), ("rope.dimension_count_swa", sliding_dim)):
        if keys.size(name, default=wanted) != wanted:
            keys.wrong.append(f"{keys.full(name)} is {shown(keys.get(name))}; only heads whose values are as long as "
                              f"their keys ({wanted}) and rotate as a whole are supported")
    if keys.number("rope.scaling.factor", 1.0) != 1.0 and keys.get("rope.scaling.type") not in (None, "none"):
        keys.wrong.append(f"{keys.full('rope.scaling.factor')}: scaled rotary embeddings are not supported")
    if (shift := metadata.get("diffusion.shift_logits")) not in (None, False):
        keys.wrong.append(f"diffusion.shift_logits {shown(shift)} is not supported")
    if (own := metadata.get(EOS_TOKEN_IDS)) is not None and not (isinstance(own, list) and all(map(_is_token, own))):
        keys.wrong.append(f"{EOS_TOKEN_IDS} must be a list of token ids, got {shown(own)}")
    bases = {FULL: keys.number("rope.freq_base", 1e6), SLIDING: keys.number("rope.freq_base_swa", 1e4)}
    layers = tuple(LayerConfig(SLIDING, sliding_dim, kv, bases[SLIDING], 1.0) if slides else
                   LayerConfig(FULL, full_dim, kv, bases[FULL], rotary)
                   for slides, kv in zip(sliding, kv_heads, strict=True))
    for index, layer in enumerate(layers):
        if heads % layer.num_key_value_heads:
            keys.wrong.append(f"{keys.full('attention.head_count_kv')}: {layer.num_key_value_heads} in layer {index}, "
                              f"which does not divide the {heads} attention heads")
    experts, used = keys.size("expert_count"), keys.size("expert_used_count")
    if used > experts and not keys.missing:
        keys.wrong.append(f"{keys.full('expert_used_count')} is {used}, more than {keys.full('expert_count')} "
                          f"{experts}")
    config = ModelConfig(
        vocab_size=keys.size("vocab_size", default=vocab_size, most=MOST_TOKENS),
        hidden_size=hidden,
        intermediate_size=keys.size("feed_forward_length"),
        num_attention_heads=heads,
        num_experts=experts,
        top_k_experts=used,
        moe_intermediate_size=keys.size("expert_feed_forward_length"),
        sliding_window=keys.size("attention.sliding_window"),
        layers=layers,
        canvas_length=keys.size("diffusion.canvas_length", own=False),
        final_logit_softcapping=keys.number("final_logit_softcapping", 30.0),
        rms_norm_eps=keys.number("attention.layer_norm_rms_epsilon", 1e-6),
        max_position_embeddings=keys.size("context_length", default=262_144, most=(1 << 31) - 1),
        eos_token_id=stop_ids(metadata),
    )
    keys.finish()
    return config


def read_generation_config(metadata: Mapping[str, Any], model: ModelConfig, source: str) -> GenerationConfig:
    """The sampler's settings from a file's keys; absent ones are the documented defaults."""
    def setting(name: str) -> float | None:
        value = metadata.get(f"diffusion.eb_{name}")
        return _tidy(value) if isinstance(value, float) else value

    steps, stability = setting("max_steps"), setting("stability_threshold")
    try:
        return GenerationConfig(eos_token_id=model.eos_token_id).replace(
            max_denoising_steps=_whole(steps), entropy_bound=setting("entropy_bound"), t_min=setting("t_min"),
            t_max=setting("t_max"), stability_threshold=_whole(stability),
            confidence_threshold=setting("confidence_threshold"), max_tokens=metadata.get(MAX_NEW_TOKENS))
    except ValueError as error:
        name = str(error).partition(" ")[0]
        key = MAX_NEW_TOKENS if name == "max_tokens" else f"diffusion.eb_{name.replace('max_denoising', 'max')}"
        raise CheckpointError(f"{source}: {key}: {error}") from error


def config_metadata(config: ModelConfig, generation: GenerationConfig) -> dict[str, int | float | bool | list]:
    """The inverse of the two readers: every key with its value, for whoever writes a file.

    Whole numbers are uint32, other numbers float32 in files. The architecture, the tokenizer and the tensor
    `rope_freqs` are not among them.
    """
    geometry = {layer.kind: layer for layer in reversed(config.layers)}
    full = geometry.get(FULL) or geometry[SLIDING]
    sliding = geometry.get(SLIDING) or full
    own: dict[str, int | float | bool | list] = {
        "context_length": config.max_position_embeddings,
        "block_count": config.num_hidden_layers,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "expert_count": config.num_experts,
        "expert_used_count": config.top_k_experts,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": [layer.num_key_value_heads for layer in config.layers],
        "attention.key_length": full.head_dim,
        "attention.value_length": full.head_dim,
        "attention.key_length_swa": sliding.head_dim,
        "attention.value_length_swa": sliding.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "attention.sliding_window": config.sliding_window,
        "attention.sliding_window_pattern": [layer.kind == SLIDING for layer in config.layers],
        "attention.causal": False,
        "rope.freq_base": full.rope_theta,
        "rope.freq_base_swa": sliding.rope_theta,
        "rope.dimension_count": full.head_dim,
        "rope.dimension_count_swa": sliding.head_dim,
        "final_logit_softcapping": config.final_logit_softcapping,
        "vocab_size": config.vocab_size,
    }
    return {
        **{f"{ARCHITECTURE}.{name}": value for name, value in own.items()},
        "diffusion.canvas_length": config.canvas_length,
        "diffusion.eb_max_steps": generation.max_denoising_steps,
        "diffusion.eb_t_min": float(generation.t_min),
        "diffusion.eb_t_max": float(generation.t_max),
        "diffusion.eb_entropy_bound": float(generation.entropy_bound),
        "diffusion.eb_stability_threshold": generation.stability_threshold,
        "diffusion.eb_confidence_threshold": float(generation.confidence_threshold),
        EOS_TOKEN_IDS: list(generation.eos_token_id),
        MAX_NEW_TOKENS: generation.max_tokens,
    }


class Keys:
    """A file's keys, and everything found wrong with them; a key that is wrong reads as 1 until `finish`.

    Names are those behind ``prefix``; ``what`` the file should describe.
    """

    def __init__(self, metadata: Mapping[str, Any], source: str, prefix: str, what: str):
        self._metadata, self._source, self._prefix, self._what = metadata, source, prefix, what
        self.missing: list[str] = []
        self.wrong: list[str] = []

    def full(self, name: str) -> str:
        return f"{self._prefix}.{name}"

    def get(self, name: str) -> Any:
        return self._metadata.get(self.full(name))

    def size(self, name: str, default: int | None = None, most: int = LARGEST_SIZE, own: bool = True) -> int:
        """A whole number from 1 to ``most``; some files repeat it for every layer."""
        key = self.full(name) if own else name
        value: Any = self._metadata.get(key)
        if isinstance(value, list) and len(set(map(str, value))) == 1:
            value = value[0]
        if value is None and default is not None:
            return default
        if value is None:
            self.missing.append(key)
        elif not is_whole(value) or not 1 <= value <= most:
            self.wrong.append(f"{key} must be a whole number from 1 to {most:,}, got {shown(value)}")
        else:
            return value
        return 1

    def number(self, name: str, default: float) -> float:
        value = self.get(name)
        if value is None:
            return default
        if is_number(value) and 0 < value <= 3e38:
            return _tidy(value)
        self.wrong.append(f"{self.full(name)} must be a number above 0, got {shown(value)}")
        return default

    def each(self, name: str, count: int, kind: type) -> list:
        """One value for each layer; a single number stands for all of them."""
        value: Any = self.get(name)
        if kind is int and is_whole(value):
            value = [value] * count
        if value is None:
            self.missing.append(self.full(name))
        elif not isinstance(value, list) or len(value) != count or not all(
                isinstance(item, bool) if kind is bool else is_whole(item) and 1 <= item <= LARGEST_SIZE
                for item in value):
            what = "true or false" if kind is bool else "a whole number"
            self.wrong.append(f"{self.full(name)} must hold {what} for each of the {count} layers, got {shown(value)}")
        else:
            return value
        return [kind(1)] * count

    def finish(self) -> None:
        refuse(problems_of({"missing keys": self.missing, "unusable keys": self.wrong}),
               f"{self._source}: this file does not describe {self._what}")


def _is_token(value: Any) -> TypeGuard[int]:
    return is_whole(value) and 0 <= value < MOST_TOKENS


def _whole(value: Any) -> Any:
    """A number that some files store as a float."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _tidy(value: float) -> float:
    """A float32 as it was meant: 0.1 and not 0.10000000149011612."""
    return float(f"{value:.7g}")
