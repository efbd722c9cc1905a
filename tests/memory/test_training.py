"""What training takes, against exact counts: of real networks' tensors, of what optimizers hold."""

import pytest
import torch

from dgemma.gguf.blocks import BLOCK_TYPES
from dgemma.gguf.quantize import quantize
from dgemma.kernels.packed import PackedWeight
from dgemma.memory.training import TrainingRun, training_memory
from dgemma.nn.adapters import AdapterConfig, adapter_parameters, attach
from dgemma.nn.packed import set_weights
from dgemma.train.checks.plan import mixture
from dgemma.train.optim.optimizers import Optimizers
from dgemma.train.recipe import OptimizerSettings
from support.reference import random_network, the_26b, tiny_config


def taken(config, weights="BF16", adapter=None, **settings):
    """Bytes by what they are for."""
    return {use.name: use.nbytes
            for use in training_memory(TrainingRun(config, mixture(config, weights), adapter, **settings))}


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_take_what_attached_ones_do(dora):
    config = AdapterConfig(r=3, targets=("attention", "mlp", "experts", "self_conditioning"), dora=dora,
                           rank_pattern={"q_proj": 5})
    network = random_network(tiny_config())
    attach(network, config)
    real = sum(parameter.nbytes for parameter in adapter_parameters(network).values())
    assert taken(tiny_config(), adapter=config, context=8)["adapters"] == real


def test_weights_and_moments_take_what_a_trained_network_holds():
    network = random_network(tiny_config()).requires_grad_(True)
    planned = taken(tiny_config(), weights="F32", context=8)
    assert planned["weights"] == sum(tensor.nbytes for tensor in network.state_dict().values())
    optimizer = torch.optim.AdamW(network.parameters())
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moments = sum(value.nbytes for state in optimizer.state.values() for key, value in state.items() if key != "step")
    assert planned["optimizer state"] == moments


def test_packed_weights_take_their_packed_size():
    config = tiny_config(hidden_size=64, intermediate_size=32, moe_intermediate_size=32, head_dim=16,
                         global_head_dim=32)
    types, network = mixture(config, "Q8_0"), random_network(config)
    weights = {name: tensor if types[name] == "F32" else PackedWeight(quantize(tensor, BLOCK_TYPES[types[name]]),
                                                                      BLOCK_TYPES[types[name]])
               for name, tensor in network.state_dict().items()}
    set_weights(network, weights)
    real = sum(tensor.nbytes for tensor in network.state_dict().values())
    assert taken(config, weights="Q8_0", adapter=AdapterConfig(), context=8)["weights"] == real


def test_gradients_that_accumulate_are_summed_beside_those_of_narrow_weights():
    config = tiny_config(hidden_size=512, intermediate_size=512)  # so that weights outweigh activations
    network = random_network(config).bfloat16().requires_grad_(True)
    optimizers = Optimizers(network, OptimizerSettings())
    for _ in range(2):
        for parameter in network.parameters():
            parameter.grad = torch.ones_like(parameter)
        at_most = sum(p.grad.nbytes for p in [*network.parameters(), *optimizers.masters.values()]
                      if p.grad is not None)
        optimizers.gather()
    planned = taken(config, weights="BF16", context=8, accumulation=2, checkpointing=True)
    assert planned["gradients"] == at_most


def test_gradients_take_the_place_of_activations_only_without_accumulation():
    once, twice = (taken(tiny_config(), weights="F32", context=8, accumulation=n) for n in (1, 2))
    assert sum(once.values()) <= sum(twice.values())
    assert twice["gradients"] == twice["optimizer state"] // 2


def test_sharding_divides_what_is_plain_and_not_what_is_packed():
    alone, shared = (taken(the_26b(), weights="BF16", context=256, ranks=n) for n in (1, 8))
    for name in ("weights", "masters", "optimizer state"):
        assert shared[name] == alone[name] // 8
    assert shared["gathered weights"] > 262_144 * 2816 * 2
    packed = taken(the_26b(), weights="Q4_K_M", adapter=AdapterConfig(), context=256, ranks=8)
    assert packed["weights"] == pytest.approx(16.8e9, rel=0.01)
