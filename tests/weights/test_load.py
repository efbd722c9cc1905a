"""`load_network` against transformers, and everything a checkpoint can get wrong."""

import dataclasses
import json
import os
import re
import struct

import pytest
import torch

from dgemma.config import load_model_config
from dgemma.errors import CheckpointError
from dgemma.nn import DiffusionTransformer
from dgemma.weights.load import _fill, empty_network, load_network, read_headers
from dgemma.weights.save import save_checkpoint


def load(folder, **options):
    return load_network(folder, load_model_config(folder), **options)


def refusal(folder, config=None):
    with pytest.raises(CheckpointError) as caught:
        load_network(folder, config or load_model_config(folder))
    return str(caught.value)


def logits(network):
    ids = torch.arange(40).view(2, 20) * 7 % 300
    canvas = torch.arange(32).view(2, 16) * 11 % 300
    with torch.no_grad():
        cache = network.new_cache(2)
        network.encode(ids, cache)
        return network.logits(network.denoise(canvas, cache))


@pytest.fixture(scope="module")
def reference_logits(reference):
    ids = torch.arange(40).view(2, 20) * 7 % 300
    canvas = torch.arange(32).view(2, 16) * 11 % 300
    with torch.no_grad():
        return reference(input_ids=ids, decoder_input_ids=canvas).logits


def drop(*names):
    def change(tensors):
        for name in names:
            del tensors[name]

    return change


# What is read


@pytest.mark.parametrize("form", ["single", "sharded"])
def test_logits_are_those_of_transformers(form, request, reference_logits):
    network = load(request.getfixturevalue(form))
    torch.testing.assert_close(logits(network), reference_logits, atol=1e-4, rtol=0)
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert network.dtype == torch.float32


def test_both_spellings_of_the_geometry(single, copy_of, reference_logits):
    folder = copy_of(single)
    config = json.loads((folder / "config.json").read_text())
    text = config["text_config"]
    assert text.pop("global_head_dim", 32) == 32
    text.pop("num_global_key_value_heads", None)
    for spelling in (
        {"global_head_dim": 32, "num_global_key_value_heads": 1},
        {"per_layer_config": {str(layer): {"head_dim": 32, "num_key_value_heads": 1} for layer in (1, 3)}},
    ):
        text.pop("per_layer_config", None)
        text.update(spelling)
        (folder / "config.json").write_text(json.dumps(config))
        for name in spelling:
            del text[name]
        torch.testing.assert_close(logits(load(folder)), reference_logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_conversion_is_torch_s_own(sharded, dtype):
    plain, converted = load(sharded), load(sharded, dtype=dtype)
    for name, tensor in converted.state_dict().items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, plain.state_dict()[name].to(dtype)), name


def test_conversion(single):
    plain, converted = load(single), load(single, dtype=torch.bfloat16)
    assert all(torch.equal(a, b.bfloat16()) for a, b in
               zip(converted.state_dict().values(), plain.state_dict().values(), strict=True))


def test_conversion_in_several_pieces(single):
    stored = max(read_headers(single).tensors.values(), key=lambda tensor: tensor.nbytes)
    one, many = (torch.empty(stored.nbytes // 4, dtype=torch.bfloat16) for _ in range(2))
    assert len(list(_fill(one, stored))) == 1
    assert len(list(_fill(many, stored, most=1000))) > 10
    assert torch.equal(one, many)


def test_default_dtype_is_that_of_config_then_of_the_tensors(single, copy_of, rewrite):
    folder = copy_of(single)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    assert load(folder).dtype == torch.bfloat16
    assert load(folder, dtype=torch.float32).dtype == torch.float32
    rewrite(folder, lambda tensors: tensors.update({n: t.half() for n, t in tensors.items()}))
    assert load_network(folder, dataclasses.replace(load_model_config(folder), dtype=None)).dtype == torch.float16
    with pytest.raises(ValueError, match="float64"):
        load(folder, dtype=torch.float64)
    with pytest.raises(CheckpointError, match=r"config\.json: unsupported dtype 'int8'"):
        load_network(folder, dataclasses.replace(load_model_config(folder), dtype="int8"))


def test_every_tensor_gets_one_dtype(single, copy_of, rewrite):
    folder = copy_of(single)
    rewrite(folder, lambda tensors: tensors.update({n: t.bfloat16() for n, t in tensors.items() if "router" not in n}))
    assert {tensor.dtype for tensor in load(folder).state_dict().values()} == {torch.float32}


def test_writing_to_a_mapped_weight_leaves_the_file_alone(single):
    before = (single / "model.safetensors").read_bytes()
    with torch.no_grad():
        load(single).norm.weight.zero_()
    assert (single / "model.safetensors").read_bytes() == before


def test_save_and_load_round_trip(single, tmp_path):
    network = load(single, dtype=torch.bfloat16)
    save_checkpoint(network, tmp_path / "again", json.loads((single / "config.json").read_text()), {})
    again = load(tmp_path / "again")
    assert again.dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in
               zip(again.state_dict().values(), network.state_dict().values(), strict=True))


def test_empty_network_takes_no_memory_and_no_randomness(single):
    state = torch.get_rng_state()
    network = empty_network(load_model_config(single))
    assert {tensor.device.type for tensor in network.state_dict().values()} == {"meta"}
    assert torch.equal(torch.get_rng_state(), state)
    assert isinstance(network, DiffusionTransformer)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("form", ["single", "sharded"])
def test_progress_is_monotone_and_complete(form, dtype, request):
    seen = []
    load(request.getfixturevalue(form), dtype=dtype, progress=lambda done, total: seen.append((done, total)))
    done = [at for at, _ in seen]
    total = seen[0][1]
    assert {of for _, of in seen} == {total}
    assert done == sorted(done)
    assert done[0] == 0
    assert done[-1] == total
    assert len(seen) > 10


# Tied names


def test_tied_copies_are_ignored_beside_the_primary(single, copy_of, rewrite, reference_logits):
    folder = copy_of(single)

    def add_wrong_copies(tensors):
        tensors["lm_head.weight"] = torch.zeros(300, 64)
        tensors["model.encoder.language_model.norm.weight"] = torch.zeros(64)
        tensors["model.encoder.language_model.layers.0.mlp.up_proj.weight"] = torch.zeros(96, 64)

    rewrite(folder, add_wrong_copies)
    torch.testing.assert_close(logits(load(folder)), reference_logits, atol=1e-4, rtol=0)


def test_tied_copies_stand_in_for_an_absent_primary(single, copy_of, rewrite, reference_logits):
    folder = copy_of(single)

    def rename(tensors):
        tensors["lm_head.weight"] = tensors.pop("model.decoder.embed_tokens.weight")
        for name in ("norm.weight", "layers.1.experts.gate_up_proj", "layers.0.self_attn.v_proj.weight"):
            tensors[f"model.encoder.language_model.{name}"] = tensors.pop(f"model.decoder.{name}")

    rewrite(folder, rename)
    torch.testing.assert_close(logits(load(folder)), reference_logits, atol=1e-4, rtol=0)


def test_vision_tensors_may_be_absent_or_of_any_dtype(single, copy_of, rewrite):
    folder = copy_of(single)

    def change(tensors):
        vision = [name for name in tensors if ".vision_tower." in name]
        assert vision
        del tensors[vision[0]]
        tensors[vision[1]] = torch.zeros(3, dtype=torch.int8)

    rewrite(folder, change)
    load(folder)


# What is refused


def test_everything_wrong_is_listed_at_once(single, copy_of, rewrite):
    folder = copy_of(single)

    def change(tensors):
        drop("model.decoder.norm.weight", "model.encoder.language_model.layers.2.layer_scalar")(tensors)
        tensors["model.decoder.layers.0.self_attn.bias"] = torch.zeros(4)
        tensors["model.decoder.layers.1.self_attn.v_proj.weight"] = torch.zeros(32, 64)
        tensors["adapter.weight"] = torch.zeros(4)
        tensors["model.decoder.layers.0.router.scale"] = torch.zeros(65)
        tensors["model.decoder.self_conditioning.up_proj.weight"] = torch.zeros(96, 64, dtype=torch.float8_e4m3fn)
        tensors["model.decoder.layers.3.mlp.up_proj.weight"] = torch.zeros(96, 64, dtype=torch.int8)

    rewrite(folder, change)
    message = refusal(folder)
    assert message.startswith(f"{folder}: ")
    for line in (
        "missing tensors (2):",
        "model.decoder.norm.weight",
        "model.encoder.language_model.layers.2.layer_scalar",
        "unexpected tensors (3):",
        "model.decoder.layers.0.self_attn.bias in model.safetensors",
        "model.decoder.layers.1.self_attn.v_proj.weight in model.safetensors",
        "adapter.weight in model.safetensors",
        "wrong shapes (1):",
        "model.decoder.layers.0.router.scale in model.safetensors: expected [64], found [65]",
        "unsupported dtypes (2):",
        "model.decoder.self_conditioning.up_proj.weight in model.safetensors: unsupported dtype F8_E4M3",
        "model.decoder.layers.3.mlp.up_proj.weight in model.safetensors: unsupported dtype I8",
    ):
        assert re.search(rf"^ +{re.escape(line)}", message, re.MULTILINE), line


def test_long_lists_are_cut(single):
    config = load_model_config(single)
    message = refusal(single, dataclasses.replace(config, layers=(*config.layers, *config.layers)))
    assert "missing tensors (90):" in message
    assert "    and 70 more" in message
    assert len(message.splitlines()) == 23


def test_missing_and_damaged_shards_are_all_named(sharded, copy_of):
    folder = copy_of(sharded)
    shards = sorted(folder.glob("*.safetensors"))
    shards[0].unlink()
    size = shards[1].stat().st_size
    os.truncate(shards[1], size - 100)
    shards[2].write_bytes(b"\x10\0\0\0\0\0\0\0{this is no JSON")
    message = refusal(folder)
    assert "damaged files (3):" in message
    assert f"{shards[0]}: no such file" in message
    assert f"{shards[1]}: truncated: {size - 100:,} bytes, its header says {size:,}" in message
    assert f"{shards[2]}: corrupt header: not valid JSON" in message
    assert "missing tensors" not in message  # they are in the damaged shards, for all we know


def test_a_tensor_that_the_index_promises_in_vain_is_missing(sharded, copy_of):
    folder = copy_of(sharded)
    from safetensors.torch import load_file, save_file

    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shard = folder / index["weight_map"]["model.decoder.norm.weight"]
    tensors = load_file(shard)
    save_file({n: t.clone() for n, t in tensors.items() if n != "model.decoder.norm.weight"}, shard)
    assert "missing tensors (1):\n    model.decoder.norm.weight" in refusal(folder)


def header_of(data):
    header = json.dumps(data).encode()
    return struct.pack("<Q", len(header)) + header


def entry(dtype, shape, offsets):
    return header_of({"x": {"dtype": dtype, "shape": shape, "data_offsets": offsets}})


@pytest.mark.parametrize(("data", "cause"), [
    (b"", "not a safetensors file"),
    (b"abc", "not a safetensors file"),
    (b"\xff" * 64, "not a safetensors file"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "a Git LFS pointer"),
    (struct.pack("<Q", 500) + b"{}", "truncated: 10 bytes, its header alone takes 508"),
    (struct.pack("<Q", 2) + b"[]", "corrupt header: not a JSON object"),
    (struct.pack("<Q", 8) + b'{"x": 1}', "corrupt header: no sound dtype, shape and offsets for x"),
    (entry("F32", [2], [0, 4]) + bytes(4), "corrupt header: x is F32 \\[2\\] but has 4 bytes"),
    (entry("F32", [2], [8, 0]), "corrupt header: x"),
    (entry("F64", [1], [0, 5]) + bytes(5), "corrupt header: x is F64 \\[1\\] but has 5 bytes"),
    (entry("I64", [2], [0, 8]) + bytes(8), "corrupt header: x is I64 \\[2\\] but has 8 bytes"),
    (entry("F8_E4M3", [2], [0, 3]) + bytes(3), "corrupt header: x is F8_E4M3 \\[2\\] but has 3 bytes"),
    *((header_of({"__metadata__": value}), "corrupt header: '__metadata__' must be an object of texts, not "
       f"{re.escape(repr(value))}") for value in (5, [], "a", {"format": 1})),
    (entry("F32", [2], [0, 8]) + bytes(10), "longer than it should be"),
])
def test_corrupt_files_are_named_with_the_cause(single, copy_of, data, cause):
    folder = copy_of(single)
    (folder / "model.safetensors").write_bytes(data)
    message = refusal(folder)
    assert re.search(rf"{re.escape(str(folder))}/model\.safetensors: {cause}", message), message
    # Nobody knows what an unreadable file would have held.
    assert ("missing tensors" in message) == (cause == "longer than it should be")


def test_what_only_safetensors_notices_is_an_error_too(single, copy_of):
    """Overlapping tensors: every entry is sound by itself."""
    folder = copy_of(single)
    path = folder / "model.safetensors"
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    header["model.decoder.norm.weight"]["data_offsets"] = header["model.decoder.layers.0.input_layernorm.weight"][
        "data_offsets"]
    packed = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    path.write_bytes(data[:8] + packed + data[8 + length :])
    assert "model.safetensors: corrupt safetensors file: " in refusal(folder)


def test_folders_without_weights(single, copy_of, tmp_path):
    config = load_model_config(single)
    assert refusal(tmp_path / "nowhere", config) == f"{tmp_path / 'nowhere'}: no such folder"
    assert "this is a file" in refusal(single / "config.json", config)
    folder = copy_of(single)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "neither model.safetensors nor model.safetensors.index.json; found pytorch_model.bin" in refusal(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    assert "model.safetensors.index.json: 'weight_map' must say" in refusal(folder)
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF\3\0\0\0")
    assert "this is a file; give the folder" in refusal(gguf, config)
