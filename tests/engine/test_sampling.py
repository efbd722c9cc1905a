"""Narrowed draws, log-probabilities and constraints in a batch, on a tiny random network in float32."""

from dataclasses import dataclass, field

import pytest
import torch

from dgemma.diffusion.constraint import Chosen
from dgemma.diffusion.events import CanvasCommitted, CanvasStarted, Denoised, Failed, Finished
from dgemma.diffusion.request import SamplingParams
from support.reference import tiny_config

C = tiny_config().canvas_length
PROMPT = [5, 6, 7, 8, 9]


def drafts(events):
    return [event for event in events if isinstance(event, Denoised)]


def tokens_of(generation):
    return generation.token_ids, generation.steps


def test_without_choices_nothing_changes(engine_of, ask, answer):
    usual = answer(engine_of(), ask(max_tokens=2 * C))
    assert tokens_of(answer(engine_of(), ask(max_tokens=2 * C, sampling=SamplingParams()))) == tokens_of(usual)


def test_temperature_0_believes_the_draft(engine_of, ask):
    for event in drafts(engine_of().run([ask(sampling=SamplingParams(temperature=0), entropy_bound=1e9)])):
        assert event.canvas_ids == event.token_ids


def test_a_low_temperature_comes_close_to_it_and_a_high_one_does_not(engine_of, ask):
    def agreement(temperature):
        events = drafts(engine_of().run([ask(sampling=SamplingParams(temperature=temperature), entropy_bound=1e9,
                                             max_tokens=3 * C)]))
        return sum(a == b for event in events for a, b in zip(event.canvas_ids, event.token_ids, strict=True)) / (
            len(events) * C)

    assert agreement(0.01) > 0.95 > agreement(1.0) > agreement(8.0)


def test_the_schedule_does_not_follow_the_temperature(engine_of, ask):
    usual, cold = (drafts(engine_of().run([ask(sampling=SamplingParams(temperature=t))]))[0] for t in (1.0, 0.3))
    assert cold.temperature == usual.temperature
    assert cold.entropies == pytest.approx(usual.entropies, abs=1e-4)


def test_top_k_1_is_greedy_and_only_the_kept_are_drawn(engine_of, ask):
    for event in drafts(engine_of().run([ask(sampling=SamplingParams(top_k=1), entropy_bound=1e9)])):
        assert event.canvas_ids == event.token_ids
    for event in drafts(engine_of().run([ask(sampling=SamplingParams(top_p=1e-6), entropy_bound=1e9)])):
        assert event.canvas_ids == event.token_ids


def test_a_bias_forbids_and_forces_tokens(engine_of, ask, answer):
    free = set(answer(engine_of(), ask(max_tokens=3 * C)).token_ids)
    banned = tuple((token, -1e4) for token in free)
    request = ask(max_tokens=3 * C, sampling=SamplingParams(logit_bias=banned))
    assert not free & set(answer(engine_of(), request).token_ids)
    forced = answer(engine_of(), ask(sampling=SamplingParams(logit_bias=((17, 1e4),))))
    assert forced.token_ids == [17] * C


@pytest.mark.parametrize("choices", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5},
                                     {"temperature": float("nan")}, {"logit_bias": ((1, float("inf")),)}], ids=str)
def test_impossible_choices_are_refused(choices):
    with pytest.raises(ValueError, match=next(iter(choices))):
        SamplingParams(**choices)


def test_log_probabilities_are_the_network_s(engine_of, ask, tiny_network):
    """Of one step from a given canvas: softmax of the plain logits, untempered."""
    request = ask(PROMPT, canvas=[4] * C, max_denoising_steps=1, logprobs=3)
    events = list(engine_of().run([request]))
    committed = next(event for event in events if isinstance(event, CanvasCommitted))
    cache = tiny_network.new_cache(1)
    tiny_network.encode(torch.tensor([PROMPT]), cache)
    log_p = tiny_network.logits(tiny_network.denoise(torch.tensor([[4] * C]), cache))[0].log_softmax(-1)
    assert [entry.token_id for entry in committed.logprobs] == committed.token_ids
    for place, entry in enumerate(committed.logprobs):
        assert entry.logprob == pytest.approx(log_p[place, entry.token_id].item(), abs=1e-4)
        values, tokens = log_p[place].topk(3)
        assert [token for token, _ in entry.top] == tokens.tolist()
        assert [value for _, value in entry.top] == pytest.approx(values.tolist(), abs=1e-4)
    assert events[-1].generation.logprobs == committed.logprobs


def test_log_probabilities_cover_every_token_of_a_longer_answer(engine_of, ask, answer):
    generation = answer(engine_of(), ask(max_tokens=2 * C + 3, logprobs=0))
    assert [entry.token_id for entry in generation.logprobs] == generation.token_ids
    assert all(entry.top == [] for entry in generation.logprobs)


@dataclass
class Alternating:
    """A constraint that allows even and odd tokens in turns, starts with 7 and is complete after `length` tokens."""

    length: int = 10**6
    broken: bool = False

    def guide(self, room):
        return _Guide(self)


@dataclass
class _Guide:
    rule: Alternating
    count: int = 0
    rooms: list = field(default_factory=list)
    least = 1
    may_be_empty = False

    @property
    def finished(self):
        return self.count >= self.rule.length

    def template(self, canvas, room):
        self.rooms.append(room)
        return [7 if self.count == 0 and i == 0 else None for i in range(canvas)]

    def choose(self, walk, canvas, room, uniform):
        if self.rule.broken:
            raise RuntimeError("no way")
        log_p = torch.cat([part.clone() for _, part in walk])
        for place in range(canvas):
            log_p[place, (self.count + place) % 2 :: 2] = -torch.inf
        best = log_p.argmax(1)
        fixed = torch.zeros(canvas, dtype=torch.bool)
        if self.count == 0:
            best[0], fixed[0] = 7, True
        return Chosen(best, best.clone(), fixed)

    def commit(self, token_ids):
        self.count += len(token_ids)


def test_a_constraint_decides_every_draft_and_the_answer(engine_of, ask):
    events = list(engine_of().run([ask(max_tokens=3 * C, constraint=Alternating())]))
    started = next(event for event in events if isinstance(event, CanvasStarted))
    assert started.token_ids[0] == 7
    assert started.pinned == [True] + [False] * (C - 1)
    for event in drafts(events):
        assert [token % 2 for token in event.token_ids] == [1, 0] * (C // 2)
    tokens = events[-1].generation.token_ids
    assert [token % 2 for token in tokens] == [1, 0] * (3 * C // 2)
    first = [event for event in drafts(events) if event.canvas == 0]
    assert all(event.entropies[0] == 0 for event in first)


def test_narrowing_holds_within_a_constraint(engine_of, ask):
    """Greedy by top_k is the constraint's own draft; the constraint stands above the narrowing."""
    seen = []

    class Listening(Alternating):
        def guide(self, room):
            guide = _Guide(self)
            choose = guide.choose

            def spy(walk, *rest):
                parts = [(place, log_p.clone()) for place, log_p in walk]
                seen.append(torch.cat([log_p for _, log_p in parts]))
                return choose(parts, *rest)

            guide.choose = spy
            return guide

    list(engine_of().run([ask(constraint=Listening(), sampling=SamplingParams(top_k=2), max_denoising_steps=2)]))
    assert len(seen) >= 2
    for log_p in seen:
        assert ((log_p > -1000).sum(1) == 2).all()


def test_a_complete_answer_ends_with_its_canvas(engine_of, ask, answer):
    generation = answer(engine_of(), ask(max_tokens=9 * C, constraint=Alternating(length=2 * C)))
    assert (len(generation.token_ids), generation.finish_reason) == (2 * C, "stop")


def test_a_constraint_that_breaks_ends_its_request_alone(engine_of, ask, answer):
    events = list(engine_of(isolate=True).run([ask(id=0, seed=3), ask(id=1, constraint=Alternating(broken=True))]))
    ends = {event.request: event for event in events if isinstance(event, Finished | Failed)}
    assert isinstance(ends[1], Failed)
    assert tokens_of(ends[0].generation) == tokens_of(answer(engine_of(), ask(seed=3)))


def special_requests(ask):
    """One request of every kind, each unlike the others."""
    return [
        ask(PROMPT, id=0, seed=1, max_tokens=2 * C),
        ask(PROMPT, id=1, seed=2, max_tokens=2 * C, sampling=SamplingParams(temperature=0.4)),
        ask([3], id=2, seed=3, max_tokens=C, sampling=SamplingParams(top_k=3)),
        ask(range(9), id=3, seed=4, max_tokens=2 * C, sampling=SamplingParams(temperature=2.0, top_p=0.8)),
        ask(PROMPT, id=4, seed=5, max_tokens=2 * C, sampling=SamplingParams(logit_bias=((3, 5.0), (4, -5.0)))),
        ask([8, 8], id=5, seed=6, max_tokens=3 * C, constraint=Alternating()),
        ask([8, 9], id=6, seed=7, max_tokens=C, logprobs=2, canvas=[1, None, 3], pinned=[True, False, True]),
        ask([4], id=7, seed=8, max_tokens=C, sampling=SamplingParams(temperature=0.0)),
    ]


def test_requests_of_every_kind_give_the_same_in_one_batch(engine_of, ask, answer):
    together = answer(engine_of(), *special_requests(ask))
    for request, generation in zip(special_requests(ask), together, strict=True):
        assert tokens_of(generation) == tokens_of(answer(engine_of(), request))
