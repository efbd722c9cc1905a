"""Adapters on the network: nothing at first, then exactly W + s·B·A (or DoRA's form), trained without the base."""

import copy

import pytest
import torch

from dgemma.errors import DgemmaError
from dgemma.gguf.blocks import BLOCK_TYPES
from dgemma.gguf.quantize import quantize
from dgemma.kernels import PackedWeight, linear
from dgemma.nn.adapters import (
    AdapterConfig,
    adaptable,
    adapter_parameters,
    adapters,
    attach,
    detach,
    merge,
)
from dgemma.nn.packed import set_weights
from dgemma.weights.gguf_model import is_matrix
from dgemma.weights.load import empty_network
from support.reference import random_network, tiny_config

EVERYTHING = ("attention", "mlp", "self_conditioning", "experts")


@pytest.fixture(scope="module", params=[4, 20], ids=["dense-experts", "grouped-experts"])
def network(request):
    return random_network(tiny_config(num_experts=request.param))


@pytest.fixture(params=[False, True], ids=["lora", "dora"])
def dora(request):
    return request.param


def adapted(network, **settings):
    network = copy.deepcopy(network)
    attach(network, AdapterConfig(**{"r": 3, "alpha": 6, "targets": EVERYTHING} | settings))
    return network


def stirred(network, size=0.1):
    """Random numbers in every adapter, as if it had been trained."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in adapter_parameters(network).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * size)
    return network


def forward(network, ids):
    """Logits of a prompt and of a canvas after it, with self-conditioning: every matrix, in both passes."""
    generator = torch.Generator().manual_seed(1)
    prompt, canvas = (torch.randint(50, (2, n), generator=generator) for n in ids)
    soft = torch.randn(2, ids[1], network.config.hidden_size, generator=generator)
    cache = network.new_cache(2)
    encoded = network.encode(prompt, cache)
    return torch.cat([network.logits(encoded), network.logits(network.denoise(canvas, cache, soft))], dim=1)


@torch.no_grad()
def logits(network):
    return forward(network, (11, 8))


def by_hand(network, name, number):
    """The adapted matrix of a name, whole: the ``number``-th of a stack."""
    module, attribute = adaptable(network)[name]
    weight, adapter = getattr(module, attribute).detach(), adapters(network)[name]
    a, b, m = adapter.a, adapter.b, adapter.magnitude
    if weight.ndim == 3:
        weight, a, b, m = weight[number], a[number], b[number], None if m is None else m[number]
    changed = weight + adapter.scale * (b @ a)
    return changed if m is None else m.unsqueeze(1) * changed / changed.norm(dim=1, keepdim=True)


def test_at_first_nothing_changes_bit_for_bit(network, dora):
    assert torch.equal(logits(adapted(network, dora=dora)), logits(network))


def test_bfloat16_base_keeps_float32_adapters(network, dora):
    half = copy.deepcopy(network).bfloat16()
    changed = adapted(half, dora=dora)
    assert {p.dtype for p in adapter_parameters(changed).values()} == {torch.float32}
    assert torch.equal(logits(changed), logits(half))


def test_it_is_the_network_with_the_changed_weights(network, dora):
    changed = stirred(adapted(network, dora=dora))
    plain = copy.deepcopy(network)
    with torch.no_grad():
        for name, (module, attribute) in adaptable(plain).items():
            weight = getattr(module, attribute)
            for number in range(len(weight) if weight.ndim == 3 else 1):
                (weight[number] if weight.ndim == 3 else weight).copy_(by_hand(changed, name, number))
    wanted = logits(plain)
    assert (wanted - logits(network)).abs().max() > 0.5
    torch.testing.assert_close(logits(changed), wanted, atol=1e-4, rtol=0)


def test_merging_gives_the_same_and_leaves_a_plain_network(network, dora):
    changed = stirred(adapted(network, dora=dora))
    wanted = logits(changed)
    merge(changed)
    assert not adapters(changed) and changed.state_dict().keys() == network.state_dict().keys()
    torch.testing.assert_close(logits(changed), wanted, atol=1e-4, rtol=0)


def test_detaching_gives_the_network_back(network, dora):
    changed = stirred(adapted(network, dora=dora))
    detach(changed)
    assert torch.equal(logits(changed), logits(network))
    attach(changed, AdapterConfig())  # and there is room again


def test_every_adapter_learns_and_nothing_else(network, dora):
    changed = stirred(adapted(copy.deepcopy(network).requires_grad_(True), dora=dora), size=0.01)
    before = copy.deepcopy(network.state_dict())
    mine = adapter_parameters(changed)
    assert {name for name, p in changed.named_parameters() if p.requires_grad} == {
        name for name, _ in changed.named_parameters() if ".adapter." in name}
    optimizer = torch.optim.AdamW(mine.values(), lr=1e-2)
    losses = []
    for _ in range(3):
        out = forward(changed, (11, 8))
        loss = torch.nn.functional.cross_entropy(out.flatten(0, 1), torch.full((out.shape[0] * out.shape[1],), 7))
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        for name, parameter in mine.items():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().max() > 0, name
        optimizer.step()
    assert losses[2] < losses[1] < losses[0]
    for name, tensor in before.items():
        assert torch.equal(changed.state_dict()[name], tensor), name


def test_gradients_are_those_of_the_changed_matrix():
    """Of LoRA into A and B; of DoRA too, with the rows' lengths held constant."""
    network = random_network(tiny_config())
    for dora in (False, True):
        changed = stirred(adapted(network, dora=dora, targets=("layers.0.mlp.up_proj",)))
        module = adaptable(changed)["layers.0.mlp.up_proj"][0]
        adapter = adapters(changed)["layers.0.mlp.up_proj"]
        x = torch.randn(5, 24, generator=torch.Generator().manual_seed(2))
        module(x).square().sum().backward()
        ours = {name: p.grad.clone() for name, p in adapter.named_parameters()}
        adapter.zero_grad()
        matrix = module.weight + adapter.scale * adapter.b @ adapter.a
        if dora:
            matrix = adapter.magnitude.unsqueeze(1) * matrix / matrix.norm(dim=1, keepdim=True).detach()
        (x @ matrix.T).square().sum().backward()
        for name, parameter in adapter.named_parameters():
            torch.testing.assert_close(ours[name], parameter.grad, atol=1e-4, rtol=1e-4)


def test_dora_notices_that_its_factors_changed():
    """The rows' lengths are remembered between passes without gradients, but never those of other factors."""
    changed = adapted(random_network(tiny_config()), dora=True)
    logits(changed)
    stirred(changed)
    again = copy.deepcopy(changed)
    for adapter in adapters(again).values():
        adapter._lengths.clear()
    assert torch.equal(logits(changed), logits(again))


def test_dropout_is_for_training_only(network):
    changed = stirred(adapted(network, dropout=0.5))
    plain = stirred(adapted(network))
    assert torch.equal(logits(changed), logits(plain))
    changed.train()
    assert not torch.equal(logits(changed), logits(plain))


def test_ranks_and_scales():
    changed = adapted(random_network(tiny_config()), r=4, alpha=8, rslora=True, rank_pattern={"experts.down_proj": 2},
                      alpha_pattern={r"layers\.1\.mlp\.up_proj": 3.0})
    found = adapters(changed)
    assert found["layers.0.experts.down_proj"].a.shape == (4, 2, 16)
    assert found["layers.0.experts.down_proj"].scale == pytest.approx(8 / 2**0.5)
    assert found["layers.1.mlp.up_proj"].scale == 1.5
    assert found["layers.2.mlp.up_proj"].scale == 4.0
    assert AdapterConfig(r=4, alpha=8).scale_of("x") == 2.0


def test_targets_are_groups_or_names():
    def names(*targets):
        return list(adapters(adapted(random_network(tiny_config()), targets=targets)))

    assert names("self_conditioning") == [f"self_conditioning.{part}_proj" for part in ("gate", "up", "down")]
    assert names("layers.1.self_attn.q_proj", "v_proj") == [
        "layers.0.self_attn.v_proj", "layers.1.self_attn.q_proj", "layers.1.self_attn.v_proj"]
    assert len(names("experts")) == 6 and len(names("mlp")) == 9 and len(names("attention")) == 11
    assert not any("router" in name for name in names(*EVERYTHING))


@pytest.mark.parametrize(("settings", "message"), [
    ({"r": 0}, "rank r must be a whole number from 1, got 0"),
    ({"rank_pattern": {"x": 0}}, "got 0"),
    ({"alpha": float("nan")}, "alpha must be a number"),
    ({"dropout": 1.0}, "less than 1, got 1.0"),
    ({"targets": "mlp"}, "must be a list of names"),
    ({"targets": ("router.proj",)}, "nothing called 'router.proj' to adapt"),
])
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(DgemmaError, match=message):
        adapted(random_network(tiny_config()), **settings)


def test_one_adapter_at_a_time():
    changed = adapted(random_network(tiny_config()))
    with pytest.raises(DgemmaError, match="has an adapter already"):
        attach(changed, AdapterConfig())


# Packed weights: QLoRA.

WIDE = tiny_config(hidden_size=256, intermediate_size=512, moe_intermediate_size=256, head_dim=64,
                   global_head_dim=128, num_experts=3, top_k_experts=3)


@pytest.fixture(scope="module")
def packed():
    weights = {name: PackedWeight(quantize(tensor, BLOCK_TYPES["Q4_K"]), BLOCK_TYPES["Q4_K"])
               if is_matrix(name, tuple(tensor.shape)) else tensor
               for name, tensor in random_network(WIDE, feedback=0.2).state_dict().items()}
    network = empty_network(WIDE)
    set_weights(network, weights)
    return network.eval().requires_grad_(False)


@pytest.fixture(params=["kernels", "plain-torch"])
def kernels(request, plain_torch):
    if request.param == "plain-torch":
        plain_torch()


def unpacked(network):
    """The same network, with the same adapters, over the numbers that its packed weights stand for."""
    plain = random_network(WIDE)
    with torch.no_grad():
        for name, tensor in plain.state_dict().items():
            owner, _, attribute = name.rpartition(".")
            weight = getattr(network.get_submodule(owner), attribute)
            tensor.copy_(weight.dequantize() if isinstance(weight, PackedWeight) else weight)
    return plain


@pytest.mark.parametrize(("narrow", "error"), [(False, 1e-6), (True, 5e-3)], ids=["float32", "bfloat16"])
def test_the_gradient_through_a_packed_product_is_the_matrix(kernels, narrow, error, monkeypatch):
    """Exact but for the rounding of both factors to bfloat16 where the processor multiplies that faster."""
    monkeypatch.setattr("dgemma.kernels.products.fast_bf16", lambda: narrow)
    monkeypatch.setattr("dgemma.kernels.products.PIECE", 1000)  # several pieces, the last one short
    generator = torch.Generator().manual_seed(0)
    weight = PackedWeight(quantize(torch.randn(37, 256, generator=generator), BLOCK_TYPES["Q6_K"]),
                          BLOCK_TYPES["Q6_K"])
    x = torch.randn(2, 5, 256, generator=generator).requires_grad_()
    gradient = torch.randn(2, 5, 37, generator=generator)
    linear(x, weight).backward(gradient)
    wanted = gradient @ weight.dequantize()
    assert x.grad is not None and (x.grad - wanted).norm() < error * wanted.norm()


@pytest.mark.parametrize("targets", [EVERYTHING, ("self_conditioning", "attention")],
                         ids=["everything", "not-the-experts"])
def test_a_packed_base_trains_as_the_plain_one(packed, kernels, dora, targets):
    """The way there rounds activations to int8, which turns gradients by a few per cent."""
    ours = stirred(adapted(packed, dora=dora, targets=targets), size=0.02)
    theirs = stirred(adapted(unpacked(packed), dora=dora, targets=targets), size=0.02)
    for network in (ours, theirs):
        out = forward(network, (11, 8)).flatten(0, 1)
        torch.nn.functional.cross_entropy(out, torch.arange(len(out)) % 50).backward()
    wanted = adapter_parameters(theirs)
    for name, parameter in adapter_parameters(ours).items():
        assert parameter.grad is not None, name
        cosine = torch.cosine_similarity(parameter.grad.flatten(), wanted[name].grad.flatten(), dim=0)
        assert cosine > 0.98, (name, cosine)


def test_training_and_inference_agree_over_a_packed_base(packed, dora):
    changed = stirred(adapted(packed, dora=dora), size=0.02)
    trained = forward(changed, (11, 8)).detach()
    wanted = logits(changed)
    assert (trained - wanted).norm() < 0.03 * wanted.norm()


def test_a_packed_base_cannot_be_merged_in_place(packed):
    changed = adapted(packed)
    with pytest.raises(DgemmaError, match="is packed, and an adapter cannot be merged"):
        merge(changed)
    assert adapters(changed)
