"""Prompts of token ids, in whatever a program has them."""

import numpy as np
import pytest
import torch

import dgemma
from dgemma.errors import DgemmaError


@pytest.fixture(scope="module")
def model():
    return dgemma.load("sudoku", device="cpu")


IDS = [2, 105, 7]


@pytest.mark.parametrize("prompt", [
    IDS, tuple(IDS), range(2, 5), np.array(IDS), np.array(IDS, np.int32), np.array(IDS, np.uint8), list(np.array(IDS)),
    [np.int64(2), 105, np.uint16(7)], [2, np.int64(105), 7], torch.tensor(IDS), torch.tensor(IDS, dtype=torch.int32),
    list(torch.tensor(IDS)), [2, torch.tensor(105), np.array(7)],
], ids=lambda prompt: f"{type(prompt).__name__} of {type(prompt[0]).__name__} {getattr(prompt, 'dtype', '')}")
def test_ids_are_taken_as_they_come(model, prompt):
    found = model.prompt_ids(prompt)
    assert found == (IDS if not isinstance(prompt, range) else [2, 3, 4])
    assert all(type(token) is int for token in found)
    assert model.generate(prompt, seed=1, max_tokens=9, max_denoising_steps=1).prompt_tokens == 3


@pytest.mark.parametrize("prompt", [
    np.array([[2, 3]]), np.array([2.0]), np.array([True]), np.array(2), torch.tensor([2.0]),
    torch.tensor([True, False]),
    torch.tensor(3), [np.float64(2)], [2, np.float32(3)], [True, 2], [np.bool_(True)], [2, "x"], [2.5], [2, [3]],
    [torch.tensor([2, 3])], [np.array([2, 3])], np.array(["a"]), [2, None],
], ids=repr)
def test_what_is_no_list_of_ids_is_an_error(model, prompt):
    with pytest.raises(DgemmaError):
        model.generate(prompt, max_denoising_steps=1)


def test_the_seeds_of_a_canvas_too(model):
    canvas = [np.int64(7), None, torch.tensor(9)]
    request = model.request("x", canvas=canvas, pinned=[True, False, True])
    assert request.canvas == [7, None, 9]
    assert all(token is None or type(token) is int for token in request.canvas)


def test_numbers_of_numpy_and_torch_are_numbers_everywhere(model):
    plain = model.request("x", seed=5, max_tokens=9, temperature=0.5, top_k=3, logit_bias={7: 1.0}, entropy_bound=0.25)
    theirs = model.request("x", seed=np.int64(5), max_tokens=np.int32(9), temperature=np.float32(0.5),
                           top_k=torch.tensor(3), logit_bias={np.int64(7): np.float32(1)},
                           entropy_bound=np.float64(0.25))
    assert (theirs.seed, theirs.settings, theirs.sampling) == (plain.seed, plain.settings, plain.sampling)
    assert type(theirs.seed) is int and type(theirs.settings.max_tokens) is int
    first, second = model.generate_batch(["a", "b"], seeds=np.arange(2), max_tokens=9, max_denoising_steps=1)
    assert (first.seed, second.seed) == (0, 1)


@pytest.mark.parametrize("stop", [5, [5], [None], {"a": 1}, b"x"])
def test_stop_is_text(model, stop):
    with pytest.raises(DgemmaError, match="stop must be a string or a list of strings"):
        model.request("x", stop=stop)
