"""Requests that share an engine: what is read when and for whom, memory, failures, passes."""

import copy
import itertools
from dataclasses import replace

import pytest
import torch

from dgemma.cache.pages import Page
from dgemma.diffusion.events import CanvasCommitted, CanvasStarted, Denoised, Failed, Finished
from dgemma.diffusion.request import SamplingParams, Thoughts
from dgemma.engine import Engine, PrefixStore
from dgemma.errors import NotFiniteError
from dgemma.nn.passes import Passes
from support.engine_requests import PROMPT, C, mixed_requests, tokens_of
from support.passes import texts_of, watched
from support.readers import reading
from support.reference import random_network, tiny_config


def test_a_long_prompt_does_not_stall_who_is_denoising(engine_of, ask, encoded):
    engine = engine_of(piece=4)
    engine.submit(ask(id=0, max_tokens=4 * C))
    engine.step()
    engine.submit(ask([1 + i % 40 for i in range(60)], id=1))
    encoded.clear()
    steps = 0
    while not any(isinstance(event, CanvasStarted) and event.request == 1 for event in engine.step()):
        steps += 1
    assert steps >= 10
    assert all(max(pieces) <= max(4, C) for pieces in encoded)
    assert engine.counts.denoised > steps  # the other one went on meanwhile


def test_a_short_prompt_overtakes_a_long_one(engine_of, ask):
    events = engine_of(piece=8).run([ask([1 + i % 40 for i in range(80)], id=0), ask([9, 9, 9], id=1)])
    assert [event.request for event in events if isinstance(event, Finished)] == [1, 0]


def test_samples_of_one_prompt_read_it_once(engine_of, ask, encoded):
    list(engine_of().run([ask(PROMPT, id=i, seed=i) for i in range(8)]))
    assert encoded == [[len(PROMPT)]]


def test_a_common_beginning_is_read_once_by_those_who_come_together(engine_of, ask, answer):
    engine, system = engine_of(), list(range(10, 40))
    together = answer(engine, *[ask([*system, 40 + i, 3], id=i, seed=i) for i in range(4)])
    assert engine.counts.read_tokens == len(system) + 4 * 2
    for i, generation in enumerate(together):
        assert tokens_of([generation]) == tokens_of([answer(engine_of(), ask([*system, 40 + i, 3], seed=i))])


def test_requests_wait_for_memory_and_nobody_is_overtaken(engine_of, ask):
    requests = [ask([1 + i] * 30, id=i, max_tokens=C) for i in range(3)] + [ask([40], id=3, max_tokens=C)]
    probe = engine_of()
    engine = engine_of(memory=2 * probe.scheduler.memory_of(requests[0]) + 1)
    for request in requests:
        engine.submit(request)
    running = []
    finished = []
    while engine.busy:
        finished += [event.request for event in engine.step() if isinstance(event, Finished)]
        running.append(engine.running)
    assert max(running) == 2
    assert sorted(finished) == [0, 1, 2, 3]
    assert engine.memory.reserved == 0


def test_a_request_that_can_never_fit_is_refused(engine_of, ask):
    engine = engine_of(memory=1000)
    with pytest.raises(ValueError, match="memory"):
        engine.submit(ask())


def test_memory_of_a_request_grows_with_what_it_may_become(engine_of, ask):
    engine = engine_of()
    assert engine.scheduler.memory_of(ask(max_tokens=10 * C)) > engine.scheduler.memory_of(ask(max_tokens=C))
    assert engine.scheduler.memory_of(ask(range(40))) > engine.scheduler.memory_of(ask(range(4)))


def out_of_luck(found):
    if found:
        raise RuntimeError("out of luck")


@pytest.mark.parametrize("breaks", [
    {"encode": lambda inputs, cache: out_of_luck([49] in texts_of(inputs, cache))},
    {"denoise": lambda ids, *_: out_of_luck([49] * C in ids.tolist())}], ids=["reading", "denoising"])
def test_a_request_that_fails_fails_alone(engine_of, ask, answer, tiny_network, breaks):
    good = [ask([3, 4, i], id=i, seed=i, max_tokens=2 * C) for i in range(3)]
    expected = tokens_of([answer(engine_of(), request) for request in good])
    bad = ask([49], id=7, canvas=[49] * C, pinned=[True] * C)
    engine = engine_of(isolate=True, passes=watched(tiny_network, **breaks))
    ends = {e.request: e for e in engine.run([*good, bad]) if isinstance(e, Finished | Failed)}
    assert isinstance(ends[7], Failed)
    assert "out of luck" in ends[7].error
    assert tokens_of([ends[i].generation for i in range(3)]) == expected


def test_without_isolation_what_goes_wrong_is_raised(engine_of, ask, tiny_network):
    with pytest.raises(RuntimeError, match="out of luck"):
        list(engine_of(passes=watched(tiny_network, denoise=lambda *_: out_of_luck(True))).run([ask()]))


def test_an_answer_that_cannot_be_read_fails_alone(tiny_network, ask):
    read = reading(lambda request, tokens: ("fine", None, []) if request.prompt_ids != [9] else 1 / 0)
    ends = list(Engine(tiny_network, read, isolate=True).run([ask(id=0), ask([9], id=1)]))
    assert [type(e) for e in ends if e.request == 1][-1] is Failed
    assert [e.generation.text for e in ends if isinstance(e, Finished)] == ["fine"]


def test_a_stop_string_ends_the_answer(engine_of, ask, answer):
    free = answer(engine_of(), ask(max_tokens=3 * C)).token_ids

    fed = []

    def stop(tokens):
        fed.append(len(tokens))
        return C + 3 if len(tokens) > C else None

    read = reading(lambda request, tokens: ("", None, []), stop)
    generation = answer(engine_of(make_reader=read), ask(max_tokens=3 * C, stop=("x",)))
    assert fed == [C, 2 * C]  # each canvas once
    assert generation.token_ids == free[: C + 3]
    assert (generation.finish_reason, generation.stop_token_id, len(generation.steps)) == ("stop", None, 2)


def test_without_drafts_only_canvases_are_told(engine_of, ask, answer):
    events = list(engine_of().run([ask(max_tokens=2 * C, drafts=False)]))
    assert [type(event) for event in events] == [CanvasStarted, CanvasCommitted] * 2 + [Finished]
    assert tokens_of([events[-1].generation]) == tokens_of([answer(engine_of(), ask(max_tokens=2 * C))])


def test_a_canvas_is_handed_out_at_once(engine_of, ask, encoded):
    """Its commit pass comes with the next step's reading, not before the event."""
    engine = engine_of()
    engine.submit(ask(PROMPT, max_tokens=2 * C))
    events = []
    while not any(isinstance(event, CanvasCommitted) for event in events):
        events = engine.step()
    assert encoded == [[len(PROMPT)]]
    engine.step()
    assert encoded == [[len(PROMPT)], [C]]


def test_a_batch_of_32_gives_every_answer_as_alone(engine_of, ask, answer):
    requests = [ask([1 + (7 * i + j) % 40 for j in range(1 + i % 13)], id=i, seed=i, max_tokens=1 + (5 * i) % (3 * C))
                for i in range(32)]
    together = answer(engine_of(), *requests)
    assert tokens_of(together) == tokens_of([answer(engine_of(), request) for request in requests])


def test_a_transient_failure_wherever_it_comes_costs_nobody_an_answer(engine_of, ask, answer, monkeypatch):
    """Memory may run out anywhere: while a pass runs, while its pages are written, while pages are taken over."""
    requests = [ask([3 + i, 4, 5], id=i, seed=i, max_tokens=2 * C) for i in range(2)]
    expected = tokens_of([answer(engine_of(), request) for request in requests])
    memory = Page.longer

    for failing in range(8):
        calls = itertools.count()

        def fail_once(page, count, calls=calls, failing=failing):
            if next(calls) == failing:
                raise torch.OutOfMemoryError("for a moment")
            return memory(page, count)

        monkeypatch.setattr(Page, "longer", fail_once)
        assert tokens_of(answer(engine_of(isolate=True), *requests)) == expected


def test_taking_over_what_another_has_read_can_fail_alone(engine_of, ask, answer, monkeypatch):
    engine = engine_of(isolate=True)
    answer(engine, ask(PROMPT))
    monkeypatch.setattr(Page, "beginning", lambda *_: 1 / 0)
    events = list(engine.run([ask([*PROMPT[:3], 40], id=0), ask([30, 31], id=1)]))
    ends = {event.request: type(event) for event in events if isinstance(event, Finished | Failed)}
    assert ends == {0: Failed, 1: Finished}


def test_a_cancelled_request_that_cannot_be_read_fails_alone(tiny_network, ask):
    read = reading(lambda request, tokens: ("fine", None, []) if tokens else 1 / 0)
    engine = Engine(tiny_network, read, max_batch=1, isolate=True)
    for i in range(3):
        engine.submit(ask(id=i))
    engine.cancel(1)
    engine.cancel(2)
    ends = {}
    while engine.busy:
        ends |= {event.request: type(event) for event in engine.step() if isinstance(event, Finished | Failed)}
    assert ends == {0: Finished, 1: Failed, 2: Failed}


def test_a_short_prompt_does_not_wait_for_a_long_one_that_begins_alike(engine_of, ask):
    """With the pages and pieces of real use: the long one's first piece is longer than the sliding window."""
    stem = [1 + i % 45 for i in range(200)]
    engine = engine_of()
    engine.submit(ask(stem + [3] * 2800, id=0))
    engine.submit(ask([*stem, 7, 8, 9, 10, 11], id=1))
    started = []
    for _ in range(3):
        started += [event.request for event in engine.step() if isinstance(event, CanvasStarted)]
    assert started[:1] == [1]
    finished = list(engine.run([]))
    assert next(e for e in finished if isinstance(e, Finished) and e.request == 1).generation.cached_tokens == 200


def test_what_was_left_in_the_middle_is_gone(engine_of, ask):
    engine = engine_of(max_batch=1)
    events = engine.run([ask(id=0, max_tokens=9 * C), ask(id=1)])
    next(events)
    events.close()
    assert (engine.busy, engine.memory.reserved) == (False, 0)
    assert {event.request for event in engine.run([ask(id=5)])} == {5}


def test_memory_of_a_request_is_never_less_than_what_it_holds(engine_of, ask):
    engine = engine_of()
    request = ask([1 + i % 45 for i in range(700)], max_tokens=4 * C)
    engine.submit(request)
    held = 0
    while engine.busy:
        engine.step()
        held = max([held, *(slot.prefix.cache.nbytes for slot in engine.scheduler.slots)])
    assert 0 < held <= engine.scheduler.memory_of(request)


def test_a_step_of_several_passes_hears_of_cancels_between_them(engine_of, ask):
    engine = engine_of(cached=1, between=lambda: engine.cancel(2))  # every canvas is a pass of its own
    events = list(engine.run([ask([3 + i], id=i) for i in range(3)]))
    assert [event for event in events if isinstance(event, Denoised) and event.request == 2] == []
    assert {e.request: e.generation.finish_reason for e in events if isinstance(e, Finished)} == {
        0: "length", 1: "length", 2: "cancelled"}


def test_passes_of_any_size_give_the_same_answers(engine_of, ask, answer):
    together = answer(engine_of(), *mixed_requests(ask))
    two = 2 * C * tiny_config().hidden_size
    assert tokens_of(answer(engine_of(cached=two), *mixed_requests(ask))) == tokens_of(together)


# Memory that grows with the answers


def long_requests(ask, count=5):
    """Requests whose answers are much longer than what they are promised at first, some of them narrowed or seeded."""
    return [ask([1 + i, 2, 3 + i] * (1 + i % 3), id=i, seed=20 + i, max_tokens=(9 - i) * C + i, max_denoising_steps=2,
                sampling=SamplingParams(top_k=5 if i == 1 else 0), canvas=[4] if i == 2 else None,
                logprobs=2 if i == 3 else None)
            for i in range(count)]


def memory_for(engine, request, canvases, times=1):
    """What so many such requests need that have committed so many canvases and write one more."""
    return times * engine.scheduler.memory_for(len(request.prompt_ids) + canvases * C)


def run_to_the_end(engine, requests, each_step=lambda: None):
    for request in requests:
        engine.submit(request)
    generations = {}
    while engine.busy:
        generations |= {e.request: e.generation for e in engine.step() if isinstance(e, Finished)}
        each_step()
    return [generations[request.id] for request in requests]


def test_a_request_is_promised_its_prompt_and_a_canvas_not_all_it_may_become(engine_of, ask):
    request = ask([3] * 20, max_tokens=1000 * C)
    engine = engine_of(memory=4 * memory_for(engine_of(), request, 1))
    for i in range(3):
        engine.submit(replace(request, id=i))
    engine.step()
    assert engine.running == 3
    memory_of, bounded = engine.scheduler.memory_of, engine.scheduler.bounded(request)
    assert memory_of(bounded) <= engine.memory.limit < memory_of(request)


@pytest.mark.parametrize("thoughts", [None, Thoughts(40, 41, False, 3)])
@pytest.mark.parametrize("spare", [0, 1, C // 2, C - 1])
def test_an_answer_that_memory_bounds_is_as_long_as_it_was_told(engine_of, ask, answer, thoughts, spare):
    """A form is planned for that length: ending before would cut it off."""
    request = ask([3] * 20, max_tokens=1000 * C, max_denoising_steps=1, thoughts=thoughts)
    engine = engine_of(memory=engine_of().scheduler.memory_for(20 + 2 * C + spare) + 1)
    bounded = engine.scheduler.bounded(request)
    assert engine.scheduler.memory_of(bounded) <= engine.memory.most
    generation = answer(engine, request)
    assert len(generation.token_ids) == bounded.settings.max_tokens and generation.finish_reason == "length"


@pytest.mark.parametrize(("times", "canvases"), [(2, 2), (2, 4), (3, 2), (4, 1), (4, 3)])
def test_long_answers_in_little_memory_are_those_that_each_request_gets_alone(engine_of, ask, answer, times, canvases):
    requests = long_requests(ask)
    alone = [answer(engine_of(), request) for request in requests]
    probe = engine_of()
    engine = engine_of(memory=memory_for(probe, requests[0], canvases, times))
    most, running = [], []

    def watch():
        most.append(engine.memory.reserved)
        running.append(engine.running)

    together = run_to_the_end(engine, requests, watch)
    assert tokens_of(together) == tokens_of(alone)
    assert [g.logprobs and len(g.logprobs) for g in together] == [g.logprobs and len(g.logprobs) for g in alone]
    assert [g.prompt_tokens for g in together] == [g.prompt_tokens for g in alone]
    assert max(most) <= engine.memory.limit
    assert max(running) > 1
    assert engine.counts.gave_way > 0
    assert (engine.memory.reserved, engine.busy) == (0, False)
    assert engine.counts.prompt_tokens == sum(len(request.prompt_ids) for request in requests)
    assert engine.counts.read_tokens + engine.counts.cached_tokens == engine.counts.prompt_tokens


def test_a_request_that_gave_way_goes_on_although_nothing_of_it_was_kept(engine_of, ask, answer):
    requests = long_requests(ask, 3)
    alone = [answer(engine_of(), request) for request in requests]
    engine = engine_of(memory=memory_for(engine_of(), requests[0], 2, 2), prefixes=PrefixStore(0))
    assert tokens_of(run_to_the_end(engine, requests)) == tokens_of(alone)
    assert engine.counts.gave_way > 0


def test_what_gave_way_is_read_again_in_pieces(engine_of, ask, answer, encoded):
    requests = long_requests(ask, 3)
    alone = [answer(engine_of(), request) for request in requests]
    engine = engine_of(memory=memory_for(engine_of(), requests[0], 2, 2), prefixes=PrefixStore(0), piece=C)
    encoded.clear()
    assert tokens_of(run_to_the_end(engine, requests)) == tokens_of(alone)
    assert engine.counts.gave_way > 0
    assert max(map(max, encoded)) <= 2 * C


def test_the_oldest_never_gives_way(engine_of, ask):
    requests = [ask([1 + i, 2, 3], id=i, seed=i, max_tokens=10 * C) for i in range(4)]
    engine = engine_of(memory=memory_for(engine_of(), requests[0], 2, 2))
    finished = []
    for request in requests:
        engine.submit(request)
    while engine.busy:
        finished += [event.request for event in engine.step() if isinstance(event, Finished)]
    assert finished[0] == 0
    assert sorted(finished) == [0, 1, 2, 3]


def test_the_prefixes_memory_is_used_before_anybody_gives_way(engine_of, ask, answer):
    requests = long_requests(ask, 2)
    needed = memory_for(engine_of(), requests[0], 2, 2)
    alone = [answer(engine_of(), request) for request in requests]
    store = PrefixStore(2 * needed)
    answer(engine_of(prefixes=store), ask(range(40), id=9))
    engine = engine_of(memory=needed, lent=store.budget, prefixes=store)
    budgets = []
    together = run_to_the_end(engine, requests, lambda: budgets.append((store.budget - store.lent, store.spare)))
    assert tokens_of(together) == tokens_of(alone)
    assert engine.counts.gave_way == 0
    assert min(budget for budget, _ in budgets) < 2 * needed
    assert all(spare <= budget for budget, spare in budgets)
    assert (store.budget, store.lent) == (2 * needed, 0)


def test_an_answer_ends_where_all_memory_does(engine_of, ask, answer):
    request = ask(max_tokens=1000 * C)
    engine = engine_of(memory=memory_for(engine_of(), request, 5))
    generation = answer(engine, request)
    assert (generation.finish_reason, len(generation.token_ids)) == ("length", 6 * C)
    assert generation.token_ids == answer(engine_of(), ask(max_tokens=6 * C)).token_ids


def test_only_what_could_not_run_alone_is_refused(engine_of, ask, answer):
    request = ask([3] * 50, max_tokens=1000 * C)
    needed = engine_of().scheduler.memory_for(50)
    with pytest.raises(ValueError, match="prompt of 50 tokens and one canvas need"):
        engine_of(memory=needed - 1).submit(request)
    generation = answer(engine_of(memory=needed), request)
    assert (generation.finish_reason, len(generation.token_ids)) == ("length", C)


def test_a_constraint_is_told_where_memory_ends(engine_of, ask):
    class Long:
        rooms = []

        def guide(self, room):
            self.rooms.append(room)
            if room < 10 * C:
                raise ValueError("nothing valid is so short")

    constraint = Long()
    request = ask(max_tokens=100 * C, constraint=constraint)
    engine = engine_of(memory=memory_for(engine_of(), request, 5))
    with pytest.raises(ValueError, match=r"in the memory there is .* 48 tokens: nothing valid"):
        engine.check(request)
    assert constraint.rooms == [100 * C, 6 * C]


def test_less_memory_than_when_it_came_ends_an_answer_too(engine_of, ask):
    engine = engine_of(memory=memory_for(engine_of(), ask(), 5))
    engine.submit(ask(max_tokens=100 * C))
    generations = []
    while engine.busy:
        generations += [event.generation for event in engine.step() if isinstance(event, Finished)]
        engine.memory.limit = memory_for(engine, ask(), 2)  # an adapter came
    assert [(g.finish_reason, len(g.token_ids)) for g in generations] == [("length", 2 * C)]


@pytest.mark.parametrize("after", [5, 15, 25])
def test_those_that_gave_way_can_be_cancelled_and_dropped(engine_of, ask, answer, after):
    requests = long_requests(ask)
    engine = engine_of(memory=memory_for(engine_of(), requests[0], 2, 2))
    ends, step = {}, 0
    for request in requests:
        engine.submit(request)
    while engine.busy:
        step += 1
        if step == after:
            engine.cancel_all()
        ends |= {e.request: e.generation for e in engine.step() if isinstance(e, Finished)}
    assert "cancelled" in {g.finish_reason for g in ends.values()}
    assert len(ends) == 5
    for request in requests:
        assert ends[request.id].token_ids == answer(engine_of(), request).token_ids[: len(ends[request.id].token_ids)]
    assert (engine.memory.reserved, engine.busy) == (0, False)
    for request in requests:
        engine.submit(request)
    for _ in range(after):
        engine.step()
    assert len(dropped := engine.clear()) >= 3 and set(dropped) <= set(range(5))
    assert (engine.memory.reserved, engine.busy) == (0, False)


def test_requests_that_come_later_do_not_overtake_those_that_gave_way(engine_of, ask):
    first = [ask([1 + i, 2, 3], id=i, seed=i, max_tokens=10 * C) for i in range(3)]
    engine = engine_of(memory=memory_for(engine_of(), first[0], 2, 2))
    started = []
    for request in first:
        engine.submit(request)
    while not engine.counts.gave_way:
        engine.step()
    engine.submit(ask([9], id=9, max_tokens=C, client="another"))
    while engine.busy:
        started += [event.request for event in engine.step() if isinstance(event, CanvasStarted)]
    assert started.index(9) > max(started.index(i) for i in range(3))


# Tenants


def test_tenants_who_come_together_each_read_their_own(engine_of, ask, answer):
    engine, system = engine_of(), list(range(10, 40))
    requests = [ask([*system, 40, i % 2], id=i, seed=i, tenant=f"tenant {i // 2}") for i in range(6)]
    together = answer(engine, *requests)
    assert engine.counts.read_tokens == 3 * (len(system) + 3)
    assert tokens_of(together) == tokens_of([answer(engine_of(), request) for request in requests])


def test_a_tenant_cannot_tell_what_another_has_asked(engine_of, ask, answer):
    engine = engine_of()
    secret = list(range(5, 45))
    answer(engine, ask(secret, tenant="a"))
    for number, guess in enumerate((secret, secret[:20], [*secret[:30], 1])):
        assert answer(engine, ask(guess, tenant=f"b{number}")).cached_tokens == 0
    assert answer(engine, ask(secret, tenant="a")).cached_tokens == len(secret)


def test_tenants_share_whole_pages_of_a_system_prompt_if_they_are_allowed_to(engine_of, ask, answer):
    engine, system = engine_of(prefixes=PrefixStore(page=8)), [*range(10, 35), 2]  # three pages and two tokens
    for turn, tenant in enumerate(["a", "b", "a", "c"]):
        request = ask([*system, 40 + turn, 3], id=turn, seed=turn, tenant=tenant, shared=len(system))
        generation = answer(engine, request)
        assert generation.cached_tokens == {0: 0, 1: 24, 2: len(system), 3: 24}[turn]
        assert tokens_of([generation]) == tokens_of([answer(engine_of(), request)])


def test_shared_system_prompts_are_read_once_by_those_who_come_together(engine_of, ask, answer):
    engine, system = engine_of(prefixes=PrefixStore(page=8)), [*range(10, 34)]
    requests = [ask([*system, 40 + i], id=i, seed=i, tenant=f"tenant {i}", shared=len(system)) for i in range(4)]
    together = answer(engine, *requests)
    assert engine.counts.read_tokens == len(system) + 4
    assert tokens_of(together) == tokens_of([answer(engine_of(), request) for request in requests])


def test_a_server_s_engine_tells_of_whole_pages_only(engine_of, ask, answer):
    prompt = [1 + i % 45 for i in range(600)]
    engine = engine_of(whole_pages=True)
    told = [answer(engine, ask(prompt[:length])).cached_tokens for length in (600, 600, 255, 256, 511, 300)]
    assert told == [0, 512, 0, 256, 256, 256]
    assert engine.counts.read_tokens == 600
    assert engine.counts.cached_tokens == sum(told)


# Numbers that are none


def damaged(network, *names):
    """A copy of the network with a NaN in each of these tensors."""
    other = copy.deepcopy(network)
    for name in names:
        tensor = other.get_parameter(name) if name in dict(other.named_parameters()) else other.get_buffer(name)
        tensor.data.view(-1)[tensor.numel() // 2] = float("nan")
    return other


def all_weights():
    network = random_network(tiny_config(), feedback=0.2)
    return [name for name, _ in [*network.named_parameters(), *network.named_buffers()]]


@pytest.mark.parametrize("name", all_weights())
def test_damaged_weights_end_a_request_with_an_error_that_says_so(tiny_network, engine_of, ask, name):
    network = damaged(tiny_network, name)
    wide = list(range(50))  # every expert and every embedding has its part in it
    for options in ({}, {"sampling": SamplingParams(top_k=3)}, {"sampling": SamplingParams(logit_bias=((3, 1.0),))}):
        with pytest.raises(NotFiniteError, match="not finite.*damaged.*dgemma inspect --check"):
            list(engine_of(network).run([ask(wide, max_tokens=2 * C + 1, **options)]))
    events = list(engine_of(network, isolate=True).run([ask(wide, max_tokens=2 * C + 1)]))
    assert isinstance(events[-1], Failed)
    assert "not finite" in events[-1].told


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
def test_infinities_count_as_well(tiny_network, engine_of, ask, value):
    network = copy.deepcopy(tiny_network)
    network.layers[1].mlp.up_proj.weight.data[3] = value
    with pytest.raises(NotFiniteError):
        list(engine_of(network).run([ask()]))


def test_a_request_whose_numbers_are_none_ends_alone(tiny_network, engine_of, ask, answer):
    network = copy.deepcopy(tiny_network)
    good = [ask([3, 4, i], id=i, seed=i, max_tokens=2 * C, canvas=[5] * C, pinned=[True] * C) for i in range(4)]
    expected = tokens_of([answer(engine_of(), request) for request in good])

    def encode(inputs, cache, **options):  # the head reads every embedding, so it is not the weights that are damaged
        hidden = network.encode(inputs, cache, **options)
        for part, text in zip(hidden[0].split(list(cache.counts)), texts_of(inputs, cache), strict=True):
            if text[0] == 49:
                part[:] = float("nan")
        return hidden

    def denoise(canvas, *rest):
        hidden = network.denoise(canvas, *rest)
        for row, tokens in enumerate(canvas.tolist()):
            if tokens == [48] * C:
                hidden[row, 3, 2] = float("inf")
        return hidden

    bad = [ask([49, 3, 4], id=7), ask([5], id=8, canvas=[48] * C, pinned=[True] * C),
           ask([5], id=9, canvas=[48] * C, pinned=[True] * C, sampling=SamplingParams(top_k=2))]
    engine = engine_of(network, isolate=True, passes=Passes(encode, denoise))
    events = list(engine.run([good[0], bad[0], good[1], bad[1], *good[2:], bad[2]]))
    ends = {event.request: event for event in events if isinstance(event, Finished | Failed)}
    assert [type(ends[i]) for i in (7, 8, 9)] == [Failed] * 3
    assert "while the prompt was read" in ends[7].error
    assert "while step 1 of canvas 1 was computed" in ends[8].error
    assert tokens_of([ends[i].generation for i in range(4)]) == expected
    assert engine.counts.failed == 3
    assert (engine.memory.reserved, engine.busy) == (0, False)


def test_what_was_read_to_numbers_that_are_none_is_not_kept(tiny_network, engine_of, ask, answer):
    network, store = copy.deepcopy(tiny_network), PrefixStore()
    scalar = network.layers[0].encoder_layer_scalar
    kept = scalar.clone()
    scalar.fill_(float("nan"))
    with pytest.raises(NotFiniteError, match="while the prompt was read"):
        list(engine_of(network, prefixes=store).run([ask(PROMPT)]))
    assert store.nbytes == 0
    scalar.copy_(kept)
    assert tokens_of([answer(engine_of(network, prefixes=store), ask(PROMPT))]) == tokens_of(
        [answer(engine_of(), ask(PROMPT))])
