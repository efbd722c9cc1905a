"""The vision tower against transformers' on random configs, and how pictures go through it together."""

import dataclasses

import pytest
import torch

from dgemma.chat.pictures import prepare
from dgemma.config import VisionConfig
from dgemma.gguf.blocks import BLOCK_TYPES
from dgemma.gguf.quantize import quantize
from dgemma.kernels import PackedWeight
from dgemma.nn import vision as tower
from dgemma.nn.layers import Linear
from dgemma.nn.vision import Layout, Vision
from support.pictures import random_picture, reference_processor
from support.vision import SMALL, TEXT_WIDTH, ReferenceVision, padded, random_pictures, vision_config, vision_like

SHAPES = {  # in patches; several of one size, and two of equally many patches but not of one size
    "one": [(6, 9)],
    "several-sizes": [(6, 9), (3, 3), (9, 12), (3, 27)],
    "alike": [(6, 6), (6, 6), (6, 6)],
    "equally-many-patches": [(6, 9), (3, 18), (9, 6), (3, 3)],
    "a-strip": [(3, 60), (60, 3)],
}
CONFIGS = {
    "plain": {},
    "standardised": {"standardize": True},
    "clipped": {"use_clipped_linears": True},
    "standardised-clipped": {"standardize": True, "use_clipped_linears": True},
    "grouped": {"num_key_value_heads": 2, "head_dim": 20},
    "other-sizes": {"standardize": True, "patch_size": 4, "pooling_kernel_size": 3, "rms_norm_eps": 1e-5,
                    "rope_parameters": {"rope_theta": 40.0}},
}


def difference(ours, theirs):
    return (torch.cat(ours) - theirs).abs().max().item()


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_soft_tokens_are_those_of_transformers(shapes, changes):
    reference = ReferenceVision(SMALL | changes, seed=len(shapes))
    pictures = random_pictures(shapes, reference.config.patch_size)
    theirs = reference(*padded(pictures, 9 * 28))  # with padding behind every picture
    ours = vision_like(reference)(pictures)
    assert [len(soft) for soft in ours] == [rows * columns // 9 for rows, columns in shapes]
    assert theirs.abs().mean() > 0.1  # numbers that could differ
    assert difference(ours, theirs) < 1e-4


def test_a_pooling_of_its_own_is_that_of_transformers():
    reference = ReferenceVision(SMALL | {"pooling_kernel_size": 2}, seed=3)
    pictures = random_pictures([(4, 6), (2, 2)])
    assert difference(vision_like(reference)(pictures), reference(*padded(pictures, 4 * 9))) < 1e-4


def test_from_the_picture_on_everything_is_as_in_transformers():
    reference = ReferenceVision(SMALL | {"standardize": True}, seed=7)
    images = [random_picture(300, 200), random_picture(70, 300), random_picture(200, 300)]
    theirs = reference_processor()(images, max_soft_tokens=70, return_tensors="pt")
    pictures = [prepare(image, 70) for image in images]
    ours = vision_like(reference)([picture.patches() for picture in pictures])
    assert [len(soft) for soft in ours] == [picture.tokens for picture in pictures]
    assert difference(ours, reference(theirs["pixel_values"], theirs["image_position_ids"])) < 1e-4


def test_clipping_is_seen():
    """The bounds of the reference do something, or the tests above would show nothing."""
    reference = ReferenceVision(SMALL | {"use_clipped_linears": True}, seed=0)
    vision = vision_like(reference)
    free = Vision(dataclasses.replace(vision.config, use_clipped_linears=False), TEXT_WIDTH).requires_grad_(False)
    free.load_state_dict(reference.state_dict(), strict=False)
    pictures = random_pictures([(6, 9)])
    assert (vision(pictures)[0] - free(pictures)[0]).abs().max() > 0.01


def test_large_std_biases_are_taken_off_in_float32():
    """|std_bias| reaches 5.4e4: bfloat16 would be off by hundreds."""
    reference = ReferenceVision(SMALL | {"standardize": True}, seed=5)
    pictures = random_pictures([(6, 6)])
    wide = vision_like(reference)
    pooled = wide.vision_tower(pictures[0].flatten(0, 1), Layout(((6, 6),)))
    narrow = vision_like(reference).to(torch.bfloat16)
    narrow.vision_tower.std_bias.copy_(torch.full_like(narrow.vision_tower.std_bias, 3e4))
    off = narrow.vision_tower(pictures[0].flatten(0, 1), Layout(((6, 6),)))
    assert off.dtype == pooled.dtype == torch.float32
    off = off / narrow.vision_tower.std_scale.float() + narrow.vision_tower.std_bias.float()
    plain = pooled / wide.vision_tower.std_scale + wide.vision_tower.std_bias
    assert (off - plain).abs().max() < 0.05 * plain.abs().max()


def test_pictures_together_are_as_each_alone_whatever_their_order():
    vision = vision_like(ReferenceVision(SMALL | {"standardize": True}, seed=1))
    pictures = random_pictures([(9, 12), (3, 3), (6, 6), (3, 3), (12, 9)])
    together = vision(pictures)
    for picture, soft in zip(pictures, together, strict=True):
        torch.testing.assert_close(soft, vision([picture])[0], atol=1e-5, rtol=1e-5)
    backwards = vision(pictures[::-1])[::-1]
    for soft, other in zip(together, backwards, strict=True):
        torch.testing.assert_close(soft, other, atol=1e-5, rtol=1e-5)


def test_no_pictures_give_none():
    assert vision_like(ReferenceVision(SMALL, seed=1))([]) == []


def test_however_small_the_tiles_are_the_same_is_seen(monkeypatch):
    vision = vision_like(ReferenceVision(SMALL | {"standardize": True}, seed=8))
    pictures = random_pictures([(6, 9), (3, 3), (3, 18), (3, 3), (3, 3)])
    whole = vision(pictures)
    for rows in (1, 7, 18, 54, 60):
        monkeypatch.setattr(tower, "CPU_ROWS", rows)
        for tiled, soft in zip(vision(pictures), whole, strict=True):
            torch.testing.assert_close(tiled, soft, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("most", [1, 5, 9, 20, 54, 1000])
def test_tiles_are_all_patches_in_order_and_see_their_pictures(most):
    layout = Layout(((3, 3), (3, 3), (3, 3), (6, 9), (9, 6), (3, 27)))
    tiles = list(layout.tiles(most))
    assert [row for tile in tiles for row in range(tile.rows.start, tile.rows.stop)] == list(range(sum(layout.counts)))
    starts = [sum(layout.counts[:place]) for place in range(len(layout.counts) + 1)]
    for tile in tiles:
        first, last = starts.index(tile.seen.start), starts.index(tile.seen.stop)
        assert last - first == tile.pictures and len(set(layout.counts[first:last])) == 1
        assert tile.seen.start <= tile.rows.start < tile.rows.stop <= tile.seen.stop
        assert tile.pictures == 1 or tile.rows == tile.seen
        assert tile.rows.stop - tile.rows.start <= max(most, 9)


def test_packs_hold_no_more_patches_than_they_may_but_any_one_picture():
    counts = [3000, 7000, 90, 20_000, 5000, 5000]
    packs = list(tower._packs(sorted(range(6), key=counts.__getitem__), counts))
    assert sorted(place for pack in packs for place in pack) == list(range(6))
    assert all(sum(counts[place] for place in pack) <= tower.MOST_PATCHES or len(pack) == 1 for pack in packs)
    assert len(packs) == 4


def test_bfloat16_weights_come_near_float32_ones():
    reference = ReferenceVision(SMALL | {"standardize": True}, seed=2)
    pictures = random_pictures([(6, 9)])
    wide = vision_like(reference)(pictures)[0]
    narrow = vision_like(reference).to(torch.bfloat16)(pictures)[0]
    assert narrow.dtype == torch.bfloat16
    assert (narrow.float() - wide).norm() < 0.05 * wide.norm()


def test_weights_may_be_packed():
    sizes = SMALL | {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
    reference = ReferenceVision(sizes | {"standardize": True}, seed=4)
    vision, pictures = vision_like(reference), random_pictures([(6, 9), (3, 3)])
    plain = vision(pictures)
    q8_0 = BLOCK_TYPES["Q8_0"]
    for module in [module for module in vision.modules() if isinstance(module, Linear)]:
        module.pack("weight", PackedWeight(quantize(module.weight, q8_0), q8_0))
    for packed, soft in zip(vision(pictures), plain, strict=True):
        assert packed.dtype == torch.float32
        assert (packed - soft).norm() < 0.05 * soft.norm()


def test_gradients_reach_every_weight():
    vision = vision_like(ReferenceVision(SMALL | {"standardize": True}, seed=6)).requires_grad_(True)
    sum(soft.square().sum() for soft in vision(random_pictures([(6, 9), (3, 3)]))).backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in vision.parameters())


@pytest.mark.parametrize(("shape", "message"), [
    ((6, 9, 700), "a picture is patches [rows, columns, 768], got [6, 9, 700]"),
    ((54, 768), "a picture is patches"), ((6, 8, 768), "multiples of 3 patches"), ((0, 3, 768), "multiples of 3"),
    ((3, 66, 768), "at most 64"),
])
def test_what_the_tower_cannot_take_is_refused(shape, message):
    vision = Vision(vision_config(ReferenceVision(SMALL, seed=0)), TEXT_WIDTH)
    with pytest.raises(ValueError, match="^a picture") as caught:
        vision([torch.zeros(shape)])
    assert message in str(caught.value)


def test_the_real_tower_has_the_checkpoint_s_tensors():
    config = VisionConfig(hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16,
                          num_key_value_heads=16, head_dim=72, standardize=True)
    with torch.device("meta"):
        tensors = Vision(config, 2816).state_dict()
    assert len(tensors) == 356
    assert sum(tensor.numel() for name, tensor in tensors.items() if "vision_tower" in name) == 569_550_384
    assert list(tensors["vision_tower.patch_embedder.position_embedding_table"].shape) == [2, 10240, 1152]
    assert list(tensors["vision_tower.encoder.layers.26.mlp.down_proj.linear.weight"].shape) == [1152, 4304]
    assert list(tensors["embed_vision.embedding_projection.weight"].shape) == [2816, 1152]
