"""GGUF files: the container, networks out of them, and everything that can be wrong with one."""

import dataclasses
import json
import shutil
import struct

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf import GGUFValueType, GGUFWriter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dgemma
from dgemma.config import FULL, SLIDING, GenerationConfig, load_generation_config, model_config_from_dict
from dgemma.errors import CheckpointError
from dgemma.gguf.keys import config_metadata, gguf_name, network_name, rope_freqs, rotary_fraction, stop_ids
from dgemma.gguf.reader import map_tensors, read_gguf
from dgemma.inspect import inspect_checkpoint
from dgemma.kernels.packed import PackedWeight
from dgemma.nn.layers import inverse_frequencies
from dgemma.nn.packed import all_packed
from dgemma.weights.files import bundled_models
from dgemma.weights.gguf_model import is_matrix, load_gguf_network, match_gguf, open_gguf, packed_weights
from dgemma.weights.hub.locate import locate
from dgemma.weights.load import empty_network, network_shapes
from support.gguf_files import metadata_of, tensors_of, write, write_network
from support.reference import SHAPES, random_network, tiny_config


@pytest.fixture(scope="module")
def network():
    """Two sliding layers and a full one, every row a multiple of 32."""
    return random_network(tiny_config(hidden_size=64, intermediate_size=96, moe_intermediate_size=32, head_dim=16,
                                      global_head_dim=32, num_attention_heads=4), feedback=0.2)


@pytest.fixture(scope="module")
def sound(network, tmp_path_factory):
    """Its file in float32; not to be written to."""
    return write_network(tmp_path_factory.mktemp("gguf") / "sound.gguf", network)


@pytest.fixture(scope="module")
def packed(network, tmp_path_factory):
    """The same with Q8_0 matrices and one in F16."""
    return write_network(tmp_path_factory.mktemp("gguf") / "packed.gguf", network, Type.Q8_0,
                         types={"blk.1.attn_q.weight": Type.F16})


def load(path, **arguments):
    return load_gguf_network(open_gguf(path), **arguments)


def logits_of(network, canvas=8):
    with torch.no_grad():
        cache = network.new_cache(1)
        network.encode(torch.arange(20).unsqueeze(0), cache)
        return network.logits(network.denoise(torch.arange(20, 20 + canvas).unsqueeze(0) % 50, cache))


def refused(path, *fragments):
    with pytest.raises(CheckpointError) as error:
        load(path)
    for fragment in fragments:
        assert fragment in str(error.value)
    return str(error.value)


# Networks


@pytest.mark.parametrize("shape", ["alternating", "odd-sizes", "all-full", "multi-query"])
def test_network_comes_back(shape, tmp_path):
    text = dict(vocab_size=50, intermediate_size=72, moe_intermediate_size=24) | SHAPES[shape]
    text.setdefault("num_hidden_layers", len(text["layer_types"]))
    canvas = text.pop("canvas_length")
    original = random_network(model_config_from_dict(
        {"model_type": "diffusion_gemma", "canvas_length": canvas, "text_config": text}))
    path = write_network(tmp_path / "model.gguf", original)
    found = load(path)
    for ours, theirs in zip(found.config.layers, original.config.layers, strict=True):
        assert torch.equal(inverse_frequencies(ours), inverse_frequencies(theirs))
    plain = [dataclasses.replace(n.config, layers=tuple(dataclasses.replace(layer, rotary_fraction=1.0)
                                                        for layer in n.config.layers), dtype=None, eos_token_id=())
             for n in (found, original)]
    assert plain[0] == plain[1]
    assert torch.equal(logits_of(found, canvas), logits_of(original, canvas))
    assert not any(parameter.requires_grad for parameter in found.parameters())


def test_unpacked_weights_stay_in_the_mapped_file(sound, network):
    found = load(sound)
    assert len({parameter.untyped_storage().data_ptr() for parameter in found.parameters()}) == 1
    before = sound.read_bytes()
    with torch.no_grad():
        found.norm.weight.zero_()  # a private copy
    assert sound.read_bytes() == before
    assert torch.equal(load(sound).norm.weight, network.norm.weight)


@pytest.mark.parametrize(("kind", "dtype"), [(Type.F16, torch.float16), (Type.BF16, torch.bfloat16)])
def test_stored_dtype(kind, dtype, network, tmp_path):
    path = write_network(tmp_path / "model.gguf", network, kind)
    found = load(path)
    assert {tensor.dtype for tensor in found.state_dict().values()} == {dtype}
    exact = random_network(network.config, feedback=0.2)
    exact.load_state_dict({name: tensor.to(dtype).float() if is_matrix(name, tensor.shape) else tensor
                           for name, tensor in network.state_dict().items()})
    assert torch.equal(logits_of(load(path, dtype=torch.float32)), logits_of(exact))


def test_packed_weights_stay_packed_on_another_device_if_they_are_to(packed):
    """For training an adapter: matrices in their blocks, everything else in float32, all of it there."""
    found, here = load(packed, device="meta", keep_packed=True), load(packed)
    expected = [("meta", weight.type, weight.data.shape) for weight in all_packed(here)]
    assert [(weight.device.type, weight.type, weight.data.shape) for weight in all_packed(found)] == expected
    assert len(expected) > 10
    assert {tensor.device.type for tensor in found.state_dict().values()} == {"meta"}
    assert {tensor.dtype for tensor in found.state_dict().values()} == {torch.float32, torch.uint8}
    assert found.cache_type == here.cache_type == "bf16"
    assert not list(all_packed(load(packed, device="meta")))


def test_packed_weights_are_views_of_the_file(packed, network):
    model = open_gguf(packed)
    shapes = network_shapes(model.config)
    chosen, problems = match_gguf(model, shapes)
    assert problems == []
    calls = []
    weights = packed_weights(model, chosen, shapes, lambda done, total: calls.append((done, total)))
    assert set(weights) == set(shapes)
    assert calls[0] == (0, calls[0][1]) and calls[-1] == (calls[0][1],) * 2 and calls == sorted(calls)
    matrices = {name: weight for name, weight in weights.items() if isinstance(weight, PackedWeight)}
    assert len({weight.data.untyped_storage().data_ptr() for weight in matrices.values()}) == 1
    types = {name: weight.type.name for name, weight in matrices.items()}
    assert types.pop("layers.1.self_attn.q_proj.weight") == "F16"
    assert set(types.values()) == {"Q8_0"}
    reader = {tensor.name: tensor for tensor in gguf.GGUFReader(packed).tensors}
    for name, weight in weights.items():
        assert tuple(weight.shape) == shapes[name]
        assert is_matrix(name, shapes[name]) == isinstance(weight, PackedWeight)
        if isinstance(weight, PackedWeight):
            theirs = reader[gguf_name(name)]
            exact = gguf.quants.dequantize(theirs.data, theirs.tensor_type)
            assert np.array_equal(weight.dequantize().numpy(), exact.reshape(shapes[name]))
        else:
            assert weight.dtype == torch.float32 and torch.equal(weight, network.state_dict()[name])


def test_packed_network_computes_what_the_unpacked_one_does(packed, network, plain_torch):
    """Plain torch and the kernels on the same packed weights, and weights without packing.

    The former agree but for tokens that meet a rounding tie; the latter differ by activations rounded to int8, 0.7 % of
    every product.
    """
    assert load(packed).cache_type == "bf16"
    found = load(packed, cache_type="f32")
    unpacked = random_network(network.config, feedback=0.2)
    unpacked.load_state_dict(unpacked_state(packed))
    quick, states = logits_of(found), encoded(found)
    wanted = logits_of(unpacked)
    plain_torch()
    plain = logits_of(found)
    assert (quick - wanted).norm() < 0.03 * wanted.norm()
    assert (plain - wanted).norm() < 0.03 * wanted.norm()
    assert ((states - encoded(found)).norm(dim=-1) / states.norm(dim=-1)).median() < 2e-6


def encoded(network):
    with torch.no_grad():
        return network.encode(torch.arange(20).unsqueeze(0), network.new_cache(1))


def unpacked_state(path):
    model = open_gguf(path)
    shapes = network_shapes(model.config)
    weights = packed_weights(model, match_gguf(model, shapes)[0], shapes, lambda done, total: None)
    return {name: weight.dequantize() if isinstance(weight, PackedWeight) else weight
            for name, weight in weights.items()}


def test_other_devices_get_everything_unpacked(packed, monkeypatch):
    monkeypatch.setattr("dgemma.weights.gguf_model.dequantize", lambda data, kind, dtype=torch.float32: torch.empty(
        *data.shape[:-1], kind.row_width(data.shape[-1]), dtype=dtype, device=data.device))
    monkeypatch.setattr("dgemma.weights.gguf_model.rotary_fraction", lambda freqs, source: 0.25)
    monkeypatch.setattr("dgemma.weights.gguf_model.read_tensor", lambda tensor: None)
    found = load(packed, device="meta")
    assert {tensor.dtype for tensor in found.state_dict().values()} == {torch.bfloat16}
    assert {tensor.device.type for tensor in found.state_dict().values()} == {"meta"}
    assert {t.dtype for t in load(packed, device="meta", dtype=torch.float16).state_dict().values()} == {torch.float16}


@pytest.mark.parametrize("kind", [Type.F32, Type.Q8_0])
def test_gate_and_up_experts_apart(kind, network, tmp_path):
    def part(metadata, tensors):
        for layer in range(3):
            both = tensors.pop(f"blk.{layer}.ffn_gate_up_exps.weight")
            for half, values in zip(("gate", "up"), np.split(both, 2, axis=1), strict=True):
                tensors[f"blk.{layer}.ffn_{half}_exps.weight"] = values

    halves = {f"blk.{layer}.ffn_{half}_exps.weight": kind for layer in range(3) for half in ("gate", "up")}
    apart = write_network(tmp_path / "apart.gguf", network, kind, change=part, types=halves)
    together = write_network(tmp_path / "together.gguf", network, kind)
    for name, tensor in unpacked_state(together).items():
        assert torch.equal(unpacked_state(apart)[name], tensor)

    def one_only(metadata, tensors):
        part(metadata, tensors)
        del tensors["blk.1.ffn_up_exps.weight"]

    message = refused(write_network(tmp_path / "half.gguf", network, change=one_only), "missing tensors (1)")
    assert "blk.1.ffn_up_exps.weight" in message
    path = write_network(tmp_path / "mixed.gguf", network, change=part, types={"blk.2.ffn_up_exps.weight": Type.F16})
    refused(path, "different types (1)", "blk.2.ffn_gate_exps.weight is F32, blk.2.ffn_up_exps.weight F16")


def test_without_the_encoders_scalars_the_decoders_count(network, tmp_path):
    def drop(metadata, tensors):
        for layer in range(3):
            del tensors[f"blk.{layer}.enc_layer_output_scale.weight"]

    found = load(write_network(tmp_path / "model.gguf", network, change=drop))
    for block, original in zip(found.layers, network.layers, strict=True):
        assert torch.equal(block.encoder_layer_scalar, original.layer_scalar)


def test_bundled_model_as_gguf(tmp_path):
    """Through `dgemma.load`: same tokens for the same seed, same tokenizer, same settings."""
    assert bundled_models()
    original = dgemma.load("sudoku")
    folder = locate("sudoku")
    metadata = config_metadata(original.config, original.generation_config) | {
        "tokenizer.ggml.model": "gpt2",
        "dgemma.tokenizer.json": (folder / "tokenizer.json").read_text(),
        "dgemma.tokenizer_config.json": (folder / "tokenizer_config.json").read_text(),
        "tokenizer.chat_template": (folder / "chat_template.jinja").read_text()}
    path = write_network(tmp_path / "sudoku.gguf", original.network, metadata=metadata)
    model = dgemma.load(path)
    assert model.config == dataclasses.replace(original.config, dtype=None, eos_token_id=(1, 106, 50))
    assert model.generation_config == load_generation_config(folder, original.config)
    puzzle = "Solve 53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"
    found, expected = (one.generate(puzzle, seed=3) for one in (model, original))
    assert found == dataclasses.replace(expected, seconds=found.seconds)


# The container


def test_metadata_of_every_type(tmp_path):
    values = {
        GGUFValueType.UINT8: 200, GGUFValueType.INT8: -100, GGUFValueType.UINT16: 60000, GGUFValueType.INT16: -30000,
        GGUFValueType.UINT32: 4_000_000_000, GGUFValueType.INT32: -2_000_000_000, GGUFValueType.FLOAT32: 0.5,
        GGUFValueType.UINT64: 1 << 60, GGUFValueType.INT64: -(1 << 60), GGUFValueType.FLOAT64: 0.1,
        GGUFValueType.BOOL: True, GGUFValueType.STRING: "Ünï\0code"}
    writer = GGUFWriter(tmp_path / "all.gguf", "diffusion-gemma")
    for kind, value in values.items():
        writer.add_key_value(f"one.{kind.name}", value, kind)
        writer.add_key_value(f"many.{kind.name}", [value] * 3, GGUFValueType.ARRAY, kind)
    writer.add_array("nested", [[1, 2], [3]])
    writer.add_tensor("t", np.arange(12, dtype=np.float32).reshape(3, 4))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = read_gguf(tmp_path / "all.gguf")
    for kind, value in values.items():
        assert file.metadata[f"one.{kind.name}"] == value
        assert file.metadata[f"many.{kind.name}"] == [value] * 3
    assert file.metadata["nested"] == [[1, 2], [3]]
    assert file.tensors["t"].shape == (3, 4) and file.tensors["t"].nbytes == 48
    data = map_tensors(file)["t"]
    assert data.view(torch.float32).tolist() == list(range(12))


strings = st.text(st.characters(exclude_categories=["Cs"])) | st.text("\0a", max_size=20) | \
    st.integers(0, 400).map(lambda n: "é" * n)


@given(st.lists(strings, min_size=1, max_size=300), st.integers(0, 3))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_arrays_of_any_strings(tmp_path, texts, long):
    texts = texts * (1, 1, 40, 200)[long]
    blob = struct.pack("<4sIQQ", b"GGUF", 3, 0, 2) + key("a", 9, struct.pack("<IQ", 8, len(texts))) + b"".join(
        struct.pack("<Q", len(text.encode())) + text.encode() for text in texts) + key("b", 4, struct.pack("<I", 7))
    (tmp_path / "strings.gguf").write_bytes(blob)
    assert read_gguf(tmp_path / "strings.gguf").metadata == {"a": texts, "b": 7}


def key(name, code, value):
    return struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", code) + value


def test_version_2_and_other_alignments(network, sound, tmp_path):
    data = bytearray(sound.read_bytes())
    data[4] = 2
    (tmp_path / "two.gguf").write_bytes(data)
    assert torch.equal(logits_of(load(tmp_path / "two.gguf")), logits_of(network))
    writer = GGUFWriter(tmp_path / "aligned.gguf", "diffusion-gemma")
    writer.add_custom_alignment(4096)
    writer.add_tensor("a", np.ones(3, np.float32))
    writer.add_tensor("b", np.full(3, 2, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = read_gguf(tmp_path / "aligned.gguf")
    assert file.tensors["b"].offset % 4096 == 0
    assert map_tensors(file)["b"].view(torch.float32).tolist() == [2, 2, 2]


def test_names_both_ways():
    names = list(empty_network(tiny_config()).state_dict())
    assert [network_name(gguf_name(name)) for name in names] == names
    assert len({gguf_name(name) for name in names}) == len(names)
    assert network_name("blk.0.nonsense.weight") is None and network_name("rope_freqs.weight") is None


def test_the_published_model_has_692_tensors():
    text = dict(vocab_size=262_144, hidden_size=2816, intermediate_size=2112, num_hidden_layers=30,
                num_attention_heads=16, num_key_value_heads=8, num_global_key_value_heads=2, sliding_window=1024,
                num_experts=128, top_k_experts=8, moe_intermediate_size=704)
    config = model_config_from_dict({"model_type": "diffusion_gemma", "text_config": text})
    assert len(network_shapes(config)) + 1 == 692
    assert rope_freqs(config) == [1.0] * 64 + [1e30] * 192
    keys = config_metadata(config, GenerationConfig())
    assert keys["diffusion-gemma.attention.head_count_kv"] == ([8] * 5 + [2]) * 5
    assert keys["diffusion-gemma.attention.sliding_window_pattern"] == ([True] * 5 + [False]) * 5
    assert keys["diffusion-gemma.attention.key_length"] == 512
    assert keys["diffusion-gemma.attention.key_length_swa"] == 256


@given(st.integers(1, 300), st.data())
def test_rotary_fraction_keeps_the_count(half, data):
    rotated = data.draw(st.integers(1, half))
    fraction = rotary_fraction([1.0] * rotated + [1e30] * (half - rotated), "x")
    assert int(fraction * (2 * half) // 2) == rotated


def test_settings_and_stop_tokens(network, tmp_path):
    def change(metadata, tensors):
        for name in [name for name in metadata if name.startswith("dgemma.")]:
            del metadata[name]
        metadata["diffusion.eb_max_steps"] = 12
        metadata["diffusion.eb_t_min"] = 0.1
        metadata["diffusion.eb_stability_threshold"] = 2.0  # some write a float
        del metadata["diffusion.eb_t_max"]

    model = open_gguf(write_network(tmp_path / "model.gguf", network, change=change))
    assert model.generation == GenerationConfig(max_denoising_steps=12, t_min=0.1, stability_threshold=2,
                                                eos_token_id=(1, 5, 6))
    assert model.config.eos_token_id == (1, 5, 6)
    assert model.config.rms_norm_eps == 1e-6  # not 9.99999997e-07
    assert stop_ids({"tokenizer.ggml.eos_token_id": 106, "tokenizer.ggml.eot_token_id": 7,
                     "tokenizer.ggml.tokens": ["<eos>", "a"]}) == (106, 7, 0)
    assert stop_ids({}) == (1,)


def test_defaults_and_scalars_in_place_of_arrays(tmp_path):
    config = dataclasses.replace(tiny_config(), layers=tuple(
        dataclasses.replace(layer, num_key_value_heads=2) for layer in tiny_config().layers))
    original = random_network(config)
    left_out = ["vocab_size", "rope.freq_base", "rope.freq_base_swa", "rope.dimension_count", "context_length",
                "attention.layer_norm_rms_epsilon", "final_logit_softcapping", "attention.value_length"]

    def change(metadata, tensors):
        for name in left_out:
            del metadata[f"diffusion-gemma.{name}"]
        metadata["diffusion-gemma.attention.head_count_kv"] = 2
        metadata["diffusion-gemma.feed_forward_length"] = [32, 32, 32]

    found = open_gguf(write_network(tmp_path / "model.gguf", original, change=change)).config
    assert dataclasses.replace(found, max_position_embeddings=config.max_position_embeddings, layers=(),
                               eos_token_id=(1,)) == dataclasses.replace(config, layers=())
    assert [layer.num_key_value_heads for layer in found.layers] == [2, 2, 2]


# Split files


@pytest.fixture
def parts(network, tmp_path):
    write_network(tmp_path / "model.gguf", network, split_max_tensors=30)
    found = sorted(tmp_path.glob("*.gguf"))
    assert len(found) == 3 and found[0].name == "model-00001-of-00003.gguf"
    return found


@pytest.mark.parametrize("given_part", [0, 1, 2])
def test_any_part_means_the_whole(given_part, parts, network):
    assert torch.equal(logits_of(load(parts[given_part])), logits_of(network))
    file = read_gguf(parts[given_part])
    assert file.files == tuple(parts) and file.complete and not file.damaged


def test_missing_parts_are_named(parts):
    parts[1].unlink()
    message = refused(parts[0], "model-00002-of-00003.gguf: part 2 of 3 is missing")
    assert "missing tensors" not in message  # nobody knows which
    report = inspect_checkpoint(parts[2])
    assert [problem.kind for problem in report.problems] == ["damaged files"]
    parts[0].unlink()
    refused(parts[2], "the first one", "model-00001-of-00003.gguf should be beside it")


def test_parts_that_do_not_belong(parts, tmp_path):
    moved = parts[1].rename(tmp_path / "other.gguf")
    refused(moved, "part 2 of 3", "…-00002-of-00003.gguf")
    shutil.copy(parts[2], parts[1])
    refused(parts[0], "model-00002-of-00003.gguf: this should be part 2 of 3, but it says that it is a part of another",
            "split.no 2")
    parts[1].write_bytes(b"nonsense")
    refused(parts[0], "model-00002-of-00003.gguf: not a GGUF file")


def test_truncated_part(parts):
    data = parts[1].read_bytes()
    parts[1].write_bytes(data[:-500])
    refused(parts[0], f"{parts[1]}: truncated: {len(data) - 500:,} bytes, its header says")


# What is no DiffusionGemma, or not all of one


@pytest.mark.parametrize(("data", "fragment"), [
    (b"", "empty"),
    (bytes(100), "zero bytes"),
    (b"PK\x03\x04" + bytes(40), "begins with b'PK\\x03\\x04' instead of b'GGUF'"),
    (b"<!DOCTYPE html><html>" + bytes(40), "web page"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:abc", "Git LFS"),
    (b"GGUF\x03\0\0\0", "truncated: 8 bytes"),
    (struct.pack("<4sIQQ", b"GGUF", 1, 0, 0), "version 1"),
    (struct.pack("<4sIQQ", b"GGUF", 4, 0, 0), "version 4"),
    (struct.pack("<4sIQQ", b"GGUF", 0, 0, 0), "version 0"),
    (struct.pack(">4sIQQ", b"GGUF", 3, 0, 0), "big-endian"),
    (struct.pack("<4sIQQ", b"GGUF", 3, 0, 0), "no architecture"),
    (struct.pack("<4sIQQ", b"GGUF", 3, 0, 1 << 62), "ends (24 bytes) within its header, at 4,611,686,018,427,387,904"),
    (struct.pack("<4sIQQ", b"GGUF", 3, 1 << 62, 0), "within its header, at 4,611,686,018,427,387,904 tensors"),
    (struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + key("k", 8, struct.pack("<Q", 1 << 63)), "metadata key k"),
    (struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + key("k", 9, struct.pack("<IQ", 8, 1 << 60)), "strings"),
    (struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + key("k", 9, struct.pack("<IQ", 4, 1 << 60)), "numbers"),
    (struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + key("k", 99, b""), "type 99 is no metadata type"),
    (struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + key("k", 9, struct.pack("<IQ", 9, 1) * 50), "nested too deep"),
    (struct.pack("<4sIQQ", b"GGUF", 3, 0, 2) + key("k", 0, b"a") * 2, "there twice"),
    (struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + key("k\xff", 0, b"a").replace("ÿ".encode(), b"\xff\xff"), "not UTF-8"),
])
def test_not_a_gguf_file(data, fragment, tmp_path):
    (tmp_path / "bad.gguf").write_bytes(data)
    message = refused(tmp_path / "bad.gguf", fragment)
    assert str(tmp_path / "bad.gguf") in message and "\n" not in message


@pytest.mark.parametrize(("architecture", "kind", "fragments"), [
    ("gemma4", None, ["architecture 'gemma4' is not DiffusionGemma", "llama.cpp, Ollama and LM Studio run it"]),
    ("gemma4-assistant", None, ["Gemma 4"]),
    ("llama", None, ["'llama'", "llama.cpp may run it"]),
    ("llada", None, ["llama-diffusion-cli"]),
    ("clip", "mmproj", ["mmproj"]),
    ("diffusion-gemma", "adapter", ["adapter"]),
    ("diffusion-gemma", "imatrix", ["general.type is 'imatrix'"]),
])
def test_other_architectures(architecture, kind, fragments, tmp_path):
    metadata = {"general.type": kind} if kind else {}
    path = write(tmp_path / "other.gguf", metadata, {"t": np.ones(4, np.float32)}, architecture=architecture)
    refused(path, "dgemma runs" if kind != "adapter" else "dgemma does not read", *fragments)


def test_every_missing_key_is_named(network, tmp_path):
    path = write(tmp_path / "empty.gguf", {"diffusion-gemma.block_count": 3}, {"t": np.ones(4, np.float32)})
    message = refused(path, "missing keys (12)")
    required = ["embedding_length", "feed_forward_length", "attention.head_count", "attention.head_count_kv",
                "attention.key_length", "attention.sliding_window", "attention.sliding_window_pattern", "expert_count",
                "expert_used_count", "expert_feed_forward_length"]
    for name in required:
        assert f"    diffusion-gemma.{name}\n" in f"{message}\n"
    assert "    diffusion.canvas_length" in message and "unusable" not in message


@pytest.mark.parametrize(("name", "value", "fragment"), [
    ("block_count", 4, "sliding_window_pattern must hold true or false for each of the 4 layers"),
    ("block_count", 0, "block_count must be a whole number from 1 to 1,024, got 0"),
    ("embedding_length", 1 << 31, "embedding_length must be a whole number"),
    ("embedding_length", "64", "got '64'"),
    ("attention.head_count_kv", [3, 3, 1], "3 in layer 0, which does not divide the 4 attention heads"),
    ("attention.head_count_kv", [1, 2], "for each of the 3 layers"),
    ("attention.head_count_kv", [1, 2, 0], "for each of the 3 layers"),
    ("expert_used_count", 9, "expert_used_count is 9, more than diffusion-gemma.expert_count 4"),
    ("attention.value_length", 8, "attention.value_length is 8"),
    ("rope.dimension_count_swa", 8, "rope.dimension_count_swa is 8"),
    ("rope.freq_base", 0.0, "rope.freq_base must be a number above 0"),
    ("attention.layer_norm_rms_epsilon", float("nan"), "must be a number above 0, got nan"),
    ("final_logit_softcapping", -1.0, "got -1.0"),
])
def test_unusable_keys(name, value, fragment, network, tmp_path):
    def change(metadata, tensors):
        metadata[f"diffusion-gemma.{name}"] = value

    refused(write_network(tmp_path / "model.gguf", network, change=change), fragment, "unusable keys")


@pytest.mark.parametrize(("keys", "fragment"), [
    ({"diffusion.eb_t_min": 0.9}, "t_max must be"),
    ({"diffusion.eb_max_steps": 0}, "max_denoising_steps must be"),
    ({"diffusion.shift_logits": True}, "shift_logits"),
    ({"diffusion-gemma.rope.scaling.type": "yarn", "diffusion-gemma.rope.scaling.factor": 4.0}, "scaled rotary"),
    ({"tokenizer.ggml.tokens": ["a"] * 51}, "51 tokens, but the embedding has 50"),
])
def test_other_keys(keys, fragment, network, tmp_path):
    path = write_network(tmp_path / "model.gguf", network, change=lambda metadata, tensors: metadata.update(keys))
    refused(path, fragment)


@pytest.mark.parametrize("freqs", [[1e30] * 16, [1.0, 1e30, 1.0] + [1e30] * 13, [1.0] * 8 + [4.0] * 8,
                                   [float("nan")] * 16])
def test_rope_frequencies_of_another_form(freqs, network, tmp_path):
    def change(metadata, tensors):
        tensors["rope_freqs.weight"] = np.array(freqs, np.float32)

    refused(write_network(tmp_path / "model.gguf", network, change=change), "rope_freqs.weight must hold ones")


def test_everything_wrong_with_the_tensors_at_once(network, tmp_path):
    def change(metadata, tensors):
        for name in ("blk.0.attn_q.weight", "self_cond_pre_norm.weight", "rope_freqs.weight"):
            del tensors[name]
        tensors["output.weight"] = np.ones((50, 64), np.float32)
        tensors["blk.9.attn_q.weight"] = np.ones((4, 4), np.float32)
        tensors["output_norm.weight"] = np.ones(65, np.float32)

    path = write_network(tmp_path / "model.gguf", network, change=change)
    message = refused(path, "missing tensors (3)", "unexpected tensors (2)", "wrong shapes (1)",
                      "output.weight in model.gguf", "output_norm.weight in model.gguf: expected [64], found [65]")
    for name in ("blk.0.attn_q.weight", "self_cond_pre_norm.weight", "rope_freqs.weight", "blk.9.attn_q.weight"):
        assert name in message
    report = inspect_checkpoint(path)
    assert [problem.kind for problem in report.problems] == ["missing tensors", "unexpected tensors", "wrong shapes"]


def patched_type(path, target, code):
    """The file with another block type's number at a tensor in its table."""
    data = bytearray(path.read_bytes())
    name = struct.pack("<Q", len(target)) + target.encode()
    at = data.index(name) + len(name)
    dimensions = struct.unpack_from("<I", data, at)[0]
    struct.pack_into("<I", data, at + 4 + 8 * dimensions, code)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(("code", "shown"), [(9, "Q8_1"), (41, "Q1_0"), (77, "type 77")])
def test_unknown_types(code, shown, sound, tmp_path):
    path = shutil.copy(sound, tmp_path / "model.gguf")
    for name in ("blk.0.attn_q.weight", "blk.1.attn_q.weight", "blk.2.attn_q.weight"):
        patched_type(path, name, code)
    message = refused(path, f"{shown}: blk.0.attn_q.weight and 2 more tensors")
    assert "supported: F32" in message and "IQ4_XS" in message
    assert "wrong shapes" not in message and "missing" not in message


def test_rows_that_are_no_whole_blocks(sound, tmp_path):
    path = patched_type(shutil.copy(sound, tmp_path / "model.gguf"), "blk.0.attn_q.weight", 12)
    refused(path, "tensor blk.0.attn_q.weight: rows of 64 numbers are no whole number of Q4_K blocks of 256")


def test_tensors_that_overlap(sound, tmp_path):
    data = bytearray(sound.read_bytes())
    name = b"blk.0.attn_q.weight"
    at = data.index(name) + len(name) + 4 + 16 + 4
    struct.pack_into("<Q", data, at, struct.unpack_from("<Q", data, at)[0] + 32)
    (tmp_path / "model.gguf").write_bytes(data)
    refused(tmp_path / "model.gguf", "its data lies over that of")
    struct.pack_into("<Q", data, at, 1)
    (tmp_path / "model.gguf").write_bytes(data)
    refused(tmp_path / "model.gguf", "no multiple of 32")


@pytest.mark.parametrize("left", [-1, -5000, 20_000])
def test_truncated(left, sound, tmp_path):
    data = sound.read_bytes()[:left]
    (tmp_path / "cut.gguf").write_bytes(data)
    refused(tmp_path / "cut.gguf", "truncated", f"{len(data):,} bytes", "download it again")
    report = inspect_checkpoint(tmp_path / "cut.gguf")
    assert report.problems[0].kind == "damaged files" and len(report.problems) == 1


def test_unreadable(tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot be read \(No such file"):
        read_gguf(tmp_path / "none.gguf")
    with pytest.raises(CheckpointError, match=r"cannot be read \(Is a directory"):
        read_gguf(tmp_path)


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    """A small file's bytes, the length of its header, and a place for broken ones."""
    network = random_network(tiny_config(num_hidden_layers=1, layer_types=[FULL], hidden_size=8, intermediate_size=8))
    folder = tmp_path_factory.mktemp("fuzz")
    path = write_network(folder / "whole.gguf", network)
    first = min(tensor.offset for tensor in read_gguf(path).tensors.values())
    return path.read_bytes(), first, folder / "broken.gguf"


def survives(path):
    """Everything that may be done with a broken file ends well or in a CheckpointError."""
    try:
        model = open_gguf(path)
        match_gguf(model, network_shapes(model.config))
        inspect_checkpoint(path)
        load_gguf_network(model, dtype=torch.float32)
    except CheckpointError:
        pass


@given(st.integers(0, 1 << 20))
@settings(max_examples=100, deadline=None)
def test_any_truncation_is_a_clear_error(fuzzed, length):
    data, _, path = fuzzed
    path.write_bytes(data[: length % len(data)])
    with pytest.raises(CheckpointError):
        load(path)


@given(st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), min_size=1, max_size=6))
@settings(max_examples=250, deadline=None)
def test_any_flipped_bytes_in_the_header_are_survived(fuzzed, flips):
    data, header, path = fuzzed
    broken = bytearray(data)
    for at, value in flips:
        broken[at % header] = value
    path.write_bytes(broken)
    survives(path)


@given(st.integers(0, 1 << 20), st.sampled_from([0, 1, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 40, (1 << 63) - 1, (1 << 64) - 1]))
@settings(max_examples=250, deadline=None)
def test_lying_numbers_in_the_header_are_survived(fuzzed, at, number):
    data, header, path = fuzzed
    broken = bytearray(data)
    struct.pack_into("<Q", broken, at % (header - 8), number)
    path.write_bytes(broken)
    survives(path)


# Inspect


def test_report(packed, network):
    report = inspect_checkpoint(packed, contexts=[100])
    assert report.problems == () and report.format == "gguf" and report.folder == packed
    assert report.files == {packed.name: packed.stat().st_size}
    assert report.text_parameters == sum(tensor.numel() for tensor in network.state_dict().values())
    assert {entry.dtype for entry in report.stored} == {"Q8_0", "F32", "F16"}
    tensors = read_gguf(packed).tensors.values()
    assert sum(entry.nbytes for entry in report.stored) == sum(tensor.nbytes for tensor in tensors)
    assert sum(part.tensors for part in report.parts) == sum(entry.tensors for entry in report.stored) == len(tensors)
    experts = [(part.dtype, part.tensors) for part in report.parts if part.part == "experts"]
    assert experts == [("Q8_0", 6)]
    assert [need.dtype for need in report.memory] == ["packed", "bfloat16"]
    assert report.memory[0].weights == sum(entry.nbytes for entry in report.stored)
    assert report.memory[0].kv_cache == report.memory[1].kv_cache
    assert (report.tokenizer.vocab_size, report.tokenizer.has_chat_template) == (50, True)
    assert json.loads(json.dumps(report.to_dict()))["parts"][0]["part"] == "embedding"


def test_report_of_unpacked_weights(sound):
    report = inspect_checkpoint(sound, contexts=[100])
    assert [need.dtype for need in report.memory] == ["bfloat16", "float32"]
    assert {part.dtype for part in report.parts} == {"F32"}


def test_report_without_a_tokenizer(network, tmp_path):
    def change(metadata, tensors):
        for name in [name for name in metadata if name.startswith("tokenizer.")]:
            del metadata[name]

    path = write_network(tmp_path / "model.gguf", network, change=change)
    report = inspect_checkpoint(path)
    assert report.tokenizer is None
    assert [problem.kind for problem in report.problems] == ["tokenizer"]
    with pytest.raises(CheckpointError, match="no tokenizer in this file"):
        dgemma.load(path)


def test_inspect_prints_types_and_exits_with_the_verdict(packed, parts, network):
    import typer
    from typer.testing import CliRunner

    from dgemma.cli.commands.inspect import inspect

    app = typer.Typer()
    app.command()(inspect)
    result = CliRunner().invoke(app, [str(packed)])
    assert result.exit_code == 0, result.output
    for fragment in ("Types", "Q8_0", "packed", "No problems found", "with a chat template", "packed: on the CPU"):
        assert fragment in result.output
    result = CliRunner().invoke(app, [str(parts[0])])
    assert result.exit_code == 0 and "model-00002-of-00003.gguf" in result.output
    parts[0].write_bytes(parts[0].read_bytes()[:-500])
    result = CliRunner().invoke(app, [str(parts[0])])
    assert result.exit_code == 1 and "truncated" in result.output
    assert SLIDING.removesuffix("_attention") in result.output


def test_metadata_helpers_agree(network):
    """What the tests write is what the format has: no tensor of ours is left without a name."""
    assert set(tensors_of(network)) == {gguf_name(name) for name in network.state_dict()} | {"rope_freqs.weight"}
    assert "tokenizer.ggml.tokens" in metadata_of(network)
