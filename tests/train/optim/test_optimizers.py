"""Optimizers as one: schedules, float32 masters, running averages, and a memory that can be put away."""

import pytest
import torch
from torch import nn

from dgemma.errors import DgemmaError
from dgemma.train.optim.optimizers import Optimizers, learning_rate_factor
from dgemma.train.recipe import OptimizerSettings


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).to(dtype)


def trained(net, optimizers, steps, factor=1.0):
    x = torch.linspace(-1, 1, 12).view(2, 6).to(next(net.parameters()).dtype)
    for _ in range(steps):
        net(x).float().square().sum().backward()
        optimizers.step(factor)
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def test_another_optimizer_s_memory_is_refused_and_nothing_changes():
    net = network()
    first = Optimizers(net, OptimizerSettings(kind="adamw"))
    trained(net, first, 2)
    other = network()
    before = {name: p.detach().clone() for name, p in other.named_parameters()}
    with pytest.raises(DgemmaError, match="holds another optimizer's memory than that of muon"):
        Optimizers(other, OptimizerSettings(kind="muon")).load(first.tensors(), 2)
    assert all(torch.equal(p, before[name]) for name, p in other.named_parameters())


def test_the_linear_schedule_warms_up_stays_and_falls_to_zero():
    settings = OptimizerSettings(warmup_steps=10, schedule="linear", decay_fraction=0.5)
    factors = [learning_rate_factor(step, 100, settings) for step in range(101)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9:50] == [1.0] * 41
    assert factors[75] == pytest.approx(0.5)
    assert factors[100] == 0.0


def test_the_cosine_schedule_falls_from_the_warm_up_to_zero():
    settings = OptimizerSettings(warmup_steps=10, schedule="cosine")
    factors = [learning_rate_factor(step, 110, settings) for step in range(111)]
    assert factors[10] == 1.0
    assert factors[60] == pytest.approx(0.5)
    assert factors[110] == pytest.approx(0.0)
    assert factors == sorted(factors[:11]) + sorted(factors[11:], reverse=True)


def test_the_constant_schedule_stays():
    assert learning_rate_factor(99, 100, OptimizerSettings(schedule="constant")) == 1.0


def test_adamw_is_torch_s_own():
    net, other = network(), network()
    settings = OptimizerSettings(lr=0.01, weight_decay=0.1, betas=(0.9, 0.99))
    found = trained(net, Optimizers(net, settings), 5)
    matrices = [p for p in other.parameters() if p.ndim == 2]
    rest = [p for p in other.parameters() if p.ndim < 2]
    reference = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
                                  lr=0.01, betas=(0.9, 0.99))
    x = torch.linspace(-1, 1, 12).view(2, 6)
    for _ in range(5):
        reference.zero_grad()
        other(x).square().sum().backward()
        reference.step()
    for name, parameter in other.named_parameters():
        assert torch.equal(found[name], parameter), name


def test_muon_takes_matrices_and_adamw_the_rest():
    optimizers = Optimizers(network(), OptimizerSettings(kind="muon"))
    sizes = [[p.ndim for group in o.param_groups for p in group["params"]] for o in optimizers.all]
    assert sizes == [[2, 2], [1, 1]]


def test_what_is_frozen_is_not_touched():
    net = network()
    net[0].requires_grad_(False)
    before = net[0].weight.clone()
    found = trained(net, Optimizers(net, OptimizerSettings(lr=0.1, weight_decay=0.5)), 3)
    assert torch.equal(found["0.weight"], before)
    assert not torch.equal(found["2.weight"], network()[2].weight)


def test_small_steps_of_bfloat16_weights_add_up():
    net = network(torch.bfloat16)
    optimizers = Optimizers(net, OptimizerSettings(lr=1e-5))
    before = net[0].weight.clone()
    found = trained(net, optimizers, 300)
    assert found["0.weight"].dtype == torch.bfloat16
    moved = (found["0.weight"] - before).abs().max().item()
    assert 1e-3 < moved < 5e-3  # 300 steps of 1e-5; rounded one by one, none of them is felt


def test_the_average_is_in_place_within_and_gone_afterwards():
    net = network()
    optimizers = Optimizers(net, OptimizerSettings(lr=0.1, ema=0.5))
    seen = [trained(net, optimizers, 1)["0.weight"] for _ in range(3)]
    start = network()[0].weight.detach()
    average = start
    for step, weight in enumerate(seen, start=1):
        decay = min(0.5, step / (step + 10))
        average = average * decay + weight * (1 - decay)
    with optimizers.averaged():
        torch.testing.assert_close(net[0].weight.detach(), average)
    assert torch.equal(net[0].weight, seen[-1])


@pytest.mark.parametrize("settings", [OptimizerSettings(lr=0.05, ema=0.9), OptimizerSettings(kind="muon", lr=0.01)],
                         ids=["adamw with an average", "muon"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_memory_put_away_and_taken_up_goes_on_to_the_bit(settings, dtype):
    whole = network(dtype)
    optimizers = Optimizers(whole, settings)
    trained(whole, optimizers, 3)
    kept = {name: tensor.clone() for name, tensor in optimizers.tensors().items()}
    expected = trained(whole, optimizers, 3)
    other = network(dtype)
    again = Optimizers(other, settings)
    again.load(kept, 3)
    found = trained(other, again, 3)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert all(torch.equal(tensor, again.tensors()[name]) for name, tensor in optimizers.tensors().items())


def test_a_memory_of_other_parameters_is_refused():
    optimizers = Optimizers(network(), OptimizerSettings())
    other = Optimizers(nn.Sequential(nn.Linear(6, 9)), OptimizerSettings())
    with pytest.raises(DgemmaError, match=r"was made by another model.*parameters/0\.bias"):
        other.load(optimizers.tensors(), 1)
    with pytest.raises(DgemmaError, match="average"):
        Optimizers(network(), OptimizerSettings(ema=0.5)).load(optimizers.tensors(), 1)


def test_gradients_of_bfloat16_weights_are_summed_in_float32():
    net = network(torch.bfloat16)
    optimizers = Optimizers(net, OptimizerSettings())
    wanted = torch.zeros(8, 6)
    for part in range(20):
        x = torch.linspace(-1, 1, 12).view(2, 6).to(torch.bfloat16) * (1 + part)
        net(x).float().square().sum().backward()
        wanted += net[0].weight.grad.float()
        optimizers.gather()
        assert net[0].weight.grad is None
    assert torch.equal(optimizers.masters["0.weight"].grad, wanted)
