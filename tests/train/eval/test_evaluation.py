"""Answers that are being made end when the run is to stop."""

import threading

import pytest

from dgemma.diffusion.events import Generation
from dgemma.model import read_parts
from dgemma.train.data.sources import source_of
from dgemma.train.eval.evaluation import Evaluator
from dgemma.train.recipe import ConversationData, Evaluation, Recipe


class Endless:
    """A model whose answers end when they are cancelled only."""

    def __init__(self):
        self.began, self.cancelled = threading.Event(), threading.Event()

    def generate_batch(self, prompts, **_):
        self.began.set()
        assert self.cancelled.wait(30)
        return [Generation("", None, [], [], "cancelled", [1], 0.0, 4, 0.1) for _ in prompts]

    def cancel(self):
        self.cancelled.set()


@pytest.fixture
def evaluator(conversations, tmp_path):
    recipe = Recipe(name="r", model="sudoku", data=ConversationData((str(conversations),), fill="pad"), max_steps=1,
                    evaluation=Evaluation(metric="exact", count=1, max_tokens=4))
    parts = read_parts("sudoku")
    source = source_of(recipe, parts.tokenizer, parts.config, parts.generation_config, tmp_path, lambda text: None)
    return Evaluator(recipe, source, parts.generation_config)


def test_a_stop_cancels_the_answers_that_have_begun(evaluator):
    model = Endless()
    score = evaluator.score(model, model.began.is_set, lambda done, count: None)
    assert score.partial and score.count == 0
