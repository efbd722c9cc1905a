"""Adapters in PEFT's files, with PEFT over transformers' model as the oracle, in both directions."""

import copy
import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import dgemma
from dgemma.config import load_model_config
from dgemma.errors import CheckpointError, DgemmaError
from dgemma.gguf.reader import read_gguf, read_tensor
from dgemma.nn.adapters import AdapterConfig, adapter_parameters, adapters, attach, merge
from dgemma.weights.adapters import CONFIG_FILE, WEIGHTS_FILE, load_adapter, save_adapter
from dgemma.weights.load import load_network
from dgemma.weights.merge import merge_to_folder, merge_to_gguf
from dgemma.weights.quantize import convert
from dgemma.weights.save import save_checkpoint
from support.gemma_files import write_checkpoint
from support.gguf_files import write_network
from support.reference import SHAPES, RoutingMargin, network_like, random_network, reference_model, tiny_config

# PEFT looks for patterns' matches among modules only, and says so although it has just used them for a parameter.
pytestmark = pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match")

EVERYTHING = ("attention", "mlp", "self_conditioning", "experts")
LAYERS = r"model\.(encoder\.language_model|decoder)\.layers\.\d+\."


@pytest.fixture(scope="module", params=["alternating", "seventeen-experts"])
def pair(request):
    """transformers' model and our network with its weights; few experts and more than the dense path takes."""
    reference = reference_model(SHAPES[request.param], seed=3)
    return reference, network_like(reference)


def adapted(network, **settings):
    """A copy with an adapter that does something, and its settings."""
    config = AdapterConfig(**{"r": 3, "alpha": 6, "targets": EVERYTHING} | settings)
    network = copy.deepcopy(network)
    attach(network, config)
    stir(adapter_parameters(network).values())
    return network, config


@torch.no_grad()
def stir(parameters, size=0.1):
    generator = torch.Generator().manual_seed(5)
    for parameter in parameters:
        parameter.add_(torch.randn(parameter.shape, generator=generator) * size)


@torch.no_grad()
def logits(network, seed=0):
    """Of a canvas after a prompt, with self-conditioning; and how narrowly a router decided."""
    ids, canvas, processed = inputs(network.config, seed)
    cache = network.new_cache(2)
    with RoutingMargin(network, network.config.top_k_experts) as margin:
        network.encode(ids, cache)
        out = network.logits(network.denoise(canvas, cache, network.soft_embeddings(processed)))
    return out, margin.least


def inputs(config, seed):
    generator = torch.Generator().manual_seed(seed)
    ids, canvas = (torch.randint(config.vocab_size, (2, n), generator=generator) for n in (17, config.canvas_length))
    return ids, canvas, 3 * torch.randn(2, config.canvas_length, config.vocab_size, generator=generator)


def agree(network, theirs, plain):
    """Assert that our logits are transformers', and not those without the adapter."""
    for seed in range(20):
        ours, margin = logits(network, seed)
        if margin > 3e-5:
            break
    ids, canvas, processed = inputs(network.config, seed)
    with torch.no_grad():
        wanted = theirs(input_ids=ids, decoder_input_ids=canvas, self_conditioning_logits=processed).logits
    assert (wanted - logits(plain, seed)[0]).abs().max() > 0.1
    torch.testing.assert_close(ours, wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("settings", [
    {}, {"targets": ("experts",)}, {"targets": ("experts.gate_up_proj", "q_proj")}, {"rslora": True},
    {"targets": ("experts.down_proj", "layers.1.mlp.up_proj"), "rank_pattern": {"experts.down_proj": 2},
     "alpha_pattern": {"mlp.up_proj": 1.5}},
    {"targets": ("attention", "mlp", "self_conditioning"), "dora": True},
], ids=["everything", "experts", "gate-up", "rslora", "patterns", "dora"])
def test_peft_loads_what_we_write(pair, settings, tmp_path):
    peft = pytest.importorskip("peft")
    reference, plain = pair
    network, config = adapted(plain, **settings)
    save_adapter(network, config, tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(reference), tmp_path).eval()
    agree(network, theirs, plain)


@pytest.mark.parametrize("settings", [
    {"target_modules": LAYERS + r"(self_attn\.[qkvo]_proj|mlp\..*_proj)|model\.decoder\.self_conditioning\..*_proj",
     "target_parameters": ["experts.down_proj", "experts.gate_up_proj"], "rank_pattern": {"experts.down_proj": 2}},
    {"target_modules": LAYERS + r"mlp\.up_proj", "use_dora": True, "use_rslora": True},
    {"target_modules": ["decoder.layers.1.self_attn.q_proj", "language_model.layers.1.self_attn.q_proj"],
     "target_parameters": ["layers.0.experts.gate_up_proj"], "alpha_pattern": {"gate_up_proj": 5}},
], ids=["everything", "dora", "lists"])
def test_we_load_what_peft_writes(pair, settings, tmp_path):
    """The encoder's pairs made those of the decoder, as whoever trains this model with PEFT has to."""
    peft = pytest.importorskip("peft")
    reference, plain = pair
    theirs = peft.get_peft_model(copy.deepcopy(reference), peft.LoraConfig(r=3, lora_alpha=6, **settings)).eval()
    parameters = dict(theirs.named_parameters())
    stir(p for name, p in parameters.items() if "lora_" in name)
    with torch.no_grad():
        for name, parameter in parameters.items():
            if "lora_" in name and ".encoder.language_model." in name:
                parameter.copy_(parameters[name.replace(".encoder.language_model.", ".decoder.")])
    theirs.save_pretrained(tmp_path)
    network = copy.deepcopy(plain)
    load_adapter(network, tmp_path)
    assert not any(parameter.requires_grad for parameter in network.parameters())
    agree(network, theirs, plain)


@pytest.fixture
def tiny():
    return random_network(tiny_config())


@pytest.fixture
def saved(tiny, tmp_path):
    """A folder with an adapter for the tiny network."""
    network, config = adapted(tiny)
    save_adapter(network, config, tmp_path / "adapter", base="some/model")
    return tmp_path / "adapter"


@pytest.mark.parametrize("settings", [
    {"dora": True}, {"targets": ("experts.down_proj",), "dora": True, "alpha": 1.5, "dropout": 0.1},
    {"rank_pattern": {"experts": 1, "experts.gate_up_proj": 2}, "targets": ("experts", "layers.2.mlp.up_proj")},
], ids=["dora", "dora-experts", "ranks"])
def test_what_is_written_is_read_again(tiny, settings, tmp_path):
    network, config = adapted(tiny, **settings)
    save_adapter(network, config, tmp_path)
    again = copy.deepcopy(tiny)
    read = load_adapter(again, tmp_path, trainable=True)
    assert (read.r, read.alpha, read.dora, read.rslora, read.dropout) == (
        config.r, config.alpha, config.dora, config.rslora, config.dropout)
    wanted = adapter_parameters(network)
    assert adapter_parameters(again).keys() == wanted.keys() and set(read.targets) == adapters(network).keys()
    for name, parameter in adapter_parameters(again).items():
        assert torch.equal(parameter, wanted[name]) and parameter.requires_grad
    assert torch.equal(logits(again)[0], logits(network)[0])
    save_adapter(again, read, tmp_path / "again")
    assert load_adapter(copy.deepcopy(tiny), tmp_path / "again") == read


def test_swapping(tiny, saved, tmp_path):
    """An adapter takes another's place; of the same shapes, in the same parameters."""
    first = copy.deepcopy(tiny)
    load_adapter(first, saved)
    wanted = logits(first)[0]
    other, config = adapted(tiny, dora=True, targets=("mlp",), alpha=1)
    save_adapter(other, config, tmp_path / "other")
    same, config = adapted(tiny, alpha=1)
    save_adapter(same, config, tmp_path / "same")
    network = copy.deepcopy(tiny)
    load_adapter(network, tmp_path / "same")
    kept = list(adapter_parameters(network).values())
    load_adapter(network, saved / WEIGHTS_FILE)
    assert torch.equal(logits(network)[0], wanted)
    assert all(one is other for one, other in zip(kept, adapter_parameters(network).values(), strict=True))
    load_adapter(network, tmp_path / "other")
    assert torch.equal(logits(network)[0], logits(other)[0])
    load_adapter(network, saved)
    assert torch.equal(logits(network)[0], wanted)


def test_there_must_be_an_adapter_to_save(tiny, tmp_path):
    with pytest.raises(DgemmaError, match="has no adapter"):
        save_adapter(tiny, AdapterConfig(), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def edited(folder, change):
    tensors = load_file(folder / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_FILE)


def set_to(**settings):
    def change(folder):
        data = json.loads((folder / CONFIG_FILE).read_text())
        data.update(settings)
        (folder / CONFIG_FILE).write_text(json.dumps(data))

    return change


Q = "base_model.model.model.decoder.layers.0.self_attn.q_proj."
E = "base_model.model.model.encoder.language_model.layers.0.self_attn.q_proj."


@pytest.mark.parametrize(("change", "message"), [
    (lambda f: shutil.rmtree(f), "no such adapter"),
    (lambda f: (f / WEIGHTS_FILE).unlink(), "there is no adapter_model.safetensors in this folder"),
    (lambda f: (f / WEIGHTS_FILE).rename(f / "adapter_model.bin"), "is a pickle, which is not read"),
    (lambda f: (f / CONFIG_FILE).unlink(), "cannot be read"),
    (lambda f: (f / CONFIG_FILE).write_text("{"), "not valid JSON"),
    (lambda f: (f / WEIGHTS_FILE).write_bytes(b"x" * 40), "corrupt safetensors"),
    (set_to(peft_type="LOHA"), "peft_type must be LORA, got 'LOHA'"),
    (set_to(r="8"), "rank r must be a whole number from 1, got '8'"),
    (set_to(bias="all"), "bias 'all' is not supported"),
    (set_to(init_lora_weights="pissa"), "init_lora_weights 'pissa' is not supported"),
    (set_to(modules_to_save=["lm_head"]), "modules_to_save .* is not supported"),
    (set_to(target_modules="("), "unterminated subpattern"),
    (set_to(target_modules=7), "target_modules must be a list of names, got 7"),
    (set_to(target_parameters="experts"), "target_parameters must be a list of names, got 'experts'"),
    (lambda f: (f / CONFIG_FILE).write_text("[" * 100_000), "not valid JSON"),
    (set_to(alpha_pattern={"decoder.layers.0.self_attn.q_proj": 1}), "differs between the encoder and the decoder"),
    (set_to(r=4), r"expected \[4, 24\], found \[3, 24\]"),
    (set_to(use_dora=True), "missing keys .*\n.*lora_magnitude_vector of model.decoder"),
    (lambda f: edited(f, lambda t: t.pop(Q + "lora_B.weight")), r"missing keys \(1\):\n *lora_B.weight of "
     r"model.decoder.layers.0.self_attn.q_proj$"),
    (lambda f: edited(f, lambda t: [t.pop(k) for k in list(t) if k.startswith((Q, E))]), r"missing keys \(4\)"),
    (lambda f: edited(f, lambda t: [t.pop(k) for k in list(t) if ".encoder." in k]), "missing keys"),
    (lambda f: edited(f, lambda t: t[E + "lora_B.weight"].add_(1)), r"different in the encoder and the decoder.*\n *"
     "layers.0.self_attn.q_proj"),
    (lambda f: edited(f, lambda t: t.update({Q + "x": torch.ones(1)})), r"unknown keys.*\(1\):\n *.*q_proj.x$"),
    (lambda f: edited(f, lambda t: t.update({Q.replace("layers.0", "layers.9") + "lora_A.weight": torch.ones(1)})),
     "unknown keys"),
    (lambda f: edited(f, lambda t: t.update({Q + "lora_magnitude_vector": torch.ones(32)})), "unknown keys"),
    (lambda f: edited(f, lambda t: t[Q + "lora_A.weight"].fill_(float("nan"))), "no numbers"),
])
def test_what_does_not_fit_is_refused_and_changes_nothing(tiny, saved, change, message):
    change(saved)
    network = copy.deepcopy(tiny)
    with pytest.raises(CheckpointError, match=message):
        load_adapter(network, saved)
    assert not adapters(network)


def test_a_path_longer_than_any_is_no_adapter(tiny, tmp_path):
    with pytest.raises(CheckpointError, match="no such adapter"):
        load_adapter(tiny, tmp_path / ("x" * 300))


def test_an_adapter_for_another_model_says_whose_it_is(saved):
    with pytest.raises(CheckpointError, match=r"fit this model \(it was made for some/model\)\n  wrong shapes"):
        load_adapter(random_network(tiny_config(hidden_size=32)), saved)


def test_a_full_disk_leaves_the_old_adapter(tiny, saved, full_disk):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    full_disk()
    network, config = adapted(tiny, alpha=1)
    with pytest.raises(DgemmaError, match="cannot be written .*No space left"):
        save_adapter(network, config, saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


# Whole models: loading with an adapter, merging files. Every token takes every expert: a router's close decision,
# turned over by rounding, would hide what is measured.


@pytest.fixture(params=[False, True], ids=["lora", "dora"])
def model_and_adapter(request, tmp_path):
    """A bfloat16 checkpoint, and a folder with an adapter for it."""
    folder = tmp_path / "model"
    folder.mkdir()
    write_checkpoint(folder, num_experts=3, top_k_experts=3)
    network, settings = adapted(load_network(folder, load_model_config(folder)), dora=request.param)
    save_adapter(network, settings, tmp_path / "adapter")
    return folder, tmp_path / "adapter"


def in_float32(path, adapter=None):
    return logits(dgemma.load(path, device="cpu", dtype="float32", adapter=adapter).network)[0]


def relative(ours, wanted):
    return ((ours - wanted).norm() / wanted.norm()).item()


def test_a_merged_folder_is_the_model_with_its_adapter(model_and_adapter, tmp_path):
    """Within bfloat16's rounding of the sums, a 512th of a weight at most; in one file or in memory, the same bits."""
    folder, adapter = model_and_adapter
    merge_to_folder(folder, adapter, tmp_path / "out")
    wanted = in_float32(folder, adapter)
    assert relative(in_float32(folder), wanted) > 0.1
    assert relative(in_float32(tmp_path / "out"), wanted) < 0.02
    network = dgemma.load(folder, device="cpu", adapter=adapter).network
    merge(network)
    for name, tensor in dgemma.load(tmp_path / "out", device="cpu").network.state_dict().items():
        assert torch.equal(tensor, network.state_dict()[name]), name


def test_shards_and_companions_stay_what_they_are(sharded, tmp_path):
    """The vision tower and the norms too; of float32 weights there is no rounding to speak of."""
    network, settings = adapted(load_network(sharded, load_model_config(sharded)))
    save_adapter(network, settings, tmp_path / "adapter")
    steps = []
    merge_to_folder(sharded, tmp_path / "adapter", tmp_path / "out", lambda *step: steps.append(step))
    torch.testing.assert_close(in_float32(tmp_path / "out"), logits(network)[0], atol=1e-4, rtol=0)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in sharded.iterdir()}
    assert [name for name, _, _ in steps] == [path.name for path in sorted(sharded.glob("*.safetensors"))]
    (tmp_path / "new").touch()
    for path in sharded.iterdir():
        copied = tmp_path / "out" / path.name
        assert copied.stat().st_mode == (tmp_path / "new").stat().st_mode
        if path.suffix != ".safetensors":
            assert copied.read_bytes() == path.read_bytes()
            continue
        before, after = load_file(path), load_file(copied)
        for name, tensor in before.items():
            touched = bool(re.search(r"(_proj|_proj\.weight)$", name)) and ".vision_tower." not in name
            assert torch.equal(after[name], tensor) != touched, name


@pytest.mark.parametrize(("mixture", "error"), [("BF16", 0.02), ("Q8_0", 0.05)])
def test_a_merged_gguf_is_the_model_with_its_adapter(model_and_adapter, tmp_path, mixture, error):
    """Compared by its numbers in float32, so that only what was written counts; and rounded only once, to the bit."""
    folder, adapter = model_and_adapter
    merge_to_gguf(folder, adapter, tmp_path / "merged.gguf", mixture)
    assert relative(unpacked(tmp_path / "merged.gguf"), in_float32(folder, adapter)) < error
    model = dgemma.load(folder, device="cpu", dtype="float32", adapter=adapter)
    merge(model.network)
    save_checkpoint(model.network, folder, json.loads((folder / "config.json").read_text()), {}, torch.float32)
    convert(folder, tmp_path / "wanted.gguf", mixture)
    ours, wanted = (read_gguf(tmp_path / f"{name}.gguf").tensors for name in ("merged", "wanted"))
    assert {name: tensor.type for name, tensor in ours.items()} == {name: t.type for name, t in wanted.items()}
    for name, tensor in ours.items():
        assert torch.equal(read_tensor(tensor), read_tensor(wanted[name])), name


def unpacked(path):
    """The logits of a GGUF file's numbers, computed in float32."""
    from dgemma.weights.gguf_model import match_gguf, open_gguf, unpacked_weights
    from dgemma.weights.load import empty_network, tensor_shapes

    model = open_gguf(path)
    network = empty_network(model.config)
    shapes = tensor_shapes(network)
    weights = unpacked_weights(model, match_gguf(model, shapes)[0], shapes, torch.device("cpu"), torch.float32,
                               lambda done, total: None)
    network.load_state_dict(weights, assign=True)
    return logits(network.eval())[0]


def test_a_packed_gguf_takes_an_adapter_and_a_merge(model_and_adapter, tmp_path, monkeypatch):
    monkeypatch.setattr("dgemma.weights.quantize._PIECE", 3000)  # pieces that end in the middle of an expert
    folder, adapter = model_and_adapter
    convert(folder, tmp_path / "base.gguf", "Q8_0")
    summary = merge_to_gguf(tmp_path / "base.gguf", adapter, tmp_path / "out.gguf", "Q8_0")
    assert "Q8_0" in summary.requantized
    wanted = logits(dgemma.load(tmp_path / "base.gguf", device="cpu", adapter=adapter).network)[0]
    assert relative(unpacked(tmp_path / "base.gguf"), wanted) > 0.1
    assert relative(unpacked(tmp_path / "out.gguf"), wanted) < 0.05
    with pytest.raises(DgemmaError, match="give an OUT that ends in .gguf"):
        merge_to_folder(tmp_path / "base.gguf", adapter, tmp_path / "out")


def test_gate_and_up_experts_that_stand_apart(tiny, saved, tmp_path):
    import numpy as np

    def split(metadata, tensors):
        for name in [name for name in tensors if "gate_up_exps" in name]:
            for half, values in zip(("gate", "up"), np.split(tensors.pop(name), 2, axis=1), strict=True):
                tensors[name.replace("gate_up_exps", f"{half}_exps")] = values

    for dora in (False, True):
        network, config = adapted(tiny, dora=dora)
        save_adapter(network, config, saved)
        path = write_network(tmp_path / "apart.gguf", tiny, change=split)
        merge_to_gguf(path, saved, tmp_path / "out.gguf", "BF16", force=True)
        assert relative(unpacked(tmp_path / "out.gguf"), logits(network)[0]) < 0.02


def test_where_a_merge_cannot_go(model_and_adapter, tmp_path, monkeypatch):
    folder, adapter = model_and_adapter
    for place in (folder, folder / "config.json"):
        with pytest.raises(DgemmaError, match="this exists already"):
            merge_to_folder(folder, adapter, place)
    monkeypatch.setattr("dgemma.weights.merge._rewrite", lambda *_: (_ for _ in ()).throw(OSError(28, "No space")))
    with pytest.raises(DgemmaError, match=r"out: cannot be written \(No space\)"):
        merge_to_folder(folder, adapter, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"model", "adapter"}


def test_a_checkpoint_has_no_place_for_an_adapter(tiny, tmp_path):
    network, _ = adapted(tiny)
    with pytest.raises(DgemmaError, match="merge it into the network"):
        save_checkpoint(network, tmp_path / "x", {}, {})
    assert not (tmp_path / "x").exists()
