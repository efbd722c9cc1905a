"""Checkpoints of ten layers and more as transformers saves them, whose layers' numbers are padded; and the way back."""

import json
import math

import pytest
import torch

from dgemma.config import FULL, SLIDING, load_model_config, model_config_from_dict
from dgemma.errors import CheckpointError
from dgemma.inspect import inspect_checkpoint
from dgemma.train.data import tokenizer as bundled_tokenizer
from dgemma.weights.gguf_model import load_gguf_network, open_gguf
from dgemma.weights.load import load_network
from dgemma.weights.quantize import convert
from dgemma.weights.save import save_checkpoint
from support.reference import reference_model

SHAPE = dict(layer_types=([SLIDING] * 5 + [FULL]) * 2, hidden_size=32, intermediate_size=32, num_attention_heads=4,
             num_key_value_heads=2, head_dim=8, global_head_dim=16, num_global_key_value_heads=1, sliding_window=5,
             num_experts=4, top_k_experts=2, vocab_size=288, canvas_length=8)
# What the full layers say of themselves, and what is left of it in the file: what equals the base is left out.
GEOMETRIES = {
    "both": (dict(), {"head_dim": 16, "num_key_value_heads": 1}),
    "only-the-heads-width": (dict(num_global_key_value_heads=2), {"head_dim": 16}),
    "only-the-heads-number": (dict(global_head_dim=8), {"num_key_value_heads": 1}),
    "nothing": (dict(global_head_dim=8, num_global_key_value_heads=2), None),
}


def logits_of(network, ids, canvas):
    cache = network.new_cache(1)
    network.encode(ids, cache)
    return network.logits(network.denoise(canvas, cache, soft=None))


@pytest.fixture(scope="module", params=GEOMETRIES)
def saved(request, tmp_path_factory):
    """The geometry's name, transformers' network, and the folder that it saved."""
    changes, _ = GEOMETRIES[request.param]
    model = reference_model(SHAPE | changes, feedback=0.2)
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder)
    bundled_tokenizer.save(folder)
    return request.param, model, folder


def test_twelve_layers_give_transformers_logits(saved):
    name, model, folder = saved
    kept = GEOMETRIES[name][1]
    text = json.loads((folder / "config.json").read_text())["text_config"]
    assert text["per_layer_config"] == ({"05": kept, "11": kept} if kept else {})  # else this tests nothing
    generator = torch.Generator().manual_seed(1)
    ids, canvas = (torch.randint(288, (1, count), generator=generator) for count in (11, 8))
    with torch.no_grad():
        theirs = model(input_ids=ids, decoder_input_ids=canvas).logits
        ours = logits_of(load_network(folder, load_model_config(folder)), ids, canvas)
    assert torch.allclose(ours, theirs.float(), rtol=0, atol=1e-4)
    assert inspect_checkpoint(folder).problems == ()


def test_what_we_save_transformers_loads(saved, tmp_path):
    from transformers import DiffusionGemmaForBlockDiffusion

    _, model, folder = saved
    network = load_network(folder, load_model_config(folder))
    save_checkpoint(network, tmp_path, json.loads((folder / "config.json").read_text()), {}, torch.float32)
    again = DiffusionGemmaForBlockDiffusion.from_pretrained(tmp_path).eval()
    layers = again.config.text_config.per_layer_config
    assert [(layer.head_dim, layer.num_key_value_heads) for layer in layers] == [
        (layer.head_dim, layer.num_key_value_heads) for layer in model.config.text_config.per_layer_config]
    theirs = model.state_dict()
    for name, tensor in again.state_dict().items():
        if name.startswith("model.decoder."):
            assert torch.equal(tensor, theirs[name]), name


def test_the_same_as_a_gguf_file(saved, tmp_path):
    _, _, folder = saved
    convert(folder, tmp_path / "model.gguf", "BF16")
    model = open_gguf(tmp_path / "model.gguf")
    assert [(layer.kind, layer.head_dim, layer.num_key_value_heads) for layer in model.config.layers] == [
        (layer.kind, layer.head_dim, layer.num_key_value_heads) for layer in load_model_config(folder).layers]
    assert load_gguf_network(model).config.num_hidden_layers == 12


# How a layer may be named


def config(per_layer, **text):
    full = {name: value for name, value in SHAPE.items()
            if name not in ("canvas_length", "global_head_dim", "num_global_key_value_heads")}
    return {"model_type": "diffusion_gemma", "canvas_length": 8,
            "text_config": full | {"num_hidden_layers": 12, "moe_intermediate_size": 24,
                                   "per_layer_config": per_layer} | text}


WANTED = {"head_dim": 16, "num_key_value_heads": 1}


@pytest.mark.parametrize("five", ["5", "05", "005", "+5", " 5", "5 ", 5, "٥"], ids=repr)
def test_a_layer_is_named_by_whatever_reads_as_its_number(five):
    assert int(five) == 5  # which is how transformers reads it
    read = model_config_from_dict(config({five: WANTED, "11": WANTED}))
    assert [(layer.head_dim, layer.num_key_value_heads) for layer in read.layers if layer.kind == FULL] == [(16, 1)] * 2
    assert read == model_config_from_dict(config({FULL: WANTED}))


@pytest.mark.parametrize("key", ["x", "12", "99", "-1", "5.0", "0x5", "", "full", "layers.5", "5,11", None, True, 12,
                                 "9" * 5000], ids=lambda key: repr(key)[:12])
def test_what_names_no_layer_is_refused(key):
    with pytest.raises(CheckpointError, match=r"^c\.json: text_config\.per_layer_config names a layer .*0 to 11"):
        model_config_from_dict(config({"05": WANTED, "11": WANTED, key: WANTED}), "c.json")


def test_a_layer_is_described_once():
    same = config({"5": WANTED, "05": dict(WANTED), "11": WANTED})
    assert model_config_from_dict(same) == model_config_from_dict(config({FULL: WANTED}))
    with pytest.raises(CheckpointError, match="describes layer 5 twice"):
        model_config_from_dict(config({"5": WANTED, "05": {"head_dim": 16}, "11": WANTED}))


def test_what_else_layers_may_differ_in_is_refused_by_name():
    """transformers lets a layer have any setting of its own, and leaves out parts of it."""
    for own in ({"intermediate_size": 48}, {"sliding_window": 3}, {"skip": ["mlp"]}, {"rope_theta": 5.0}):
        (name,) = own
        with pytest.raises(CheckpointError, match=f"per_layer_config.05.{name} is not supported"):
            model_config_from_dict(config({"05": WANTED | own, "11": WANTED}))
    said_again = {"intermediate_size": 32, "sliding_window": 5, "skip": []}
    assert model_config_from_dict(config({"05": WANTED | said_again, "11": WANTED | said_again}))


def test_the_index_is_stronger_than_the_kind():
    layers = model_config_from_dict(config({FULL: {"head_dim": 16}, "05": {"num_key_value_heads": 1}})).layers
    assert [(layer.head_dim, layer.num_key_value_heads) for layer in (layers[5], layers[11])] == [(16, 1), (16, 2)]


def test_a_fraction_of_the_head_may_turn_and_no_more():
    ropes = {FULL: {"rope_type": "proportional", "partial_rotary_factor": math.nextafter(1, 2)}}
    with pytest.raises(CheckpointError, match="partial_rotary_factor must be at most 1"):
        model_config_from_dict(config({FULL: WANTED}, rope_parameters=ropes))
