"""What a step holds, against what autograd saves."""

import dataclasses

import pytest
import torch

from dgemma.memory.activations import Pass, Step, kept_by_block, widest
from dgemma.nn.adapters import AdapterConfig, adapters, attach
from support.reference import random_network, the_26b, tiny_config


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
