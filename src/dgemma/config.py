"""What a checkpoint says about itself: the network's shape and its generation defaults.

Works on plain dictionaries (a parsed ``config.json`` or ``generation_config.json``); knows nothing of tensors.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dgemma.errors import CheckpointError
from dgemma.fields import Fields, is_number, is_there, is_whole, read_json, shown

ARCHITECTURE = "diffusion-gemma"  # as GGUF and Ollama spell it
MODEL_TYPE = "diffusion_gemma"
VISION_TYPE = "gemma4_vision"
SLIDING = "sliding_attention"
FULL = "full_attention"
BUDGETS = (70, 140, 280, 560, 1120)  # the most soft tokens of a picture that Gemma 4's towers were trained on
LARGEST_SIZE = 1 << 19  # of anything but the vocabulary: shapes made of three stay within 64 bits
MOST_TOKENS = 1 << 24
MOST_LAYERS = 1024


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
class VisionConfig:
    """The shape of the vision tower, and the tokens that stand for pictures in a prompt.

    Field names are those of ``vision_config`` and, for the tokens, of ``config.json`` itself; the defaults are the
    reference's (`Gemma4VisionConfig`). ``rope_theta`` is that of both axes, ``vision_soft_tokens_per_image`` how many
    soft tokens a picture has at most where nobody says it, ``vision_soft_token_budgets`` (our own) which such numbers
    the tower was trained on: it is asked for no others. A token id may lie outside a small vocabulary, which then has
    no pictures.
    """

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 16
    num_attention_heads: int = 12
    num_key_value_heads: int = 12
    head_dim: int = 64
    rms_norm_eps: float = 1e-6
    rope_theta: float = 100.0
    patch_size: int = 16
    pooling_kernel_size: int = 3
    position_embedding_size: int = 10_240
    standardize: bool = False
    use_clipped_linears: bool = False
    vision_soft_tokens_per_image: int = 280
    vision_soft_token_budgets: tuple[int, ...] = BUDGETS  # in rising order
    boi_token_id: int = 255_999  # begins a picture
    image_token_id: int = 258_880  # stands for each of its soft tokens
    eoi_token_id: int = 258_882  # ends it
    video_token_id: int = 258_884  # stands for each soft token of a frame

    def trained_budget(self, most: int) -> int:
        """The largest number of soft tokens that the tower was trained on and that is at most ``most``; else the
        smallest one."""
        return max((budget for budget in self.vision_soft_token_budgets if budget <= most),
                   default=self.vision_soft_token_budgets[0])


PictureAttention = Literal["sliding", "full", "causal"]


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a DiffusionGemma; field names are those of ``config.json``.

    ``vision`` is None where the checkpoint describes no vision tower; a checkpoint that describes one need not hold it.
    ``picture_attention`` is in which layers a picture's soft tokens see all of their picture: "sliding" ones, within
    the window, as in Google's own code (gemma, `gm/nn`); "full", in both kinds, whatever the window, as `transformers`'
    `DiffusionGemma.generate` has it; "causal", in none.
    """

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
    vision: VisionConfig | None = None
    picture_attention: PictureAttention = "sliding"

    @property
    def num_hidden_layers(self) -> int:
        return len(self.layers)


@dataclass(frozen=True)
class GenerationConfig:
    """Sampler settings under the checkpoint's own names (facts: ``generation_config.json``).

    ``t_min``/``t_max`` are softmax temperatures (a training objective's are noise levels), ``entropy_bound`` and
    ``confidence_threshold`` are in nats, ``stability_threshold`` counts earlier steps whose argmax canvas must equal
    the current one. ``max_tokens`` is the checkpoint's ``max_new_tokens`` where nothing else has been asked for;
    evaluations that must end use it, but an answer of `Model.generate` may go on to the end of the context.
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
        for name, least in (("max_denoising_steps", 1), ("stability_threshold", 0), ("max_tokens", 1)):
            value = getattr(self, name)
            _require(is_whole(value) and value >= least, f"{name} must be an integer of at least {least}", value)
            _require(value < 1 << 31, f"{name} must be an integer below 2^31", value)
        for name in ("entropy_bound", "t_min", "confidence_threshold"):
            value = getattr(self, name)
            _require(is_number(value) and value > 0, f"{name} must be a number greater than 0", value)
        _require(is_number(self.t_max) and self.t_max >= self.t_min,
                 f"t_max must be a number of at least t_min ({self.t_min})", self.t_max)
        _require(isinstance(self.eos_token_id, tuple) and all(map(is_whole, self.eos_token_id)),
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


def _require(condition: bool, rule: str, value: Any) -> None:
    if not condition:
        raise ValueError(f"{rule}, got {shown(value)}")


def load_model_config(folder: Path) -> ModelConfig:
    """Read ``config.json`` of a checkpoint folder; raises CheckpointError when it is not DiffusionGemma."""
    path = folder / "config.json"
    if not is_there(path):
        raise CheckpointError(f"{folder}: no config.json here; a checkpoint folder holds config.json, *.safetensors "
                              "and tokenizer.json")
    return model_config_from_dict(read_json(path), str(path))


def model_config_from_dict(data: dict[str, Any], source: str = "config.json") -> ModelConfig:
    """Build a ModelConfig from a parsed ``config.json``; ``source`` names the file in errors."""
    top = Fields(data, source)
    model_type, architectures = data.get("model_type"), top.texts("architectures")
    if model_type != MODEL_TYPE:
        named = f"model_type {shown(model_type)}" if model_type else "no model_type"
        what = f" ({', '.join(architectures)})" if architectures else ""
        raise CheckpointError(f"{source}: this is not a DiffusionGemma checkpoint: it says {named}{what}; dgemma runs "
                              f"model_type {MODEL_TYPE!r} only")
    text = top.within("text_config")
    if text is None:
        raise CheckpointError(f"{source}: 'text_config' is missing")
    bidirectional = text.text("use_bidirectional_attention")
    if bidirectional == "all":
        raise CheckpointError(f"{source}: use_bidirectional_attention 'all' is not supported (the encoder must be "
                              "causal over text)")
    if text.flag("attention_bias"):
        raise CheckpointError(f"{source}: attention_bias true is not supported")
    if top.flag("tie_word_embeddings") is False:
        raise CheckpointError(f"{source}: tie_word_embeddings false is not supported (encoder, decoder and head share "
                              "their weights)")
    activation = text.text("hidden_activation", "gelu_pytorch_tanh")
    if activation != "gelu_pytorch_tanh":
        raise CheckpointError(f"{source}: hidden_activation {shown(activation)} is not supported (gelu_pytorch_tanh "
                              "is)")

    def size(name: str) -> int:
        return text.whole(name, most=LARGEST_SIZE)

    # Token ids and the dtype may stand at either level; the inner one wins.
    both = Fields({**data, **{k: v for k, v in text.data.items() if v is not None}}, source)
    heads, vision = size("num_attention_heads"), _vision_config(top)
    config = ModelConfig(
        vocab_size=text.whole("vocab_size", most=MOST_TOKENS),
        hidden_size=size("hidden_size"),
        intermediate_size=size("intermediate_size"),
        num_attention_heads=heads,
        num_experts=size("num_experts"),
        top_k_experts=size("top_k_experts"),
        moe_intermediate_size=size("moe_intermediate_size"),
        sliding_window=text.whole("sliding_window"),
        layers=_layer_configs(text, text.whole("num_hidden_layers", most=MOST_LAYERS), heads),
        canvas_length=top.whole("canvas_length", 256, most=LARGEST_SIZE),
        final_logit_softcapping=text.positive("final_logit_softcapping", 30.0),
        rms_norm_eps=text.positive("rms_norm_eps", 1e-6),
        max_position_embeddings=text.whole("max_position_embeddings", 131_072),
        eos_token_id=_token_ids(both) or (1,),
        dtype=both.text("dtype") or both.text("torch_dtype"),
        vision=vision,
        picture_attention="causal" if vision is not None and bidirectional is None else "sliding",
    )
    for index, layer in enumerate(config.layers):
        if config.num_attention_heads % layer.num_key_value_heads:
            raise CheckpointError(f"{source}: layer {index} has {layer.num_key_value_heads} key-value heads, which do "
                                  f"not divide the {config.num_attention_heads} attention heads")
    if config.top_k_experts > config.num_experts:
        raise CheckpointError(f"{source}: top_k_experts {config.top_k_experts} exceeds num_experts "
                              f"{config.num_experts}")
    return config


def _vision_config(top: Fields) -> VisionConfig | None:
    """The vision tower that a ``config.json`` describes, if it does."""
    vision, default = top.within("vision_config"), VisionConfig()
    if vision is None:
        return None
    source = top.source
    kind = vision.text("model_type", VISION_TYPE)
    if kind != VISION_TYPE:
        raise CheckpointError(f"{source}: a vision tower of model_type {shown(kind)} is not supported ({VISION_TYPE!r} "
                              "is)")
    activation = vision.text("hidden_activation", "gelu_pytorch_tanh")
    if activation != "gelu_pytorch_tanh":
        raise vision.wrong("hidden_activation", "is not supported (gelu_pytorch_tanh is)")
    if vision.flag("attention_bias"):
        raise CheckpointError(f"{source}: vision_config.attention_bias true is not supported")
    rope = vision.within("rope_parameters") or Fields({}, source, "vision_config.rope_parameters.")
    if rope.text("rope_type", "axial") not in ("axial", "default"):  # two names of one thing
        raise rope.wrong("rope_type", "is not supported ('axial' is)")

    def size(name: str, most: int = LARGEST_SIZE) -> int:
        return vision.whole(name, getattr(default, name), most=most)

    def token(name: str) -> int:
        return top.whole(name, getattr(default, name), least=0, most=MOST_TOKENS)

    config = VisionConfig(
        hidden_size=size("hidden_size"),
        intermediate_size=size("intermediate_size"),
        num_hidden_layers=size("num_hidden_layers", MOST_LAYERS),
        num_attention_heads=size("num_attention_heads"),
        num_key_value_heads=size("num_key_value_heads"),
        head_dim=size("head_dim"),
        rms_norm_eps=vision.positive("rms_norm_eps", default.rms_norm_eps),
        rope_theta=rope.positive("rope_theta", default.rope_theta),
        patch_size=size("patch_size", 256),
        pooling_kernel_size=size("pooling_kernel_size", 256),
        position_embedding_size=size("position_embedding_size"),
        standardize=bool(vision.flag("standardize")),
        use_clipped_linears=bool(vision.flag("use_clipped_linears")),
        vision_soft_tokens_per_image=top.whole("vision_soft_tokens_per_image", default.vision_soft_tokens_per_image),
        vision_soft_token_budgets=_budgets(top),
        boi_token_id=token("boi_token_id"),
        image_token_id=token("image_token_id"),
        eoi_token_id=token("eoi_token_id"),
        video_token_id=token("video_token_id"),
    )
    if config.num_attention_heads % config.num_key_value_heads:
        raise CheckpointError(f"{source}: vision_config has {config.num_key_value_heads} key-value heads, which do not "
                              f"divide its {config.num_attention_heads} attention heads")
    if config.head_dim % 4:
        raise vision.wrong("head_dim", "must be a multiple of 4 (halves of halves are rotated together)")
    return config


def vision_config_to_dict(config: VisionConfig) -> dict[str, Any]:
    """What a ``config.json`` says of a vision tower: the inverse of what `model_config_from_dict` reads of it."""
    tower = dataclasses.asdict(config)
    around = {name: tower.pop(name) for name in ("vision_soft_tokens_per_image", "vision_soft_token_budgets",
                                                 "boi_token_id", "image_token_id", "eoi_token_id", "video_token_id")}
    around["vision_soft_token_budgets"] = list(config.vision_soft_token_budgets)
    rope = {"rope_type": "default", "rope_theta": tower.pop("rope_theta")}
    return {"vision_config": {"model_type": VISION_TYPE, **tower, "rope_parameters": rope}, **around}


def _budgets(fields: Fields) -> tuple[int, ...]:
    """``vision_soft_token_budgets``: some of `BUDGETS`, in order; all of them where it is absent."""
    value = fields.data.get("vision_soft_token_budgets")
    if value is None:
        return BUDGETS
    if not isinstance(value, list) or not value or value != [budget for budget in BUDGETS if budget in value]:
        raise fields.wrong("vision_soft_token_budgets", f"must be some of {', '.join(map(str, BUDGETS))}, in order")
    return tuple(value)


def _token_ids(fields: Fields) -> tuple[int, ...] | None:
    """``eos_token_id``: one id or a list of them; None where it is absent."""
    value = fields.data.get("eos_token_id")
    if value is None:
        return None
    ids = tuple(value) if isinstance(value, list) else (value,)
    if not ids or not all(is_whole(token) and 0 <= token < MOST_TOKENS for token in ids):
        raise fields.wrong("eos_token_id", "must be a token id or a list of them")
    return ids


def _layer_configs(text: Fields, count: int, heads: int) -> tuple[LayerConfig, ...]:
    """The geometry of every layer, from either spelling of the full layers' heads.

    The global one (``global_head_dim``, ``num_global_key_value_heads``) or ``per_layer_config``, keyed by the
    layer's index or by its kind.
    """
    source = text.source
    kinds = text.data.get("layer_types")
    if kinds is None:
        kinds = [FULL if (i + 1) % 6 == 0 else SLIDING for i in range(count)]
    if not isinstance(kinds, list) or len(kinds) != count or any(kind not in (SLIDING, FULL) for kind in kinds):
        raise CheckpointError(f"{source}: layer_types must name {count} layers, each {SLIDING} or {FULL}")
    kinds = [*kinds[:-1], FULL]  # the architecture's last layer is always a full one
    usual = {"head_dim": text.whole("head_dim", 256, most=LARGEST_SIZE),
             "num_key_value_heads": text.whole("num_key_value_heads", heads, most=LARGEST_SIZE)}
    given = text.within("per_layer_config")
    if given is None:
        own: dict[str, Any] = {"head_dim": text.whole("global_head_dim", 512, most=LARGEST_SIZE)}
        if text.data.get("num_global_key_value_heads") is not None:
            own["num_key_value_heads"] = text.whole("num_global_key_value_heads", most=LARGEST_SIZE)
        per_layer: dict[str | int, dict[str, Any]] = {FULL: own}
    else:
        per_layer = _per_layer(given, text, count)
    ropes = text.within("rope_parameters")
    usual_ropes = {
        SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
        FULL: {"rope_type": "proportional", "rope_theta": 1_000_000.0, "partial_rotary_factor": 0.25},
    }
    ropes = ropes if ropes is not None and ropes.data else Fields(usual_ropes, source)
    layers = []
    for index, kind in enumerate(kinds):
        own = {**usual, **per_layer.get(kind, {}), **per_layer.get(index, {})}
        for name in usual:
            if not is_whole(own[name]) or not 1 <= own[name] <= LARGEST_SIZE:
                raise CheckpointError(f"{source}: layer {index}: {name} must be a whole number of at least 1, got "
                                      f"{shown(own[name])}")
        rope = ropes.within(kind) or Fields(usual_ropes[kind], source)
        wanted = "default" if kind == SLIDING else "proportional"
        rope_type = rope.text("rope_type", wanted)
        if rope_type != wanted:
            raise CheckpointError(f"{source}: rope_type {shown(rope_type)} for {kind} is not supported ({wanted!r} is)")
        # Without a partial_rotary_factor the whole head turns, as in the reference.
        rotary_fraction = rope.positive("partial_rotary_factor", 1.0, most=1.0)
        if rope.positive("factor", 1.0) != 1.0 or (kind == SLIDING and rotary_fraction != 1.0):
            raise CheckpointError(f"{source}: rope_parameters {shown(rope.data, 200)} for {kind} are not supported "
                                  "(factor must be 1, and sliding layers rotate the whole head)")
        layers.append(LayerConfig(
            kind=kind,
            head_dim=own["head_dim"],
            num_key_value_heads=own["num_key_value_heads"],
            rope_theta=rope.positive("rope_theta", 10_000.0 if kind == SLIDING else 1_000_000.0),
            rotary_fraction=rotary_fraction,
        ))
    for kind in (SLIDING, FULL):
        dims = {layer.head_dim for layer in layers if layer.kind == kind}
        if len(dims) > 1:  # one rotary table serves all layers of a kind, in the reference too
            raise CheckpointError(f"{source}: {kind} layers must have one head_dim, not {sorted(dims)}")
        if any(dim % 2 for dim in dims):
            raise CheckpointError(f"{source}: the head_dim of {kind} layers must be even (its halves are rotated "
                                  f"together), got {dims.pop()}")
    return tuple(layers)


def _per_layer(given: Fields, text: Fields, count: int) -> dict[str | int, dict[str, Any]]:
    """``per_layer_config`` by layers' indices and kinds.

    An index is spelt in any way that reads as one: transformers pads with zeros to one width. What a layer does not say
    is as in the others.
    """
    found: dict[str | int, dict[str, Any]] = {}
    for name in given.data:
        key = str(name) if str(name) in (SLIDING, FULL) else _layer_index(str(name))
        if key is None or (isinstance(key, int) and not 0 <= key < count):
            raise CheckpointError(f"{given.source}: {given.prefix.rstrip('.')} names a layer {shown(name)}; there are "
                                  f"layers 0 to {count - 1}, and {SLIDING} or {FULL} for all of a kind")
        fields = given.within(name)
        own = {} if fields is None else dict(fields.data)
        for setting in own:
            if fields is not None and setting not in ("head_dim", "num_key_value_heads") and (
                    own[setting] != (text.data.get(setting) if setting != "skip" else [])):
                raise fields.wrong(setting, "is not supported (layers differ in head_dim and num_key_value_heads "
                                            "only)")
        if found.setdefault(key, own) != own:
            raise CheckpointError(f"{given.source}: {given.prefix.rstrip('.')} describes layer {key} twice, and not in "
                                  "the same way")
    return found


def _layer_index(key: str) -> int | None:
    if not re.fullmatch(r"\s*[+-]?\d+(_\d+)*\s*", key) or len(key) > 100:
        return None
    return int(key)


def load_generation_config(folder: Path, model: ModelConfig) -> GenerationConfig:
    """Read ``generation_config.json`` if there is one; nulls and absent keys mean the documented defaults."""
    path = folder / "generation_config.json"
    return generation_config_from_dict(read_json(path) if is_there(path) else {}, model, str(path))


def generation_config_from_dict(data: dict[str, Any], model: ModelConfig,
                                source: str = "generation_config.json") -> GenerationConfig:
    """Build a GenerationConfig from a parsed ``generation_config.json``; ``source`` names the file in errors.

    Settings of other samplers and runtimes that may stand there are ignored.
    """
    fields = Fields(data, source)
    sampler = fields.within("sampler_config") or Fields({}, source)
    sampler_class = sampler.data.get("_cls_name", "EntropyBoundSamplerConfig")
    if sampler_class != "EntropyBoundSamplerConfig":
        raise CheckpointError(f"{source}: sampler {shown(sampler_class)} is not supported (EntropyBoundSamplerConfig "
                              "is)")
    try:
        return GenerationConfig(eos_token_id=model.eos_token_id).replace(
            max_denoising_steps=data.get("max_denoising_steps"), entropy_bound=sampler.data.get("entropy_bound"),
            t_min=data.get("t_min"), t_max=data.get("t_max"), stability_threshold=data.get("stability_threshold"),
            confidence_threshold=data.get("confidence_threshold"), max_tokens=data.get("max_new_tokens"),
            eos_token_id=_token_ids(fields))
    except ValueError as error:
        theirs = {"max_tokens": "max_new_tokens: ", "entropy_bound": "sampler_config.entropy_bound: "}
        raise CheckpointError(f"{source}: {theirs.get(str(error).partition(' ')[0], '')}{error}") from error
