"""Pictures become soft tokens once: the tower comes with the first, and what it saw is kept within its bounds."""

import threading

import pytest
import torch

from dgemma.chat.media import Shown, place_media
from dgemma.chat.pictures import prepare
from dgemma.config import VisionConfig
from dgemma.engine import PrefixStore
from dgemma.engine.pictures import PictureEncoder
from dgemma.memory.vision import tower_working_bytes
from dgemma.nn.vision import Vision
from support.pictures import random_picture
from support.reference import randomise, tiny_config

TOKENS = VisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                      num_key_value_heads=2, head_dim=8, boi_token_id=40, image_token_id=41, eoi_token_id=42)
A, B, C = (prepare(random_picture(60, 50, seed), 70) for seed in range(3))


@pytest.fixture
def encoder_of(tiny_network):
    """A function that makes an encoder for the tiny network; every load and every picture seen is counted."""
    def make(**options):
        vision = Vision(TOKENS, tiny_config().hidden_size).eval().requires_grad_(False)
        randomise(vision, seed=0)
        loads, seen = [], []
        vision.register_forward_hook(lambda module, inputs, outputs: seen.append(len(inputs[0])))

        def load():
            loads.append(1)
            return vision

        encoder = PictureEncoder(tiny_network, TOKENS, load, **options)
        return encoder, vision, loads, seen
    return make


def test_the_tower_comes_with_the_first_picture(encoder_of):
    encoder, _, loads, _ = encoder_of()
    assert encoder.spans([], []) == () and not loads
    encoder.spans([A], [0])
    encoder.spans([B], [0])
    assert len(loads) == 1


def test_what_seeing_has_yet_to_take_is_known(encoder_of):
    encoder, vision, _, _ = encoder_of(kept=1 << 20)
    weights = sum(tensor.nbytes for tensor in vision.state_dict().values())
    working = tower_working_bytes(TOKENS, 4)
    assert encoder.ahead == weights + working + (1 << 20)
    soft = encoder.see([A])[0]
    assert encoder.ahead == working + (1 << 20) - soft.nbytes  # the tower is in memory, and so is what it saw
    known = PictureEncoder(encoder.network, TOKENS, encoder.load, 0, nbytes=5)
    assert known.ahead == 5 + working
    read = PictureEncoder(encoder.network, TOKENS, encoder.load, 0, vision=vision)
    assert read.ahead == working


def test_spans_are_what_the_tower_sees(encoder_of):
    encoder, vision, _, _ = encoder_of()
    spans = encoder.spans([A, B], [3, 99])
    for span, picture, start in zip(spans, (A, B), (3, 99), strict=True):
        assert (span.start, span.stop, span.digest) == (start, start + picture.tokens, picture.digest)
        torch.testing.assert_close(span.embeddings, vision([picture.patches()])[0])


def test_a_picture_goes_through_the_tower_once(encoder_of):
    encoder, _, _, seen = encoder_of()
    first = encoder.spans([A, B, A], [0, 100, 200])
    again = encoder.spans([B, C], [0, 100])
    assert seen == [2, 1]
    assert (encoder.seen, encoder.reused) == (3, 2)
    assert again[0].embeddings is first[1].embeddings and first[0].embeddings is first[2].embeddings


def test_no_more_is_kept_than_may_be_and_the_last_ones_are(encoder_of):
    one = A.tokens * tiny_config().hidden_size * 4
    encoder, _, _, seen = encoder_of(kept=2 * one)
    for picture in (A, B, A, C, A, B):  # C takes B's place, and B then C's
        encoder.spans([picture], [0])
        assert encoder.nbytes <= 2 * one
    assert len(seen) == 4
    assert all(span.embeddings.untyped_storage().nbytes() == one for span in encoder.spans([A, B], [0, 100]))


def test_more_pictures_than_are_kept_are_all_there(encoder_of):
    encoder, vision, _, _ = encoder_of(kept=0)
    spans = encoder.spans([A, B, C], [0, 100, 200])
    assert encoder.nbytes == 0
    torch.testing.assert_close(spans[2].embeddings, vision([C.patches()])[0])


def test_a_picture_asked_for_by_many_at_once_is_seen_once(encoder_of):
    encoder, _, loads, seen = encoder_of()
    threads = [threading.Thread(target=encoder.spans, args=([A], [0])) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(loads), seen) == (1, [1])


def test_a_tower_that_cannot_be_loaded_is_asked_for_again(tiny_network):
    def load():
        raise OSError("unplugged")

    encoder = PictureEncoder(tiny_network, TOKENS, load)
    for _ in range(2):
        with pytest.raises(OSError, match="unplugged"):
            encoder.spans([A], [0])


def test_from_an_image_token_to_an_answer(encoder_of, engine_of, ask, answer):
    """Two pictures of one size are two prompts; one picture twice is read once."""
    encoder, *_ = encoder_of()
    store = PrefixStore(page=4)

    def answered(picture):
        ids, starts = place_media([1, 2, TOKENS.image_token_id, 3, 4], [Shown((picture,))], TOKENS, list)
        return answer(engine_of(prefixes=store), ask(ids, spans=encoder.spans([picture], starts)))

    first, other, again = answered(A), answered(B), answered(A)
    assert first.prompt_tokens == 4 + 2 + A.tokens
    assert first.token_ids == again.token_ids != other.token_ids
    assert (first.cached_tokens, other.cached_tokens, again.cached_tokens) == (0, 3, first.prompt_tokens)
