"""A run: it resumes as if it had never stopped, and leaves a checkpoint that loads."""

import dataclasses
import os
import signal

import pytest
import torch

import dgemma
from dgemma.errors import DgemmaError
from dgemma.train.recipe import OptimizerSettings
from dgemma.train.trainer import Trainer, learning_rate_factor


def quiet(_: str) -> None:
    pass


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.network.parameters()])


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(recipe, tmp_path):
    whole = Trainer(recipe, tmp_path / "whole", quiet)
    whole.train()
    first = Trainer(recipe, tmp_path / "parts", quiet)
    original = first._train_step

    def interrupted(loss_of):
        if first.step == 1:  # as Ctrl-C does, during the second step
            os.kill(os.getpid(), signal.SIGINT)
        return original(loss_of)

    first._train_step = interrupted
    first.train()
    assert first.step == 2
    second = Trainer(recipe, tmp_path / "parts", quiet)
    assert second.step == 2
    second.train()
    assert second.step == recipe.max_steps
    assert torch.equal(weights(whole), weights(second))


def test_the_checkpoint_loads_and_generates(recipe, tmp_path):
    trainer = Trainer(dataclasses.replace(recipe, max_steps=1), tmp_path / "run", quiet)
    trainer.train()
    model = dgemma.load(tmp_path / "run" / "checkpoint")
    assert model.generation_config.max_denoising_steps == 2
    assert model.generation_config.eos_token_id == (1, 106, 50)
    assert model.generate("hello", seed=1).steps == [2]
    assert (tmp_path / "run" / "best" / "model.safetensors").exists()


def test_another_models_folder_is_refused(recipe, tmp_path):
    Trainer(dataclasses.replace(recipe, max_steps=1), tmp_path / "run", quiet).train()
    model = {**recipe.model, "text_config": {**recipe.model["text_config"], "hidden_size": 24}}
    with pytest.raises(DgemmaError, match=r"state\.pt: was made by another model"):
        Trainer(dataclasses.replace(recipe, model=model), tmp_path / "run", quiet)


def test_the_learning_rate_warms_up_stays_and_falls_to_zero():
    settings = OptimizerSettings(warmup_steps=10, decay_fraction=0.5)
    factors = [learning_rate_factor(step, 100, settings) for step in range(101)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9:50] == [1.0] * 41
    assert factors[75] == pytest.approx(0.5)
    assert factors[100] == 0.0
