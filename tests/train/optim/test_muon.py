"""Muon's update: orthogonal, for matrices and stacks of them."""

import torch

from dgemma.train.optim.optimizers import Muon, Optimizers, orthogonalise
from dgemma.train.recipe import OptimizerSettings


def test_orthogonalised_matrices_have_singular_values_near_one():
    matrices = torch.randn(3, 24, 16, generator=torch.Generator().manual_seed(0))
    for shape in (matrices, matrices.mT):
        values = torch.linalg.svdvals(orthogonalise(shape).float())
        assert values.min() > 0.5
        assert values.max() < 1.4


def test_a_stack_is_updated_like_its_matrices_one_by_one():
    generator = torch.Generator().manual_seed(1)
    start, grad = torch.randn(2, 2, 8, 6, generator=generator)
    stack = torch.nn.Parameter(start.clone())
    single = [torch.nn.Parameter(matrix.clone()) for matrix in start]
    stack.grad = grad.clone()
    for parameter, part in zip(single, grad, strict=True):
        parameter.grad = part.clone()
    Muon([stack], lr=0.1, weight_decay=0.1).step()
    Muon(single, lr=0.1, weight_decay=0.1).step()
    torch.testing.assert_close(stack.data, torch.stack([p.data for p in single]), atol=2e-3, rtol=0)


def test_matrices_go_to_muon_and_everything_else_to_adamw():
    from support.reference import random_network, tiny_config

    network = random_network(tiny_config()).requires_grad_(True)
    muon, adam = Optimizers(network, OptimizerSettings(kind="muon")).all
    counts = [sum(len(group["params"]) for group in optimizer.param_groups) for optimizer in (muon, adam)]
    assert sum(counts) == len(list(network.parameters()))
    assert all(p.ndim >= 2 for group in muon.param_groups for p in group["params"])
    assert any(p is network.embed_tokens.weight for group in adam.param_groups for p in group["params"])
