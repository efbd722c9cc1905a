"""The memory plan against exact counts: of real networks' tensors, of optimizers' states, of what autograd saves."""

import dataclasses
import json

import pytest
import torch

from dgemma.config import FULL, SLIDING, LayerConfig, ModelConfig
from dgemma.errors import DgemmaError
from dgemma.gguf.blocks import BLOCK_TYPES
from dgemma.gguf.quantize import quantize
from dgemma.kernels.packed import PackedWeight
from dgemma.memory import program_bytes
from dgemma.nn.adapters import AdapterConfig, adapter_parameters, adapters, attach
from dgemma.nn.packed import set_weights
from dgemma.train.checks.activations import Pass, Step, kept_by_block, widest
from dgemma.train.checks.plan import memory_plan, mixture, stored_types
from dgemma.train.optim.optimizers import Optimizers
from dgemma.train.recipe import OptimizerSettings
from support.reference import random_network, tiny_config

S, F = SLIDING, FULL


def lines(plan):
    return {line.name: line.nbytes for line in plan.lines}


def the_26b() -> ModelConfig:
    sliding, full = LayerConfig(S, 256, 8, 1e4, 1.0), LayerConfig(F, 512, 2, 1e6, 0.25)
    return ModelConfig(262_144, 2816, 2112, 16, 128, 8, 704, 1024,
                       tuple(full if i % 6 == 5 else sliding for i in range(30)))


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_take_what_attached_ones_do(dora):
    config = AdapterConfig(r=3, targets=("attention", "mlp", "experts", "self_conditioning"), dora=dora,
                           rank_pattern={"q_proj": 5})
    network = random_network(tiny_config())
    attach(network, config)
    real = sum(parameter.nbytes for parameter in adapter_parameters(network).values())
    assert lines(memory_plan(tiny_config(), adapter=config, context=8))["adapters"] == real


def test_weights_and_moments_take_what_a_trained_network_holds():
    network = random_network(tiny_config()).requires_grad_(True)
    planned = lines(memory_plan(tiny_config(), weights="F32", context=8))
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
    assert lines(memory_plan(config, weights="Q8_0", adapter=AdapterConfig(), context=8))["weights"] == real


def test_stored_types_are_those_of_the_checkpoint():
    from dgemma.weights.files import bundled_path

    types = stored_types(bundled_path("sudoku"))
    assert set(types.values()) <= {"F32", "BF16", "F16"} and "layers.0.experts.gate_up_proj" in types


@pytest.mark.parametrize(("dtype", "trained", "experts"), [
    (torch.bfloat16, ("attention", "mlp"), 32), (torch.float32, ("attention", "mlp", "experts"), 32),
    (torch.bfloat16, ("attention", "experts"), 8), (torch.float32, None, 32), (torch.float32, None, 8)])
def test_what_blocks_keep_is_what_autograd_saves(dtype, trained, experts):
    config = tiny_config(hidden_size=128, intermediate_size=96, head_dim=32, global_head_dim=64, num_experts=experts,
                         moe_intermediate_size=48, sliding_window=200, vocab_size=64)
    network = random_network(config).to(dtype)
    ranks = None
    if trained is None:
        network.requires_grad_(True)
    else:
        attach(network, AdapterConfig(r=4, targets=trained))
        ranks = dict.fromkeys(adapters(network), 4)
    own = {tensor.untyped_storage().data_ptr() for tensor in [*network.parameters(), *network.buffers()]}
    saved = {}

    def save(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        network.encode(torch.randint(64, (2, 96)), network.new_cache(2))
    real = sum(size for size, _ in saved.values())
    size = dtype.itemsize
    from dgemma.kernels.attention import fast_bf16

    narrow = 2 if size == 2 and fast_bf16() else 4
    step = Step(config, 96, 2, stream=size, product=size, attention=narrow, cached=size, ranks=ranks)
    planned = sum(sum(kept_by_block(step, layer, Pass(96, 0, True)).values()) for layer in range(3))
    assert planned == pytest.approx(real, rel=0.08)


def test_checkpointing_keeps_the_inputs_of_blocks():
    step = Step(the_26b(), 1024, checkpointing=True, ranks={})
    apart = dataclasses.replace(step, checkpointing=False)
    inputs = 30 * (1024 + 2 * 256) * 2816 * 2
    assert inputs <= widest(step, 0, 0, 0).kept + 30 * 512 * 2816 * 2 <= 2 * inputs
    assert widest(apart, 0, 0, 0).total > 5 * widest(step, 0, 0, 0).total


def test_the_26b_trains_packed_in_24_gb():
    plan = memory_plan(the_26b(), weights="Q4_K_M", adapter=AdapterConfig(r=16), context=1024)
    assert lines(plan)["weights"] == pytest.approx(16.8e9, rel=0.01)
    assert lines(plan)["runtime"] > program_bytes(262_144, training=True)
    assert plan.total < 24e9 and plan.advice(24_000_000_000) == ()
    with_experts = memory_plan(the_26b(), weights="Q4_K_M", context=1024,
                               adapter=AdapterConfig(r=16, targets=("attention", "mlp", "experts")))
    advice = with_experts.advice(24_000_000_000)
    assert with_experts.total > 24e9 and [step.change for step in advice] == ["rank 8"] and advice[-1].total < 24e9


def test_advice_is_ordered_and_ends_where_it_fits():
    plan = memory_plan(the_26b(), weights="BF16", adapter=AdapterConfig(), context=1024, micro_batch=4,
                       checkpointing=False)
    advice = plan.advice(24_000_000_000)
    totals = [plan.total, *(step.total for step in advice)]
    assert totals == sorted(totals, reverse=True) and totals[-2] > 24e9 >= totals[-1]
    assert advice[0].change == "checkpointing: on" and advice[-1].change == "the base packed as Q4_K_M"


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
    planned = lines(memory_plan(config, weights="BF16", context=8, accumulation=2, checkpointing=True))
    assert planned["gradients"] == at_most


def test_gradients_take_the_place_of_activations_only_without_accumulation():
    once, twice = (memory_plan(tiny_config(), weights="F32", context=8, accumulation=n) for n in (1, 2))
    assert once.total <= twice.total
    assert lines(twice)["gradients"] == lines(twice)["optimizer state"] // 2


def test_sharding_divides_what_is_plain_and_not_what_is_packed():
    alone, shared = (memory_plan(the_26b(), weights="BF16", context=256, ranks=n) for n in (1, 8))
    for name in ("weights", "masters", "optimizer state"):
        assert lines(shared)[name] == lines(alone)[name] // 8
    assert lines(shared)["gathered weights"] > 262_144 * 2816 * 2
    packed = memory_plan(the_26b(), weights="Q4_K_M", adapter=AdapterConfig(), context=256, ranks=8)
    assert lines(packed)["weights"] == pytest.approx(16.8e9, rel=0.01)


def test_a_plan_prints_and_is_json():
    plan = memory_plan(tiny_config(), adapter=AdapterConfig(), context=8, ema=True)
    assert f"{plan.total / 1e9:.2f} GB" in plan.text(1) and "does not fit" in plan.text(1)
    data = json.loads(json.dumps(plan.as_dict()))
    assert data["total"] == sum(line["nbytes"] for line in data["lines"]) and data["run"]["context"] == 8


@pytest.mark.parametrize(("change", "named"), [({"context": 0}, "context"), ({"optimizer": "sgd"}, "sgd"),
                                               ({"weights": "Q9"}, "Q9")])
def test_what_cannot_be_planned_is_named(change, named):
    with pytest.raises(DgemmaError, match=named):
        memory_plan(tiny_config(), **{"context": 8, **change})
