"""A model is given a vision tower by its recipe: it is trained with it, resumed, written, and sees from then on."""

import dataclasses

import pytest
import torch

import dgemma
from dgemma.config import load_model_config
from dgemma.errors import DgemmaError
from dgemma.tasks import sudoku
from dgemma.train.parallel.distributed import Ranks
from dgemma.train.recipe import Evaluation, OptimizerSettings, Recipe, SudokuData
from dgemma.train.runs.state import begin, parts_of
from dgemma.train.trainer import Trainer
from support.pictures import random_picture
from support.seeing import TOWER, save_seeing_sudoku
from train.conftest import MODEL, loaded

RANKS = Ranks(torch.device("cpu"))
RECIPE = Recipe("seeing", "sudoku", SudokuData(bases=40, pictures=1.0, photos=0.0), vision=TOWER, max_steps=2,
                batch_size=2, optimizer=OptimizerSettings(lr=3e-3, warmup_steps=1),
                evaluation=Evaluation(every=1000, examples=2))


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    """The bundled model with a random tower, as it is written."""
    return save_seeing_sudoku(tmp_path_factory.mktemp("seeing") / "model")


def tower_of(folder):
    return dgemma.load(folder, vision=str(folder)).pictures.load().state_dict()


def test_a_model_with_a_new_tower_is_written_and_sees(seeing):
    model = dgemma.load(seeing)
    prompt = model.prompt_ids("Solve this", images=[random_picture(300, 300)])
    assert prompt.count(model.config.vision.image_token_id) == 64
    answer = model.generate("Solve this", images=[random_picture(300, 300)], max_tokens=90, max_denoising_steps=1)
    assert answer.prompt_tokens == len(prompt)
    config = load_model_config(seeing)
    assert config.picture_attention == "sliding"
    assert config.vision.vision_soft_token_budgets == (70,)


def test_what_it_says_to_text_is_what_it_said(seeing):
    puzzle = sudoku.to_line(sudoku.generate(1, 42, seed=3)[0][0])
    one, other = (dgemma.load(name).generate(puzzle, seed=1) for name in ("sudoku", seeing))
    assert one.token_ids == other.token_ids


def test_a_tower_is_taken_from_a_checkpoint(seeing, tmp_path):
    recipe = dataclasses.replace(RECIPE, vision=str(seeing))
    state = begin(recipe, parts_of(recipe), RANKS.device)
    state.export(tmp_path / "again")
    wanted = tower_of(seeing)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in tower_of(tmp_path / "again").items())
    assert load_model_config(tmp_path / "again") == load_model_config(seeing)
    assert all(parameter.requires_grad for parameter in state.network.vision.parameters())


@pytest.mark.usefixtures("quick")
def test_a_stopped_run_goes_on_as_if_it_had_not_been(tmp_path):
    recipe = dataclasses.replace(RECIPE, optimizer=dataclasses.replace(RECIPE.optimizer, schedule="constant"))
    assert Trainer(recipe, tmp_path / "whole", ranks=RANKS).train()
    for steps in (1, 2):
        assert Trainer(dataclasses.replace(recipe, max_steps=steps), tmp_path / "parts", ranks=RANKS).train()
    states = [tower_of(tmp_path / name / "last") for name in ("whole", "parts")]
    before = begin(RECIPE, parts_of(RECIPE), RANKS.device).network.vision.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in before)
    assert any(not torch.equal(states[0][name], before[name]) for name in before)


@pytest.mark.parametrize(("change", "said"), [
    ({"adapter": {"r": 2}}, "no place for a tower"), ({"vision": {"hidden_size": 8}}, "vision_config in it"),
    ({"vision": "nowhere"}, "nowhere"), ({"model": MODEL}, "model that there is"),
    ({"vision": {"vision_config": {}, "vision_soft_token_budgets": [71]}}, "must be some of 70")])
def test_what_is_no_tower_is_an_error(tmp_path, change, said):
    data = {"name": "t", "model": "sudoku", "max_steps": 1, "data": {"kind": "sudoku", "bases": 40}, "vision": TOWER}
    with pytest.raises(DgemmaError, match=said):
        parts_of(loaded(tmp_path / "t.yaml", data | change))
