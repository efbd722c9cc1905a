"""The denoising loop: lengths, stops, batches, cancelling, pins, prefixes; on a tiny random network in float32."""

import dataclasses
import itertools

import pytest
import torch

from dgemma.diffusion.events import CanvasCommitted, CanvasStarted, Denoised, Finished
from dgemma.diffusion.sampler import EntropyBoundSampler, temperature_at
from dgemma.engine import Engine, PrefixStore
from support.engine_requests import PROMPT, C, mixed_requests, tokens_of
from support.passes import watched
from support.readers import reading
from support.reference import random_network, tiny_config


def assert_same_events(events, others):
    """Equal but for times and the last digits of entropies."""
    assert len(events) == len(others)
    for event, other in zip(events, others, strict=True):
        one, two = dataclasses.asdict(event), dataclasses.asdict(other)
        for values in (one, two, one.get("generation", {}), two.get("generation", {})):
            values.pop("seconds", None)
            values.pop("cached_tokens", None)
        assert one.pop("entropies", ()) == pytest.approx(two.pop("entropies", ()), abs=1e-2)
        assert one == two


# Lengths and stops


@pytest.mark.parametrize("limit", [1, C - 1, C, C + 1, 2 * C + 3])
def test_max_tokens_is_met_to_the_token(engine_of, ask, answer, limit):
    generation = answer(engine_of(), ask(max_tokens=limit))
    assert len(generation.token_ids) == limit
    assert generation.finish_reason == "length"
    assert generation.steps == [4] * -(-limit // C)
    assert generation.tokens_per_forward == limit / sum(generation.steps)


def test_a_shorter_limit_gives_the_beginning_of_the_longer_answer(engine_of, ask, answer):
    longest = answer(engine_of(), ask(max_tokens=3 * C)).token_ids
    for limit in (1, C, C + 3):
        assert answer(engine_of(), ask(max_tokens=limit)).token_ids == longest[:limit]


def test_a_stop_token_ends_the_answer(engine_of, ask, answer):
    free = answer(engine_of(), ask(max_tokens=4 * C, seed=1)).token_ids
    for place in (0, 3, C, 2 * C + 1):
        stop = free[place]
        if stop in free[:place]:
            continue
        generation = answer(engine_of(), ask(max_tokens=4 * C, seed=1, eos_token_id=(999, stop)))
        assert generation.token_ids == free[:place]
        assert (generation.finish_reason, generation.stop_token_id) == ("stop", stop)
        assert len(generation.steps) == place // C + 1


def test_an_adaptive_stop_ends_a_canvas_early(engine_of, ask):
    """At the first step whose draft is the one before's and whose mean entropy is below the threshold: not later."""
    settled = {"t_min": 0.02, "t_max": 0.03, "entropy_bound": 1e3, "confidence_threshold": 0.05}
    agreeing = []
    for event in engine_of().run([ask(max_denoising_steps=30, max_tokens=4 * C, **settled)]):
        if isinstance(event, CanvasStarted):
            steps = []
        elif isinstance(event, Denoised):
            steps.append(event)
        elif isinstance(event, CanvasCommitted):
            done = [not any(step.changed) and step.mean_entropy < 0.05 for step in steps]
            assert done == [False] * (event.steps - 1) + [True]
            agreeing.append(event.steps)
    assert len(agreeing) == 4
    assert max(agreeing) < 30


@pytest.mark.parametrize(("threshold", "steps"), [(0, 1), (1, 2), (3, 4)])
def test_a_certain_canvas_takes_one_step_more_than_must_agree(engine_of, ask, answer, threshold, steps):
    request = ask(canvas=[4] * C, pinned=[True] * C, stability_threshold=threshold, max_denoising_steps=20)
    assert answer(engine_of(), request).steps == [steps]


def test_an_answer_ends_where_the_model_s_positions_do(engine_of, ask, answer):
    network = random_network(tiny_config(max_position_embeddings=len(PROMPT) + 2 * C + 1))
    generation = answer(engine_of(network), ask(PROMPT, max_tokens=100))
    assert (len(generation.token_ids), generation.finish_reason) == (2 * C, "length")


def test_a_canvas_is_committed_only_when_another_follows(engine_of, ask, answer, encoded):
    answer(engine_of(), ask(PROMPT, max_tokens=C))
    assert encoded == [[len(PROMPT)]]
    encoded.clear()
    free = answer(engine_of(), ask(PROMPT, max_tokens=2 * C + 1))
    assert encoded == [[len(PROMPT)], [C], [C]]
    encoded.clear()
    answer(engine_of(), ask(PROMPT, max_tokens=2 * C + 1, eos_token_id=(free.token_ids[C - 1],)))
    assert encoded == [[len(PROMPT)]]


# Randomness and batches


def test_the_seed_decides_the_answer(engine_of, ask, answer):
    first, again, other = (answer(engine_of(), ask(seed=seed, max_tokens=2 * C)) for seed in (1, 1, 2))
    assert first.token_ids == again.token_ids != other.token_ids
    assert first.seed == 1


@pytest.mark.parametrize("max_batch", [32, 3, 1])
def test_an_answer_does_not_depend_on_who_shares_the_batch(engine_of, ask, answer, max_batch):
    alone = [answer(engine_of(), request) for request in mixed_requests(ask)]
    together = answer(engine_of(max_batch=max_batch), *mixed_requests(ask))
    assert tokens_of(together) == tokens_of(alone)
    assert len({tuple(generation.token_ids) for generation in alone}) == len(alone)


def test_every_step_of_a_request_is_the_same_in_a_batch(engine_of, ask):
    shared = list(engine_of().run(mixed_requests(ask)))
    for request in mixed_requests(ask):
        assert_same_events(list(engine_of().run([request])), [e for e in shared if e.request == request.id])


def test_a_batch_never_exceeds_its_limit(engine_of, ask, tiny_network):
    sizes = []
    passes = watched(tiny_network, denoise=lambda ids, *_: sizes.append(len(ids)))
    list(engine_of(max_batch=3, passes=passes).run(mixed_requests(ask)))
    assert max(sizes) == 3


def test_requests_may_join_while_others_run(engine_of, ask, answer):
    late = ask([3, 4], id=9, seed=5, max_tokens=2 * C)
    engine, finished = engine_of(), {}
    engine.submit(ask(PROMPT, seed=4, max_tokens=3 * C))
    for step in itertools.count():
        if step == 5:
            engine.submit(late)
        if not engine.busy:
            break
        finished |= {event.request: event.generation for event in engine.step() if isinstance(event, Finished)}
    assert tokens_of([finished[9]]) == tokens_of([answer(engine_of(), late)])
    assert tokens_of([finished[0]]) == tokens_of([answer(engine_of(), ask(PROMPT, seed=4, max_tokens=3 * C))])


# Events


def test_events_tell_the_whole_story_in_order(engine_of, ask):
    request = ask(PROMPT, id=7, max_tokens=2 * C + 3, max_denoising_steps=3)
    events = list(engine_of().run([request]))
    kinds = [type(event) for event in events]
    assert kinds == [CanvasStarted, *[Denoised] * 3, CanvasCommitted] * 3 + [Finished]
    assert {event.request for event in events} == {7}
    times = [event.seconds for event in events if isinstance(event, Denoised | CanvasCommitted)]
    assert times == sorted(times)
    generation = events[-1].generation
    committed = [event for event in events if isinstance(event, CanvasCommitted)]
    assert [token for event in committed for token in event.token_ids] == generation.token_ids
    assert [event.steps for event in committed] == generation.steps == [3, 3, 3]
    assert generation.prompt_tokens == len(PROMPT)
    assert generation.text == f"{2 * C + 3} tokens"
    for index, started in enumerate(event for event in events if isinstance(event, CanvasStarted)):
        assert (started.canvas, started.max_steps) == (index, 3)
        assert started.context_tokens == len(PROMPT) + index * C


def test_steps_follow_from_one_another(engine_of, ask):
    canvas, draft = None, None
    for event in engine_of().run([ask(max_tokens=2 * C, max_denoising_steps=5)]):
        if isinstance(event, CanvasStarted):
            canvas, draft, step = event.token_ids, [None] * C, 0
            assert len(canvas) == C
        elif isinstance(event, Denoised):
            step += 1
            assert event.step == step
            assert event.temperature == temperature_at(step - 1, 5, 0.4, 0.8)
            assert event.changed == [old != new for old, new in zip(draft, event.token_ids, strict=True)]
            assert any(event.accepted)
            assert event.mean_entropy == pytest.approx(sum(event.entropies) / C)
            # Renoised positions hold new noise: hardly any keeps its token by chance.
            renoised = [i for i, accepted in enumerate(event.accepted) if not accepted]
            assert sum(canvas[i] == event.canvas_ids[i] for i in renoised) <= C // 2
            canvas, draft = event.canvas_ids, event.token_ids
        elif isinstance(event, CanvasCommitted):
            assert event.token_ids == draft  # the argmax canvas, not the sampled one


def test_an_idle_engine_has_nothing_to_do(engine_of):
    engine = engine_of()
    assert not engine.busy
    assert engine.step() == []


# Cancelling


@pytest.mark.parametrize("steps", [1, 4, 6])
def test_a_cancelled_request_stops_before_its_next_step(engine_of, ask, steps):
    """After `steps` steps in all (four a canvas): what was committed by then stays."""
    engine, seen = engine_of(), []
    whole = list(engine_of().run([ask(max_tokens=5 * C)]))[-1].generation
    for event in engine.run([ask(max_tokens=5 * C)]):
        seen.append(event)
        if sum(isinstance(event, Denoised) for event in seen) == steps:
            engine.cancel(0)
    assert sum(isinstance(event, Denoised) for event in seen) == steps
    generation = seen[-1].generation
    assert generation.finish_reason == "cancelled"
    assert generation.token_ids == whole.token_ids[: steps // 4 * C]
    assert sum(generation.steps) == steps
    assert not engine.busy


def test_cancelling_one_leaves_the_others_alone(engine_of, ask, answer):
    requests = mixed_requests(ask)
    engine, finished = engine_of(), {}
    for event in engine.run(requests):
        if isinstance(event, Denoised) and event.request == 1 and event.step == 3:
            engine.cancel(1)
        if isinstance(event, Finished):
            finished[event.request] = event.generation
    assert finished[1].finish_reason == "cancelled"
    for request in requests:
        if request.id != 1:
            assert tokens_of([finished[request.id]]) == tokens_of([answer(engine_of(), request)])


@pytest.mark.parametrize("cancelled", [[0], [1], [2], [2, 0, 1]], ids=str)
def test_waiting_requests_can_be_cancelled(engine_of, ask, cancelled, encoded):
    engine = engine_of()
    for request in range(3):
        engine.submit(ask(id=request))
    for request in cancelled:
        engine.cancel(request)
    reasons = {}
    while engine.busy:
        reasons |= {e.request: e.generation.finish_reason for e in engine.step() if isinstance(e, Finished)}
    assert reasons == {request: "cancelled" if request in cancelled else "length" for request in range(3)}
    assert encoded == ([[3]] if len(cancelled) < 3 else [])  # one prompt, read once for all


def test_everything_can_be_cancelled_at_once(engine_of, ask):
    engine, events = engine_of(max_batch=2), []
    for event in engine.run([ask(id=i, max_tokens=9 * C) for i in range(4)]):
        events.append(event)
        if isinstance(event, Denoised) and event.step == 3 and event.request == 1:
            engine.cancel_all()
    assert sum(isinstance(event, Denoised) for event in events) == 6
    assert [e.generation.finish_reason for e in events if isinstance(e, Finished)] == ["cancelled"] * 4
    assert not engine.busy
    again = list(engine.run([ask(id=9)]))[-1]
    assert again.generation.finish_reason == "length"  # the engine goes on being of use


def test_a_long_prompt_can_be_cancelled_while_it_is_read(engine_of, ask, tiny_network):
    pieces = []

    def spy(inputs, cache):
        pieces.append(list(cache.counts))
        if len(pieces) == 2:
            engine.cancel_all()

    engine = engine_of(passes=watched(tiny_network, encode=spy), piece=4)
    events = list(engine.run([ask(range(30), id=0), ask(range(10, 50), id=1)]))
    assert pieces == [[2, 2], [2, 2]]
    assert [(event.request, event.generation.finish_reason) for event in events] == [(0, "cancelled"), (1, "cancelled")]
    assert not engine.busy


def test_a_prompt_read_in_pieces_gives_the_same_answer(engine_of, ask, answer):
    request = ask(range(30), max_tokens=2 * C)
    whole = answer(engine_of(), request)
    assert tokens_of([answer(engine_of(piece=4), request)]) == tokens_of([whole])


def test_cancelling_what_is_not_there_does_nothing(engine_of, ask, answer):
    engine = engine_of()
    engine.submit(ask(id=1))
    engine.cancel(77)
    assert {e.generation.finish_reason for e in engine.run([]) if isinstance(e, Finished)} == {"length"}


def test_a_caller_who_stops_listening_stops_the_work(engine_of, ask, tiny_network):
    steps = []
    events = engine_of(passes=watched(tiny_network, denoise=lambda *_: steps.append(1))).run([ask(max_tokens=9 * C)])
    while not isinstance(next(events), Denoised):
        pass
    events.close()
    assert len(steps) == 1


# Seeded and pinned canvases


def test_pinned_positions_never_change_and_stand_in_the_answer(engine_of, ask):
    canvas = [11, None, 13, 14, None, 16]
    pinned = [True, False, True, False, False, True]
    request = ask(canvas=canvas, pinned=pinned, max_tokens=2 * C, max_denoising_steps=6)
    fixed = {i: token for i, (token, pin) in enumerate(zip(canvas, pinned, strict=True)) if pin}
    first = [event for event in engine_of().run([request])
             if isinstance(event, CanvasStarted | Denoised | CanvasCommitted) and event.canvas == 0]
    assert first[0].pinned == [i in fixed for i in range(C)]
    for event in first:
        for ids in (event.token_ids, *([event.canvas_ids] if isinstance(event, Denoised) else [])):
            assert {i: ids[i] for i in fixed} == fixed
        if isinstance(event, Denoised):
            assert all(event.entropies[i] == 0 and event.accepted[i] for i in fixed)


def test_pinned_positions_condition_the_next_step_as_known_tokens(engine_of, ask, tiny_network):
    softs = []
    passes = watched(tiny_network, denoise=lambda ids, cache, soft: softs.append(soft))
    list(engine_of(passes=passes).run([ask(id=0, canvas=[11, 12], pinned=[True, True]), ask(id=1)]))
    known = tiny_network.embed(torch.tensor([11, 12]))
    assert not softs[0].any()
    for soft in softs[1:]:
        assert torch.equal(soft[0, :2], known)
        assert not torch.isclose(soft[1, :2], known).all(-1).any()


def test_pins_hold_whatever_the_sampler_does(engine_of, ask):
    class NothingGoes(EntropyBoundSampler):
        def advance(self, stats, random, settings):
            return random, torch.zeros_like(random, dtype=torch.bool)

    events = engine_of(sampler=NothingGoes()).run([ask(canvas=[11, None, 13], pinned=[True, False, True])])
    for event in events:
        if isinstance(event, Denoised):
            assert (event.canvas_ids[0], event.canvas_ids[2]) == (11, 13)


def test_pins_hold_for_the_first_canvas_only(engine_of, ask):
    request = ask(canvas=[1] * C, pinned=[True] * C, max_tokens=2 * C)
    started = [event for event in engine_of().run([request]) if isinstance(event, CanvasStarted)]
    assert [any(event.pinned) for event in started] == [True, False]


def test_a_canvas_of_pins_alone_is_its_own_answer(engine_of, ask, answer):
    canvas = list(range(10, 10 + C))
    generation = answer(engine_of(), ask(canvas=canvas, pinned=[True] * C, max_denoising_steps=40,
                                         confidence_threshold=0.005))
    assert generation.token_ids == canvas
    assert generation.steps == [2]  # certain at once, stable at the second step


def test_a_pinned_stop_token_ends_the_answer(engine_of, ask, answer):
    generation = answer(engine_of(), ask(canvas=[11, 12, 1], pinned=[True] * 3, eos_token_id=(1,), max_tokens=3 * C))
    assert (generation.token_ids, generation.steps, generation.stop_token_id) == ([11, 12], [4], 1)


def test_pins_steer_the_rest(engine_of, ask, answer):
    free = answer(engine_of(), ask(seed=3))
    steered = answer(engine_of(), ask(seed=3, canvas=[(t + 1) % 50 for t in free.token_ids[:4]], pinned=[True] * 4))
    assert steered.token_ids[:4] != free.token_ids[:4]
    assert steered.token_ids[4:] != free.token_ids[4:]


def test_a_seeded_canvas_is_where_denoising_starts_but_may_change(engine_of, ask):
    request = ask(canvas=[11, None, 13], seed=2, max_denoising_steps=6)
    started, *rest = engine_of().run([request])
    noise = next(iter(engine_of().run([ask(seed=2)]))).token_ids
    assert started.token_ids == [11, noise[1], 13, *noise[3:]]
    assert not any(started.pinned)
    assert any(event.canvas_ids[:3] != started.token_ids[:3] for event in rest if isinstance(event, Denoised))


def test_the_network_denoises_the_canvas_that_was_given(engine_of, ask, tiny_network):
    seen = []
    passes = watched(tiny_network, denoise=lambda ids, *_: seen.append(ids.tolist()))
    events = list(engine_of(passes=passes).run([ask(canvas=[4] * C)]))
    canvases = [event.canvas_ids for event in events if isinstance(event, Denoised)]
    assert seen == [[canvas] for canvas in [[4] * C, *canvases[:-1]]]


def test_self_conditioning_starts_at_zero_on_every_canvas(engine_of, ask, tiny_network):
    sizes = []

    def spy(ids, cache, soft):
        sizes.append([float(row.abs().sum()) > 0 for row in soft])

    list(engine_of(passes=watched(tiny_network, denoise=spy)).run([ask(id=0, max_tokens=2 * C, max_denoising_steps=2),
                          ask(id=1, max_tokens=C, max_denoising_steps=3)]))
    assert sizes == [[False, False], [True, True], [False, True], [True]]


# Prefixes


def test_a_conversation_s_next_turn_reads_only_what_is_new(engine_of, ask, answer):
    engine = engine_of()
    first = answer(engine, ask(PROMPT, max_tokens=2 * C + 2))
    assert engine.counts.read_tokens == len(PROMPT)
    # The next prompt holds the two committed canvases as they were written, then a new turn.
    longer = [*PROMPT, *first.token_ids[: 2 * C], 4, 4, 4]
    second = answer(engine, ask(longer, seed=8, max_tokens=C))
    assert engine.counts.read_tokens == len(PROMPT) + 3
    assert tokens_of([second]) == tokens_of([answer(engine_of(), ask(longer, seed=8, max_tokens=C))])


def test_the_same_prompt_again_reads_nothing(engine_of, ask, answer):
    engine = engine_of()
    answers = [answer(engine, ask(PROMPT, seed=1, max_tokens=2 * C)) for _ in range(3)]
    assert engine.counts.read_tokens == len(PROMPT)
    assert tokens_of(answers[1:]) == tokens_of(answers[:1]) * 2


def test_another_answer_to_the_same_prompt_reads_only_what_follows_the_prompt(engine_of, ask, answer):
    engine = engine_of()
    answer(engine, ask(PROMPT, max_tokens=3 * C))
    branch = [*PROMPT, 30, 31]
    generation = answer(engine, ask(branch, seed=8))
    assert engine.counts.read_tokens == len(PROMPT) + 2
    assert tokens_of([generation]) == tokens_of([answer(engine_of(), ask(branch, seed=8))])


def test_several_turns_can_go_on_from_one_context(engine_of, ask, answer):
    engine = engine_of()
    first = answer(engine, ask(PROMPT, max_tokens=2 * C + 2))
    context = [*PROMPT, *first.token_ids[: 2 * C]]
    for turn, read in (([4, 4, 4], 3), ([9], 1), ([9, 8], 1), ([], 0)):
        before = engine.counts.read_tokens
        generation = answer(engine, ask(context + turn, seed=8))
        assert engine.counts.read_tokens - before == read
        assert tokens_of([generation]) == tokens_of([answer(engine_of(), ask(context + turn, seed=8))])


@pytest.mark.parametrize(("prompt", "read"), [(PROMPT[:-1], 0), ([*PROMPT[:-1], 40, 41], 2), ([1, *PROMPT], 6)],
                         ids=["shorter", "other-end", "other-start"])
def test_a_prompt_is_read_from_where_it_differs(engine_of, ask, answer, prompt, read):
    engine = engine_of()
    answer(engine, ask(PROMPT, max_tokens=2 * C))
    generation = answer(engine, ask(prompt, seed=8))
    assert engine.counts.read_tokens == len(PROMPT) + read
    assert generation.cached_tokens == len(prompt) - read
    assert tokens_of([generation]) == tokens_of([answer(engine_of(), ask(prompt, seed=8))])


def test_prefixes_outlive_an_engine(engine_of, ask, answer):
    prefixes = PrefixStore()
    answer(engine_of(prefixes=prefixes), ask(PROMPT))
    second = engine_of(prefixes=prefixes)
    answer(second, ask([*PROMPT, 3]))
    assert second.counts.read_tokens == 1
    prefixes.clear()
    third = engine_of(prefixes=prefixes)
    answer(third, ask([*PROMPT, 3]))
    assert third.counts.read_tokens == len(PROMPT) + 1


def test_two_engines_can_go_on_from_one_prefix_in_turns(engine_of, ask, answer):
    prefixes = PrefixStore()
    answer(engine_of(prefixes=prefixes), ask(PROMPT))
    requests = [ask(PROMPT, seed=seed, max_tokens=3 * C) for seed in (1, 2)]
    runs = [engine_of(prefixes=prefixes).run([request]) for request in requests]
    finished = {}
    for events in itertools.zip_longest(*runs):
        finished |= {i: e.generation for i, e in enumerate(events) if isinstance(e, Finished)}
    for i, request in enumerate(requests):
        assert tokens_of([finished[i]]) == tokens_of([answer(engine_of(), request)])


# Plugging in and refusing


def test_a_sampler_of_one_s_own_plugs_in(engine_of, ask, answer):
    class Greedy:
        """Believes every argmax at once and stops after two steps."""

        def __init__(self):
            self.steps = 0

        def advance(self, stats, random, settings):
            self.steps += 1
            return stats.argmax, torch.ones_like(stats.argmax, dtype=torch.bool)

        def done(self, stats, history, settings):
            return torch.full_like(settings.last, self.steps == 2)

    sampler = Greedy()
    events = list(engine_of(sampler=sampler).run([ask(max_denoising_steps=40)]))
    steps = [event for event in events if isinstance(event, Denoised)]
    assert len(steps) == 2
    assert all(event.canvas_ids == event.token_ids and all(event.accepted) for event in steps)


def test_the_sampler_is_told_every_row_s_settings(engine_of, ask):
    class Listening(EntropyBoundSampler):
        heard = []

        def advance(self, stats, random, settings):
            self.heard.append(settings.entropy_bound.tolist())
            return super().advance(stats, random, settings)

    list(engine_of(sampler=Listening()).run([ask(id=0, entropy_bound=0.5), ask(id=1, entropy_bound=7.0)]))
    assert Listening.heard == [[0.5, 7.0]] * 4


@pytest.mark.parametrize("changes", [{"prompt": []}, {"prompt": [50]}, {"canvas": [1] * (C + 1)},
                                     {"pinned": [True]}], ids=str)
def test_an_impossible_request_is_refused_before_it_waits(engine_of, ask, changes):
    engine = engine_of()
    with pytest.raises(ValueError, match="prompt|canvas|pinned"):
        engine.submit(ask(**changes))
    assert not engine.busy


def test_the_engine_has_the_answer_read_with_its_prompt(tiny_network, ask, answer):
    heard = []

    def read(request, tokens):
        heard.append((request.prompt_ids, tokens))
        return "text", "thought", [{"name": "tool"}]

    generation = answer(Engine(tiny_network, reading(read)), ask(PROMPT))
    assert heard == [(PROMPT, generation.token_ids)]
    assert (generation.text, generation.reasoning, generation.tool_calls) == ("text", "thought", [{"name": "tool"}])


@pytest.mark.parametrize("redraw_empty", [False, True])
def test_a_canvas_is_read_once_and_its_event_carries_what_was_read(tiny_network, ask, redraw_empty):
    heard = []
    read = reading(lambda request, tokens: heard.append(tokens) or ("text", None, []))
    *events, last = Engine(tiny_network, read).run([ask(max_tokens=C, redraw_empty=redraw_empty)])
    committed = [event for event in events if isinstance(event, CanvasCommitted)]
    assert [event.pieces for event in committed] == [[event.token_ids] for event in committed]
    assert heard == [committed[0].token_ids] and last.answer.text == "text"


def test_every_bit_of_a_seed_decides_the_answer(engine_of, ask, answer):
    wanted = [3, 3 + 2**32, 3 + 2**33, 3 + 2**62, 2**63 - 1]
    answers = [answer(engine_of(), ask(seed=seed, max_tokens=2 * C)).token_ids for seed in wanted]
    assert len(set(map(tuple, answers))) == len(wanted)
    assert answer(engine_of(), ask(seed=wanted[3], max_tokens=2 * C)).token_ids == answers[3]
