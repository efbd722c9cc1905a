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


def test_a_second_question_reads_only_what_is_behind_the_picture():
    text = {"vocab_size": 6_000, "hidden_size": vision.TEXT_WIDTH, "intermediate_size": 8, "num_hidden_layers": 1,
            "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8, "global_head_dim": 8,
            "num_global_key_value_heads": 1, "sliding_window": 8, "num_experts": 2, "top_k_experts": 1,
            "moe_intermediate_size": 8, "layer_types": ["full_attention"]}
    [[*_, first]], [[*_, second]] = vision.again(1, text, rounds=1, budget=70).values()
    assert (first, second) == (2 * vision.QUESTION + 11 * 6, vision.QUESTION)


def test_operations_grow_with_layers_and_frames():
    one = vision.operations(1, "film", 1)
    assert vision.operations(1, "film", 3) == pytest.approx(3 * one)
    assert one < vision.operations(2, "film", 1) < 2 * one
