"""A canvas of an answer is edited, and denoised again from there: another answer beside it."""

import asyncio

import numpy as np
import pytest

from dgemma.errors import DgemmaError
from dgemma.studio.answers import Answers
from dgemma.studio.edits import Place, read_places, start_of, type_over
from dgemma.studio.recording import Canvas, Recording, Step
from dgemma.tasks.sudoku import is_solved, parse
from support.studio import PUZZLE

END, FILL = 9, 0


def step(ids, number=1, noise=7):
    ids = np.array(ids, np.int32)
    flags = np.zeros(len(ids), bool)
    return Step(number, ids, np.full(len(ids), noise, np.int32), np.zeros(len(ids), np.float16), flags, flags, 0.8, 0.1)


@pytest.fixture
def recording():
    first = Canvas(0, 8, np.zeros(6, np.int32), np.zeros(6, bool), steps=[step([1, 2, 3, 4, 5, 6])],
                   committed=[1, 2, 3, 4, 5, 6])
    second = Canvas(1, 8, np.zeros(6, np.int32), np.zeros(6, bool),
                    steps=[step([4, 4, 4, 4, 4, 4]), step([1, 2, 3, END, FILL, FILL], 2)], committed=[1, 2, 3])
    return Recording([first, second], {token: str(token) for token in range(10)})


def places(**marks):
    return [Place(at, None, marks.get(f"at{at}", "")) for at in range(6)]


def test_what_is_cleared_is_noise_and_the_rest_stays(recording):
    start = start_of(recording, 1, 1, places(at1="clear"), "stay", [END])
    assert start.canvas == [1, None, 3, END, FILL, FILL]
    assert start.pinned == [True, False, True, True, True, True]
    assert (start.from_step, start.prefix, start.before.given) == (0, [1, 2, 3, 4, 5, 6], 1)


def test_the_rest_goes_on_from_the_canvas_that_the_step_left(recording):
    start = start_of(recording, 1, 0, places(at0="pin"), "go_on", [END])
    assert start.canvas == [4, 7, 7, 7, 7, 7] and start.pinned == [True] + [False] * 5
    assert start.from_step == 1


def test_the_rest_is_drawn_anew(recording):
    assert start_of(recording, 1, 1, places(at0="pin"), "anew", [END]).canvas == [1] + [None] * 5


def test_the_first_canvas_has_nothing_before_it(recording):
    start = start_of(recording, 0, 0, places(at0="clear"), "stay", [END])
    assert start.prefix == [] and start.before.canvases == []


def test_a_pin_behind_a_pinned_end_is_refused(recording):
    with pytest.raises(DgemmaError, match="position 6 is pinned, but the answer ends before it.*position 4"):
        start_of(recording, 1, 1, places(at0="clear", at5="pin"), "stay", [END])


def test_where_nothing_is_to_change_that_is_said(recording):
    with pytest.raises(DgemmaError, match="clear the tokens"):
        start_of(recording, 1, 1, places(), "stay", [END])


def test_typed_tokens_are_pinned_and_what_follows_moves(recording):
    shown = recording.canvases[1].steps[1]
    made = type_over(places(), 1, 1, [8, 8], shown, [END])
    assert made == [Place(0), Place(None, 8, "pin"), Place(None, 8, "pin"), Place(2), Place(3), Place(4)]
    assert start_of(recording, 1, 1, [*made[:3], Place(2, None, "clear"), *made[4:]], "stay", [END]).canvas == [
        1, 8, 8, None, END, FILL]
    assert len(type_over(places(), 0, 2, [8], shown, [END])) == 4


def test_a_text_that_pushes_the_answer_out_of_its_canvas_is_refused(recording):
    with pytest.raises(DgemmaError, match="no room for 1 of them"):
        type_over(places(), 0, 0, [8, 8, 8, 8], recording.canvases[1].steps[1], [END])


@pytest.mark.parametrize("given", [None, [[0, None]], [[0, 1, ""]], [[None, None, ""]], [[6, None, ""]],
                                   [[None, 99, ""]], [[0, None, "stay"]], [[0.5, None, ""]], [[0, None, ""]] * 7])
def test_a_browser_that_tells_nonsense_is_refused(given):
    with pytest.raises(DgemmaError):
        read_places(given, 6, 10)


@pytest.mark.parametrize("where", [(2, 0), (0, 5), ("0", 0), (None, None), (-1, 0), (0, True)])
def test_a_step_that_is_not_there_is_refused(recording, where):
    with pytest.raises(DgemmaError, match="nothing was recorded"):
        start_of(recording, *where, places(), "anew", [END])


@pytest.fixture
def solved(serving, store):
    """A function: what is done with the answers and the message of a solved Sudoku, in an event loop."""
    chat = store.new_conversation("Chat", options={"seed": 1})
    question = store.add_message(chat.id, "user", PUZZLE)

    def run(then):
        async def inner():
            answers = Answers(lambda: serving, store)
            first = answers.start(question)
            await first.finished()
            again = then(answers, store.message(first.id))
            await again.finished()
            await answers.close()
            return first, again

        return asyncio.run(inner())

    return run


def edited(serving, recording, marks, rest, index=-1):
    canvas = recording.canvases[0]
    index %= len(canvas.steps)
    return start_of(recording, 0, index, [Place(at, None, marks.get(at, "")) for at in range(len(canvas.start))], rest,
                    serving.model.generation_config.eos_token_id)


def test_a_pinned_row_is_kept_and_the_others_are_solved_again(serving, store, solved):
    def then(answers, message):
        start = edited(serving, answers.recording(message.id), dict.fromkeys(range(9), "pin"), "anew")
        return answers.denoise_again(message, start, seed=5)

    first, again = solved(then)
    assert again.text.split("\n")[0] == first.text.split("\n")[0]
    grid = parse(again.text)
    assert grid is not None and is_solved(grid, parse(PUZZLE))
    message = store.message(again.id)
    assert [one.id for one in store.siblings(message)] == [first.id, again.id]
    assert message.info["seed"] == 5
    kept = Recording.unpack(store.recording(again.id))
    assert kept.canvases[0].pinned[:9].all() and not kept.canvases[0].pinned[9:].any()


def test_only_a_span_is_drawn_again(serving, solved):
    def then(answers, message):
        return answers.denoise_again(message, edited(
            serving, answers.recording(message.id), dict.fromkeys(range(10, 19), "clear"), "stay"), seed=5)

    first, again = solved(then)
    assert again.text == first.text and again.figures.tokens == first.figures.tokens


def test_an_answer_goes_on_from_its_second_step(serving, solved):
    def then(answers, message):
        return answers.denoise_again(message, edited(serving, answers.recording(message.id), {}, "go_on", 1), seed=9)

    first, again = solved(then)
    before = first.recording.canvases[0].steps[1].step  # a busy machine may leave steps out
    assert again.recording.canvases[0].steps_before == before
    assert again.recording.canvases[0].steps[0].step > before
    assert is_solved(parse(again.text), parse(PUZZLE))


def test_what_was_said_in_earlier_canvases_is_a_part_of_the_new_answer(serving, store, solved):
    """The first canvas of an answer, given as the prefix of a second one."""
    def then(answers, message):
        made = answers.recording(message.id)
        one = made.canvases[0]
        whole = Recording([one, Canvas(1, 48, one.start, one.pinned, steps=one.steps, committed=[])],
                          made.texts, made.special, made.pieces)
        start = start_of(whole, 1, 0, [Place(0, None, "pin")], "anew",
                         serving.model.generation_config.eos_token_id)
        return answers.denoise_again(message, start, seed=9)

    first, again = solved(then)
    assert again.status == "done" and again.text.startswith(first.text)
    kept = Recording.unpack(store.recording(again.id))
    assert kept.given == 1 and [canvas.index for canvas in kept.canvases][:2] == [0, 1]
