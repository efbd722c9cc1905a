"""The two ways to run the experts, against a loop over tokens and their experts."""

import pytest
import torch
import torch.nn.functional as F

from dgemma.kernels import experts as experts_module
from dgemma.kernels.experts import DENSE_EXPERTS, dense_expert_mlp, expert_mlp, grouped_expert_mlp, sorted_expert_mlp

SIZES = [(1, 1, 1), (7, 4, 2), (5, 16, 16), (40, 17, 3), (9, 64, 8)]


def inputs(tokens: int, count: int, top_k: int, dtype=torch.float32, hidden=12, inner=10):
    generator = torch.Generator().manual_seed(tokens + count)
    x = torch.randn(tokens, hidden, generator=generator)
    gate_up = torch.randn(count, 2 * inner, hidden, generator=generator) * hidden**-0.5
    down = torch.randn(count, hidden, inner, generator=generator) * inner**-0.5
    experts = torch.stack([torch.randperm(count, generator=generator)[:top_k] for _ in range(tokens)])
    weights = torch.rand(tokens, top_k, generator=generator) + 0.1  # after per_expert_scale they need not sum to 1
    return x.to(dtype), gate_up.to(dtype), down.to(dtype), weights, experts


def naive(x, gate_up, down, weights, experts):
    rows = []
    for token, chosen in enumerate(experts.tolist()):
        row = torch.zeros_like(x[token])
        for place, expert in enumerate(chosen):
            gate, up = (gate_up[expert] @ x[token]).chunk(2)
            row = row + weights[token, place] * (down[expert] @ (F.gelu(gate, approximate="tanh") * up))
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("path", [dense_expert_mlp, grouped_expert_mlp, expert_mlp])
def test_every_path_is_the_loop(path, size):
    arguments = inputs(*size)
    torch.testing.assert_close(path(*arguments), naive(*arguments), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_one_product_over_all_experts_is_the_loop(size):
    arguments = inputs(*size, hidden=16, inner=8)
    torch.testing.assert_close(sorted_expert_mlp(*arguments), naive(*arguments), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("path", [dense_expert_mlp, grouped_expert_mlp])
def test_every_path_has_the_loop_s_gradients(path):
    """Into the tokens, both expert matrices and the router's weights."""
    *tensors, experts = inputs(9, 5, 2)

    def gradients(function):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        function(*leaves, experts).square().sum().backward()
        return [leaf.grad for leaf in leaves]

    for ours, theirs in zip(gradients(path), gradients(naive), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_frozen_experts_have_the_loop_s_gradients():
    """Into the tokens and the router's weights, without anything of the experts kept but their gates and ups."""
    x, gate_up, down, weights, experts = inputs(40, 20, 3)

    def gradients(function):
        leaves = [x.clone().requires_grad_(), weights.clone().requires_grad_()]
        out = function(leaves[0], gate_up, down, leaves[1], experts)
        out.square().sum().backward()
        return [out.detach(), *(leaf.grad for leaf in leaves)]

    for ours, theirs in zip(gradients(expert_mlp), gradients(naive), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("path", [dense_expert_mlp, grouped_expert_mlp])
def test_bfloat16_is_close_to_float32(path):
    x, gate_up, down, weights, experts = inputs(20, 8, 2, torch.bfloat16)
    out = path(x, gate_up, down, weights, experts)
    assert out.dtype == torch.bfloat16
    wanted = naive(x.float(), gate_up.float(), down.float(), weights, experts)
    torch.testing.assert_close(out.float(), wanted, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("path", [dense_expert_mlp, grouped_expert_mlp])
def test_an_expert_that_nobody_chose_does_not_matter(path):
    x, gate_up, down, weights, experts = inputs(6, 6, 2)
    experts = torch.tensor([[0, 1], [2, 3]] * 3)
    before = path(x, gate_up, down, weights, experts)
    gate_up[4:], down[4:] = 1e6, 1e6
    torch.testing.assert_close(path(x, gate_up, down, weights, experts), before, atol=1e-5, rtol=1e-5)


def test_many_experts_take_the_grouped_path(monkeypatch):
    taken = []
    for name in ("dense_expert_mlp", "grouped_expert_mlp"):
        monkeypatch.setattr(experts_module, name, lambda *_, name=name: taken.append(name))
    for count in (DENSE_EXPERTS, DENSE_EXPERTS + 1):
        expert_mlp(*inputs(3, count, 2))
    assert taken == ["dense_expert_mlp", "grouped_expert_mlp"]
