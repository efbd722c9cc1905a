"""Checkpoints written as GGUF: the right types, readable by the `gguf` package, the same model when read back."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dgemma.chat.gguf_tokenizer import tokenizer_from_gguf
from dgemma.chat.tokenizer import Tokenizer
from dgemma.config import load_generation_config, load_model_config, model_config_from_dict
from dgemma.errors import CheckpointError, DgemmaError
from dgemma.gguf.keys import gguf_name
from dgemma.gguf.reader import read_gguf
from dgemma.gguf.tokenizer import tokenizer_metadata
from dgemma.gguf.writer import TensorEntry
from dgemma.weights import quantize as module
from dgemma.weights.files import bundled_path
from dgemma.weights.gguf_model import open_gguf
from dgemma.weights.load import empty_network
from dgemma.weights.names import checkpoint_name
from dgemma.weights.quantize import MIXTURES, convert, fitting, mixture_types
from support.gemma_files import GENERATION, TEMPLATE, config_dict, tokenizer_json, write_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Rows of 256 (hidden), 96 and 32, bfloat16; not to be changed."""
    folder = tmp_path_factory.mktemp("gemma") / "random-gemma"
    write_checkpoint(folder, hidden_size=256)
    return folder


@pytest.fixture(scope="module")
def bf16(checkpoint, tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "bf16.gguf"
    convert(checkpoint, path, "BF16")
    return path


@pytest.fixture
def own_copy(checkpoint, tmp_path):
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


def original(folder):
    """Every tensor of the checkpoint by its GGUF name, float32."""
    stored = load_file(folder / "model.safetensors")
    network = empty_network(load_model_config(folder))
    return {gguf_name(name): stored[checkpoint_name(name)].float() for name in network.state_dict()}


def change(folder, edit):
    stored = load_file(folder / "model.safetensors")
    edit(stored)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})


def leftovers(folder):
    return [path.name for path in folder.iterdir() if ".tmp" in path.name]


# The real model's shape.

REAL = dict(vocab_size=262_144, hidden_size=2816, intermediate_size=2112, num_hidden_layers=30, num_attention_heads=16,
            num_key_value_heads=8, head_dim=256, global_head_dim=512, num_global_key_value_heads=2, num_experts=128,
            top_k_experts=8, moe_intermediate_size=704, sliding_window=1024)


@pytest.fixture(scope="module")
def real_shapes():
    config = model_config_from_dict({"model_type": "diffusion_gemma", "text_config": REAL})
    shapes = {gguf_name(name): tuple(t.shape) for name, t in empty_network(config).state_dict().items()}
    return {**shapes, "rope_freqs.weight": (256,)}


@pytest.mark.parametrize(("mixture", "counts", "gigabytes"), [
    ("Q4_K_M", {"F32": 423, "Q4_K": 194, "Q6_K": 14, "Q5_0": 33, "Q8_0": 28}, 16.8),
    ("Q5_K_M", {"F32": 423, "Q5_K": 194, "Q6_K": 14, "Q5_1": 33, "Q8_0": 28}, 19.1),
    ("Q6_K", {"F32": 423, "Q6_K": 208, "Q8_0": 61}, 22.6),
    ("Q8_0", {"F32": 423, "Q8_0": 269}, 26.9),
    ("BF16", {"F32": 423, "BF16": 269}, 50.5),
])
def test_the_real_model_s_types(real_shapes, mixture, counts, gigabytes):
    types = mixture_types(real_shapes, mixture)
    assert Counter(block_type.name for block_type in types.values()) == counts
    size = sum(TensorEntry(name, real_shapes[name], types[name]).nbytes for name in types)
    assert size / 1e9 == pytest.approx(gigabytes, abs=0.05)


def test_which_tensors_get_more_bits(real_shapes):
    types = {name: block_type.name for name, block_type in mixture_types(real_shapes, "Q4_K_M").items()}
    assert types["token_embd.weight"] == "Q6_K"
    better = [0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 26, 27, 28, 29]
    for name in ("ffn_down.weight", "ffn_down_exps.weight"):
        assert [i for i in range(30) if types[f"blk.{i}.{name}"] == "Q8_0"] == better
    assert types["blk.3.ffn_down_exps.weight"] == "Q5_0"
    assert types["self_cond_down.weight"] == "Q5_0"
    assert types["blk.0.ffn_gate_inp.weight"] == "F32"
    assert types["blk.0.attn_v.weight"] == "Q6_K"
    assert types["blk.3.attn_v.weight"] == "Q4_K"


@pytest.mark.parametrize(("width", "expected"), [(256, "Q4_K"), (704, "Q5_0"), (40, "F16")])
def test_rows_that_do_not_fit(width, expected):
    assert fitting("Q4_K", width) == expected
    assert fitting("Q8_0", width) == ("F16" if width == 40 else "Q8_0")


# What is in the file.

@pytest.mark.parametrize("mixture", MIXTURES)
def test_the_gguf_package_reads_it(mixture, checkpoint, tmp_path):
    summary = convert(checkpoint, tmp_path / "out.gguf", mixture)
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    expected = original(checkpoint)
    assert set(tensors) == {*expected, "rope_freqs.weight"}
    used = Counter()
    for name, numbers in expected.items():
        tensor = tensors[name]
        assert tuple(reversed(tensor.shape.tolist())) == tuple(numbers.shape)
        back = torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type)).view(numbers.shape)
        kind = tensor.tensor_type.name
        used[kind] += 1
        loss = {"F32": 0.0, "BF16": 0.0, "Q8_0": 0.008, "Q6_K": 0.02, "Q5_K": 0.045, "Q5_0": 0.06, "Q5_1": 0.05,
                "Q4_K": 0.08}[kind]
        assert (back - numbers).norm() <= loss * numbers.norm()
    assert {name: total.tensors for name, total in summary.types.items()} == used + Counter(F32=1)
    assert summary.nbytes == (tmp_path / "out.gguf").stat().st_size
    assert summary.weights == sum(numbers.numel() for numbers in expected.values()) + 256


def test_types_with_fixed_rounding_are_the_gguf_package_s_bytes(checkpoint, tmp_path):
    convert(checkpoint, tmp_path / "out.gguf", "Q4_K_M")
    expected = original(checkpoint)
    checked = Counter()
    for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors:
        if tensor.tensor_type.name in ("Q8_0", "Q5_0"):
            checked[tensor.tensor_type.name] += 1
            theirs = gguf.quants.quantize(expected[tensor.name].numpy(), tensor.tensor_type)
            assert np.array_equal(theirs, tensor.data)
    assert set(checked) == {"Q8_0", "Q5_0"}


def test_metadata(checkpoint, tmp_path):
    convert(checkpoint, tmp_path / "out.gguf", "Q4_K_M", name="My Model")
    fields = {key: field.contents() for key, field in gguf.GGUFReader(tmp_path / "out.gguf").fields.items()}
    expected = {
        "general.architecture": "diffusion-gemma", "general.name": "My Model", "general.file_type": 15,
        "general.quantization_version": 2, "diffusion-gemma.block_count": 3, "diffusion-gemma.embedding_length": 256,
        "diffusion-gemma.attention.head_count_kv": [1, 1, 1], "diffusion-gemma.attention.causal": False,
        "diffusion-gemma.attention.sliding_window_pattern": [True, True, False],
        "diffusion.canvas_length": 32, "diffusion.eb_max_steps": 12, "dgemma.eos_token_ids": [1, 6],
        "tokenizer.ggml.model": "gemma4", "tokenizer.ggml.bos_token_id": 2, "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 3, "tokenizer.ggml.padding_token_id": 0, "tokenizer.ggml.mask_token_id": 4,
        "tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.chat_template": TEMPLATE,
    }
    assert {key: fields.get(key) for key in expected} == expected
    assert "dgemma.tokenizer.json" not in fields
    assert fields["diffusion.eb_t_min"] == pytest.approx(0.3)
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == len(fields["tokenizer.ggml.scores"]) == 320
    for token, kind in {"<pad>": 3, "<unk>": 2, "<|turn>": 3, "<|channel>": 4, "<0x0A>": 6, "▁ab": 1}.items():
        assert types[tokens.index(token)] == kind
    assert tokens[319] == "[PAD319]" and types[319] == 5
    assert fields["tokenizer.ggml.merges"] == ["▁ a", "a b", "▁a b", "c d", "ab cd"]


@pytest.mark.parametrize("special", [True, False, None], ids=["special", "plain", "no-added-token"])
def test_tokens_with_a_role_are_control_tokens(special, own_copy, tmp_path):
    """Also where the tokenizer's eos_token is another one and `tokenizer.json` calls <eos> a plain token, or none."""
    data = tokenizer_json()
    data["added_tokens"] = [entry | {"special": bool(special)} for entry in data["added_tokens"]
                            if special is not None or entry["content"] not in ("<eos>", "<mask>")]
    (own_copy / "tokenizer.json").write_text(json.dumps(data))
    (own_copy / "tokenizer_config.json").write_text('{"eos_token": "<turn|>"}')
    convert(own_copy, tmp_path / "out.gguf", "BF16")
    metadata = read_gguf(tmp_path / "out.gguf").metadata
    types = dict(zip(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"], strict=True))
    assert [types[token] for token in ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<turn|>", "<channel|>")] == [
        3, 3, 3, 2, 3, 3, 4]
    assert types["a"] == 1
    assert metadata["tokenizer.ggml.eos_token_id"] == 6


def test_types_of_a_file_that_leaves_eos_and_unk_words_are_mended(checkpoint, tmp_path, monkeypatch):
    def theirs(*args):
        data = tokenizer_metadata(*args)
        for at, kind in ((1, 1), (3, 1), (4, 4)):
            data["tokenizer.ggml.token_type"][at] = kind
        return data

    with monkeypatch.context() as patched:  # as llama.cpp's conversion would write it
        patched.setattr(module, "tokenizer_metadata", theirs)
        convert(checkpoint, tmp_path / "theirs.gguf", "BF16")
    assert read_gguf(tmp_path / "theirs.gguf").metadata["tokenizer.ggml.token_type"][:5] == [3, 1, 3, 1, 4]
    convert(tmp_path / "theirs.gguf", tmp_path / "ours.gguf", "Q8_0")
    assert read_gguf(tmp_path / "ours.gguf").metadata["tokenizer.ggml.token_type"][:5] == [3, 3, 3, 2, 3]


def test_rope_freqs(bf16):
    tensor = next(t for t in gguf.GGUFReader(bf16).tensors if t.name == "rope_freqs.weight")
    assert tensor.data.tolist() == [1.0] * 64 + [np.float32(1e30)] * 192


def test_the_hub_s_cache_gives_the_repository_s_name(checkpoint, tmp_path):
    folder = tmp_path / "models--org--some-model" / "snapshots" / "0123abc"
    shutil.copytree(checkpoint, folder)
    convert(folder, tmp_path / "out.gguf", "BF16")
    assert read_gguf(tmp_path / "out.gguf").metadata["general.name"] == "some-model"


# The same model when it is read back.

@pytest.mark.parametrize("source", ["gemma", "sudoku"])
def test_round_trip_of_everything_but_the_weights(source, checkpoint, tmp_path):
    folder = checkpoint if source == "gemma" else bundled_path("sudoku")
    convert(folder, tmp_path / "out.gguf", "Q8_0")
    model = open_gguf(tmp_path / "out.gguf")
    config = load_model_config(folder)
    generation = load_generation_config(folder, config)
    assert model.generation == generation
    assert model.config.layers == config.layers
    assert model.config.vocab_size == config.vocab_size and model.config.canvas_length == config.canvas_length
    before = Tokenizer.from_folder(folder)
    after = tokenizer_from_gguf(model.file.metadata, "out.gguf")
    text = "ab abcd  a\ncab <|turn>user\nÉ 日本 12 <turn|> <|channel>"
    for specials in (True, False):
        assert after.encode(text, specials) == before.encode(text, specials)
    ids = before.encode(text)
    assert after.decode(ids) == before.decode(ids)
    assert [after.is_special(i) for i in ids] == [before.is_special(i) for i in ids]
    messages = [{"role": "user", "content": "a b <turn|>"}]
    assert after.apply_chat_template(messages) == before.apply_chat_template(messages)
    assert (after.bos_id, after.eos_id, after.pad_id) == (before.bos_id, before.eos_id, before.pad_id)


def test_named_templates_and_those_in_the_configuration(own_copy, tmp_path):
    (own_copy / "chat_template.jinja").unlink()
    path = own_copy / "tokenizer_config.json"
    roles = json.loads(path.read_text())
    path.write_text(json.dumps({**roles, "chat_template": [{"name": "default", "template": "D"},
                                                           {"name": "tool_use", "template": "T"}]}))
    convert(own_copy, tmp_path / "out.gguf", "BF16")
    metadata = read_gguf(tmp_path / "out.gguf").metadata
    assert metadata["tokenizer.chat_template"] == "D" and metadata["tokenizer.chat_template.tool_use"] == "T"
    assert tokenizer_from_gguf(metadata, "").chat_templates == {"default": "D", "tool_use": "T"}
    path.write_text(json.dumps({**roles, "chat_template": "one"}))
    convert(own_copy, tmp_path / "out.gguf", "BF16", force=True)
    assert read_gguf(tmp_path / "out.gguf").metadata["tokenizer.chat_template"] == "one"


def test_another_kind_of_tokenizer_goes_along_whole(tmp_path):
    convert(bundled_path("sudoku"), tmp_path / "out.gguf", "Q8_0")
    metadata = read_gguf(tmp_path / "out.gguf").metadata
    assert metadata["tokenizer.ggml.model"] == "gpt2"
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert metadata[f"dgemma.{file}"] == (bundled_path("sudoku") / file).read_text(encoding="utf-8")


# From GGUF.

@pytest.mark.parametrize("mixture", ["Q4_K_M", "Q8_0", "BF16"])
def test_gguf_and_safetensors_sources_give_the_same_file(mixture, checkpoint, bf16, tmp_path):
    convert(checkpoint, tmp_path / "a.gguf", mixture)
    summary = convert(bf16, tmp_path / "b.gguf", mixture)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    assert summary.requantized == ()


def test_what_is_packed_already(checkpoint, tmp_path):
    """What keeps its type keeps its bytes; what was packed otherwise is packed from what it stands for."""
    convert(checkpoint, tmp_path / "q8.gguf", "Q8_0")
    summary = convert(tmp_path / "q8.gguf", tmp_path / "q4.gguf", "Q4_K_M")
    assert summary.requantized == ("Q8_0",)
    before = {t.name: t for t in gguf.GGUFReader(tmp_path / "q8.gguf").tensors}
    kinds = Counter()
    for tensor in gguf.GGUFReader(tmp_path / "q4.gguf").tensors:
        source = before[tensor.name]
        kinds[tensor.tensor_type.name] += 1
        if tensor.tensor_type == source.tensor_type:
            assert np.array_equal(tensor.data, source.data)
        elif tensor.tensor_type.name == "Q5_0":
            numbers = gguf.quants.dequantize(source.data, source.tensor_type)
            assert np.array_equal(gguf.quants.quantize(numbers, tensor.tensor_type), tensor.data)
    assert {"F32", "Q8_0", "Q5_0"} <= set(kinds)


def test_metadata_of_others_is_kept(bf16, tmp_path):
    reader = gguf.GGUFReader(bf16)
    writer = gguf.GGUFWriter(tmp_path / "in.gguf", "diffusion-gemma")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            kind, *inner = field.types
            writer.add_key_value(key, field.contents(), kind, inner[0] if inner else None)
    extra = {"general.author": "somebody", "general.license": "apache-2.0", "x.f": 0.25, "x.n": -3, "x.big": 1 << 40,
             "x.list": ["a", "é"], "x.flag": True, "x.floats": [0.5, 1.5], "x.negative": [-1, 2]}
    writer.add_string("general.author", "somebody")
    writer.add_string("general.license", "apache-2.0")
    writer.add_float32("x.f", 0.25)
    writer.add_int32("x.n", -3)
    writer.add_uint64("x.big", 1 << 40)
    writer.add_array("x.list", ["a", "é"])
    writer.add_bool("x.flag", True)
    writer.add_array("x.floats", [0.5, 1.5])
    writer.add_array("x.negative", [-1, 2])
    writer.add_string("quantize.imatrix.file", "gone")
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    convert(tmp_path / "in.gguf", tmp_path / "out.gguf", "Q8_0")
    fields = {key: field.contents() for key, field in gguf.GGUFReader(tmp_path / "out.gguf").fields.items()}
    assert {key: fields.get(key) for key in extra} == extra
    assert "quantize.imatrix.file" not in fields
    assert fields["general.file_type"] == 7


# Sources of many kinds.

def test_rows_of_any_width(tmp_path):
    """36 is no multiple of 32, so these rows become F16."""
    folder = tmp_path / "narrow"
    write_checkpoint(folder, hidden_size=64, moe_intermediate_size=36)
    convert(folder, tmp_path / "out.gguf", "Q4_K_M")
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    for name in ("blk.0.ffn_down_exps.weight", "blk.2.ffn_down_exps.weight"):
        assert tensors[name].tensor_type.name == "F16"
        back = torch.from_numpy(tensors[name].data.astype(np.float32))
        assert torch.equal(back, original(folder)[name].half().float())


def test_the_vision_tower_is_left_out(checkpoint, own_copy, tmp_path):
    change(own_copy, lambda stored: stored.update({f"model.encoder.vision_tower.layer{i}": torch.ones(3)
                                                   for i in range(4)}))
    summary = convert(own_copy, tmp_path / "out.gguf", "Q8_0", name="x")
    assert summary.left_out == 4
    assert convert(checkpoint, tmp_path / "plain.gguf", "Q8_0", name="x").left_out == 0
    assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "plain.gguf").read_bytes()


def test_shards(checkpoint, tmp_path):
    folder = tmp_path / "shards"
    shutil.copytree(checkpoint, folder)
    stored = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(stored)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, own in shards.items():
        save_file({name: stored[name] for name in own}, folder / file)
    weight_map = {name: file for file, own in shards.items() for name in own}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    convert(folder, tmp_path / "a.gguf", "Q4_K_M", name="x")
    convert(checkpoint, tmp_path / "b.gguf", "Q4_K_M", name="x")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


@pytest.mark.parametrize("piece", [5000, 60_000])
def test_the_pieces_do_not_matter(piece, checkpoint, tmp_path, monkeypatch):
    convert(checkpoint, tmp_path / "a.gguf", "Q4_K_M")
    monkeypatch.setattr(module, "_PIECE", piece)
    convert(checkpoint, tmp_path / "b.gguf", "Q4_K_M")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


# What can go wrong.

def test_progress_counts_the_source_s_bytes(checkpoint, tmp_path):
    told = []
    convert(checkpoint, tmp_path / "out.gguf", progress=lambda name, done, total: told.append((name, done, total)))
    done = [entry[1] for entry in told]
    assert done == sorted(done) and done[0] == 0
    assert told[-1][1] == told[-1][2] and len({entry[2] for entry in told}) == 1
    assert {"token_embd.weight", "blk.2.ffn_down_exps.weight"} <= {entry[0] for entry in told}


@pytest.mark.parametrize("failure", [KeyboardInterrupt, MemoryError, RuntimeError])
def test_an_interruption_leaves_nothing_behind(failure, checkpoint, tmp_path):
    def interrupt(name, done, total):
        if done > total // 2:
            raise failure

    out = tmp_path / "out.gguf"
    with pytest.raises(failure):
        convert(checkpoint, out, progress=interrupt)
    assert not list(tmp_path.iterdir())
    out.write_bytes(b"what was there")
    with pytest.raises(failure):
        convert(checkpoint, out, progress=interrupt, force=True)
    assert out.read_bytes() == b"what was there" and not leftovers(tmp_path)


def test_an_existing_file_is_kept_unless_forced(checkpoint, tmp_path):
    out = tmp_path / "out.gguf"
    out.write_bytes(b"precious")
    with pytest.raises(DgemmaError, match="this file exists; --force replaces it"):
        convert(checkpoint, out)
    assert out.read_bytes() == b"precious"
    convert(checkpoint, out, force=True)
    assert read_gguf(out).metadata["general.file_type"] == 15


def test_the_source_is_not_written_over(bf16, own_copy, tmp_path):
    source = tmp_path / "in.gguf"
    shutil.copy(bf16, source)
    (tmp_path / "link.gguf").symlink_to(source)
    for out in (source, tmp_path / "link.gguf", tmp_path / "." / "in.gguf"):
        with pytest.raises(DgemmaError, match="this is the checkpoint itself"):
            convert(source, out, force=True)
    with pytest.raises(DgemmaError, match="this is the checkpoint itself"):
        convert(own_copy, own_copy / "model.safetensors", force=True)
    assert source.read_bytes() == bf16.read_bytes()


def test_where_nothing_can_be_written(checkpoint, tmp_path):
    with pytest.raises(DgemmaError, match="this is a folder; give the name of the file"):
        convert(checkpoint, tmp_path)
    with pytest.raises(DgemmaError, match="there is no folder"):
        convert(checkpoint, tmp_path / "none" / "out.gguf")
    with pytest.raises(DgemmaError, match="there is no type Q3_K; there are Q4_K_M"):
        convert(checkpoint, tmp_path / "out.gguf", "Q3_K")


def test_a_full_disk_is_found_before_anything_is_written(checkpoint, tmp_path, free_space):
    free_space(100_000)
    with pytest.raises(DgemmaError, match=r"\d\.\d MB are needed, and 100\.0 kB are free on that disk"):
        convert(checkpoint, tmp_path / "out.gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_none_are_named(value, own_copy, tmp_path):
    name = "model.decoder.layers.1.mlp.up_proj.weight"
    change(own_copy, lambda stored: stored[name][3, 5].fill_(value))
    with pytest.raises(CheckpointError, match=rf"{name} holds numbers that are infinite or no numbers"):
        convert(own_copy, tmp_path / "out.gguf", "Q8_0")
    assert not (tmp_path / "out.gguf").exists() and not leftovers(tmp_path)


def test_numbers_too_large_for_half_precision_are_named(tmp_path):
    folder = tmp_path / "narrow"
    write_checkpoint(folder, hidden_size=64, moe_intermediate_size=36)
    change(folder, lambda stored: stored["model.decoder.layers.0.experts.down_proj"][0, 0, 0].fill_(1e6))
    with pytest.raises(CheckpointError, match="holds numbers as large as 999424, which F16 cannot hold"):
        convert(folder, tmp_path / "out.gguf")


def test_an_incomplete_checkpoint_is_refused_with_all_that_is_missing(own_copy, tmp_path):
    def take(stored):
        del stored["model.decoder.layers.0.mlp.up_proj.weight"], stored["model.decoder.norm.weight"]

    change(own_copy, take)
    with pytest.raises(CheckpointError, match=r"(?s)cannot be converted.*missing tensors \(2\)"):
        convert(own_copy, tmp_path / "out.gguf")


def test_a_damaged_gguf_is_refused(bf16, tmp_path):
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(bf16.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="truncated"):
        convert(cut, tmp_path / "out.gguf")
    with pytest.raises(CheckpointError, match="no GGUF file"):
        other = tmp_path / "notes.txt"
        other.write_text("hello")
        convert(other, tmp_path / "out.gguf")


def test_tokenizers_that_cannot_be_written(own_copy, tmp_path):
    path = own_copy / "tokenizer.json"
    data = tokenizer_json()
    data["model"]["vocab"]["far"] = 320
    path.write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match="token ids go up to 320, but the network knows 320 tokens only"):
        convert(own_copy, tmp_path / "out.gguf")
    path.write_text(json.dumps({**data, "model": {"type": "Unigram", "vocab": [["a", 0.0]]}}))
    with pytest.raises(CheckpointError, match="this kind of tokenizer cannot be written"):
        convert(own_copy, tmp_path / "out.gguf")
    path.unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is missing"):
        convert(own_copy, tmp_path / "out.gguf")


# Runs alone in a process: prints the file's size and how resident memory grew at its peak.
MEASURE = """
import sys
from pathlib import Path
from dgemma.weights.quantize import convert

def resident(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

small, large, out = map(Path, sys.argv[1:])
convert(small, out, "Q4_K_M", force=True)  # whatever is imported or allocated once
Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
before = resident("VmRSS")
convert(large, out, "Q8_0", force=True)
print(out.stat().st_size, resident("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's memory accounts")
def test_memory_is_that_of_a_few_pieces(checkpoint, tmp_path):
    large = tmp_path / "large"
    write_large(large, dict(hidden_size=512, moe_intermediate_size=512, num_experts=48))
    ran = subprocess.run(
        [sys.executable, "-c", MEASURE, str(checkpoint), str(large), str(tmp_path / "out.gguf")], capture_output=True,
        text=True, check=False, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src"),
                                     "OMP_NUM_THREADS": "1"})
    assert ran.returncode == 0, ran.stderr
    size, peak = map(int, ran.stdout.split())
    assert size > 120e6
    assert peak < 45e6, (size, peak)


def write_large(folder, changes):
    """A checkpoint of zeros: no time goes into drawing it, and it is never in memory as a whole network."""
    from dgemma.weights.save import save_checkpoint
    from support.gemma_files import write_tokenizer

    data = config_dict(**changes)
    network = empty_network(model_config_from_dict(data)).bfloat16().to_empty(device="cpu")
    for tensor in network.state_dict().values():
        tensor.zero_()
    save_checkpoint(network, folder, data, GENERATION)
    write_tokenizer(folder)
