"""What `config.json` and `generation_config.json` become, and what is said of those that cannot be used."""

import dataclasses
import json

import pytest

from dgemma.config import (
    FULL,
    SAMPLER_SETTINGS,
    SLIDING,
    GenerationConfig,
    VisionConfig,
    generation_config_from_dict,
    load_generation_config,
    load_model_config,
    model_config_from_dict,
    vision_config_to_dict,
)
from dgemma.errors import CheckpointError, DgemmaError


def config(top=None, **text):
    """A small ``config.json`` as transformers writes it; None as a value removes the key."""
    full = {
        "vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_experts": 8, "top_k_experts": 2,
        "moe_intermediate_size": 24, "sliding_window": 12, "layer_types": [SLIDING, SLIDING, FULL],
        "per_layer_config": {"2": {"head_dim": 32, "num_key_value_heads": 1}}, "max_position_embeddings": 1000,
        "rms_norm_eps": 1e-6, "hidden_activation": "gelu_pytorch_tanh", "eos_token_id": 1,
    } | text
    data = {"model_type": "diffusion_gemma", "architectures": ["DiffusionGemmaForBlockDiffusion"],
            "canvas_length": 64, "dtype": "bfloat16", "text_config": full} | (top or {})
    data["text_config"] = {name: value for name, value in full.items() if value is not None}
    return {name: value for name, value in data.items() if value is not None}


def read(top=None, **text):
    return model_config_from_dict(config(top, **text))


def refusal(top=None, **text):
    with pytest.raises(CheckpointError) as caught:
        model_config_from_dict(config(top, **text), "/models/x/config.json")
    assert str(caught.value).startswith("/models/x/config.json: ")
    return str(caught.value)


# The network's shape


def test_the_shape_is_read_under_its_own_names():
    model = read()
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_experts",
                 "top_k_experts", "moe_intermediate_size", "sliding_window", "max_position_embeddings"):
        assert getattr(model, name) == config()["text_config"][name]
    assert (model.canvas_length, model.num_hidden_layers, model.dtype) == (64, 3, "bfloat16")


def test_full_layers_have_their_own_geometry_and_no_v_projection():
    sliding, _, full = read().layers
    assert (sliding.kind, sliding.head_dim, sliding.num_key_value_heads, sliding.has_v_proj) == (SLIDING, 16, 2, True)
    assert (full.kind, full.head_dim, full.num_key_value_heads, full.has_v_proj) == (FULL, 32, 1, False)
    assert (sliding.rope_theta, sliding.rotary_fraction) == (1e4, 1.0)
    assert (full.rope_theta, full.rotary_fraction) == (1e6, 0.25)


@pytest.mark.parametrize("spelling", [
    {"per_layer_config": None, "global_head_dim": 32, "num_global_key_value_heads": 1},
    {"per_layer_config": {FULL: {"head_dim": 32, "num_key_value_heads": 1}}},
    {"per_layer_config": {2: {"head_dim": 32, "num_key_value_heads": 1}}},
    {"global_head_dim": 99, "num_global_key_value_heads": 4},  # per_layer_config is there and wins
], ids=["global", "by-kind", "by-number", "both"])
def test_every_spelling_of_the_full_layers_means_the_same(spelling):
    assert read(**spelling) == read()


def test_what_a_layer_does_not_say_is_as_in_the_others():
    assert read(per_layer_config={"2": {"head_dim": 32}}).layers[2].num_key_value_heads == 2
    assert read(per_layer_config={}).layers[2].head_dim == 16
    assert read(per_layer_config=None, global_head_dim=32).layers[2].num_key_value_heads == 2


def test_without_layer_types_every_sixth_layer_is_full():
    kinds = [layer.kind for layer in read(layer_types=None, num_hidden_layers=12, per_layer_config={}).layers]
    assert kinds == ([SLIDING] * 5 + [FULL]) * 2


def test_the_last_layer_is_always_a_full_one():
    assert read(layer_types=[SLIDING] * 3).layers[2].kind == FULL


def test_defaults_are_those_of_transformers():
    model = read({"canvas_length": None, "dtype": None}, eos_token_id=None, max_position_embeddings=None,
                 rms_norm_eps=None, head_dim=None, per_layer_config=None)
    assert (model.canvas_length, model.eos_token_id, model.max_position_embeddings) == (256, (1,), 131_072)
    assert (model.rms_norm_eps, model.final_logit_softcapping, model.dtype) == (1e-6, 30.0, None)
    assert [layer.head_dim for layer in model.layers] == [256, 256, 512]


def test_a_null_is_a_missing_value():
    data = config()
    data |= {"canvas_length": None, "eos_token_id": None}
    data["text_config"] |= {"eos_token_id": None, "rope_parameters": None, "final_logit_softcapping": None}
    model = model_config_from_dict(data)
    assert (model.canvas_length, model.eos_token_id, model.final_logit_softcapping) == (256, (1,), 30.0)
    assert model.layers == read().layers


def test_stop_tokens_may_be_one_or_several_and_stand_at_either_level():
    assert read(eos_token_id=7).eos_token_id == (7,)
    assert read(eos_token_id=[1, 106]).eos_token_id == (1, 106)
    assert read({"eos_token_id": [1, 50]}, eos_token_id=None).eos_token_id == (1, 50)


def test_rope_parameters_are_read():
    ropes = {SLIDING: {"rope_type": "default", "rope_theta": 500.0},
             FULL: {"rope_type": "proportional", "rope_theta": 2e5, "partial_rotary_factor": 0.5}}
    layers = read(rope_parameters=ropes).layers
    assert [(layer.rope_theta, layer.rotary_fraction) for layer in layers] == [(500.0, 1.0)] * 2 + [(2e5, 0.5)]


def test_proportional_rope_without_a_fraction_turns_the_whole_head():
    layers = read(rope_parameters={FULL: {"rope_type": "proportional", "rope_theta": 1e6}}).layers
    assert layers[2].rotary_fraction == 1.0


# The vision tower

GOOGLES = {"model_type": "gemma4_vision", "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27,
           "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 72, "rms_norm_eps": 1e-6,
           "hidden_activation": "gelu_pytorch_tanh", "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
           "patch_size": 16, "pooling_kernel_size": 3, "position_embedding_size": 10240, "default_output_length": 280,
           "standardize": True, "use_clipped_linears": False, "attention_bias": False}


def test_a_checkpoint_may_have_no_tower():
    assert read().vision is None


def test_the_tower_s_shape_is_read_under_its_own_names():
    vision = read({"vision_config": GOOGLES, "vision_soft_tokens_per_image": 140}).vision
    for name in dataclasses.asdict(vision).keys() & GOOGLES.keys():
        assert getattr(vision, name) == GOOGLES[name]
    assert (vision.rope_theta, vision.vision_soft_tokens_per_image) == (100.0, 140)


def test_pictures_see_themselves_where_the_checkpoint_says_so():
    assert read({"vision_config": {}}, use_bidirectional_attention="vision").picture_attention == "sliding"
    assert read({"vision_config": {}}).picture_attention == "causal"
    assert read().picture_attention == "sliding"  # a tower that comes from elsewhere


def test_the_tower_s_defaults_are_those_of_transformers():
    from transformers import DiffusionGemmaConfig, Gemma4VisionConfig

    vision = read({"vision_config": {}}).vision
    assert vision == VisionConfig()
    theirs, top = Gemma4VisionConfig().to_dict(), DiffusionGemmaConfig().to_dict()
    for name, value in dataclasses.asdict(vision).items():
        if name not in ("rope_theta", "vision_soft_tokens_per_image", "vision_soft_token_budgets", "video_token_id"):
            assert value == {**top, **theirs}[name], name
    assert vision.rope_theta == theirs["rope_parameters"]["rope_theta"]


def test_the_tokens_of_pictures_are_the_checkpoint_s():
    ids = {"boi_token_id": 5, "image_token_id": 6, "eoi_token_id": 7, "video_token_id": 8}
    vision = read({"vision_config": {}, **ids}).vision
    assert {name: getattr(vision, name) for name in ids} == ids


@pytest.mark.parametrize(("changes", "message"), [
    ({"model_type": "siglip_vision_model"}, "a vision tower of model_type 'siglip_vision_model' is not supported"),
    ({"hidden_activation": "silu"}, "vision_config.hidden_activation is not supported"),
    ({"attention_bias": True}, "vision_config.attention_bias true"),
    ({"head_dim": 70}, "vision_config.head_dim must be a multiple of 4"),
    ({"num_attention_heads": 16, "num_key_value_heads": 3}, "3 key-value heads, which do not divide its 16"),
    ({"hidden_size": "big"}, "vision_config.hidden_size must be a whole number"),
    ({"patch_size": 100_000}, "vision_config.patch_size must be a whole number of at most 256"),
    ({"standardize": "yes"}, "vision_config.standardize must be true or false"),
    ({"rope_parameters": {"rope_type": "yarn"}}, "vision_config.rope_parameters.rope_type is not supported"),
    ({"rope_parameters": {"rope_theta": 0}}, "vision_config.rope_parameters.rope_theta must be a number above 0"),
], ids=lambda value: next(iter(value)) if isinstance(value, dict) else "")
def test_a_tower_that_cannot_be_run_is_named(changes, message):
    assert message in refusal({"vision_config": GOOGLES | changes})


def test_a_tower_is_written_as_it_is_read():
    vision = read({"vision_config": GOOGLES, "vision_soft_token_budgets": [70, 280], "image_token_id": 7}).vision
    assert vision.vision_soft_token_budgets == (70, 280)
    assert read(json.loads(json.dumps(vision_config_to_dict(vision)))).vision == vision


@pytest.mark.parametrize("top", [{"vision_config": [1]}, {"vision_config": {}, "boi_token_id": -1},
                                 {"vision_config": {}, "vision_soft_tokens_per_image": 0},
                                 {"vision_config": {}, "vision_soft_token_budgets": []},
                                 {"vision_config": {}, "vision_soft_token_budgets": [140, 70]},
                                 {"vision_config": {}, "vision_soft_token_budgets": 70}], ids=str)
def test_a_bad_field_beside_the_tower_s_is_named(top):
    assert list(top)[-1] in refusal(top)


# Checkpoints that are not ours


@pytest.mark.parametrize(("kind", "architecture"), [
    ("gemma4", "Gemma4ForConditionalGeneration"), ("gemma3_text", "Gemma3ForCausalLM"), ("llama", "LlamaForCausalLM")])
def test_another_model_is_named(kind, architecture):
    message = refusal({"model_type": kind, "architectures": [architecture]})
    assert "not a DiffusionGemma checkpoint" in message
    assert kind in message and architecture in message


def test_a_config_without_a_model_type_is_refused():
    assert "no model_type" in refusal({"model_type": None, "architectures": None})


@pytest.mark.parametrize("name", ["vocab_size", "hidden_size", "intermediate_size", "num_attention_heads",
                                  "num_experts", "top_k_experts", "moe_intermediate_size", "sliding_window",
                                  "num_hidden_layers"])
@pytest.mark.parametrize("value", [None, 0, "8", 2.5, True])
def test_a_bad_size_is_named(name, value):
    assert f"text_config.{name}" in refusal(**{name: value})


@pytest.mark.parametrize(("changes", "message"), [
    ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention 'all'"),
    ({"attention_bias": True}, "attention_bias"),
    ({"hidden_activation": "silu"}, "hidden_activation 'silu'"),
    ({"layer_types": [SLIDING, FULL]}, "layer_types must name 3 layers"),
    ({"layer_types": [SLIDING, "linear_attention", FULL]}, "layer_types must name 3 layers"),
    ({"num_key_value_heads": 3}, "layer 0 has 3 key-value heads, which do not divide the 4 attention heads"),
    ({"top_k_experts": 9}, "top_k_experts 9 exceeds num_experts 8"),
    ({"rope_parameters": {FULL: {"rope_type": "yarn"}}}, "rope_type 'yarn' for full_attention"),
    ({"rope_parameters": {FULL: {"rope_type": "proportional", "factor": 4.0}}}, "factor"),
    ({"rope_parameters": {SLIDING: {"rope_type": "default", "partial_rotary_factor": 0.5}}}, "partial_rotary_factor"),
    ({"per_layer_config": {"0": {"head_dim": 8}}}, "sliding_attention layers must have one head_dim, not [8, 16]"),
    ({"per_layer_config": {"2": {"head_dim": "big"}}}, "layer 2: head_dim"),
    ({"per_layer_config": [1]}, "per_layer_config must be an object"),
    ({"rms_norm_eps": -1}, "rms_norm_eps must be a number above 0"),
    ({"eos_token_id": "</s>"}, "eos_token_id must be a token id"),
], ids=lambda value: next(iter(value)) if isinstance(value, dict) else "")
def test_what_cannot_be_run_is_named(changes, message):
    assert message in refusal(**changes)


def test_untied_weights_are_refused():
    assert "tie_word_embeddings" in refusal({"tie_word_embeddings": False})


# Folders


def folder_with(tmp_path, **files):
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / f"{name}.json").write_text(text, encoding="utf-8")
    return tmp_path


def test_a_folder_is_read(tmp_path):
    folder = folder_with(tmp_path, config=config(), generation_config={"t_max": 0.9})
    model = load_model_config(folder)
    assert model == read()
    assert load_generation_config(folder, model).t_max == 0.9


def test_a_folder_without_config_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="no config.json here") as caught:
        load_model_config(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(("content", "message"), [
    ('{"model_type": ', "not valid JSON"), ("[1, 2]", "expected a JSON object, found list"),
    ({"model_type": "llama"}, "'llama'"), ({"model_type": "diffusion_gemma"}, "'text_config' is missing")],
    ids=["cut", "list", "llama", "no-text"])
def test_a_bad_config_file_is_named_with_its_cause(tmp_path, content, message):
    with pytest.raises(CheckpointError) as caught:
        load_model_config(folder_with(tmp_path, config=content))
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: ")
    assert message in str(caught.value)
    assert isinstance(caught.value, DgemmaError)


def test_a_config_that_is_not_text_is_named(tmp_path):
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match="config.json: not valid JSON"):
        load_model_config(tmp_path)


# Generation settings

DOCUMENTED = {"max_denoising_steps": 48, "entropy_bound": 0.1, "t_min": 0.4, "t_max": 0.8, "stability_threshold": 1,
              "confidence_threshold": 0.005, "max_tokens": 256}


def test_no_generation_config_means_the_documented_defaults(tmp_path):
    settings = load_generation_config(tmp_path, read(eos_token_id=[1, 106]))
    assert dataclasses.asdict(settings) == DOCUMENTED | {"eos_token_id": (1, 106)}


def test_nulls_mean_the_documented_defaults():
    """As transformers writes the file for a model whose settings nobody touched."""
    nulls = {"confidence_threshold": None, "max_denoising_steps": None, "return_dict_in_generate": True,
             "sampler_config": None, "stability_threshold": None, "t_max": None, "t_min": None, "max_new_tokens": None,
             "eos_token_id": None, "transformers_version": "5.23.0"}
    assert generation_config_from_dict(nulls, read()) == GenerationConfig()


def test_settings_are_read_under_the_file_s_names():
    settings = generation_config_from_dict(
        {"max_denoising_steps": 16, "sampler_config": {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": 0.2},
         "t_min": 0.3, "t_max": 0.9, "stability_threshold": 2, "confidence_threshold": 0.01, "max_new_tokens": 512,
         "eos_token_id": [1, 106, 50]}, read())
    assert settings == GenerationConfig(16, 0.2, 0.3, 0.9, 2, 0.01, 512, (1, 106, 50))


def test_the_defaults_are_those_of_transformers():
    from transformers.models.diffusion_gemma.generation_diffusion_gemma import DiffusionGemmaGenerationConfig

    theirs = DiffusionGemmaGenerationConfig._get_default_generation_params()
    theirs["entropy_bound"] = theirs.pop("sampler_config").entropy_bound
    theirs["max_tokens"] = theirs.pop("max_new_tokens")
    assert theirs == DOCUMENTED
    assert set(SAMPLER_SETTINGS) == set(DOCUMENTED) - {"max_tokens"}


BAD_SETTINGS = [
    ("max_denoising_steps", 0), ("max_denoising_steps", 4.5), ("max_denoising_steps", True), ("t_min", 0),
    ("t_min", -0.5), ("t_max", 0.1), ("t_max", "hot"), ("t_max", float("nan")), ("stability_threshold", -1),
    ("stability_threshold", 1.5), ("confidence_threshold", 0), ("entropy_bound", 0), ("entropy_bound", "0.1"),
    ("max_tokens", 0), ("eos_token_id", (1, "2"))]


@pytest.mark.parametrize(("name", "value"), BAD_SETTINGS)
def test_a_bad_setting_is_named(name, value):
    with pytest.raises(ValueError, match=name):
        GenerationConfig().replace(**{name: value})


@pytest.mark.parametrize("name", ["max_denoising_steps", "t_min", "stability_threshold", "confidence_threshold"])
def test_a_bad_setting_in_a_file_is_named_with_the_file(name):
    with pytest.raises(CheckpointError, match=f"^/models/x/generation_config.json: {name} must"):
        generation_config_from_dict({name: -1}, read(), "/models/x/generation_config.json")


@pytest.mark.parametrize(("data", "message"), [
    ({"sampler_config": {"_cls_name": "OtherSamplerConfig"}}, "sampler 'OtherSamplerConfig' is not supported"),
    ({"sampler_config": "EntropyBound"}, "sampler_config must be an object"),
    ({"eos_token_id": "<eos>"}, "eos_token_id must be a token id"),
    ({"max_new_tokens": "many"}, "max_tokens must be an integer")], ids=lambda value: str(value)[:20])
def test_a_file_that_cannot_be_used_is_named(data, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        generation_config_from_dict(data, read(), "/models/x/generation_config.json")
    assert str(caught.value).startswith("/models/x/generation_config.json: ")


def test_replacing_keeps_what_is_none_and_refuses_what_is_unknown():
    settings = GenerationConfig(t_max=0.9)
    assert settings.replace(t_max=None, max_tokens=3) == GenerationConfig(t_max=0.9, max_tokens=3)
    assert settings == GenerationConfig(t_max=0.9)
    with pytest.raises(ValueError, match="unknown generation setting temperature; the settings are max_den"):
        settings.replace(temperature=1.0)
