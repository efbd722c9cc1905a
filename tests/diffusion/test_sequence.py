"""A request's way through its canvases, without a network: what it checks, draws, keeps and ends with."""

import pytest
import torch

from dgemma.config import GenerationConfig
from dgemma.diffusion.request import Request
from dgemma.diffusion.sequence import SequenceState
from dgemma.nn.head import VOCAB_TILE
from support.reference import tiny_config

CONFIG = tiny_config()
C = CONFIG.canvas_length
EOS = 1


def request(prompt=(5, 6, 7), seed=3, canvas=None, pinned=None, **settings):
    return Request(0, list(prompt), GenerationConfig(**settings), seed, canvas, pinned)


def sequence(**arguments):
    return SequenceState(request(**arguments), CONFIG)


def close_with(sequence, draft):
    sequence.start_canvas()
    sequence.draft = torch.tensor(draft)
    return sequence.close_canvas()


# Checking


@pytest.mark.parametrize(("changes", "message"), [
    ({"prompt": []}, "prompt is empty"),
    ({"prompt": [3, 50]}, "token id 50 in the prompt is outside the vocabulary of 50"),
    ({"prompt": [-1]}, "token id -1 in the prompt"),
    ({"canvas": [1] * (C + 1)}, f"canvas has {C + 1} tokens, the model's canvas {C}"),
    ({"canvas": [1, 50]}, "canvas has token id 50"),
    ({"canvas": [-1]}, "canvas has token id -1"),
    ({"pinned": [True]}, "one entry for every entry of canvas"),
    ({"canvas": [1, 2], "pinned": [True]}, "one entry for every entry of canvas"),
    ({"canvas": [1, None], "pinned": [True, True]}, "pinned has position 1, but canvas says None"),
], ids=lambda value: "-".join(value) if isinstance(value, dict) else "")
def test_an_impossible_request_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        request(**changes).check(CONFIG)


def test_a_prompt_must_leave_room_for_a_canvas():
    config = tiny_config(max_position_embeddings=20)
    request(prompt=[1] * (20 - C)).check(config)
    with pytest.raises(ValueError, match=f"13 tokens; this model takes at most {20 - C} before a canvas of {C}"):
        request(prompt=[1] * 13).check(config)


@pytest.mark.parametrize("changes", [
    {}, {"canvas": []}, {"canvas": [], "pinned": []}, {"canvas": [None] * C},
    {"canvas": [1, None], "pinned": [True, False]},
], ids=str)
def test_a_possible_request_is_accepted(changes):
    request(**changes).check(CONFIG)
    started = sequence(**changes).start_canvas()
    assert len(started.token_ids) == len(started.pinned) == C


# Opening a canvas


def test_a_canvas_opens_as_noise_of_the_request_s_seed():
    first, again, other = (sequence(seed=seed).start_canvas().token_ids for seed in (3, 3, 4))
    assert first == again != other
    assert all(0 <= token < CONFIG.vocab_size for token in first)


def test_a_seeded_canvas_has_the_given_tokens_and_noise_elsewhere():
    noise = sequence().start_canvas().token_ids
    started = sequence(canvas=[9, None, 11], pinned=[True, False, False]).start_canvas()
    assert started.token_ids == [9, noise[1], 11, *noise[3:]]
    assert started.pinned == [True] + [False] * (C - 1)


def test_only_the_first_canvas_is_seeded():
    it = sequence(canvas=[9] * C, pinned=[True] * C, max_tokens=2 * C)
    close_with(it, [9] * C)
    started = it.start_canvas()
    assert not any(started.pinned)
    assert started.token_ids != [9] * C
    assert (started.canvas, started.context_tokens) == (1, 3 + C)


def test_a_step_s_noise_has_two_numbers_for_every_tile():
    uniform, fresh = SequenceState(request(), tiny_config(vocab_size=2 * VOCAB_TILE + 1)).draw_noise()
    assert uniform.shape == (C, 3, 2)
    assert fresh.shape == (C,)
    assert ((uniform >= 0) & (uniform < 1)).all()


# Denoising


def test_a_step_reports_what_it_changed():
    it = sequence(stability_threshold=2)
    it.start_canvas()
    ones, mixed = torch.ones(C, dtype=torch.long), torch.tensor([1, 2] * (C // 2))
    rest = (torch.zeros(C), torch.ones(C, dtype=torch.bool))
    first, second = it.advance(ones, ones, *rest), it.advance(mixed, mixed, *rest)
    assert (first.step, second.step) == (1, 2)
    assert first.changed == [True] * C
    assert second.changed == [False, True] * (C // 2)
    assert first.temperature > second.temperature
    assert it.history.tolist() == [ones.tolist(), mixed.tolist()]


# Closing a canvas

WORDS = list(range(10, 10 + C))


def test_an_answer_ends_before_its_first_stop_token():
    it = sequence(max_tokens=100, eos_token_id=(EOS, 40))
    event = close_with(it, [10, 11, 40, 12, EOS, *WORDS[5:]])
    assert event.token_ids == it.token_ids == [10, 11]
    assert (it.finish_reason, it.stop_token_id) == ("stop", 40)


def test_a_stop_token_may_be_the_first():
    it = sequence()
    assert close_with(it, [EOS] * C).token_ids == []
    assert it.finish_reason == "stop"


@pytest.mark.parametrize("limit", [1, C - 1, C])
def test_an_answer_is_cut_at_its_limit(limit):
    it = sequence(max_tokens=limit)
    assert close_with(it, WORDS).token_ids == WORDS[:limit]
    assert (it.finish_reason, it.stop_token_id) == ("length", None)


def test_a_stop_token_right_behind_the_limit_ends_the_answer_by_itself():
    it = sequence(max_tokens=3)
    close_with(it, [10, 11, 12, EOS, *WORDS[4:]])
    assert (it.token_ids, it.finish_reason) == ([10, 11, 12], "stop")


def test_a_stop_token_beyond_the_limit_does_not_count():
    it = sequence(max_tokens=2)
    close_with(it, [10, 11, 12, EOS, *WORDS[4:]])
    assert (it.token_ids, it.finish_reason, it.stop_token_id) == ([10, 11], "length", None)


def test_the_limit_counts_over_canvases():
    it = sequence(max_tokens=C + 2)
    close_with(it, WORDS)
    assert it.finish_reason is None
    assert it.context == [5, 6, 7, *WORDS]
    close_with(it, WORDS)
    assert (it.token_ids, it.finish_reason) == ([*WORDS, *WORDS[:2]], "length")
    assert it.steps == [0, 0]


def test_an_answer_ends_where_no_further_canvas_fits():
    it = SequenceState(request(max_tokens=100), tiny_config(max_position_embeddings=3 + 2 * C))
    close_with(it, WORDS)
    assert it.finish_reason is None
    close_with(it, WORDS)
    assert (it.token_ids, it.finish_reason) == (WORDS * 2, "length")


def test_without_stop_tokens_nothing_stops():
    it = sequence(max_tokens=C + 1, eos_token_id=())
    close_with(it, [EOS] * C)
    assert it.finish_reason is None
