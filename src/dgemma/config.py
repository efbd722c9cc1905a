"""What a checkpoint says about itself: the network's shape and its generation defaults.

Works on plain dictionaries (a parsed ``config.json`` or ``generation_config.json``); knows nothing of tensors.
"""

from __future__ import annotations

import dataclasses
import json
import math
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
    eos_token_id: tuple[int, ...] = (1,)
    dtype: str | None = None

    @property
    def num_hidden_layers(self) -> int:
        return len(self.layers)


@dataclass(frozen=True)
class GenerationConfig:
    """Sampler settings under the checkpoint's own names (facts: ``generation_config.json``).

    ``t_min``/``t_max`` are softmax temperatures, ``entropy_bound`` and ``confidence_threshold`` are in nats,
    ``stability_threshold`` counts earlier steps whose argmax canvas must equal the current one. ``max_tokens`` is the
    checkpoint's ``max_new_tokens`` where nothing else has been asked for; it is told, and evaluations that must end
    use it, but it is no default of `Model.generate`: there an answer may go on to the end of the context.
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
        _require(isinstance(self.eos_token_id, tuple) and all(map(_is_int, self.eos_token_id)),
                 "eos_token_id must be a tuple of integers", self.eos_token_id)

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
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


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

    def size(name: str, default: int | None = None, within: dict[str, Any] = text) -> int:
        value = within.get(name)
        if value is None and default is not None:
            return default
        where = f"text_config.{name}" if within is text else name
        if value is None:
            raise CheckpointError(f"{source}: {where} is missing")
        if not _is_int(value) or value < 1:
            raise CheckpointError(f"{source}: {where} must be a whole number of at least 1, got {value!r}")
        return value

    if text.get("use_bidirectional_attention") == "all":
        raise CheckpointError(f"{source}: use_bidirectional_attention 'all' is not supported (the encoder must be "
                              "causal over text)")
    if text.get("attention_bias"):
        raise CheckpointError(f"{source}: attention_bias true is not supported")
    if data.get("tie_word_embeddings") is False:
        raise CheckpointError(f"{source}: tie_word_embeddings false is not supported (encoder, decoder and head share "
                              "their weights)")
    activation = text.get("hidden_activation", "gelu_pytorch_tanh")
    if activation != "gelu_pytorch_tanh":
        raise CheckpointError(f"{source}: hidden_activation {activation!r} is not supported (gelu_pytorch_tanh is)")
    # Token ids and the dtype may stand at either level; the inner one wins.
    both = {**data, **{k: v for k, v in text.items() if v is not None}}
    config = ModelConfig(
        vocab_size=size("vocab_size"),
        hidden_size=size("hidden_size"),
        intermediate_size=size("intermediate_size"),
        num_attention_heads=size("num_attention_heads"),
        num_experts=size("num_experts"),
        top_k_experts=size("top_k_experts"),
        moe_intermediate_size=size("moe_intermediate_size"),
        sliding_window=size("sliding_window"),
        layers=_layer_configs(text, size("num_hidden_layers"), size("num_attention_heads"), source),
        canvas_length=size("canvas_length", 256, within=data),
        final_logit_softcapping=_positive(text, "final_logit_softcapping", 30.0, source),
        rms_norm_eps=_positive(text, "rms_norm_eps", 1e-6, source),
        max_position_embeddings=size("max_position_embeddings", 131_072),
        eos_token_id=_token_ids(both.get("eos_token_id"), source) or (1,),
        dtype=both.get("dtype") or both.get("torch_dtype"),
    )
    for index, layer in enumerate(config.layers):
        if config.num_attention_heads % layer.num_key_value_heads:
            raise CheckpointError(f"{source}: layer {index} has {layer.num_key_value_heads} key-value heads, which do "
                                  f"not divide the {config.num_attention_heads} attention heads")
    if config.top_k_experts > config.num_experts:
        raise CheckpointError(f"{source}: top_k_experts {config.top_k_experts} exceeds num_experts "
                              f"{config.num_experts}")
    return config


def _positive(data: dict[str, Any], name: str, default: float, source: str) -> float:
    value = data.get(name)
    if value is None:
        return default
    if not _is_number(value) or value <= 0:
        raise CheckpointError(f"{source}: {name} must be a number above 0, got {value!r}")
    return float(value)


def _token_ids(value: Any, source: str) -> tuple[int, ...] | None:
    """One id or a list of them; None stays None."""
    if value is None:
        return None
    ids = tuple(value) if isinstance(value, list) else (value,)
    if not ids or not all(map(_is_int, ids)):
        raise CheckpointError(f"{source}: eos_token_id must be a token id or a list of them, got {value!r}")
    return ids


def _mapping(data: dict[str, Any], name: str, source: str) -> dict[str, Any] | None:
    value = data.get(name)
    if value is not None and not isinstance(value, dict):
        raise CheckpointError(f"{source}: {name} must be an object, got {value!r}")
    return value


def _layer_configs(text: dict[str, Any], count: int, heads: int, source: str) -> tuple[LayerConfig, ...]:
    """The geometry of every layer, from either spelling of the full layers' heads.

    The global one (``global_head_dim``, ``num_global_key_value_heads``) or ``per_layer_config``, keyed by the
    layer's index or by its kind.
    """
    kinds = text.get("layer_types")
    if kinds is None:
        kinds = [FULL if (i + 1) % 6 == 0 else SLIDING for i in range(count)]
    if not isinstance(kinds, list) or len(kinds) != count or any(kind not in (SLIDING, FULL) for kind in kinds):
        raise CheckpointError(f"{source}: layer_types must name {count} layers, each {SLIDING} or {FULL}")
    kinds = [*kinds[:-1], FULL]  # the architecture's last layer is always a full one
    usual = {"head_dim": text.get("head_dim") or 256, "num_key_value_heads": text.get("num_key_value_heads") or heads}
    per_layer = _mapping(text, "per_layer_config", source)
    if per_layer is None:
        override: dict[str, Any] = {"head_dim": text.get("global_head_dim") or 512}
        if text.get("num_global_key_value_heads") is not None:
            override["num_key_value_heads"] = text["num_global_key_value_heads"]
        per_layer = {FULL: override}
    per_layer = {str(key): _mapping(per_layer, key, source) or {} for key in per_layer}
    usual_ropes = {
        SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
        FULL: {"rope_type": "proportional", "rope_theta": 1_000_000.0, "partial_rotary_factor": 0.25},
    }
    ropes = _mapping(text, "rope_parameters", source) or usual_ropes
    layers = []
    for index, kind in enumerate(kinds):
        own = {**usual, **per_layer.get(kind, {}), **per_layer.get(str(index), {})}
        for name in usual:
            if not _is_int(own[name]) or own[name] < 1:
                raise CheckpointError(f"{source}: layer {index}: {name} must be a whole number of at least 1, got "
                                      f"{own[name]!r}")
        rope = _mapping(ropes, kind, source) or usual_ropes[kind]
        wanted = "default" if kind == SLIDING else "proportional"
        if rope.get("rope_type", wanted) != wanted:
            raise CheckpointError(f"{source}: rope_type {rope['rope_type']!r} for {kind} is not supported "
                                  f"({wanted!r} is)")
        # Without a partial_rotary_factor the whole head turns, as in the reference.
        rotary_fraction = _positive(rope, "partial_rotary_factor", 1.0, source)
        if _positive(rope, "factor", 1.0, source) != 1.0 or (kind == SLIDING and rotary_fraction != 1.0):
            raise CheckpointError(f"{source}: rope_parameters {rope!r} for {kind} are not supported (factor must be 1, "
                                  "and sliding layers rotate the whole head)")
        layers.append(LayerConfig(
            kind=kind,
            head_dim=own["head_dim"],
            num_key_value_heads=own["num_key_value_heads"],
            rope_theta=_positive(rope, "rope_theta", 10_000.0 if kind == SLIDING else 1_000_000.0, source),
            rotary_fraction=rotary_fraction,
        ))
    for kind in (SLIDING, FULL):
        dims = {layer.head_dim for layer in layers if layer.kind == kind}
        if len(dims) > 1:  # one rotary table serves all layers of a kind, in the reference too
            raise CheckpointError(f"{source}: {kind} layers must have one head_dim, not {sorted(dims)}")
    return tuple(layers)


def load_generation_config(folder: Path, model: ModelConfig) -> GenerationConfig:
    """Read ``generation_config.json`` if there is one; nulls and absent keys mean the documented defaults."""
    path = folder / "generation_config.json"
    return generation_config_from_dict(read_json(path) if path.is_file() else {}, model, str(path))


def generation_config_from_dict(data: dict[str, Any], model: ModelConfig,
                                source: str = "generation_config.json") -> GenerationConfig:
    """Build a GenerationConfig from a parsed ``generation_config.json``; ``source`` names the file in errors.

    Settings of other samplers and runtimes that may stand there are ignored.
    """
    sampler = _mapping(data, "sampler_config", source) or {}
    sampler_class = sampler.get("_cls_name", "EntropyBoundSamplerConfig")
    if sampler_class != "EntropyBoundSamplerConfig":
        raise CheckpointError(f"{source}: sampler {sampler_class!r} is not supported (EntropyBoundSamplerConfig is)")
    try:
        return GenerationConfig(eos_token_id=model.eos_token_id).replace(
            max_denoising_steps=data.get("max_denoising_steps"), entropy_bound=sampler.get("entropy_bound"),
            t_min=data.get("t_min"), t_max=data.get("t_max"), stability_threshold=data.get("stability_threshold"),
            confidence_threshold=data.get("confidence_threshold"), max_tokens=data.get("max_new_tokens"),
            eos_token_id=_token_ids(data.get("eos_token_id"), source))
    except ValueError as error:
        raise CheckpointError(f"{source}: {error}") from error
