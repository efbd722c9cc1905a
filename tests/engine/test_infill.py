"""Answers that start from a canvas: with steps behind it, with pins behind stop tokens, beside ordinary requests."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dgemma.diffusion.events import CanvasStarted, Denoised
from support.engine_requests import C, mixed_requests, tokens_of
from support.passes import watched

STEPS = {"max_denoising_steps": 6, "stability_threshold": 0}


def drafts(events):
    return [event for event in events if isinstance(event, Denoised)]


def of_steps(events):
    """What the steps came to, by their numbers."""
    return {event.step: (event.token_ids, event.canvas_ids, event.entropies, event.accepted, event.temperature)
            for event in drafts(events)}


def test_with_its_seed_and_what_it_expected_a_canvas_goes_on_as_it_did(engine_of, ask, tiny_network):
    softs = []
    passes = watched(tiny_network, denoise=lambda ids, cache, soft: softs.append(soft[0].clone()))
    whole = of_steps(engine_of(passes=passes).run([ask(seed=4, **STEPS)]))
    request = ask(seed=4, **STEPS, canvas=whole[2][1], from_step=2, soft=softs[2])
    rest = of_steps(engine_of().run([request]))
    assert rest == {step: found for step, found in whole.items() if step > 2}


def test_without_what_it_expected_schedule_and_noise_go_on(engine_of, ask):
    whole = of_steps(engine_of().run([ask(seed=4, **STEPS)]))
    request = ask(seed=4, **STEPS, canvas=whole[2][1], from_step=2)
    started, *events = engine_of().run([request])
    assert (started.steps_before, started.token_ids, started.max_steps) == (2, whole[2][1], 6)
    rest = of_steps(events)
    assert list(rest) == [3, 4, 5, 6]
    assert [found[4] for found in rest.values()] == [whole[step][4] for step in rest]
    noise = [places for *places, one, other in zip(whole[3][1], rest[3][1], whole[3][3], rest[3][3], strict=True)
             if not (one or other)]
    assert rest[3] != whole[3] and noise and all(one == other for one, other in noise)


def test_steps_that_were_done_before_are_not_counted_again(engine_of, ask, answer):
    generation = answer(engine_of(), ask(**STEPS, canvas=[3] * C, from_step=4, max_tokens=2 * C))
    assert generation.steps == [2, 6]
    assert generation.tokens_per_forward == 2 * C / 8


def test_another_seed_or_setting_goes_another_way(engine_of, ask):
    canvas = of_steps(engine_of().run([ask(seed=4, **STEPS)]))[2][1]
    ways = [of_steps(engine_of().run([ask(seed=seed, **STEPS | settings, canvas=canvas, from_step=2)]))[6][0]
            for seed, settings in ((4, {}), (5, {}), (4, {"entropy_bound": 0.01}))]
    assert ways[0] != ways[1] and ways[0] != ways[2]


def test_a_pinned_position_never_changes_whatever_else_the_request_asks(engine_of, ask):
    pinned = [False, True] * (C // 2)
    events = list(engine_of().run([ask(canvas=[9] * C, pinned=pinned, from_step=1, candidates=2, **STEPS)]))
    assert len(drafts(events)) == 5
    for event in drafts(events):
        assert [ids[1::2] for ids in (event.token_ids, event.canvas_ids)] == [[9] * (C // 2)] * 2


def test_ordinary_requests_have_their_usual_tokens_beside_pinned_ones(engine_of, ask, answer):
    usual = [answer(engine_of(), request) for request in mixed_requests(ask)]
    pinned = [ask([4, 4], id=20 + i, seed=i, max_tokens=2 * C, canvas=[7] * C, pinned=[i % 2 == 0] * C, from_step=i,
                  candidates=3) for i in range(3)]
    together = answer(engine_of(), *mixed_requests(ask), *pinned)
    assert tokens_of(together[: len(usual)]) == tokens_of(usual)
    assert tokens_of(together[len(usual) :]) == tokens_of([answer(engine_of(), request) for request in pinned])


# Where the answer ends


def test_a_stop_token_ends_the_answer_only_behind_what_is_pinned(engine_of, ask, answer):
    request = ask(canvas=[None, None, 9], pinned=[False, False, True], eos_token_id=tuple(range(9)), seed=2)
    tokens = answer(engine_of(), request).token_ids
    assert len(tokens) >= 3 and tokens[2] == 9
    assert any(token < 9 for token in tokens[:2])  # which would have ended it


@pytest.mark.parametrize(("canvas", "limit", "said", "reason"), [
    ([9, 8, 1, 9, 1], C, [9, 8], "stop"),  # a stop token that is pinned itself ends it
    ([9, 8, 7, 1, 1], 2, [9, 8], "length"),
    ([9, 8, 7, 1, 1], 3, [9, 8, 7], "stop"),
    ([9, 8, 7], 2, [9, 8], "length"),
], ids=str)
def test_pins_say_where_an_answer_ends(engine_of, ask, answer, canvas, limit, said, reason):
    request = ask(canvas=canvas, pinned=[True] * len(canvas), eos_token_id=(1,), max_tokens=limit)
    generation = answer(engine_of(), request)
    assert (generation.token_ids, generation.finish_reason) == (said, reason)


def test_pins_behind_the_length_limit_are_seen_but_keep_no_answer_open(engine_of, ask, answer):
    request = ask(canvas=[None] * 4 + [9] * 4, pinned=[False] * 4 + [True] * 4, eos_token_id=tuple(range(10, 40)),
                  max_tokens=4, seed=2)
    generation = answer(engine_of(), request)
    assert 0 < len(generation.token_ids) < 4 and generation.finish_reason == "stop"


# Candidates


def test_candidates_are_the_most_probable_tokens_of_the_step(engine_of, ask, tiny_network):
    hidden = []

    def denoise(ids, cache, soft=None):
        hidden.append(tiny_network.denoise(ids, cache, soft))
        return hidden[-1]

    passes = watched(tiny_network)
    passes = type(passes)(passes.encode, denoise)
    events = drafts(engine_of(passes=passes).run([ask(candidates=3, canvas=[5], pinned=[True])]))
    for event, states in zip(events, hidden, strict=True):
        p = (tiny_network.logits(states)[0] / event.temperature).softmax(-1)
        best, tokens = p.topk(3)
        assert [[token for token, _ in place] for place in event.candidates] == tokens.tolist()
        found = torch.tensor([[value for _, value in place] for place in event.candidates])
        torch.testing.assert_close(found, best)
        assert event.token_ids[1:] == tokens[1:, 0].tolist()
    assert any(event.candidates[0][0][0] != 5 for event in events)  # before pins


class Operations(TorchDispatchMode):
    """Counts what is computed, by name."""

    def __init__(self):
        super().__init__()
        self.counts = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket] = self.counts.get(func.overloadpacket, 0) + 1
        return func(*args, **(kwargs or {}))


def computed(engine, request):
    with Operations() as operations:
        list(engine.run([request]))
    return operations.counts


def test_nothing_is_computed_for_candidates_that_nobody_asked_for(engine_of, ask):
    topk = torch.ops.aten.topk
    plain = computed(engine_of(), ask(drafts=False))
    heard, unheard = computed(engine_of(), ask()), computed(engine_of(), ask(candidates=3, drafts=False))
    asked = computed(engine_of(), ask(candidates=3))
    routed = plain[topk]  # experts are chosen by it, too
    assert heard[topk] == unheard[topk] == routed and asked[topk] == routed + 4  # a walk of one part at each step
    assert plain == unheard
    extra = {name for name, count in heard.items() if count != plain.get(name, 0)}
    assert extra <= {torch.ops.aten.resolve_conj, torch.ops.aten.resolve_neg}  # an event's lists, of what is here


@pytest.mark.parametrize(("changes", "message"), [
    ({"from_step": 2}, "from_step needs canvas"),
    ({"from_step": -1, "canvas": [1]}, "from_step must be a whole number from 0 to max_denoising_steps - 1 .3."),
    ({"from_step": 4, "canvas": [1]}, "from_step must be"), ({"from_step": 1.0, "canvas": [1]}, "from_step must be"),
    ({"soft": torch.zeros(C, 3), "canvas": [1]}, "soft must be"), ({"candidates": -1}, "candidates must be"),
    ({"candidates": True}, "candidates must be"),
], ids=str)
def test_a_start_that_cannot_be_is_refused(engine_of, ask, changes, message):
    with pytest.raises(ValueError, match=message):
        engine_of().submit(ask(**changes))


def test_a_later_canvas_is_behind_what_was_said_before_it(engine_of, ask, answer):
    whole = list(engine_of().run([ask(**STEPS, max_tokens=2 * C)]))
    second = [event for event in whole if isinstance(event, CanvasStarted | Denoised) and event.canvas == 1]
    said = whole[-1].generation.token_ids[:C]
    started, first, *_ = engine_of().run([ask([5, 6, 7, *said], **STEPS, canvas=second[0].token_ids)])
    assert (started.token_ids, started.context_tokens) == (second[0].token_ids, second[0].context_tokens)
    assert first.token_ids == second[1].token_ids  # its sample is drawn with other noise
    assert first.entropies == pytest.approx(second[1].entropies, abs=1e-5)


def test_only_the_first_canvas_has_steps_behind_it(engine_of, ask):
    events = list(engine_of().run([ask(**STEPS, canvas=[3] * C, from_step=4, max_tokens=2 * C)]))
    assert [event.steps_before for event in events if isinstance(event, CanvasStarted)] == [4, 0]
    assert [event.step for event in drafts(events)] == [5, 6, 1, 2, 3, 4, 5, 6]
