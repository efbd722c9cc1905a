"""Thoughts that are bounded, and answers that come out empty: on a network whose every prediction is written down."""

from dataclasses import replace

import pytest
import torch

import dgemma
from dgemma.chat.reply import read_answer
from dgemma.config import GenerationConfig
from dgemma.diffusion.events import CanvasCommitted, CanvasStarted, Denoised
from dgemma.diffusion.request import Request, Thoughts
from dgemma.diffusion.sequence import NARROWER, SequenceState
from dgemma.engine import Engine
from dgemma.engine.runner import Outcome, Runner
from support.readers import reading
from support.reference import random_network, tiny_config

C = tiny_config().canvas_length
OPEN, CLOSE, STOP = 40, 41, 42
SAID = 7


class Scripted(Runner):
    """Writes what it is told, canvas by canvas, pins kept; ``made`` are the settings that each canvas was made with."""

    def __init__(self, network, canvases):
        super().__init__(network)
        self.canvases, self.made = canvases, []

    def denoise(self, slots):
        outcomes = []
        for slot in slots:
            wanted = self.canvases[min(len(self.made), len(self.canvases) - 1)]
            self.made.append(slot.sequence.settings)
            draft = torch.tensor([*wanted, *([SAID] * C)][:C])
            if slot.sequence.pinned is not None:
                draft = torch.where(slot.sequence.pinned, slot.sequence.canvas, draft)
            flags = torch.ones(C, dtype=torch.bool)
            slot.hidden = torch.zeros(C, self.network.config.hidden_size)
            outcomes.append(Outcome(slot.sequence.advance(draft, draft, torch.zeros(C), flags), True))
        return outcomes


@pytest.fixture
def scripted(tiny_network):
    """A function: what the network would write, canvas by canvas -> an engine that writes it, pins kept."""
    def make(*canvases, answer=None, network=tiny_network):
        def text(request, tokens):
            inside, said, thought = False, [], []
            for token in tokens:
                inside = token == OPEN or (inside and token != CLOSE)
                if token not in (OPEN, CLOSE):
                    (thought if inside else said).append(token)
            return "x" * len(said), "x" * len(thought) or None, []

        return Engine(network, reading(answer or text), runner=Scripted(network, canvases))

    return make


def ask(max_tokens=6 * C, budget=None, inside=False, **options):
    return Request(0, [5, 6], GenerationConfig(max_tokens=max_tokens, eos_token_id=(STOP,), max_denoising_steps=4), 3,
                   thoughts=Thoughts(OPEN, CLOSE, inside, budget), **options)


def run(engine, request):
    events = list(engine.run([request]))
    return events, events[-1].generation


def thought_length(tokens, inside=False):
    """Tokens of thoughts, their marks included."""
    count = 0
    for token in tokens:
        inside = inside or token == OPEN
        count += inside
        inside = inside and token != CLOSE
    return count


@pytest.mark.parametrize("budget", [2, 3, 4, C - 1, C, C + 1, C + 2, 2 * C - 1, 2 * C, 2 * C + 5])
def test_a_runaway_thought_has_as_many_tokens_as_its_budget_and_the_answer_follows(scripted, budget):
    runaway = [OPEN, *([8] * (C - 1))]
    full, rest = divmod(budget - 1, C)
    canvases = [runaway, *([[8] * C] * (full - (rest == 0))), [SAID, SAID, STOP]]
    engine = scripted(*canvases)
    events, generation = run(engine, ask(budget=budget))
    assert generation.token_ids == [OPEN, *([8] * (budget - 2)), CLOSE, SAID, STOP][: budget + 1]
    assert thought_length(generation.token_ids) == budget
    assert generation.finish_reason == "stop"
    committed = [event for event in events if isinstance(event, CanvasCommitted)]
    assert [token for event in committed for token in event.token_ids] == generation.token_ids
    assert [event.canvas for event in committed] == list(range(len(committed)))
    last = [event for event in events if isinstance(event, CanvasStarted)][-1]
    assert (last.token_ids[0], last.pinned[:2]) == (CLOSE, [True, False])
    assert last.context_tokens == 2 + budget - 1  # what stood behind the cut was never read


def test_a_thought_that_closes_too_late_in_its_canvas_is_cut_all_the_same(scripted):
    engine = scripted([OPEN, 8, 8, 8, 8, CLOSE, SAID], [1, SAID, STOP])
    _, generation = run(engine, ask(budget=4))
    assert generation.token_ids == [OPEN, 8, 8, CLOSE, SAID]


def test_a_thought_within_its_budget_is_left_alone(scripted):
    for inner in (0, 2):
        canvas = [OPEN, *([8] * inner), CLOSE, SAID, STOP]
        events, generation = run(scripted(canvas), ask(budget=inner + 2))
        assert generation.token_ids == canvas[:-1]
        assert sum(isinstance(event, CanvasStarted) for event in events) == 1


def test_a_thought_that_the_prompt_opened_counts(scripted):
    _, generation = run(scripted([8] * C, [1, SAID, STOP]), ask(budget=3, inside=True))
    assert generation.token_ids == [8, 8, CLOSE, SAID]
    _, generation = run(scripted([8] * C, [1, SAID, STOP]), ask(budget=1, inside=True))
    assert generation.token_ids == [CLOSE, SAID]


def test_several_thoughts_share_the_budget(scripted):
    engine = scripted([OPEN, 8, CLOSE, SAID, OPEN, 8, 8, 8], [1, SAID, STOP])
    _, generation = run(engine, ask(budget=6))
    assert generation.token_ids == [OPEN, 8, CLOSE, SAID, OPEN, 8, CLOSE, SAID]
    assert thought_length(generation.token_ids) == 6


def test_without_a_budget_a_runaway_thought_leaves_a_canvas_for_the_answer(scripted):
    for most, thought in ((6 * C, 5 * C), (2 * C, C), (C, C // 2)):
        engine = scripted(*[[OPEN, *([8] * (C - 1))], *([[8] * C] * 20)])
        _, generation = run(engine, ask(max_tokens=most))
        assert thought_length(generation.token_ids) == thought
        assert (len(generation.token_ids), generation.finish_reason) == (most, "length")
    engine = scripted([OPEN, *([8] * (C - 1))], [8] * C)
    _, generation = run(engine, ask(max_tokens=3 * C, budget=99 * C))
    assert thought_length(generation.token_ids) == 2 * C


def test_a_thought_near_the_end_of_the_context_is_cut_only_if_a_canvas_can_follow(scripted):
    most = 5 * C
    network = random_network(tiny_config(max_position_embeddings=most), seed=3)
    for left in range(C, 2 * C + 3):
        request = replace(ask(max_tokens=3 * C, budget=3), prompt_ids=[5] * (most - left))
        engine = scripted([OPEN, *([8] * (C - 1))], [1, SAID, STOP], network=network)
        _, generation = run(engine, request)
        if left >= C + 2:  # there are positions for another canvas
            assert (generation.token_ids, generation.finish_reason) == ([OPEN, 8, CLOSE, SAID], "stop")
        else:
            assert (generation.token_ids, generation.finish_reason) == ([OPEN, *([8] * (C - 1))], "length")


def test_a_stop_token_behind_the_cut_was_never_said(scripted):
    _, generation = run(scripted([OPEN, 8, 8, 8, STOP], [1, SAID, STOP]), ask(budget=3))
    assert generation.token_ids == [OPEN, 8, CLOSE, SAID]


# An answer that comes out empty


def test_an_empty_first_canvas_is_drawn_once_more_narrower(scripted):
    engine = scripted([STOP], [SAID, STOP])
    events, generation = run(engine, ask(redraw_empty=True))
    assert generation.token_ids == [SAID]
    assert (generation.steps, generation.redrawn_steps, engine.counts.redrawn) == ([1], 1, 1)
    assert generation.tokens_per_forward == 0.5
    assert [(type(event), event.canvas) for event in events[:-1]] == [
        (CanvasStarted, 0), (Denoised, 0), (CanvasStarted, 0), (Denoised, 0), (CanvasCommitted, 0)]
    assert events[0].token_ids != events[2].token_ids  # other noise
    wide, narrow = engine.runner.made
    assert (narrow.t_min, narrow.t_max, narrow.entropy_bound) == tuple(
        NARROWER * value for value in (wide.t_min, wide.t_max, wide.entropy_bound))


def test_the_second_try_counts_whatever_comes(scripted):
    engine = scripted([STOP])
    events, generation = run(engine, ask(redraw_empty=True))
    assert (generation.token_ids, generation.finish_reason, engine.counts.redrawn) == ([], "stop", 1)
    assert len(engine.runner.made) == 2


def test_an_empty_thought_alone_is_empty_and_later_canvases_are_drawn_as_ever(scripted):
    engine = scripted([OPEN, CLOSE, STOP], [SAID] * C, [STOP])
    _, generation = run(engine, ask(redraw_empty=True))
    assert generation.token_ids == [SAID] * C
    assert engine.runner.made[2] == engine.runner.made[0] != engine.runner.made[1]


@pytest.mark.parametrize("canvas", [[SAID, STOP], [OPEN, 8, CLOSE, STOP]])
def test_what_is_not_empty_is_kept(scripted, canvas):
    engine = scripted(canvas)
    _, generation = run(engine, ask(redraw_empty=True))
    assert (generation.token_ids, engine.counts.redrawn) == (canvas[:-1], 0)


@pytest.mark.parametrize("options", [{"redraw_empty": False}, {"canvas": [STOP], "redraw_empty": True}])
def test_nothing_is_drawn_again_unasked_or_where_the_caller_seeded_the_canvas(scripted, options):
    engine = scripted([STOP])
    _, generation = run(engine, ask(**options))
    assert (generation.token_ids, engine.counts.redrawn) == ([], 0)


def test_a_call_alone_is_not_empty(scripted):
    engine = scripted([STOP], answer=lambda *_: ("", None, [{"name": "f", "arguments": {}}]))
    run(engine, ask(redraw_empty=True))
    assert engine.counts.redrawn == 0


def test_a_budget_must_be_a_number():
    model = dgemma.load("sudoku")
    for budget in (-1, 1.5, "3", True):
        with pytest.raises(dgemma.DgemmaError, match="reasoning_budget"):
            model.request("x", reasoning_budget=budget)
    assert model.request("x", thinking=True, reasoning_budget=0).prompt_ids == model.request("x").prompt_ids


def test_a_thought_under_a_constraint_is_cut_to_the_token_and_the_form_follows():
    model = dgemma.load("sudoku")
    opened, closed = (model.tokenizer.token_to_id(mark) for mark in ("<|channel>", "<channel|>"))
    # It opens a thought, goes on with it and never ends.
    bias = {opened: 50.0, model.tokenizer.encode("x")[0]: 50.0, **dict.fromkeys((closed, 1, 106, 50), -100.0)}
    form = {"type": "choice", "choice": ["yes", "no"]}
    for options in ({"response_format": form}, {"tool_choice": "required", "tools": [
            {"type": "function", "function": {"name": "now"}}]}):
        generation = model.generate("Well?", max_tokens=120, seed=1, thinking=True, reasoning_budget=20,
                                    logit_bias=bias, max_denoising_steps=2, **options)
        ids = generation.token_ids
        assert ids[0] == opened
        assert ids.index(closed) == 19
        answer = read_answer(model.tokenizer, [], ids[20:])
        assert answer.text in ("yes", "no") or answer.tool_calls == [{"name": "now", "arguments": {}}]
        assert generation.finish_reason == "stop"


def test_the_engine_promises_memory_for_the_canvas_behind_a_cut(tiny_network):
    engine = Engine(tiny_network)
    bounded = ask(max_tokens=C, budget=2)
    plain = Request(0, bounded.prompt_ids, bounded.settings, 3)
    assert engine.scheduler.memory_of(bounded) > engine.scheduler.memory_of(plain)


def test_a_row_knows_where_its_thoughts_stand():
    sequence = SequenceState(ask(budget=4), tiny_config())
    sequence.start_canvas()
    sequence.draft = torch.tensor([OPEN, *([8] * (C - 1))])
    assert sequence.close_canvas().token_ids == [OPEN, 8, 8]
    assert sequence.closes_thought
    assert sequence.finish_reason is None
