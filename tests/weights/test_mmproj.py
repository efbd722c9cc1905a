"""Vision towers in GGUF files (mmproj): written, read, found beside a model, and what is said of misfits."""

import dataclasses
import json
import random
import shutil

import gguf
import numpy as np
import pytest
import torch

import dgemma
from dgemma.config import load_model_config
from dgemma.errors import CheckpointError, DgemmaError
from dgemma.gguf.vision import check_mmproj, gguf_name, gguf_shape, read_vision_config, vision_metadata
from dgemma.kernels import PackedWeight
from dgemma.nn.packed import all_packed
from dgemma.weights.gguf_vision import load_mmproj, open_mmproj, pixel_order, plane_order, tower_beside
from dgemma.weights.load import empty_vision, load_vision, tensor_shapes
from dgemma.weights.quantize import convert
from support.gguf_files import write
from support.pictures import random_picture
from support.vision import SEEING_WIDTH, random_pictures, save_seeing_model

IMAGE = random_picture(60, 50)
SETTINGS = {"max_tokens": 16, "seed": 1, "max_denoising_steps": 2, "image_tokens": 70, "eos_token_id": ()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_seeing_model(tmp_path_factory.mktemp("seeing"))


@pytest.fixture(scope="module")
def quantized(folder, tmp_path_factory):
    """Folders with model.gguf and mmproj-model.gguf, by the tower's type."""
    folders = {}
    for kind in ("F32", "BF16", "F16", "Q8_0"):
        folders[kind] = tmp_path_factory.mktemp(kind)
        convert(folder, folders[kind] / "model.gguf", "BF16", tower=kind)
    return folders


@pytest.fixture(scope="module")
def towers(quantized):
    return {kind: place / "mmproj-model.gguf" for kind, place in quantized.items()}


@pytest.fixture(scope="module")
def original(folder):
    return load_vision(folder, load_model_config(folder))


def opened(path):
    return open_mmproj(path, SEEING_WIDTH)


def loaded(path, **options):
    return load_mmproj(opened(path), SEEING_WIDTH, **options)


def rewritten(path, out, edit=lambda metadata, tensors: None):
    """A tower's file once more, F32, after ``edit`` of its keys and tensors."""
    reader = gguf.GGUFReader(path)
    metadata = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    del metadata["general.architecture"]
    tensors = {t.name: t.data.astype(np.float32) for t in reader.tensors}
    edit(metadata, tensors)
    return write(out, metadata, tensors, architecture=metadata.pop("general.architecture", "clip"))


# There and back.

def test_from_safetensors_to_a_file_and_back_is_the_same_tower(towers, original):
    read = loaded(towers["F32"])
    assert read.config == dataclasses.replace(original.config, boi_token_id=255_999, image_token_id=258_880,
                                              eoi_token_id=258_882, video_token_id=258_884)
    assert {name: tensor.dtype for name, tensor in read.state_dict().items()} == \
        dict.fromkeys(original.state_dict(), torch.float32)
    for name, tensor in original.state_dict().items():
        assert torch.equal(read.state_dict()[name], tensor), name
    assert not read.training and not any(parameter.requires_grad for parameter in read.parameters())


@pytest.mark.parametrize("kind", ["BF16", "F16"])
def test_half_the_bytes_are_the_same_weights(kind, towers, original):
    read = loaded(towers[kind])
    for name, tensor in read.state_dict().items():
        assert tensor.dtype == torch.bfloat16
        written = original.state_dict()[name]
        if kind == "F16" and written.ndim > 1 and "table" not in name:
            written = written.half()  # loses what is below 2^-24
        assert torch.equal(tensor, written.bfloat16()), name
    wide = loaded(towers[kind], dtype=torch.float32)(random_pictures([(6, 9)]))[0]
    assert (wide - original(random_pictures([(6, 9)]))[0]).abs().max() < 1e-4


def test_packed_weights_stay_packed_and_see_nearly_the_same(towers, original):
    read = loaded(towers["Q8_0"])
    kinds = {weight.type.name for weight in all_packed(read)}
    assert kinds == {"Q8_0", "BF16"}  # rows of 80 are no whole number of blocks
    assert isinstance(read.vision_tower.encoder.layers[0].mlp.up_proj.linear.weight, PackedWeight)
    pictures = random_pictures([(6, 9), (3, 3)])
    seen, exact = torch.cat(read(pictures)), torch.cat(original(pictures))
    assert seen.dtype == torch.float32
    assert 0 < (seen - exact).norm() / exact.norm() < 0.05
    name = "vision_tower.encoder.layers.0.mlp.up_proj.linear"
    weight, written = read.get_submodule(name).weight.dequantize(), original.get_submodule(name).weight
    step = written.unflatten(1, (-1, 32)).abs().amax(-1, keepdim=True) / 127  # of 32 weights; it is kept in F16
    assert ((weight - written).unflatten(1, (-1, 32)).abs() <= 0.57 * step).all()
    unpacked = {name: tensor for name, tensor in original.state_dict().items()
                if gguf_name(name) in ("v.std_bias", "v.blk.0.ln1.weight", "v.patch_embd.weight")}
    assert all(torch.equal(read.state_dict()[name], tensor) for name, tensor in unpacked.items())


def test_f16_beside_packed_weights_runs_in_bfloat16(towers, tmp_path):
    reader = gguf.GGUFReader(towers["Q8_0"])
    name = "v.blk.0.ffn_down.weight"
    metadata = {field: value.contents() for field, value in reader.fields.items() if not field.startswith("GGUF.")}
    del metadata["general.architecture"]
    tensors = {t.name: np.array(t.data) for t in reader.tensors}
    kinds = {t.name: t.tensor_type for t in reader.tensors}
    exact = loaded(towers["Q8_0"]).get_submodule("vision_tower.encoder.layers.0.mlp.down_proj.linear").weight
    tensors[name], kinds[name] = exact.dequantize().numpy(), gguf.GGMLQuantizationType.F16
    read = loaded(write(tmp_path / "mmproj.gguf", metadata, tensors, kinds, architecture="clip"))
    weight = read.get_submodule("vision_tower.encoder.layers.0.mlp.down_proj.linear").weight
    assert weight.type.name == "BF16" and torch.equal(weight.dequantize(torch.bfloat16),
                                                              exact.dequantize().half().bfloat16())


def test_the_gguf_package_reads_what_is_written(towers, original):
    reader = gguf.GGUFReader(towers["Q8_0"])
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "clip" and fields["general.type"] == "mmproj"
    assert fields["clip.has_vision_encoder"] is True and fields["clip.vision.projector_type"] == "gemma4v"
    assert (fields["clip.vision.block_count"], fields["clip.vision.projection_dim"]) == (3, SEEING_WIDTH)
    assert fields["clip.vision.image_mean"] == [0.0] * 3 and fields["general.file_type"] == 7
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    kinds = {name: tensor.tensor_type.name for name, tensor in tensors.items()}
    assert kinds["v.blk.2.attn_q.weight"] == "Q8_0" and kinds["v.blk.2.ffn_down.weight"] == "BF16"
    assert kinds["v.position_embd.weight"] == kinds["v.blk.2.attn_post_norm.weight"] == kinds["v.std_scale"] == "F32"
    assert list(tensors["v.patch_embd.weight"].shape) == [16, 16, 3, 64]  # ggml's order
    assert len(tensors) == len(original.state_dict())
    patches = {t.name: t for t in gguf.GGUFReader(towers["F32"]).tensors}["v.patch_embd.weight"].data
    matrix = original.vision_tower.patch_embedder.input_proj.weight
    pixel = matrix.view(64, 16, 16, 3)[:, 5, 9, 2]  # row, column, colour
    assert torch.equal(torch.from_numpy(patches[:, 2, 5, 9].copy()), pixel)


def test_names_and_keys_are_those_that_the_gguf_package_knows(towers):
    reader = gguf.GGUFReader(towers["BF16"])
    known = {template.format(bid=layer) for template in gguf.TENSOR_NAMES.values() for layer in range(3)}
    assert {name.removesuffix(".weight") for name in tensors_of(towers["BF16"])} <= known
    keys = {value for part in (gguf.Keys.Clip, gguf.Keys.ClipVision, gguf.Keys.ClipVision.Attention,
                               gguf.Keys.ClipVision.Projector) for value in vars(part).values()}
    assert {name for name in reader.fields if name.startswith("clip.")} <= keys
    mapping = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, 3)
    for name in ("vision_tower.patch_embedder.input_proj", "embed_vision.embedding_projection"):
        assert gguf_name(f"{name}.weight") == f"{mapping.get_name(f'model.{name}')}.weight"
    assert reader.fields["clip.vision.projector_type"].contents() == gguf.VisionProjectorType.GEMMA4V


def test_patches_go_both_ways():
    matrix = torch.randn(5, 3 * 4 * 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(pixel_order(plane_order(matrix, 4)), matrix)


def test_towers_without_standardising_and_with_bounds_go_both_ways(tmp_path):
    folder = save_seeing_model(tmp_path / "other", standardize=False, use_clipped_linears=True)
    convert(folder, tmp_path / "m.gguf", "Q8_0", tower="F32")
    read, exact = loaded(tmp_path / "mmproj-m.gguf"), load_vision(folder, load_model_config(folder))
    assert read.config.use_clipped_linears and not read.config.standardize
    assert read.state_dict().keys() == exact.state_dict().keys()
    assert all(torch.equal(tensor, exact.state_dict()[name]) for name, tensor in read.state_dict().items())


def test_keys_go_both_ways(original):
    shape = dataclasses.replace(original.config, rope_theta=77.0, num_key_value_heads=2,
                                vision_soft_tokens_per_image=140, vision_soft_token_budgets=(70, 140))
    shapes = {gguf_name(name): gguf_shape(name, own, shape)
              for name, own in tensor_shapes(empty_vision(shape, 40)).items()}
    keys = vision_metadata(shape, 40)
    check_mmproj(keys, "x")
    ids = {name: getattr(shape, name) for name in ("boi_token_id", "image_token_id", "eoi_token_id", "video_token_id")}
    config, width = read_vision_config(keys, shapes, "x")
    assert (dataclasses.replace(config, **ids), width) == (shape, 40)


# What is wrong with a file.

def test_what_is_no_vision_tower_is_said(quantized, towers, tmp_path):
    with pytest.raises(CheckpointError, match=r"no vision tower \(mmproj\): its architecture is 'diffusion-gemma'"):
        opened(quantized["F32"] / "model.gguf")
    other = rewritten(towers["F32"], tmp_path / "a.gguf", lambda keys, _: keys.update(
        {"clip.vision.projector_type": "gemma3"}))
    with pytest.raises(CheckpointError, match="projector_type 'gemma3' is not one of DiffusionGemma's; dgemma reads"):
        opened(other)
    sound = rewritten(towers["F32"], tmp_path / "b.gguf", lambda keys, _: keys.update(
        {"clip.has_vision_encoder": False}))
    with pytest.raises(CheckpointError, match="holds no vision tower"):
        opened(sound)
    with pytest.raises(CheckpointError, match="cannot be read"):
        opened(tmp_path / "nothing.gguf")


def test_a_tower_for_a_model_of_another_width_is_refused(towers):
    said = f"another model: what it makes is {SEEING_WIDTH} wide, .* embeddings are 1,000"
    with pytest.raises(CheckpointError, match=said):
        open_mmproj(towers["F32"], 1000)


def test_everything_that_is_wrong_with_its_tensors_is_said(towers, tmp_path):
    def change(keys, tensors):
        del tensors["v.blk.1.ffn_up.weight"], tensors["v.std_bias"]
        tensors["v.blk.0.ln1.weight"] = np.zeros(5, np.float32)
        tensors["v.blk.9.ln1.weight"] = np.zeros(64, np.float32)
        tensors["mm.a.fc.weight"] = tensors["a.blk.0.ln1.weight"] = np.zeros(4, np.float32)  # for sound: nobody minds

    with pytest.raises(CheckpointError, match="cannot be loaded") as caught:
        opened(rewritten(towers["F32"], tmp_path / "m.gguf", change))
    message = str(caught.value)
    assert "missing tensors (2):\n" in message and "v.blk.1.ffn_up.weight" in message and "v.std_bias" in message
    assert "wrong shapes (1):\n    v.blk.0.ln1.weight in m.gguf: expected [64], found [5]" in message
    assert "unexpected tensors (1):\n    v.blk.9.ln1.weight\n" in message + "\n"


@pytest.mark.parametrize(("key", "value", "said"), [
    ("attention.head_count", None, "missing keys"),
    ("embedding_length", 0, "must be a whole number from 1"),
    ("attention.head_count", 3, "does not describe|attention.head_count|wrong shapes"),
    ("block_count", 1 << 20, "must be a whole number from 1 to 1,024"),
])
def test_keys_that_make_no_sense_are_named(key, value, said, towers, tmp_path):
    def change(keys, _):
        keys.pop(f"clip.vision.{key}")
        if value is not None:
            keys[f"clip.vision.{key}"] = value

    with pytest.raises(CheckpointError, match=said):
        opened(rewritten(towers["F32"], tmp_path / "m.gguf", change))


def test_a_truncated_file_is_said(towers, tmp_path):
    (tmp_path / "m.gguf").write_bytes(towers["F32"].read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="truncated"):
        opened(tmp_path / "m.gguf")


def test_any_byte_of_a_header_may_be_another(towers, tmp_path):
    """It opens, or it is refused in words; seeded, some hundreds of ways."""
    data, chance, path = towers["Q8_0"].read_bytes(), random.Random(0), tmp_path / "m.gguf"
    refused = []
    for _ in range(400):
        broken = bytearray(data)
        for _ in range(chance.choice((1, 1, 2, 8))):
            broken[chance.randrange(8, 5000)] = chance.choice((0, 1, 3, 64, 127, 128, 255))
        path.write_bytes(broken)
        try:
            load_mmproj(opened(path), SEEING_WIDTH)
        except CheckpointError as error:
            refused.append(str(error))
    assert 0 < len(refused) < 400 and all(str(path) in said for said in refused)


@pytest.mark.parametrize("key", ["attention.head_count", "embedding_length", "feed_forward_length", "block_count",
                                 "projection_dim", "patch_size", "projector.scale_factor",
                                 "attention.layer_norm_epsilon"])
def test_any_value_of_a_key_is_refused_or_fits(key, towers, tmp_path):
    for value in (0, 1, 1 << 19, (1 << 32) - 1, -1.0, float("nan"), "x", True, [1, 2]):
        path = rewritten(towers["F32"], tmp_path / "m.gguf", lambda keys, _, value=value: keys.update(
            {f"clip.vision.{key}": value}))
        try:
            opened(path)
        except CheckpointError:
            continue
        assert key in ("projector.scale_factor", "attention.layer_norm_epsilon")  # no tensor tells


# Finding it.

def test_a_model_finds_the_tower_beside_it_and_sees_what_the_checkpoint_sees(folder, quantized):
    model, exact = dgemma.load(quantized["F32"] / "model.gguf", dtype="float32"), dgemma.load(folder)
    assert model.config.vision == exact.config.vision
    answers = [one.generate("What is this?", images=[IMAGE], **SETTINGS).token_ids for one in (model, exact)]
    assert answers[0] == answers[1]
    alone = quantized["F32"].parent / "alone.gguf"
    shutil.copy(quantized["F32"] / "model.gguf", alone)
    blind = dgemma.load(alone)
    assert blind.pictures is None and blind.config.vision is None
    with pytest.raises(DgemmaError, match="sees no pictures"):
        blind.generate("What is this?", images=[IMAGE], **SETTINGS)


def test_packed_text_sees_with_a_packed_tower(folder, tmp_path):
    convert(folder, tmp_path / "model.gguf", "Q8_0", tower="Q8_0")
    model = dgemma.load(tmp_path / "model.gguf")
    seen = model.generate("What is this?", images=[IMAGE], **SETTINGS)
    other = model.generate("What is this?", images=[random_picture(60, 50, seed=1)], **SETTINGS)
    assert seen.prompt_tokens == other.prompt_tokens and seen.token_ids != other.token_ids


def test_of_several_towers_its_own_comes_first_and_then_what_loses_least(quantized, towers, tmp_path):
    model = tmp_path / "model.gguf"
    shutil.copy(quantized["F32"] / "model.gguf", model)

    def chosen():
        found = tower_beside(model, SEEING_WIDTH)
        return found and found.file.path.name

    assert chosen() is None
    for kind in ("Q8_0", "F32", "F16", "BF16"):
        shutil.copy(towers[kind], tmp_path / f"mmproj-{kind}.gguf")
        assert chosen() == f"mmproj-{kind}.gguf"
    shutil.copy(towers["Q8_0"], tmp_path / "mmproj-model.gguf")
    assert chosen() == "mmproj-model.gguf"


def test_towers_that_do_not_fit_are_passed_over_and_told_when_none_fits(quantized, towers, tmp_path):
    model = tmp_path / "model.gguf"
    shutil.copy(quantized["F32"] / "model.gguf", model)
    rewritten(towers["F32"], tmp_path / "mmproj-BF16.gguf", lambda keys, _: keys.update(
        {"clip.vision.projection_dim": 7}))
    with pytest.warns(UserWarning, match="no vision tower beside model.gguf fits it"):
        assert dgemma.load(model).pictures is None
    shutil.copy(towers["Q8_0"], tmp_path / "mmproj-Q8_0.gguf")
    assert dgemma.load(model).pictures is not None


def test_a_tower_is_named(folder, quantized, towers):
    model = quantized["BF16"] / "model.gguf"
    assert dgemma.load(model, mmproj=towers["F32"]).pictures.load().vision_tower.std_bias.dtype == torch.float32
    assert dgemma.load(folder, mmproj=towers["BF16"]).pictures.load().vision_tower.std_bias.dtype == torch.bfloat16
    with pytest.raises(CheckpointError, match="no vision tower"):
        dgemma.load(model, mmproj=model)
    with pytest.raises(DgemmaError, match="give one of them"):
        dgemma.load(model, mmproj=towers["F32"], vision=folder)


def test_a_tower_is_taken_from_a_checkpoint(folder, quantized, tmp_path):
    alone = tmp_path / "alone.gguf"
    shutil.copy(quantized["F32"] / "model.gguf", alone)
    model = dgemma.load(alone, dtype="float32", vision=folder)
    assert model.pictures.load() is model.pictures.load()  # read already: it was asked for
    exact = dgemma.load(folder)
    assert model.generate("What?", images=[IMAGE], **SETTINGS).token_ids == \
        exact.generate("What?", images=[IMAGE], **SETTINGS).token_ids
    for wrong, said in ((alone, "this is a file"), ("nothing/here/at/all", "no such folder")):
        with pytest.raises(CheckpointError, match=said):
            dgemma.load(alone, vision=wrong)
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    config = json.loads((other / "config.json").read_text(encoding="utf-8"))
    config["text_config"]["hidden_size"] = 8
    (other / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(CheckpointError, match="another model: what it makes is 8 wide"):
        dgemma.load(alone, vision=other)
    (other / "config.json").write_text((folder / "config.json").read_text(encoding="utf-8"), encoding="utf-8")
    (other / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no weights here"):
        dgemma.load(alone, vision=other)


def test_a_model_whose_tokenizer_has_no_picture_tokens_says_so(quantized, towers, tmp_path):
    def change(keys, tensors):
        for key, value in keys.items():
            if isinstance(value, str):
                keys[key] = value.replace("image", "imago")
            elif value and isinstance(value, list) and isinstance(value[0], str):
                keys[key] = [text.replace("image", "imago") for text in value]

    model = rewritten_model(quantized["F32"] / "model.gguf", tmp_path / "model.gguf", change)
    with pytest.raises(CheckpointError, match="the model's tokenizer has no tokens for pictures"):
        dgemma.load(model, mmproj=towers["F32"])


def rewritten_model(path, out, edit):
    reader = gguf.GGUFReader(path)
    metadata = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    del metadata["general.architecture"]
    tensors = {t.name: np.array(t.data) for t in reader.tensors}
    kinds = {t.name: t.tensor_type for t in reader.tensors}
    edit(metadata, tensors)
    return write(out, metadata, tensors, kinds)


# Writing it.

def test_a_gguf_source_gives_its_tower_on(quantized, towers, tmp_path):
    summary = convert(quantized["F32"] / "model.gguf", tmp_path / "small.gguf", "Q8_0", tower="Q8_0")
    assert summary.tower == tmp_path / "mmproj-small.gguf" and summary.left_out == 0
    assert summary.tower_bytes == summary.tower.stat().st_size
    assert {name: tensor.data.tobytes() for name, tensor in tensors_of(summary.tower).items()} == \
        {name: tensor.data.tobytes() for name, tensor in tensors_of(towers["Q8_0"]).items()}


def tensors_of(path):
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def test_a_tower_may_be_left_out_and_never_takes_a_files_place_unasked(folder, tmp_path):
    assert convert(folder, tmp_path / "m.gguf", "Q8_0", tower=None).left_out > 0
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]
    (tmp_path / "mmproj-n.gguf").write_bytes(b"precious")
    with pytest.raises(DgemmaError, match="mmproj-n.gguf: this file exists; --force"):
        convert(folder, tmp_path / "n.gguf", "Q8_0")
    assert not (tmp_path / "n.gguf").exists() and (tmp_path / "mmproj-n.gguf").read_bytes() == b"precious"
    assert opened(convert(folder, tmp_path / "n.gguf", "Q8_0", force=True).tower).type_name == "BF16"
    with pytest.raises(DgemmaError, match="no type Q4_K for a vision tower"):
        convert(folder, tmp_path / "o.gguf", "Q8_0", tower="Q4_K")

