"""The noise of a canvas is its own: it depends on a key, not on the batch that the canvas is in."""

import dataclasses
import time

import numpy as np
import torch

from dgemma.train.noise import Noise, draw_noise, keyed_noise, noise_key
from dgemma.train.objective import Objective

CHAIN = Objective(passes=3, rollout=0.7)
KEYS = [noise_key(0, 5, place) for place in range(6)]
BY_PASS = {"t", "rolled", "sampling", "renoise"}


def rows_of(noise, rows):
    return Noise(**{f.name: getattr(noise, f.name)[:, rows] if f.name in BY_PASS else getattr(noise, f.name)[rows]
                    for f in dataclasses.fields(noise)})


def same(one, other):
    return all(torch.equal(getattr(one, f.name), getattr(other, f.name)) for f in dataclasses.fields(one))


def test_a_canvas_has_the_same_noise_in_every_batch():
    whole = keyed_noise(CHAIN, KEYS, 8, 50)
    assert same(rows_of(whole, [4, 1]), keyed_noise(CHAIN, [KEYS[4], KEYS[1]], 8, 50))
    assert not same(rows_of(whole, [4]), rows_of(whole, [1]))


def test_shapes_and_kinds_are_those_of_a_batch_drawn_at_once():
    for vocab in (50, 9000):
        keyed, drawn = (keyed_noise(CHAIN, KEYS, 8, vocab),
                        draw_noise(CHAIN, 6, 8, vocab, torch.Generator().manual_seed(0)))
        for field in dataclasses.fields(Noise):
            one, other = getattr(keyed, field.name), getattr(drawn, field.name)
            assert (one.shape, one.dtype) == (other.shape, other.dtype), field.name


def test_its_numbers_are_distributed_as_they_should_be():
    """Against moments known in closed form: a Gumbel variable has mean γ and variance π²/6."""
    noise = keyed_noise(dataclasses.replace(CHAIN, passes=2), [noise_key(1, 0, place) for place in range(200)], 20, 50)
    assert abs(noise.draw.mean() - 0.5) < 0.02 and abs(noise.t.mean() - 0.5) < 0.05
    assert abs(noise.sampling.mean() - np.euler_gamma) < 0.01 and abs(noise.sampling.var() - np.pi**2 / 6) < 0.02
    assert abs(noise.tokens.float().mean() - 24.5) < 0.8 and set(noise.tokens.unique().tolist()) == set(range(50))
    assert abs(noise.rolled.float().mean() - 0.7) < 0.08 and abs(noise.conditioned.float().mean() - 0.5) < 0.12


def test_keys_of_neighbours_have_nothing_in_common():
    keys = [noise_key(seed, step, place) for seed in range(10) for step in range(10) for place in range(10)]
    assert len(set(keys)) == 1000 and max(keys) > 2**63
    bits = np.array([[key >> bit & 1 for bit in range(64)] for key in keys])
    assert abs(bits.mean(0) - 0.5).max() < 0.08  # every bit, the high ones too: four deviations
    assert noise_key(2**32, 0, 0) != noise_key(0, 1, 0) and noise_key(-1, 0, 0) != noise_key(1, 0, 0)


def test_keys_count_in_full():
    assert not same(keyed_noise(CHAIN, [5], 8, 50), keyed_noise(CHAIN, [5 + 2**32], 8, 50))


def test_a_batch_of_the_bundled_model_is_drawn_in_a_moment():
    keys = [noise_key(0, 0, place) for place in range(64)]
    seconds = []
    for _ in range(3):
        begun = time.perf_counter()
        keyed_noise(CHAIN, keys, 90, 288)
        seconds.append(time.perf_counter() - begun)
    assert min(seconds) < 0.4, seconds  # 0.03 s on a quiet machine
