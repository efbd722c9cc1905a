"""What a checkpoint says about itself: the network's shape and its generation defaults.

Works on plain dictionaries (a parsed ``config.json`` or ``generation_config.json``); knows nothing of tensors.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dgemma.errors import CheckpointError

SLIDING = "sliding_attention"
FULL = "full_attention"


@dataclass(frozen=True)
class LayerConfig:
    """The attention geometry of one layer.

    ``rotary_fraction`` < 1 is the "proportional" RoPE of full layers: the frequencies are those of the whole
    head, and all but the first ``rotary_fraction`` of them are zero.
    """

    kind: str  # SLIDING or FULL
    head_dim: int
    num_key_value_heads: int
    rope_theta: float
    rotary_fraction: float

    @property
    def has_v_proj(self) -> bool:
        """Full layers have no V projection: V is the raw K projection."""
        return self.kind == SLIDING


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a DiffusionGemma text network; field names are those of ``config.json``."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_experts: int
    top_k_experts: int
    moe_intermediate_size: int
    sliding_window: int
    layers: tuple[LayerConfig, ...]
    canvas_length: int = 256
    final_logit_softcapping: float = 30.0
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 131_072
    pad_token_id: int = 0
    eos_token_id: tuple[int, ...] = (1,)
    bos_token_id: int = 2
    image_token_id: int | None = None
    dtype: str | None = None
    has_vision: bool = False

    @property
    def num_hidden_layers(self) -> int:
        return len(self.layers)


@dataclass(frozen=True)
class GenerationConfig:
    """Sampler settings under the checkpoint's own names (facts: ``generation_config.json``).

    ``t_min``/``t_max`` are softmax temperatures, ``entropy_bound`` and ``confidence_threshold`` are in nats,
    ``stability_threshold`` counts earlier steps whose argmax canvas must equal the current one.
    """

    max_denoising_steps: int = 48
    entropy_bound: float = 0.1
    t_min: float = 0.4
    t_max: float = 0.8
    stability_threshold: int = 1
    confidence_threshold: float = 0.005
    max_tokens: int = 256
    eos_token_id: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        _require(_is_int(self.max_denoising_steps) and self.max_denoising_steps >= 1,
                 "max_denoising_steps must be an integer of at least 1", self.max_denoising_steps)
        _require(_is_number(self.entropy_bound) and self.entropy_bound > 0,
                 "entropy_bound must be a number greater than 0", self.entropy_bound)
        _require(_is_number(self.t_min) and self.t_min > 0, "t_min must be a number greater than 0", self.t_min)
        _require(_is_number(self.t_max) and self.t_max >= self.t_min,
                 f"t_max must be a number of at least t_min ({self.t_min})", self.t_max)
        _require(_is_int(self.stability_threshold) and self.stability_threshold >= 0,
                 "stability_threshold must be an integer of at least 0", self.stability_threshold)
        _require(_is_number(self.confidence_threshold) and self.confidence_threshold > 0,
                 "confidence_threshold must be a number greater than 0", self.confidence_threshold)
        _require(_is_int(self.max_tokens) and self.max_tokens >= 1,
                 "max_tokens must be an integer of at least 1", self.max_tokens)

    def replace(self, **changes: Any) -> GenerationConfig:
        """A copy with ``changes`` applied; ``None`` keeps the present value. Raises ValueError on a bad one."""
        given = {name: value for name, value in changes.items() if value is not None}
        unknown = sorted(set(given) - {f.name for f in dataclasses.fields(self)})
        if unknown:
            known = ", ".join(f.name for f in dataclasses.fields(self))
            raise ValueError(f"unknown generation setting {', '.join(unknown)}; the settings are {known}")
        return dataclasses.replace(self, **given)


SAMPLER_SETTINGS = ("max_denoising_steps", "entropy_bound", "t_min", "t_max", "stability_threshold",
                    "confidence_threshold")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value


def _require(condition: bool, rule: str, value: Any) -> None:
    if not condition:
        raise ValueError(f"{rule}, got {value!r}")


def read_json(path: Path) -> dict[str, Any]:
    """Parse a JSON object; raises CheckpointError naming the file and the place of a mistake in it."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(data).__name__}")
    return data


def load_model_config(folder: Path) -> ModelConfig:
    """Read ``config.json`` of a checkpoint folder; raises CheckpointError when it is not DiffusionGemma."""
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder}: no config.json here; a checkpoint folder holds config.json, *.safetensors "
                              "and tokenizer.json")
    return model_config_from_dict(read_json(path), str(path))


def model_config_from_dict(data: dict[str, Any], source: str = "config.json") -> ModelConfig:
    """Build a ModelConfig from a parsed ``config.json``; ``source`` names the file in errors."""
    model_type = data.get("model_type")
    if model_type != "diffusion_gemma":
        named = f"model_type {model_type!r}" if model_type else "no model_type"
        architectures = data.get("architectures") or []
        what = f" ({', '.join(map(str, architectures))})" if architectures else ""
        raise CheckpointError(f"{source}: this is not a DiffusionGemma checkpoint: it says {named}{what}; dgemma runs "
                              "model_type 'diffusion_gemma' only")
    text = data.get("text_config")
    if not isinstance(text, dict):
        raise CheckpointError(f"{source}: 'text_config' is missing")

    def need(name: str) -> Any:
        if text.get(name) is None:
            raise CheckpointError(f"{source}: text_config.{name} is missing")
        return text[name]

    if text.get("use_bidirectional_attention") == "all":
        raise CheckpointError(f"{source}: use_bidirectional_attention 'all' is not supported (the encoder must be "
                              "causal over text)")
    if text.get("attention_bias"):
        raise CheckpointError(f"{source}: attention_bias true is not supported")
    activation = text.get("hidden_activation", "gelu_pytorch_tanh")
    if activation != "gelu_pytorch_tanh":
        raise CheckpointError(f"{source}: hidden_activation {activation!r} is not supported (gelu_pytorch_tanh is)")
    # Token ids and the dtype may stand at either level; the inner one wins.
    both = {**data, **{k: v for k, v in text.items() if v is not None}}
    eos = both.get("eos_token_id", 1)
    bos, pad = both.get("bos_token_id"), both.get("pad_token_id")
    config = ModelConfig(
        vocab_size=need("vocab_size"),
        hidden_size=need("hidden_size"),
        intermediate_size=need("intermediate_size"),
        num_attention_heads=need("num_attention_heads"),
        num_experts=need("num_experts"),
        top_k_experts=need("top_k_experts"),
        moe_intermediate_size=need("moe_intermediate_size"),
        sliding_window=need("sliding_window"),
        layers=_layer_configs(text, need("num_hidden_layers"), source),
        canvas_length=data.get("canvas_length") or 256,
        final_logit_softcapping=float(text.get("final_logit_softcapping") or 30.0),
        rms_norm_eps=float(text.get("rms_norm_eps") or 1e-6),
        max_position_embeddings=text.get("max_position_embeddings") or 131_072,
        pad_token_id=0 if pad is None else pad,
        eos_token_id=tuple(eos) if isinstance(eos, list) else (eos,),
        bos_token_id=2 if bos is None else bos,
        image_token_id=data.get("image_token_id"),
        dtype=both.get("dtype") or both.get("torch_dtype"),
        has_vision=isinstance(data.get("vision_config"), dict),
    )
    for index, layer in enumerate(config.layers):
        if config.num_attention_heads % layer.num_key_value_heads:
            raise CheckpointError(f"{source}: layer {index} has {layer.num_key_value_heads} key-value heads, which do "
                                  f"not divide the {config.num_attention_heads} attention heads")
    if config.top_k_experts > config.num_experts:
        raise CheckpointError(f"{source}: top_k_experts {config.top_k_experts} exceeds num_experts "
                              f"{config.num_experts}")
    return config


def _layer_configs(text: dict[str, Any], count: int, source: str) -> tuple[LayerConfig, ...]:
    """The geometry of every layer, from either spelling of the full layers' heads.

    The global one (``global_head_dim``, ``num_global_key_value_heads``) or ``per_layer_config``, keyed by the
    layer's index or by its kind.
    """
    kinds = text.get("layer_types")
    if kinds is None:
        kinds = [FULL if (i + 1) % 6 == 0 else SLIDING for i in range(count)]
    if len(kinds) != count or any(kind not in (SLIDING, FULL) for kind in kinds):
        raise CheckpointError(f"{source}: layer_types must name {count} layers, each {SLIDING} or {FULL}")
    kinds = [*kinds[:-1], FULL]  # the architecture's last layer is always a full one
    head_dim = text.get("head_dim") or 256
    kv_heads = text.get("num_key_value_heads") or text["num_attention_heads"]
    per_layer = text.get("per_layer_config")
    if per_layer is None:
        override: dict[str, Any] = {"head_dim": text.get("global_head_dim") or 512}
        if text.get("num_global_key_value_heads") is not None:
            override["num_key_value_heads"] = text["num_global_key_value_heads"]
        per_layer = {FULL: override}
    ropes = text.get("rope_parameters") or {
        SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
        FULL: {"rope_type": "proportional", "rope_theta": 1_000_000.0, "partial_rotary_factor": 0.25},
    }
    layers = []
    for index, kind in enumerate(kinds):
        own = {**per_layer.get(kind, {}), **per_layer.get(str(index), {}), **per_layer.get(index, {})}
        rope = ropes.get(kind) or {}
        wanted = "default" if kind == SLIDING else "proportional"
        if rope.get("rope_type", wanted) != wanted:
            raise CheckpointError(f"{source}: rope_type {rope['rope_type']!r} for {kind} is not supported "
                                  f"({wanted!r} is)")
        layers.append(LayerConfig(
            kind=kind,
            head_dim=own.get("head_dim", head_dim),
            num_key_value_heads=own.get("num_key_value_heads", kv_heads),
            rope_theta=float(rope.get("rope_theta", 10_000.0 if kind == SLIDING else 1_000_000.0)),
            rotary_fraction=1.0 if kind == SLIDING else float(rope.get("partial_rotary_factor", 0.25)),
        ))
    return tuple(layers)


def load_generation_config(folder: Path, model: ModelConfig) -> GenerationConfig:
    """Read ``generation_config.json`` if there is one; nulls and absent keys mean the documented defaults."""
    path = folder / "generation_config.json"
    return generation_config_from_dict(read_json(path) if path.is_file() else {}, model, str(path))


def generation_config_from_dict(data: dict[str, Any], model: ModelConfig,
                                source: str = "generation_config.json") -> GenerationConfig:
    """Build a GenerationConfig from a parsed ``generation_config.json``; ``source`` names the file in errors."""
    sampler = data.get("sampler_config") or {}
    sampler_class = sampler.get("_cls_name", "EntropyBoundSamplerConfig")
    if sampler_class != "EntropyBoundSamplerConfig":
        raise CheckpointError(f"{source}: sampler {sampler_class!r} is not supported (EntropyBoundSamplerConfig is)")
    eos = data.get("eos_token_id")
    if eos is not None:
        eos = tuple(eos) if isinstance(eos, list) else (eos,)
    try:
        return GenerationConfig(eos_token_id=model.eos_token_id).replace(
            max_denoising_steps=data.get("max_denoising_steps"), entropy_bound=sampler.get("entropy_bound"),
            t_min=data.get("t_min"), t_max=data.get("t_max"), stability_threshold=data.get("stability_threshold"),
            confidence_threshold=data.get("confidence_threshold"), max_tokens=data.get("max_new_tokens"),
            eos_token_id=eos)
    except ValueError as error:
        raise CheckpointError(f"{source}: {error}") from error
