"""`inspect --check`: tensors with numbers that are infinite or no numbers, by name, in any form and any place."""

import json

import numpy as np
import pytest
import torch
import typer
from gguf import GGMLQuantizationType as Type
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import dgemma
from dgemma.cli.commands.inspect import inspect
from dgemma.errors import CheckpointError, NotFiniteError
from dgemma.gguf.blocks import BLOCK_TYPES, dequantize
from dgemma.gguf.reader import GGUFTensor, read_gguf
from dgemma.inspect import NOT_FINITE, inspect_checkpoint
from dgemma.weights.files import bundled_path
from dgemma.weights.finite import check_finite
from dgemma.weights.load import StoredTensor, read_headers
from dgemma.weights.quantize import convert
from support.gguf_files import write_network
from support.reference import random_network, tiny_config

NAME = "model.decoder.layers.1.mlp.up_proj.weight"


@pytest.fixture
def run():
    app = typer.Typer()
    app.command()(inspect)
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_safetensors(value, dtype, run, single, copy_of, rewrite):
    folder = copy_of(single)
    rewrite(folder, lambda tensors: tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()}))
    sound = run(folder, "--check")
    assert sound.exit_code == 0 and "every number that was read is finite" in " ".join(sound.output.split())
    rewrite(folder, lambda tensors: tensors[NAME].view(-1)[7:9].fill_(value))
    result = run(folder, "--check")
    assert result.exit_code == 1
    assert NOT_FINITE in result.output and f"{NAME} in model.safetensors: 2 of 6,144 numbers" in result.output
    assert "No problems" not in result.output and "cannot be used" in result.output
    as_json = json.loads(run(folder, "--check", "--json").output)
    assert as_json["checked"] and as_json["problems"] == [
        {"kind": NOT_FINITE, "items": [f"{NAME} in model.safetensors: 2 of 6,144 numbers"]}]


def test_without_a_check_nothing_is_claimed_of_the_numbers(run, single, copy_of, rewrite):
    folder = copy_of(single)
    rewrite(folder, lambda tensors: tensors[NAME].fill_(float("nan")))
    result = run(folder)
    assert result.exit_code == 0
    assert "No problems found in the headers" in result.output and "--check" in result.output
    assert "finite" not in result.output
    assert json.loads(run(folder, "--json").output)["checked"] is False


def test_every_shard_and_the_vision_tower_are_read(sharded, copy_of):
    folder = copy_of(sharded)
    broken = []
    for path in sorted(folder.glob("*.safetensors")):
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
        name = next((name for name in tensors if "vision" in name and tensors[name].numel()), next(iter(tensors)))
        tensors[name].view(-1)[-1] = float("nan")
        save_file(tensors, path, metadata={"format": "pt"})
        broken.append(f"{name} in {path.name}: 1 of {tensors[name].numel():,} numbers")
    (problem,) = inspect_checkpoint(folder, check=True).problems
    assert sorted(problem.items) == sorted(broken) and any("vision" in line for line in broken)


def test_a_whole_number_is_finite_and_a_type_that_is_not_known_is_said(single, copy_of, rewrite, run):
    folder = copy_of(single)
    vision = "model.encoder.embed_vision.embedding_projection.weight"

    def change(tensors):
        tensors[vision] = torch.full(tensors[vision].shape, 127, dtype=torch.int8)
        tensors["model.encoder.vision_tower.a"] = torch.tensor([1.0, float("nan")]).to(torch.float8_e4m3fn)
        tensors["model.encoder.vision_tower.b"] = torch.tensor([1.0, float("inf")], dtype=torch.float64)

    rewrite(folder, change)
    (problem,) = inspect_checkpoint(folder, check=True).problems
    assert {item.split()[0] for item in problem.items} == {"model.encoder.vision_tower.a",
                                                           "model.encoder.vision_tower.b"}
    headers = read_headers(folder).tensors
    unknown = [StoredTensor(t.name, t.file, "F6_NEW", t.shape, t.offset, t.nbytes) for t in headers.values()]
    assert check_finite(unknown).unread == ("F6_NEW",)


# GGUF


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_a_block_is_finite_where_all_its_numbers_are(name, tmp_path):
    """Random bytes, scales that are not finite among them, beside what the blocks dequantise to."""
    kind = BLOCK_TYPES[name]
    data = torch.randint(256, (4000, kind.nbytes), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    bad = ~dequantize(data, kind).isfinite().all(-1)
    assert 10 < int(bad.sum()) < 3990 or name in ("F32", "NVFP4")  # of NVFP4 every byte is a number
    (tmp_path / "data").write_bytes(bytes(3) + data.numpy().tobytes())
    tensor = GGUFTensor("w", kind, name, (4000, kind.block), tmp_path / "data", 3, data.numel())
    unit = "numbers" if kind.block == 1 else "blocks"
    found = (f"w in data: {int(bad.sum()):,} of 4,000 {unit}",) if bad.any() else ()
    assert check_finite([tensor]).broken == found


@pytest.mark.parametrize("kind", [Type.F32, Type.F16, Type.Q8_0, Type.Q5_1])
def test_gguf_files(kind, run, tmp_path):
    network = random_network(tiny_config(hidden_size=32, intermediate_size=32, moe_intermediate_size=32, head_dim=8,
                                         global_head_dim=8))
    path = write_network(tmp_path / "m.gguf", network, kind)
    assert run(path, "--check").exit_code == 0
    tensor = read_gguf(path).tensors["blk.1.ffn_up.weight"]
    data = bytearray(path.read_bytes())
    at = tensor.offset + tensor.type.nbytes * 3
    data[at : at + tensor.type.nbytes] = np.full(tensor.type.nbytes, 0xFF, np.uint8).tobytes()
    path.write_bytes(data)
    assert run(path).exit_code == 0
    result = run(path, "--check")
    assert result.exit_code == 1
    assert "blk.1.ffn_up.weight in m.gguf: 1 of " in result.output


def test_a_broken_scale_ends_an_answer_with_an_error(tmp_path):
    """The packed weights' own kernels compute with it, whichever there are: what they give must not be numbers."""
    path = tmp_path / "m.gguf"
    convert(bundled_path("sudoku"), path, "Q8_0")
    tensor = read_gguf(path).tensors["blk.1.ffn_down.weight"]
    assert tensor.type_name == "Q8_0"
    assert dgemma.load(path, device="cpu").generate("hello", seed=0, max_tokens=8, max_denoising_steps=1).token_ids
    data = np.fromfile(path, np.uint8)
    blocks = data[tensor.offset : tensor.offset + tensor.nbytes].reshape(-1, tensor.type.nbytes)
    blocks[:, :2] = 0x00, 0x7E
    data.tofile(path)
    with pytest.raises(NotFiniteError, match="dgemma inspect --check"):
        dgemma.load(path, device="cpu").generate("hello", seed=0, max_tokens=8, max_denoising_steps=1)


def test_pieces_progress_and_files_that_end_early(single, copy_of):
    folder = copy_of(single)
    seen = []
    report = inspect_checkpoint(folder, check=True)
    assert report.problems == () and report.checked
    total = sum(stored.nbytes for stored in report.stored)
    tensors = list(read_headers(folder).tensors.values())
    assert not check_finite(tensors, lambda done, total: seen.append((done, total)), piece=1000).broken
    assert seen[0] == (0, total) and seen[-1] == (total, total) and len(seen) > total // 1000
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: the data of .* ends early"):
        check_finite(tensors)
    (problem,) = inspect_checkpoint(folder, check=True).problems  # what is there is read all the same
    assert problem.kind == "damaged files"
