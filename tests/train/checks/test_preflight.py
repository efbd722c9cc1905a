"""The preflight passes what is right, and catches each of the bugs that the public recipes had, planted here."""

import copy
import dataclasses

import pytest
import torch

from dgemma.config import FULL
from dgemma.errors import DgemmaError
from dgemma.nn import DiffusionTransformer, KVCache
from dgemma.nn.adapters import AdapterConfig, LowRank, attach, merge
from dgemma.nn.passes import Passes
from dgemma.train.batch import collate
from dgemma.train.checks.bench import Bench
from dgemma.train.checks.preflight import require, run_preflight
from dgemma.train.checks.sampling import training_equals_sampling
from dgemma.train.objective import Objective, batch_loss
from support.reference import random_network, tiny_config
from support.token_examples import Example, random_example

VOCAB, CANVAS, WINDOW = 50, 8, 6


def example(length, real=CANVAS, seed=0):
    return random_example(length, CANVAS, VOCAB, real, length - 1, 0.5, seed)


EXAMPLES = [example(4), example(5, real=3), example(3)]  # all within the window: the checks go past it themselves


@pytest.fixture
def network():
    return random_network(tiny_config()).requires_grad_(True)


def network_with(cache):
    """The network, but its caches are of this kind."""
    class Network(DiffusionTransformer):
        def new_cache(self, batch_size=1, spare=0, **sizes):
            return cache(self.config, batch_size, self.device, self.cache_type, spare, **sizes)

    return random_network(tiny_config(), kind=Network).requires_grad_(True)


def failed(network, examples=EXAMPLES, objective=None, **arguments):
    return {check.name for check in run_preflight(network, examples, objective, **arguments) if not check.passed}


@pytest.mark.parametrize("objective", [
    Objective(), Objective(causal_weight=0.0), Objective(prediction="leave_one_out"),
    Objective(passes=3, rollout=0.7, t_min=0.5, causal_weight=0.0), Objective(self_conditioning_probability=0.0),
], ids=["default", "no-causal", "leave-one-out", "chain", "unconditioned"])
def test_what_is_right_passes(network, objective):
    assert failed(network, objective=objective) == set()


@pytest.mark.parametrize("shape", [dict(layer_types=["full_attention"] * 2, num_hidden_layers=2), dict(num_experts=20),
                                   dict(vocab_size=5000)], ids=["all-full", "grouped-experts", "head-in-tiles"])
def test_other_networks_pass(shape):
    assert failed(random_network(tiny_config(**shape)).requires_grad_(True)) == set()


def test_contexts_past_the_window_and_a_frozen_part_pass(network):
    network.embed_tokens.requires_grad_(False)
    assert failed(network, [example(30), example(7)]) == set()


def test_a_network_with_adapters_passes(network):
    attach(network, AdapterConfig(r=2, alpha=4, dropout=0.5))
    assert failed(network.train()) == set()
    assert network.training


def test_the_network_and_the_optimizer_are_left_as_they_were(network):
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
    before = copy.deepcopy((network.state_dict(), optimizer.state_dict()))
    attributes = set(vars(network))
    run_preflight(network, EXAMPLES, optimizers=[optimizer])
    after = network.state_dict(), optimizer.state_dict()
    assert all(torch.equal(after[0][name], tensor) for name, tensor in before[0].items())
    assert after[1]["state"] == before[1]["state"] == {}
    assert set(vars(network)) == attributes
    assert all(parameter.grad is None for parameter in network.parameters())


def turn(prompt=9, canvases=3):
    """The canvases of one turn, which share a reading."""
    ids = torch.randint(VOCAB, (prompt + canvases * CANVAS,), generator=torch.Generator().manual_seed(7)).tolist()
    return [Example(ids[:start], ids[start : start + CANVAS], [1.0] * CANVAS, prompt, CANVAS)
            for start in range(prompt, len(ids), CANVAS)]


def test_turns_of_several_canvases_pass(network):
    assert failed(network, [example(5), *turn(), example(30)]) == set()


def test_a_canvas_of_which_only_the_last_token_counts_passes(network):
    assert failed(network, [dataclasses.replace(example(5), weights=[0.0] * (CANVAS - 1) + [1.0])]) == set()


def test_the_autoregressive_baseline_passes(network):
    checks = run_preflight(network, EXAMPLES, Objective(denoising_weight=0.0))
    assert [check.name for check in checks if check.passed] == [
        "adapters count once", "checkpointing changes nothing", "frozen stays frozen"] and len(checks) == 3


class Saved:
    """Counts what autograd holds: ``most`` bytes at a time, each tensor's storage once."""

    def __init__(self):
        self.held, self.now, self.most = {}, 0, 0

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda box: box[0])
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)

    def pack(self, tensor):
        place = tensor.untyped_storage().data_ptr()
        self.held[place] = self.held.get(place, 0) + 1
        if self.held[place] == 1:
            self.now += tensor.untyped_storage().nbytes()
            self.most = max(self.most, self.now)
        box = [tensor]
        return Box(box[0], lambda: self.let_go(place, tensor.untyped_storage().nbytes()))

    def let_go(self, place, nbytes):
        self.held[place] -= 1
        if not self.held[place]:
            self.now -= nbytes


class Box(list):
    """A tensor that says when nobody needs it any more."""

    def __init__(self, tensor, gone):
        super().__init__([tensor])
        self.gone = gone

    def __del__(self):
        self.gone()


@pytest.mark.parametrize(("checkpointing", "most"), [(False, 1.01), (True, 0.25)])
def test_it_takes_no_more_memory_than_a_training_step(checkpointing, most):
    """With checkpointing no more than one block of twelve is looked at without."""
    network = random_network(tiny_config(num_hidden_layers=12, layer_types=["sliding_attention", "full_attention"] * 6))
    network.requires_grad_(True)
    examples = [example(70), example(70, seed=1)]  # past the window already
    bench = Bench(network, Passes.of(network), collate(examples), Objective())
    with Saved() as step:
        bench.gradients()
    with Saved() as checks:
        run_preflight(network, examples, passes=Passes.of(network, checkpointing))
    assert 0 < checks.most <= most * step.most


def test_short_contexts_are_not_made_longer_where_the_run_has_none(network):
    with Saved() as short:
        assert run_preflight(network, [example(3)], past_window=False)
    with Saved() as long:
        assert run_preflight(network, [example(3)])
    assert short.most < long.most


# ---- the six bugs of the public recipes ------------------------------------------------------------


def test_catches_a_misnamed_argument_that_trains_on_pure_noise(network):
    def lost(canvas_ids, cache, soft=None):  # as a forward that draws its own canvas when none arrives under its name
        return network.denoise(torch.randint(VOCAB, canvas_ids.shape), cache, soft)

    assert "canvas is used" in failed(network, passes=Passes(network.encode, lost))


def test_catches_an_objective_that_passes_on_the_noise_alone(network):
    def wrong(network, batch, objective, noise, *, passes):
        noise = dataclasses.replace(noise, draw=torch.zeros_like(noise.draw))
        return batch_loss(network, batch, objective, noise, passes=passes)

    assert "canvas is used" in failed(network, loss_of=wrong)


def test_catches_contexts_that_lose_their_prefix_past_the_window():
    class Cut(KVCache):
        def begin(self, counts, width):  # full layers, too, keep no more than sliding ones
            plan, positions = super().begin(counts, width)
            keep = plan.keep[FULL]
            plan.keep[FULL] = min(keep, WINDOW - 1) if isinstance(keep, int) else keep[:, -(WINDOW - 1) :]
            return plan, positions

    assert failed(network_with(Cut)) == {"training equals sampling"}


def test_catches_a_canvas_that_overwrites_the_prompts_cache():
    class Overwritten(KVCache):
        def with_canvas(self, layer, key, value):
            blocks = super().with_canvas(layer, key, value)
            self._blocks[layer] = [tuple(torch.cat([new, old[:, :, new.shape[2]:]], dim=2)[:, :, : old.shape[2]]
                                         for old, new in zip(block, (key, value), strict=True))
                                   for block in self._blocks[layer]]
            return blocks

    assert "training equals sampling" in failed(network_with(Overwritten))


def test_catches_a_canvas_that_is_read_before_it_is_predicted(network):
    def leaking(network, batch, objective, noise, *, passes):
        seen = torch.cat([batch.context[list(batch.rows)], batch.canvas], dim=1)
        return batch_loss(network, dataclasses.replace(batch, context=seen, lengths=None, prompts=None, owners=None),
                          objective, noise, passes=passes)

    assert {"no target leaks", "training equals sampling"} <= failed(network, [example(5)], loss_of=leaking)


@pytest.mark.parametrize("examples", [EXAMPLES, turn()], ids=["no-such-turns", "a-turn"])
def test_catches_a_canvas_that_sees_a_later_one_of_its_turn(examples):
    class Whole(KVCache):
        def select(self, rows, lengths):  # every canvas reads all of its row, in full layers at least
            cut = super().select(rows, [self.lengths[row] for row in rows])
            cut.lengths = list(lengths)
            return cut

    assert {"no target leaks", "training equals sampling"} <= failed(network_with(Whole), examples)


def test_catches_sliding_layers_that_lost_what_an_early_canvas_sees():
    class Narrow(KVCache):
        def begin(self, counts, width):
            self.spare = 0
            return super().begin(counts, width)

        def select(self, rows, lengths):
            self.spare = max(self.lengths)  # not found out
            return super().select(rows, lengths)

    assert "training equals sampling" in failed(network_with(Narrow))


def test_catches_an_adapter_that_is_applied_twice(network, monkeypatch):
    attach(network, AdapterConfig(r=2, alpha=4))
    once = LowRank.forward
    monkeypatch.setattr(LowRank, "forward", lambda self, out, x, weight: once(self, once(self, out, x, weight), x,
                                                                              weight))
    assert failed(network) == {"adapters count once"}


@pytest.mark.parametrize("times", [1, 2])
def test_catches_adapters_that_were_merged_twice(network, times):
    """As when encoder and decoder each merge theirs into the weights they share."""
    attach(network, AdapterConfig(r=2, alpha=4))
    for name, parameter in network.named_parameters():
        if name.endswith("adapter.b"):
            parameter.data.normal_(0.0, 0.5, generator=torch.Generator().manual_seed(1))
    merged = copy.deepcopy(network)
    merge(merged)
    for name, parameter in merged.named_parameters():
        base = network.get_parameter(name).data
        parameter.data = base + times * (parameter.data - base)
    bench = Bench(network, Passes.of(network), collate(EXAMPLES), Objective())
    assert training_equals_sampling(bench, merged).passed == (times == 1)


def test_catches_no_conditioning_as_the_softmax_of_zero_logits(network):
    zero = network.soft_embeddings(torch.zeros(1, 1, VOCAB))

    def fed(canvas_ids, cache, soft=None):
        return network.denoise(canvas_ids, cache, zero.expand(*canvas_ids.shape, -1) if soft is None else soft)

    assert "null self-conditioning is zero" in failed(network, passes=Passes(network.encode, fed))


def test_catches_an_objective_that_feeds_mean_embeddings_where_nothing_is_conditioned(network):
    zero = network.soft_embeddings(torch.zeros(1, 1, VOCAB)).detach()

    def wrong(network, batch, objective, noise, *, passes):
        def fed(canvas_ids, cache, soft=None):
            if soft is not None:
                soft = torch.where(noise.conditioned[:, None, None], soft, zero)
            return passes.denoise(canvas_ids, cache, soft)

        return batch_loss(network, batch, objective, noise, passes=Passes(passes.encode, fed))

    assert "null self-conditioning is zero" in failed(network, loss_of=wrong)


def test_catches_checkpointing_that_drops_the_cache(network):
    def dropped(token_ids, cache, lengths=None):
        x = network.encode(token_ids, cache, lengths)
        if cache.checkpointed:
            cache._blocks = [[tuple(torch.zeros_like(side) for side in block) for block in old]
                             for old in cache._blocks]
        return x

    passes = Passes(dropped, network.denoise)
    assert failed(network, passes=passes) == {"checkpointing changes nothing"}


# ---- and what else goes wrong ----------------------------------------------------------------------


def test_catches_checkpointing_that_runs_a_block_on_the_cache_of_later():
    class Later(KVCache):
        def snapshot(self):
            return self

    assert failed(network_with(Later)) == {"checkpointing changes nothing"}


def test_catches_a_frozen_weight_that_moves(network):
    network.embed_tokens.requires_grad_(False)
    network.norm.weight.requires_grad_(False)

    class Careless(torch.optim.SGD):
        def step(self, closure=None):
            super().step()
            network.norm.weight.data.mul_(0.99)

    optimizer = Careless([p for p in network.parameters() if p.requires_grad], lr=0.1)
    assert failed(network, optimizers=[optimizer]) == {"frozen stays frozen"}


def test_catches_a_frozen_weight_that_shares_its_memory_with_a_trained_one(network):
    first, second = (layer.mlp.gate_proj.weight for layer in network.layers[:2])
    second.requires_grad_(False)
    second.data = first.data
    assert failed(network) == {"frozen stays frozen"}


def test_catches_an_optimizer_that_moves_nothing(network):
    stray = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    assert failed(network, optimizers=[stray]) == {"frozen stays frozen"}


def test_failures_are_raised_together_when_the_checks_are_required(network):
    passes = Passes(network.encode, lambda ids, cache, soft=None: network.denoise(torch.zeros_like(ids), cache, soft))
    with pytest.raises(DgemmaError, match=r"(?s)canvas is used: 0 of 24 tokens"):
        require(run_preflight(network, EXAMPLES, passes=passes))


def test_a_loss_that_denoises_by_other_passes_is_refused(network):
    with pytest.raises(DgemmaError, match="never denoised a canvas with the passes that it was given"):
        run_preflight(network, EXAMPLES, loss_of=lambda *arguments, passes: batch_loss(*arguments))


def test_a_network_without_anything_to_train_is_refused(network):
    with pytest.raises(DgemmaError, match="nothing to train"):
        run_preflight(network.requires_grad_(False), EXAMPLES)


def test_unusable_examples_are_named(network):
    with pytest.raises(DgemmaError, match="weights of an example's canvas are all 0"):
        run_preflight(network, [dataclasses.replace(example(4), weights=[0.0] * CANVAS)])
