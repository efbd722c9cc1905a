"""One sampler step against transformers' sampler, stopping criteria and schedule, given the same logits and noise."""

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from dgemma.config import GenerationConfig
from dgemma.diffusion.sampler import (
    EntropyBoundSampler,
    StepSettings,
    accept,
    converged,
    renoise,
    temperature_at,
    token_entropy,
)
from dgemma.nn import CanvasStats

VOCAB = 30


@pytest.fixture(scope="module")
def theirs():
    from transformers.models.diffusion_gemma import generation_diffusion_gemma

    return generation_diffusion_gemma


def made_up_logits(seed: int, batch: int, canvas: int) -> torch.Tensor:
    """Processed logits [B, C, V] whose positions range from certain to clueless."""
    generator = torch.Generator().manual_seed(seed)
    sharpness = 30 * torch.rand(batch, canvas, 1, generator=generator) ** 3
    return sharpness * torch.randn(batch, canvas, VOCAB, generator=generator)


def stats_of(processed: torch.Tensor, sample: torch.Tensor) -> CanvasStats:
    return CanvasStats(processed.argmax(-1), sample, token_entropy(processed), torch.zeros(1))


def settings_of(rows, steps=None):
    return StepSettings.of(rows, steps or [0] * len(rows), torch.device("cpu"))


def tokens(seed: int, batch: int, canvas: int) -> torch.Tensor:
    return torch.randint(VOCAB, (batch, canvas), generator=torch.Generator().manual_seed(seed))


def no_close_call(entropy: torch.Tensor, bound: float) -> bool:
    """No position stands so close to the bound that rounding decides."""
    ordered = entropy.sort(dim=-1).values.double()
    return bool(((ordered.cumsum(-1) - ordered - bound).abs() > 1e-4).all())


# Accepting and renoising


@given(seed=st.integers(0, 2**31), batch=st.integers(1, 3), canvas=st.integers(1, 24),
       bound=st.sampled_from([1e-3, 0.1, 1.0, 5.0, 1e6]))
@settings(max_examples=120, deadline=None)
def test_a_step_is_the_reference_s(theirs, seed, batch, canvas, bound):
    processed = made_up_logits(seed, batch, canvas)
    current, sample, fresh = (tokens(seed + i, batch, canvas) for i in (1, 2, 3))
    assume(no_close_call(token_entropy(processed), bound))

    reference = theirs.EntropyBoundSampler(theirs.EntropyBoundSamplerConfig(bound), canvas, VOCAB, 48)
    reference.initialize_canvas = lambda batch_size, device: fresh
    accepted_canvas = reference.accept_canvas(current, sample, processed, cur_step=3)
    next_canvas = reference.renoise_canvas(accepted_canvas, cur_step=3)

    ours, accepted = EntropyBoundSampler().advance(stats_of(processed, sample), fresh,
                                                   settings_of([GenerationConfig(entropy_bound=bound)] * batch))
    assert torch.equal(accepted, reference.accepted_token_mask)
    assert torch.equal(ours, next_canvas)
    assert accepted.any(-1).all()  # a step always makes progress


@given(seed=st.integers(0, 2**31))
@settings(max_examples=50, deadline=None)
def test_accepted_positions_are_the_most_certain_ones(seed):
    entropy = torch.rand(2, 16, generator=torch.Generator().manual_seed(seed))
    accepted = accept(entropy, torch.tensor([0.5, 2.0]))
    for row, mask in zip(entropy, accepted, strict=True):
        if not mask.all():
            assert row[mask].max() <= row[~mask].min()
    wider = accept(entropy, torch.tensor([1.0, 3.0]))
    assert (wider | ~accepted).all()  # a larger bound only adds


def test_the_sum_may_exceed_the_bound_by_the_last_entropy_only():
    entropy = torch.tensor([[0.06, 0.5, 0.03, 0.04]])
    # Ascending: 0.03, 0.04, 0.06, 0.5; sums before each: 0, 0.03, 0.07, 0.13.
    assert accept(entropy, torch.tensor([0.1])).tolist() == [[True, False, True, True]]
    assert accept(entropy, torch.tensor([0.07])).tolist() == [[True, False, True, True]]
    assert accept(entropy, torch.tensor([0.05])).tolist() == [[False, False, True, True]]
    assert accept(entropy, torch.tensor([0.2])).all()


def test_one_position_is_accepted_however_uncertain():
    assert accept(torch.full((1, 5), 9.0), torch.tensor([1e-9])).sum() == 1


def test_rows_have_their_own_bound():
    entropy = torch.full((3, 4), 1.0)
    assert accept(entropy, torch.tensor([0.5, 1.5, 3.0])).sum(-1).tolist() == [1, 2, 4]


def test_accepted_positions_take_the_sample_and_the_others_fresh_noise():
    sample, fresh = torch.tensor([[1, 2, 3]]), torch.tensor([[7, 8, 9]])
    assert renoise(sample, torch.tensor([[True, False, True]]), fresh).tolist() == [[1, 8, 3]]


# Stopping


def drafts(seed: int, steps: int, batch: int, canvas: int) -> list[torch.Tensor]:
    """Logits of successive steps that mostly stay, change now and then, and get more certain."""
    generator = torch.Generator().manual_seed(seed)
    best = torch.randint(VOCAB, (batch, canvas), generator=generator)
    outcome = []
    for step in range(steps):
        for row in range(batch):
            if torch.rand((), generator=generator) < 0.35:
                best = best.clone()
                best[row, step % canvas] = (best[row, step % canvas] + 1) % VOCAB
        noise = torch.randn(batch, canvas, VOCAB, generator=generator)
        sharpness = 5.0 + 15 * torch.rand(batch, 1, 1, generator=generator)
        outcome.append(noise + sharpness * torch.nn.functional.one_hot(best, VOCAB))
    return outcome


@pytest.mark.parametrize("threshold", [0, 1, 2, 3])
@given(seed=st.integers(0, 2**31))
@example(seed=0)
@settings(max_examples=40, deadline=None)
def test_the_decision_to_stop_is_the_reference_s(theirs, threshold, seed):
    batch, canvas, steps, confidence = 3, 6, 10, 0.05
    reference = theirs.StableAndConfidentStoppingCriteria(threshold, confidence)
    settings_ = settings_of([GenerationConfig(stability_threshold=threshold, confidence_threshold=confidence)] * batch)
    history = torch.full((threshold, batch, canvas), -1)
    for processed in drafts(seed, steps, batch, canvas):
        assume(((token_entropy(processed).mean(-1) - confidence).abs() > 1e-4).all())
        stats = stats_of(processed, processed.argmax(-1))
        ours = EntropyBoundSampler().done(stats, history, settings_)
        assert ours.tolist() == reference(processed.argmax(-1), processed).tolist()
        if threshold:
            history = torch.cat([history[1:], stats.argmax[None]])


@pytest.mark.parametrize("threshold", [0, 1, 2, 3])
def test_a_certain_canvas_stops_after_as_many_agreeing_steps(threshold):
    draft, history = torch.tensor([[4, 5]]), torch.full((threshold, 1, 2), -1)
    stops = []
    for _ in range(5):
        stops.append(bool(converged(draft, history, torch.zeros(1, 2), torch.tensor([0.005]))))
        if threshold:
            history = torch.cat([history[1:], draft[None]])
    assert stops == [step >= threshold for step in range(5)]


def test_stable_or_confident_alone_does_not_stop():
    draft, other = torch.tensor([[4, 5]]), torch.tensor([[[4, 6]]])
    sure, unsure, limit = torch.zeros(1, 2), torch.full((1, 2), 0.01), torch.tensor([0.005])
    assert converged(draft, draft[None], sure, limit)
    assert not converged(draft, draft[None], unsure, limit)
    assert not converged(draft, other, sure, limit)


def test_the_mean_entropy_counts_and_the_threshold_itself_is_not_enough():
    draft = torch.tensor([[4, 5]])
    assert converged(draft, draft[None], torch.tensor([[0.0, 0.009]]), torch.tensor([0.005]))
    assert not converged(draft, draft[None], torch.full((1, 2), 0.5), torch.tensor([0.5]))


def test_rows_ask_for_histories_of_different_lengths():
    processed = 40.0 * torch.nn.functional.one_hot(torch.tensor([[1, 2]] * 3), VOCAB)
    stats = stats_of(processed, processed.argmax(-1))
    history = torch.tensor([[[-1, -1], [-1, -1], [9, 2]], [[-1, -1], [1, 2], [1, 2]]])
    settings_ = settings_of([GenerationConfig(stability_threshold=n) for n in (0, 1, 2)])
    assert EntropyBoundSampler().done(stats, history, settings_).tolist() == [True, True, False]


def test_the_last_step_there_is_ends_a_canvas_however_unsure_it_is():
    stats = stats_of(torch.zeros(2, 2, VOCAB), torch.zeros(2, 2, dtype=torch.long))
    settings_ = settings_of([GenerationConfig(max_denoising_steps=n) for n in (3, 4)], [2, 2])
    assert EntropyBoundSampler().done(stats, torch.empty(0, 2, 2), settings_).tolist() == [True, False]


# Temperature and entropy


@pytest.mark.parametrize(("steps", "t_min", "t_max"), [(48, 0.4, 0.8), (12, 0.1, 2.0), (1, 0.5, 0.9)])
def test_temperatures_are_the_reference_s(theirs, steps, t_min, t_max):
    processor = theirs.LinearTemperatureScheduleLogitsProcessor(t_min, t_max, steps)
    for step in range(steps):
        processed = processor(None, torch.ones(1), cur_step=torch.tensor(steps - step, dtype=torch.int32))
        assert 1 / temperature_at(step, steps, t_min, t_max) == pytest.approx(processed.item(), rel=1e-6)


def test_temperature_falls_from_the_highest_to_a_step_above_the_lowest():
    schedule = [temperature_at(step, 4, 0.4, 0.8) for step in range(4)]
    assert schedule == pytest.approx([0.8, 0.7, 0.6, 0.5])


@given(seed=st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_entropies_are_the_reference_s(seed):
    processed = made_up_logits(seed, 2, 8)
    expected = torch.distributions.Categorical(logits=processed).entropy()
    torch.testing.assert_close(token_entropy(processed), expected, atol=1e-5, rtol=1e-5)
