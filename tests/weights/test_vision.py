"""The vision tower out of a checkpoint as transformers writes it."""

import dataclasses
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from dgemma.config import load_model_config
from dgemma.errors import CheckpointError
from dgemma.weights.load import load_network, load_vision
from dgemma.weights.names import vision_checkpoint_name, vision_name
from support.reference import tiny_config
from support.vision import SMALL, TEXT_WIDTH, ReferenceVision, padded, random_pictures, vision_config

TOWER, EMBEDDER = "model.encoder.vision_tower.", "model.encoder.embed_vision."


@pytest.fixture
def changed(single, tmp_path):
    """A function (change of the tensors by name, in place) -> a folder with the checkpoint so changed."""
    def build(change):
        folder = tmp_path / "changed"
        shutil.copytree(single, folder)
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    return build


@pytest.mark.parametrize("folder", ["single", "sharded"])
def test_it_sees_what_transformers_sees(folder, reference, request):
    folder = request.getfixturevalue(folder)
    vision = load_vision(folder, load_model_config(folder))
    pictures = random_pictures([(6, 9), (3, 3)])
    patches, positions = padded(pictures, 90)
    with torch.no_grad():
        theirs = reference.model.encoder.get_image_features(patches, positions).pooler_output
    assert (torch.cat(vision(pictures)) - theirs).abs().max() < 1e-4
    assert not vision.training and not any(parameter.requires_grad for parameter in vision.parameters())


def test_only_the_tower_is_read(single):
    config = load_model_config(single)
    seen = []
    vision = load_vision(single, config, progress=lambda done, total: seen.append((done, total)))
    size = sum(tensor.nbytes for tensor in vision.state_dict().values())
    assert seen[0] == (0, size) and seen[-1] == (size, size)


def test_bounds_of_clipped_products_are_read(tmp_path):
    """From a folder, too, that holds the tower and nothing more."""
    reference = ReferenceVision(SMALL | {"use_clipped_linears": True, "standardize": True}, seed=3)
    tensors = {vision_checkpoint_name(name): tensor for name, tensor in reference.state_dict().items()}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    config = dataclasses.replace(tiny_config(hidden_size=TEXT_WIDTH), vision=vision_config(reference))
    pictures = random_pictures([(6, 9)])
    for dtype, most in ((torch.float32, 1e-4), (torch.bfloat16, 0.2)):
        ours = load_vision(tmp_path, config, dtype=dtype)(pictures)[0]
        assert (ours - reference(*padded(pictures, 54))).abs().max() < most


def test_its_dtype_is_chosen_or_the_stored_one(single, changed):
    config = load_model_config(single)
    narrow = load_vision(single, config, dtype=torch.bfloat16)
    assert {t.dtype for t in narrow.state_dict().values()} == {torch.bfloat16}
    halved = changed(lambda tensors: tensors.update({name: t.bfloat16() for name, t in tensors.items()}))
    assert {t.dtype for t in load_vision(halved, config).state_dict().values()} == {torch.bfloat16}
    with pytest.raises(ValueError, match="dtype must be float32, bfloat16 or float16"):
        load_vision(single, config, dtype=torch.float64)


def test_a_stray_tensor_is_ignored(changed):
    folder = changed(lambda tensors: tensors.update({EMBEDDER + "embedding.weight": torch.zeros(3, 3)}))
    load_vision(folder, load_model_config(folder))
    load_network(folder, load_model_config(folder))


def test_everything_that_is_wrong_is_said(changed):
    def change(tensors):
        del tensors[TOWER + "encoder.layers.0.mlp.up_proj.linear.weight"]
        tensors[TOWER + "encoder.layers.7.mlp.up_proj.linear.weight"] = torch.zeros(2, 2)
        tensors[EMBEDDER + "embedding_projection.weight"] = torch.zeros(3, 4)

    folder = changed(change)
    with pytest.raises(CheckpointError, match="the vision tower cannot be loaded") as caught:
        load_vision(folder, load_model_config(folder))
    message = str(caught.value)
    assert f"missing tensors (1):\n    {TOWER}encoder.layers.0.mlp.up_proj.linear.weight" in message
    assert f"unexpected tensors (1):\n    {TOWER}encoder.layers.7.mlp.up_proj.linear.weight" in message
    assert "embedding_projection.weight in model.safetensors: expected [64, 64], found [3, 4]" in message
    load_network(folder, load_model_config(folder))  # text is none the worse for it


def test_a_checkpoint_without_a_tower_says_so(changed):
    def without(tensors):
        for name in [name for name in tensors if name.startswith((TOWER, EMBEDDER))]:
            del tensors[name]

    folder = changed(without)
    with pytest.raises(CheckpointError, match="the vision tower is not in this checkpoint, only its config is"):
        load_vision(folder, load_model_config(folder))


def test_a_config_without_a_tower_says_so(single):
    config = dataclasses.replace(load_model_config(single), vision=None)
    with pytest.raises(CheckpointError, match=r"its config.json has no vision_config"):
        load_vision(single, config)


def test_names_go_both_ways():
    name = TOWER + "encoder.layers.3.self_attn.q_proj.linear.weight"
    assert vision_name(name) == "vision_tower.encoder.layers.3.self_attn.q_proj.linear.weight"
    assert vision_checkpoint_name("vision_tower.encoder.layers.3.self_attn.q_proj.linear.weight") == name
    assert vision_name(EMBEDDER + "embedding.weight") is None
    assert vision_name("model.encoder.language_model.layers.0.layer_scalar") is None
