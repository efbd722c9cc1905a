"""How long an answer may be: to the end of the context unless something else is said."""

import dataclasses

import pytest

import dgemma
from dgemma.errors import ContextLengthError, DgemmaError
from dgemma.tasks.evaluate import evaluate_sudoku
from dgemma.tasks.sudoku import BANDS, generate
from dgemma.train.eval.metrics import Question
from dgemma.train.eval.tasks import run_task

CONTEXT, CANVAS = 8192, 90  # of the bundled model, whose own default is 90 tokens
FILLER = 102


@pytest.fixture(scope="module")
def model():
    return dgemma.load("sudoku")


def prompt(room):
    """Token ids that leave so much room for an answer."""
    return [2] + [FILLER] * (CONTEXT - room - 1)


def test_without_a_limit_an_answer_may_fill_the_context_whatever_the_checkpoint_says(model):
    request = model.request("Hello")
    assert len(request.prompt_ids) + request.settings.max_tokens == CONTEXT
    assert model.generation_config.max_tokens == 90  # it is still told
    assert model.request("Hello", max_tokens=7).settings.max_tokens == 7


def test_an_answer_longer_than_the_checkpoints_default_is_not_cut(model):
    answer = model.generate(prompt(2 * CANVAS + 5), eos_token_id=(), max_denoising_steps=1, seed=1)
    assert (len(answer.token_ids), answer.finish_reason) == (2 * CANVAS, "length")


def test_a_form_may_need_more_than_the_checkpoints_default_but_not_more_than_there_is(model):
    form = {"type": "regex", "regex": "[ab]{150}"}
    model.request("Hello", response_format=form)
    with pytest.raises(DgemmaError, match="150 tokens or more, and there is room for 100: raise max_tokens"):
        model.request("Hello", response_format=form, max_tokens=100)
    with pytest.raises(DgemmaError, match="there is room for 90, to the end of the model's context"):
        model.request(prompt(CANVAS), response_format=form)


def test_a_prompt_that_leaves_no_room_for_a_canvas_says_how_long_it_may_be(model):
    with pytest.raises(ContextLengthError) as refused:
        model.request(prompt(CANVAS - 1))
    assert (refused.value.prompt_tokens, refused.value.most) == (CONTEXT - CANVAS + 1, CONTEXT - CANVAS)


def test_evaluations_keep_to_the_checkpoints_own_limit(model):
    """A network that has not learnt yet might write on to the end of its context."""
    limits = []

    class Watched(dgemma.Model):
        def generate_batch(self, prompts, **options):
            limits.append(options["max_tokens"])
            return super().generate_batch(prompts, **options)

    settings = dataclasses.replace(model.generation_config, eos_token_id=(), max_denoising_steps=1)  # never ends
    endless = Watched(model.network, model.tokenizer, settings, "endless")
    puzzles, solutions = generate(1, BANDS["medium"], seed=1)
    assert evaluate_sudoku(endless, puzzles, solutions).mean_steps == 1  # of one canvas
    run_task(endless, [Question([{"role": "user", "content": "Hello"}], "Hello")], "exact")
    assert limits == [90, 90]
