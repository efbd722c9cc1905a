"""Grouped-query attention against repeated key-value heads and a softmax written out."""

import pytest
import torch

from dgemma.kernels import grouped_attention

HEADS = [(1, 1), (4, 4), (4, 2), (6, 2), (8, 1)]


def inputs(heads: int, kv_heads: int, batch=2, length=5, seen=9, dim=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(heads * 10 + kv_heads)
    query = torch.randn(batch, length, heads, dim, generator=generator)
    key, value = (torch.randn(batch, kv_heads, seen, dim, generator=generator) for _ in range(2))
    return query.to(dtype), key.to(dtype), value.to(dtype)


def mask(kind: str, batch=2, length=5, seen=9):
    """Boolean masks [B or 1, T or 1, S] of every shape that the network makes; no row of them is empty."""
    if kind == "none":
        return None
    generator = torch.Generator().manual_seed(1)
    shape = {"per-query": (batch, length, seen), "per-row": (batch, 1, seen), "shared": (1, length, seen),
             "rectangle": (1, 1, seen)}[kind]
    visible = torch.rand(shape, generator=generator) < 0.6
    visible[..., -1] = True
    return visible


MASKS = ["none", "per-query", "per-row", "shared", "rectangle"]


def naive(query, key, value, visible):
    batch, length, heads, dim = query.shape
    group = heads // key.shape[1]
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    scores = query.transpose(1, 2) @ key.transpose(2, 3)
    if visible is not None:
        scores = scores.masked_fill(~visible.unsqueeze(1), -torch.inf)
    out = scores.softmax(-1) @ value
    return out.transpose(1, 2).reshape(batch, length, heads * dim)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_the_softmax_written_out(heads, kind, training):
    query, key, value = (tensor.requires_grad_(training) for tensor in inputs(*heads))
    with torch.set_grad_enabled(training):
        out = grouped_attention(query, key, value, mask(kind))
    assert out.requires_grad == training
    torch.testing.assert_close(out, naive(query, key, value, mask(kind)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", MASKS)
def test_the_training_path_has_the_right_gradients(kind):
    def gradients(function):
        leaves = [tensor.requires_grad_() for tensor in inputs(6, 2)]
        function(*leaves, mask(kind)).square().sum().backward()
        return [leaf.grad for leaf in leaves]

    for ours, theirs in zip(gradients(grouped_attention), gradients(naive), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_what_is_hidden_does_not_matter():
    query, key, value = inputs(4, 2)
    visible = mask("per-row")
    visible[:, :, :3] = False
    with torch.no_grad():
        before = grouped_attention(query, key, value, visible)
        key[:, :, :3], value[:, :, :3] = 1e4, 1e4
        assert torch.equal(grouped_attention(query, key, value, visible), before)


def test_keys_may_be_a_view_into_a_larger_tensor():
    """The cache hands out its columns without the room behind them."""
    query, key, value = inputs(4, 2)
    roomy = [torch.cat([tensor, torch.full_like(tensor, 1e9)], dim=2)[:, :, :9] for tensor in (key, value)]
    with torch.no_grad():
        torch.testing.assert_close(grouped_attention(query, *roomy, None), grouped_attention(query, key, value, None))


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_bfloat16_is_close_to_float32(training):
    narrow = [tensor.requires_grad_(training) for tensor in inputs(8, 2, dtype=torch.bfloat16)]
    with torch.set_grad_enabled(training):
        out = grouped_attention(*narrow, mask("per-query"))
    assert out.dtype == torch.bfloat16
    wanted = naive(*(tensor.float() for tensor in narrow), mask("per-query"))
    torch.testing.assert_close(out.float(), wanted, atol=0.05, rtol=0.05)
