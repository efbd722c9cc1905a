"""Pictures and films in conversations: where they stand, how many tokens they get, what they become in a prompt."""

from __future__ import annotations

import io
import warnings

import pytest

from dgemma.chat.media import Shown, budget_for, outline, parts_in, place_media, put_first, show
from dgemma.chat.pictures import prepare
from dgemma.config import VisionConfig
from dgemma.errors import DgemmaError
from support.films import film
from support.pictures import random_picture

CONFIG = VisionConfig(boi_token_id=7, image_token_id=8, eoi_token_id=9, video_token_id=6)


def picture(width=60, height=50):
    return prepare(random_picture(width, height), 70)


class Sized:
    """A picture of which only the number of its tokens counts."""

    def __init__(self, tokens):
        self.tokens = tokens


def placed(ids, *counts):
    media = [Shown((Sized(count),)) if isinstance(count, int) else Shown(tuple(map(Sized, count)), ("00:00", "00:01"))
             for count in counts]
    return place_media(ids, media, CONFIG, lambda text: [100 + ord(sign) for sign in text])


def test_every_image_token_becomes_begin_its_soft_tokens_and_end():
    assert placed([1, 8, 2, 8, 8, 3], 2, 1, 3) == ([1, 7, 8, 8, 9, 2, 7, 8, 9, 7, 8, 8, 8, 9, 3], [2, 7, 10])
    assert placed([1, 2]) == ([1, 2], [])


def test_a_video_token_becomes_each_frame_behind_its_time():
    ids, starts = placed([1, 6, 2], (2, 1))
    text = "".join(chr(i - 100) if i > 100 else f"<{i}>" for i in ids)
    assert text == "<1>00:00 <7><6><6><9> 00:01 <7><6><9><2>"
    assert [ids[start] for start in starts] == [6, 6]


@pytest.mark.parametrize(("counts", "said"), [([], "0 pictures"), ([3], "1 pictures"), ([3, 3, 3], "3 pictures"),
                                              ([3, (1, 1)], "1 pictures and 1 videos")])
def test_places_and_media_are_the_same(counts, said):
    with pytest.raises(DgemmaError, match=f"places for 2 pictures, and there are {said}"):
        placed([8, 1, 8], *counts)


def test_what_is_given_stands_before_the_last_words_of_the_user():
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    parts = put_first(said, ["p"], ["f"])[2]["content"]
    assert [part["type"] for part in parts] == ["image", "video", "text"]
    assert put_first(said, []) == said
    with pytest.raises(DgemmaError, match="there is none"):
        put_first([{"role": "system", "content": "a"}], ["p"])


def test_a_picture_behind_words_is_warned_of():
    image, words = {"type": "image", "image": "p"}, {"type": "text", "text": "What is it?"}
    with pytest.warns(UserWarning, match="behind the words"):
        assert parts_in([{"role": "user", "content": [words, image]}]) == [(image, "What is it?")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert parts_in([{"role": "user", "content": [image, words]}]) == [(image, "What is it?")]


@pytest.mark.parametrize(("size", "words", "budget"), [
    ((1920, 1080), "What is this?", 280), ((1920, 1080), "Read the receipt", 1120), ((200, 200), "Read it", 70),
    ((700, 500), "Was steht da? Lies es vor", 280), ((900, 900), "transcribe", 560), ((10, 10), "", 70)])
def test_a_picture_gets_as_many_tokens_as_the_words_need_and_it_has_pixels_for(size, words, budget):
    assert budget_for(*size, words, VisionConfig()) == budget


def test_a_number_that_is_given_is_kept():
    part = {"type": "image", "image": random_picture(60, 50)}
    assert show(part, CONFIG, 140).pictures[0].budget == 140
    assert show(part | {"tokens": 280}, CONFIG, 140).pictures[0].budget == 280
    assert show(part, CONFIG, words="Read it").pictures[0].budget == 70


def test_a_tower_is_asked_for_the_numbers_of_tokens_only_that_it_was_trained_on():
    config = VisionConfig(vision_soft_tokens_per_image=70, vision_soft_token_budgets=(70,))
    assert budget_for(1920, 1080, "Read the receipt", config) == 70
    part = {"type": "image", "image": random_picture(400, 300)}
    assert show(part, config, 1120).pictures[0].budget == 70
    assert outline({**part, "tokens": 560}, config).tokens == show(part, config).pictures[0].tokens
    assert show(part, VisionConfig(vision_soft_token_budgets=(280, 560)), 140).pictures[0].budget == 280
    with pytest.raises(DgemmaError, match="at most 70"):
        show(part, config, 71)


def test_a_photo_is_turned_upright_once():
    image = random_picture(120, 60)
    turned = image.getexif()
    turned[0x0112] = 6  # on its side, as phones store them
    stored = io.BytesIO()
    image.save(stored, "PNG", exif=turned)
    shown = show({"type": "image", "image": stored.getvalue()}, CONFIG, 70).pictures[0]
    assert shown.digest == prepare(stored.getvalue(), 70, CONFIG).digest
    assert shown.pixels.shape[0] > shown.pixels.shape[1]


def test_a_film_is_frames_of_seventy_tokens_with_their_times():
    shown = show({"type": "video", "video": film(90, 30)}, CONFIG)
    assert shown.stamps == ("00:00", "00:01", "00:02")
    assert {frame.budget for frame in shown.pictures} == {70}
    assert len({frame.digest for frame in shown.pictures}) == 3
    assert len(show({"type": "video", "video": film(90, 30)}, CONFIG, fps=2).pictures) == 6


@pytest.mark.parametrize(("part", "said"), [
    ({"type": "image"}, "needs it"),
    ({"type": "image", "image": "iVBOR" * 1000}, r"^.{50,60} is no path, with its 5,000 characters; base64 is"),
    ({"type": "video", "url": "https://x.example/a.mp4"}, "nothing is fetched"),
    ({"type": "image", "url": "data:image/png;base64,§"}, "not valid base64"),
    ({"type": "image", "image": film(3)}, "this is a video"), ({"type": "video", "video": b"no"}, "not a film")])
def test_a_part_that_is_none_is_an_error(part, said):
    with pytest.raises(DgemmaError, match=said):
        show(part, CONFIG)
