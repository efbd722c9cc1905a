"""Reports on checkpoints: counts, memory, problems, and how they are printed."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from dgemma.cli.commands.inspect import inspect
from dgemma.config import FULL, SLIDING, VisionConfig, load_model_config, model_config_from_dict
from dgemma.errors import CheckpointError
from dgemma.gguf.keys import gguf_name
from dgemma.gguf.writer import TensorEntry
from dgemma.inspect import count_parameters, inspect_checkpoint, layer_groups
from dgemma.memory import program_bytes
from dgemma.memory.inference import kv_cache_bytes, memory_needs, working_bytes
from dgemma.memory.vision import TowerSize, tower_working_bytes
from dgemma.weights.hub.locate import locate
from dgemma.weights.load import empty_vision, load_network, network_shapes, tensor_shapes
from dgemma.weights.quantize import convert, mixture_types

PUBLISHED = {  # the 26B-A4B model's config.json, as far as the text network goes
    "model_type": "diffusion_gemma",
    "canvas_length": 256,
    "text_config": {
        "vocab_size": 262_144, "hidden_size": 2816, "intermediate_size": 2112, "num_hidden_layers": 30,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256, "global_head_dim": 512,
        "num_global_key_value_heads": 2, "sliding_window": 1024, "num_experts": 128, "top_k_experts": 8,
        "moe_intermediate_size": 704, "max_position_embeddings": 262_144,
        "layer_types": [FULL if layer % 6 == 5 else SLIDING for layer in range(30)],
    },
}


@pytest.fixture(scope="module")
def published():
    return model_config_from_dict(PUBLISHED)


@pytest.fixture
def run():
    app = typer.Typer()
    app.command()(inspect)
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


def break_norm(tensors):
    tensors["model.decoder.norm.weight"] = torch.zeros(65)
    del tensors["model.decoder.layers.0.layer_scalar"]


# Counting


def test_parameters_of_the_published_model(published):
    counts = count_parameters(network_shapes(published))
    billions = {part: count / 1e9 for part, count in counts.items()}
    assert billions["experts"] == pytest.approx(22.84, abs=0.01)
    assert billions["attention"] == pytest.approx(1.11, abs=0.01)
    assert billions["embedding"] == pytest.approx(0.738, abs=0.001)
    assert billions["dense MLP"] == pytest.approx(0.535, abs=0.001)
    assert sum(counts.values()) / 1e9 == pytest.approx(25.25, abs=0.05)


def test_layer_groups_of_the_published_model(published):
    sliding, full = layer_groups(published)
    assert (len(sliding.layers), full.layers) == (25, (5, 11, 17, 23, 29))
    assert (full.geometry.head_dim, full.geometry.num_key_value_heads) == (512, 2)


def test_memory_of_the_published_model(published):
    # By hand: 25 sliding layers of 8 heads of 256, 5 full ones of 2 of 512; keys and values; bf16, float32, q8_0.
    assert kv_cache_bytes(published, 8192, 2) == 2 * 2 * (25 * 8 * 256 * 1023 + 5 * 2 * 512 * 8192)
    assert kv_cache_bytes(published, 8192, "bf16") == kv_cache_bytes(published, 8192, 2)
    assert kv_cache_bytes(published, 100, 4) == 2 * 4 * (25 * 8 * 256 + 5 * 2 * 512) * 100
    assert kv_cache_bytes(published, 8192, "q8_0") == 2 * 34 * (25 * 8 * 8 * 1023 + 5 * 2 * 16 * 8192)
    needs = memory_needs(published, 25_250_000_000)
    assert [need.context for need in needs[:4]] == [4096, 32_768, 131_072, 262_144]
    assert {need.dtype: need.weights for need in needs} == {"bfloat16": 50_500_000_000, "float32": 101_000_000_000}
    assert all(need.total == need.weights + need.kv_cache + need.working for need in needs)
    assert [need.context for need in memory_needs(published, 1, [77])] == [77, 77]
    # A step alone stays far below the [256, vocab] float32 logits times a few that the reference needs.
    assert 50e6 < working_bytes(published, 0, 2) < 200e6
    grows = [working_bytes(published, tokens, 2) for tokens in (0, 256, 1024, 8192, 262_144)]
    assert grows == sorted(grows)


def test_the_published_model_packed_sees_a_large_picture_within_20_gb(published):
    """Q4_K_M, the tower in bfloat16, a picture of 1,120 tokens in a conversation of 4,096, the program included."""
    shapes = {gguf_name(name): shape for name, shape in network_shapes(published).items()}
    types = mixture_types(shapes, "Q4_K_M")
    packed = sum(TensorEntry(name, shape, types[name]).nbytes for name, shape in shapes.items())
    vision = VisionConfig(hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16,
                          num_key_value_heads=16, head_dim=72, standardize=True)
    tower = sum(map(math.prod, tensor_shapes(empty_vision(vision, published.hidden_size)).values()))
    assert tower == pytest.approx(572.8e6, rel=1e-3)
    size = TowerSize(vision, tower, 2 * tower, 2)
    need = memory_needs(published, 25_250_000_000, [4096], program_bytes(published.vocab_size), packed, size)[0]
    assert need.dtype == "packed" and need.vision == 2 * tower + tower_working_bytes(vision, 2)
    assert need.total == need.weights + need.kv_cache + need.working + need.program + need.vision
    assert 18e9 < need.total < 20e9
    # By hand: 10,080 patches of 1,152, 16 bytes each, and of 768 pixels, 8 bytes each; a tile of 1,024, three times
    # 4,304 of them in an MLP. Measured with tiles of 256: 256 MB, all patches in one tile 571 MB.
    assert tower_working_bytes(vision, 2) == 10_080 * (1152 * 16 + 768 * 8) + 1024 * (3 * 4304 * 2 + 1152 * 10)
    assert 571e6 < tower_working_bytes(vision, 2, tile=10_080) < 630e6
    assert tower_working_bytes(vision, 2, patches=630) < tower_working_bytes(vision, 2) / 7
    wide = {need.dtype: need.vision for need in memory_needs(published, 1, [77], tower=size)}
    assert wide["float32"] > wide["bfloat16"] > 2 * tower


@pytest.mark.parametrize("tokens", [5, 11, 30])
def test_cache_estimate_is_what_the_cache_holds(single, tokens):
    network = load_network(single, load_model_config(single))
    cache = network.new_cache(1)
    with torch.no_grad():
        network.encode(torch.ones(1, tokens, dtype=torch.long), cache)
    assert kv_cache_bytes(network.config, tokens, 4) == cache.nbytes


@pytest.mark.parametrize("form", ["single", "sharded"])
def test_report_of_a_sound_checkpoint(form, request, reference):
    folder = request.getfixturevalue(form)
    report = inspect_checkpoint(folder)
    network = load_network(folder, report.config)
    assert report.problems == ()
    assert report.text_parameters == sum(tensor.numel() for tensor in network.state_dict().values())
    vision = [t for name, t in reference.state_dict().items() if "vision_tower." in name or "embed_vision." in name]
    assert report.parameters["vision"] == sum(tensor.numel() for tensor in vision)
    assert report.active_parameters == report.text_parameters - report.parameters["experts"] * 6 // 8
    assert [stored.dtype for stored in report.stored] == ["F32"]
    assert report.stored[0].nbytes == 4 * (report.text_parameters + report.parameters["vision"])
    assert report.files == {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}
    assert report.generation.max_denoising_steps == 48
    assert (report.tokenizer.vocab_size, report.tokenizer.has_chat_template) == (288, True)


def test_report_of_a_tower(single, copy_of, rewrite, run, tmp_path):
    """In the checkpoint itself, in a file beside a GGUF file, or in one that is named."""
    own = inspect_checkpoint(single)
    assert (own.tower.path, own.tower.parameters) == (single, own.parameters["vision"])
    assert own.tower.nbytes == 4 * own.tower.parameters and own.memory[0].vision > 2 * own.tower.parameters
    beside = convert(single, tmp_path / "model.gguf", "Q8_0", tower="BF16").tower
    report = inspect_checkpoint(tmp_path / "model.gguf", check=True)
    assert report.tower.path == beside and report.files[beside.name] == beside.stat().st_size
    assert report.parameters == own.parameters and report.problems == () and report.checked
    assert report.memory[0].vision == report.tower.nbytes + tower_working_bytes(own.config.vision, 2)
    assert {part.dtype for part in report.parts if part.part == "vision"} == {"BF16", "F32"}
    shown = run(tmp_path / "model.gguf").output
    assert f"in {beside.name}" in " ".join(shown.split()) and "Memory to run with pictures" in shown
    assert max(map(len, shown.split("\nShape", 1)[1].splitlines())) <= 80
    away = beside.rename(tmp_path / "elsewhere.gguf")
    assert inspect_checkpoint(tmp_path / "model.gguf").tower is None
    assert "Memory to run the text network" in run(tmp_path / "model.gguf").output
    assert inspect_checkpoint(tmp_path / "model.gguf", mmproj=away).tower.path == away
    assert inspect_checkpoint(single, mmproj=away).tower.path == away
    assert json.loads(run(single, "--mmproj", away, "--json").output)["tower"]["path"] == str(away)


def test_a_tower_that_cannot_be_loaded_is_a_note(single, copy_of, rewrite, tmp_path):
    folder = copy_of(single)
    rewrite(folder, lambda tensors: tensors.pop("model.encoder.embed_vision.embedding_projection.weight"))
    report = inspect_checkpoint(folder)
    assert report.problems == () and report.tower is None and report.memory[0].vision == 0
    assert "the vision tower cannot be loaded" in report.notes[0] and "embedding_projection" in report.notes[0]
    convert(single, tmp_path / "model.gguf", "Q8_0")
    (tmp_path / "mmproj-model.gguf").write_bytes(b"GGUF")
    assert "no vision tower beside model.gguf fits it" in inspect_checkpoint(tmp_path / "model.gguf").notes[0]


def test_tokenizer_facts(single, copy_of):
    folder = copy_of(single)
    data = json.loads((folder / "tokenizer.json").read_text())
    data["added_tokens"].append({**data["added_tokens"][0], "id": 288, "content": "<more>"})
    (folder / "tokenizer.json").write_text(json.dumps(data))
    (folder / "chat_template.jinja").unlink()
    facts = inspect_checkpoint(folder).tokenizer
    assert (facts.vocab_size, facts.has_chat_template) == (289, False)
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    assert inspect_checkpoint(folder).tokenizer.has_chat_template
    (folder / "tokenizer_config.json").unlink()
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert inspect_checkpoint(folder).tokenizer.has_chat_template


def test_no_tensor_is_read(single, monkeypatch):
    import safetensors

    monkeypatch.setattr(safetensors, "safe_open", None)
    assert inspect_checkpoint(single).problems == ()


def test_problems_are_those_of_loading(single, copy_of, rewrite):
    folder = copy_of(single)
    rewrite(folder, break_norm)
    report = inspect_checkpoint(folder)
    assert {problem.kind: len(problem.items) for problem in report.problems} == {"missing tensors": 1,
                                                                                 "wrong shapes": 1}
    with pytest.raises(CheckpointError) as caught:
        load_network(folder, report.config)
    for problem in report.problems:
        assert all(item in str(caught.value) for item in problem.items)


def set_dtype(folder, dtype):
    path = folder / "config.json"
    data = json.loads(path.read_text())
    data["dtype"] = data["text_config"]["dtype"] = dtype
    path.write_text(json.dumps(data))


def edit_tokenizer(folder, change):
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


DAMAGE = {
    "no tokenizer": lambda folder: (folder / "tokenizer.json").unlink(),
    "half a tokenizer": lambda folder: (folder / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0'),
    "a list for a tokenizer": lambda folder: (folder / "tokenizer.json").write_text("[]"),
    "bytes for a tokenizer": lambda folder: (folder / "tokenizer.json").write_bytes(b"\xff\x00"),
    "a tokenizer without ids": lambda folder: edit_tokenizer(folder, lambda data: data.update(added_tokens=[{}])),
    "a tokenizer with texts for ids": lambda folder: edit_tokenizer(
        folder, lambda data: data["model"]["vocab"].update(a="x")),
    "a tokenizer of numbers": lambda folder: edit_tokenizer(folder, lambda data: data.update(added_tokens=[1, 2])),
    "a broken tokenizer_config": lambda folder: (folder / "tokenizer_config.json").write_text("{"),
    "a template that does not compile": lambda folder: (folder / "chat_template.jinja").write_text("{% for %}"),
    "an unsupported dtype": lambda folder: set_dtype(folder, "float8_e4m3fn"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_whatever_loading_refuses_is_a_problem(run, single, copy_of, damage):
    import dgemma

    folder = copy_of(single)
    DAMAGE[damage](folder)
    with pytest.raises(CheckpointError) as caught:
        dgemma.load(folder, device="cpu")
    result = run(folder)
    assert result.exit_code == 1
    assert "No problems found" not in result.output
    (problem,) = inspect_checkpoint(folder).problems
    assert problem.items == (str(caught.value),)
    assert str(caught.value).splitlines()[0] in result.output
    json_form = run(folder, "--json")
    assert json_form.exit_code == 1
    assert json.loads(json_form.output)["problems"] == [{"kind": problem.kind, "items": [str(caught.value)]}]


def test_nothing_to_report_on(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        inspect_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        inspect_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED))
    with pytest.raises(CheckpointError, match="no weights here"):
        inspect_checkpoint(tmp_path)


# Printing


def test_plain_tables_of_80_columns(run, sharded):
    result = run(sharded)
    assert result.exit_code == 0, result.output
    assert "\x1b" not in result.output
    assert "─" not in result.output
    tables = result.output.split("\nShape", 1)[1]
    assert max(map(len, tables.splitlines())) <= 80
    for words in ("8 of width 32, 2 chosen per token", "router and norms", "stored as F32",
                  "131,072  bfloat16", "max_denoising_steps", "No problems found"):
        assert words in result.output, words


def test_tables_of_the_published_model_fit_too(run, single, copy_of):
    folder = copy_of(single)
    (folder / "config.json").write_text(json.dumps(PUBLISHED))
    result = run(folder)
    assert result.exit_code == 1
    tables = result.output.split("\nShape", 1)[1].split("\nProblems")[0]
    assert max(map(len, tables.splitlines())) <= 80
    assert "22,837,985,280" in tables
    assert "…" not in tables


def test_json_is_one_object(run, single):
    result = run(single, "--json")
    assert result.exit_code == 0
    data = json.loads(result.output)
    assert data["parameters"]["text"] == inspect_checkpoint(single).text_parameters
    assert data["config"]["vocab_size"] == 300
    assert data["memory"][0]["total"] == sum(data["memory"][0][key] for key in
                                               ("weights", "kv_cache", "working", "program", "vision"))
    assert data["problems"] == []
    assert data["model"] == str(single)
    assert set(data) == {"model", *(field.name for field in dataclasses.fields(inspect_checkpoint(single)))}


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_problems_make_the_exit_code_1(run, single, copy_of, rewrite, options):
    folder = copy_of(single)
    rewrite(folder, break_norm)
    result = run(folder, *options)
    assert result.exit_code == 1
    assert "model.decoder.norm.weight in model.safetensors: expected [64], found [65]" in result.output
    assert "model.decoder.layers.0.layer_scalar" in result.output
    assert "No problems found" not in result.output


def test_the_memory_that_is_said_is_about_what_an_answer_takes():
    """In a process of its own, the program and its libraries included."""
    run = """
import dgemma
dgemma.load("sudoku").generate("Hi", max_tokens=9, max_denoising_steps=2)
with open("/proc/self/status") as file:
    print(dict(line.split(":", 1) for line in file)["VmHWM"].split()[0])
"""
    if not Path("/proc/self/status").exists():
        pytest.skip("no /proc")
    used = 1024 * int(subprocess.run([sys.executable, "-c", run], check=True, capture_output=True, text=True).stdout)
    report = inspect_checkpoint(locate("sudoku"), [300])
    said = next(need.total for need in report.memory if need.dtype == str(report.config.dtype))
    assert said == pytest.approx(used, rel=0.3)
