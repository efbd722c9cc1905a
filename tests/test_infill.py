"""The bundled model fills in: Sudoku answers with digits, rows and steps given."""

import dataclasses
import itertools

import numpy as np
import pytest

import dgemma
from dgemma import CanvasStarted, Denoised
from dgemma.errors import DgemmaError
from dgemma.tasks.sudoku import is_solved, parse

PUZZLE = "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"


@pytest.fixture(scope="module")
def model():
    return dgemma.load("sudoku", device="cpu")


@pytest.fixture(scope="module")
def steps(model):
    """The denoising steps of an answer with seed 1."""
    return [event for event in model.stream(PUZZLE, seed=1) if isinstance(event, Denoised)]


@pytest.fixture(scope="module")
def rows(model):
    """The lines of the solution."""
    return model.generate(PUZZLE, seed=1).text.split("\n")


def solves(text):
    grid = parse(text)
    return grid is not None and is_solved(grid, parse(PUZZLE))


def test_a_row_is_written_again_between_the_others(model, rows):
    parts = ["\n".join(rows[:3]) + "\n", {"blank": len(rows[3])}, "\n" + "\n".join(rows[4:]), {"end": True}]
    generation = model.generate(PUZZLE, seed=2, canvas=parts)
    assert generation.text == "\n".join(rows)
    assert generation.finish_reason == "stop" and generation.steps[0] < 48


def test_what_is_right_and_pinned_leads_to_the_solution(model, rows):
    assert solves(model.generate(PUZZLE, seed=3, canvas=[rows[0], {"blank": 1}, rows[1][:4]]).text)


def test_what_is_wrong_and_pinned_stays_and_what_is_wrong_and_free_is_mended(model, rows):
    wrong = "9" + rows[0][1:]
    assert model.generate(PUZZLE, seed=3, canvas=wrong).text.startswith(wrong)
    mended = model.generate(PUZZLE, seed=3, canvas=[{"text": wrong, "pinned": False}])
    assert solves(mended.text)


def test_a_pinned_position_never_changes_at_any_step(model, rows):
    started, *events = model.stream(PUZZLE, seed=4, canvas=["9", {"blank": 8}, "\n", {"blank": 3}, "7"])
    assert isinstance(started, CanvasStarted)
    fixed = [place for place, pin in enumerate(started.pinned) if pin]
    assert fixed == [0, 9, 13]
    for event in events:
        if isinstance(event, Denoised):
            for ids in (event.token_ids, event.canvas_ids):
                assert [ids[place] for place in fixed] == [started.token_ids[place] for place in fixed]


@pytest.mark.parametrize("changes", [{"seed": 1}, {"seed": 9}, {"seed": 1, "entropy_bound": 0.05}], ids=str)
def test_an_answer_goes_on_from_its_third_step(model, steps, changes):
    generation = model.generate(PUZZLE, canvas=steps[2].canvas_ids, from_step=3, **changes)
    assert solves(generation.text)
    assert generation == dataclasses.replace(
        model.generate(PUZZLE, canvas=steps[2].canvas_ids, from_step=3, **changes), seconds=generation.seconds,
        cached_tokens=generation.cached_tokens)


def test_a_span_of_tokens_is_drawn_again(model, steps, rows):
    ids = steps[-1].token_ids
    free = range(40, 49)
    canvas = [None if place in free else token for place, token in enumerate(ids)]
    generation = model.generate(PUZZLE, seed=8, canvas=canvas, pinned=[place not in free for place in range(len(ids))])
    assert generation.text == "\n".join(rows)


def test_what_follows_a_prefix_is_the_answer(model):
    """Its tokens are read like the prompt's, so the request is that of a longer prompt."""
    prefix = "I think: "
    request = model.request(PUZZLE, seed=1, prefix=prefix)
    ids = model.tokenizer.encode(prefix)
    assert request.prompt_ids == model.prompt_ids(PUZZLE) + ids
    assert model.request(PUZZLE, seed=1, prefix=np.array(ids)).prompt_ids == request.prompt_ids
    assert model.generate(PUZZLE, seed=1, prefix=prefix, max_tokens=9).token_ids == model.generate(
        request.prompt_ids, seed=1, max_tokens=9).token_ids


def test_a_form_holds_pins(model):
    digits = {"type": "regex", "regex": "[0-9]{20}"}
    text = model.generate("Hi", seed=2, canvas=[{"blank": 9}, "777"], response_format=digits).text
    assert len(text) == 20 and text.isdigit() and text[9:12] == "777"
    form = {"type": "regex", "regex": "[0-9]+"}
    text = model.generate("Hi", seed=2, canvas=[{"blank": 5}, "7", {"end": True}], response_format=form).text
    assert len(text) == 6 and text.isdigit() and text[5] == "7"


@pytest.mark.parametrize(("canvas", "message"), [
    ("x", "no answer of that form has all that is pinned, token 152 at position 0"),
    ([{"blank": 21}, "7"], "over before all that is pinned is said"),
    (["7", {"end": True}], "no answer of that form has"),
], ids=str)
def test_pins_that_contradict_a_form_are_refused(model, canvas, message):
    with pytest.raises(DgemmaError, match=f"pinned contradicts response_format or tool_choice: .*{message}"):
        model.request("Hi", canvas=canvas, response_format={"type": "regex", "regex": "[0-9]{20}"})


@pytest.mark.parametrize(("options", "message"), [
    ({"pinned": [True]}, "pinned needs canvas"), ({"canvas": "x", "pinned": [True]}, "pinned is for a canvas of token"),
    ({"prefix": 5}, "prefix must be text or token ids, got 5"), ({"prefix": [288]}, "got 288"),
    ({"prefix": ["x"]}, "got 'x'"), ({"canvas": [288]}, "canvas has token id 288"), ({"from_step": 1}, "needs canvas"),
    ({"prefix": "x", "response_format": {"type": "json_object"}}, "prefix must not be given with response_format"),
    ({"canvas": 5}, "canvas must be"),
], ids=str)
def test_a_start_that_cannot_be_is_an_error(model, options, message):
    with pytest.raises(DgemmaError, match=message):
        model.request("x", **options)


def test_answers_of_a_batch_are_those_of_each_alone(model, rows):
    prompts = [PUZZLE, "Hello!"]
    for options in ({}, {"canvas": [rows[0]]}, {"canvas": ["9", {"blank": 3}], "from_step": 2}):
        together = model.generate_batch(prompts, seeds=[5, 6], **options)
        alone = [model.generate(prompt, seed=seed, **options) for prompt, seed in zip(prompts, (5, 6), strict=True)]
        assert [one.token_ids for one in together] == [one.token_ids for one in alone]


def test_candidates_come_with_every_step(model):
    steps = [event for event in model.stream(PUZZLE, seed=1, candidates=4) if isinstance(event, Denoised)]
    for event in steps:
        assert len(event.candidates) == len(event.token_ids) and all(len(place) == 4 for place in event.candidates)
        assert [place[0][0] for place in event.candidates] == event.token_ids
        for place in event.candidates:
            assert all(one[1] >= other[1] for one, other in itertools.pairwise(place))
