"""Puzzles in pictures: what is trained on follows from seed and step, and is what the model is asked in use."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from dgemma.chat.media import show
from dgemma.errors import DgemmaError
from dgemma.tasks import sudoku
from dgemma.train.data.sources import longest_context, most_soft_tokens, shows_pictures, source_of
from dgemma.train.recipe import Recipe, SudokuData
from dgemma.train.runs.state import begin, parts_of
from dgemma.train.sights import pictures_of
from support.seeing import TOWER
from train.conftest import MODEL

DATA = SudokuData(bases=40, curriculum_steps=0, pictures=0.6, reading=0.5)
RECIPE = Recipe("seeing", {**MODEL, **TOWER}, DATA, max_steps=1, batch_size=3)


@pytest.fixture(scope="module")
def parts():
    return parts_of(RECIPE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("puzzles")


def source(parts, folder, **data):
    recipe = dataclasses.replace(RECIPE, data=dataclasses.replace(DATA, **data))
    return source_of(recipe, parts.tokenizer, parts.config, parts.generation_config, folder)


@pytest.fixture(scope="module")
def made(parts, folder):
    return source(parts, folder)


def flat(examples):
    return [(one.context_ids, one.canvas_ids, [(sight.start, sight.medium.source) for sight in one.sights])
            for one in examples]


def test_batches_without_pictures_are_those_of_a_run_without_any(parts, folder, made):
    plain = source(parts, folder, pictures=0.0)
    seen = 0
    for step in range(12):
        batch = made.batch(step)
        seen += bool(batch[0].sights)
        assert batch[0].sights or flat(batch) == flat(plain.batch(step))
    assert 2 < seen < 12


def test_pictures_follow_from_the_step_whether_drawn_ahead_or_not(parts, folder, made):
    other = source(parts, folder)
    steps = [4, 5, 6, 2, 3]
    assert [flat(made.batch(step)) for step in steps] == [flat(other.batch(step)) for step in reversed(steps)][::-1]


def test_an_answer_is_what_the_picture_says_or_its_solution(made):
    examples = made.seen.some(1)
    for example in examples:
        said = made.made.tokenizer.decode(example.turn.response_ids[:-1])
        grid = sudoku.parse(said)
        assert said == sudoku.format_grid(grid)
        assert example.weights == [1.0] * len(example.canvas_ids)


def test_a_prompt_and_its_picture_are_those_of_the_model_in_use(parts, made):
    model = begin(RECIPE, parts, torch.device("cpu")).model()
    for step in range(12):
        rng = np.random.default_rng([0, 3, step])
        asked = made.seen.questions.about(*made.made.puzzles(step, rng), rng)
        for question, example in zip(asked, made.seen.some(step), strict=True):
            assert model.prompt_ids(question.messages()) == example.context_ids
            [picture] = pictures_of(example.sights)
            part = {"type": "image", "image": question.image}
            assert np.array_equal(picture.pixels,
                                  show(part, parts.config.vision, words=question.said[0]).pictures[0].pixels)


def test_held_out_examples_have_their_share_of_pictures(made):
    assert [bool(one.sights) for one in made.held_out(5)] == [False] * 2 + [True] * 3


def test_a_plan_knows_of_the_pictures(made):
    assert shows_pictures(made)
    assert 40 < most_soft_tokens(made) <= 70
    assert longest_context(made) > most_soft_tokens(made)


def test_a_model_without_a_tower_is_shown_no_pictures(parts, folder):
    blind = dataclasses.replace(parts, config=dataclasses.replace(parts.config, vision=None))
    with pytest.raises(DgemmaError, match="no vision tower"):
        source(blind, folder)
