"""The vision benchmark's two sides do the same work."""

import pytest
import torch
import vision


@pytest.mark.parametrize("name", ["280", "film"])
def test_both_sides_make_as_many_soft_tokens_of_the_text_networks_width(name):
    patches = vision.patches_of(name, frames=2)[:, :6, :9]
    with torch.inference_mode():
        ours, theirs = (torch.cat(list(side(1, patches)())) if side is vision.ours else side(1, patches)()
                        for side in (vision.ours, vision.theirs))
    assert ours.shape == theirs.shape == (len(patches) * 2 * 3, vision.TEXT_WIDTH)
    assert ours.isfinite().all() and theirs.isfinite().all()


def test_operations_grow_with_layers_and_frames():
    one = vision.operations(1, "film", 1)
    assert vision.operations(1, "film", 3) == pytest.approx(3 * one)
    assert one < vision.operations(2, "film", 1) < 2 * one
