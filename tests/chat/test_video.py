"""Films as frames: the reference's choice, true times, clear errors."""

from __future__ import annotations

import os
import random

import numpy as np
import pytest
from transformers.video_utils import VideoMetadata, default_sample_indices_fn

from dgemma.chat.video import MOST_FRAMES, Film, first_frame, frame_numbers, read_film
from dgemma.errors import DgemmaError
from support.films import STEP, film, sound, turned_film
from support.pictures import as_file, random_picture


def shown(found: Film) -> list[int]:
    """The numbers of the frames, by their brightness."""
    return [round(float(np.asarray(frame).mean()) / STEP) for frame in found.frames]


@pytest.mark.parametrize(("total", "rate", "fps"), [(90, 30.0, 2.0), (91, 29.97, 1.0), (7, 25.0, 0.1), 
                                                    (1000, 23.976, 1.3), (59, 59.94, 30.0), (1, 24.0, 1.0)])
def test_frames_are_those_of_gemmas_processor(total, rate, fps):
    metadata = VideoMetadata(total_num_frames=total, fps=rate)
    assert frame_numbers(total, rate, fps) == default_sample_indices_fn(metadata, fps=fps).tolist()


def test_without_a_rate_it_is_one_a_second_and_of_a_long_film_sixty_over_all_of_it():
    assert frame_numbers(300, 30.0) == list(range(0, 300, 30))
    hours = frame_numbers(3 * 3600 * 25, 25.0)
    assert len(hours) == MOST_FRAMES
    assert hours[1] == 3 * 3600 * 25 // 60


@pytest.mark.parametrize(("fps", "said"), [(2.0, "at most 0.6"), (0.0, "above 0"), (float("nan"), "above 0")])
def test_a_rate_that_cannot_be_had_is_an_error_that_names_one_that_can(fps, said):
    with pytest.raises(DgemmaError, match=said):
        frame_numbers(3000, 30.0, fps)


@pytest.mark.parametrize(("container", "codec"), [("mp4", "libx264"), ("webm", "libvpx"), ("matroska", "mpeg4"),
                                                  ("avi", "mpeg4"), ("mpegts", "mpeg2video")])
def test_frames_and_times_of_any_common_format(container, codec):
    found = read_film(film(90, 30, container, codec), fps=2)
    assert [abs(frame - wanted) for frame, wanted in zip(shown(found), range(0, 90, 15), strict=True)] <= [1] * 6
    assert found.seconds == pytest.approx([0, 0.5, 1, 1.5, 2, 2.5], abs=0.01)
    assert found.stamps == ["00:00", "00:00", "00:01", "00:01", "00:02", "00:02"]


@pytest.mark.parametrize("frames", [2, 3, 12])
def test_every_frame_of_a_short_film_is_there(frames):
    assert np.abs(np.array(shown(read_film(film(frames, 10), fps=10))) - np.arange(frames)).max() <= 1


def test_a_long_film_is_read_by_jumps_and_gives_the_same_frames():
    found = read_film(film(125, 1), fps=0.04)
    assert found.seconds == pytest.approx([0, 25, 50, 75, 100])
    assert np.abs(np.array(shown(found)) - [0, 25, 50, 75, 100]).max() <= 1


def test_where_frames_are_not_evenly_shown_the_times_are_their_own():
    found = read_film(film(20, 10, "matroska", at=lambda number: number * 0.1 if number < 10 else number * 0.5))
    assert len(found.frames) == len(found.seconds) > 1
    times = [number * 0.1 if number < 10 else number * 0.5 for number in shown(found)]
    assert found.seconds == pytest.approx(times, abs=0.02)


@pytest.mark.parametrize(("matrix", "white", "size"), [
    ((1, 0, 0, 1), "upper left", (64, 48)), ((0, 1, -1, 0), "upper right", (48, 64)),  # a phone held upright
    ((-1, 0, 0, -1), "lower right", (64, 48)), ((0, -1, 1, 0), "lower left", (48, 64)),
    ((-1, 0, 0, 1), "upper right", (64, 48)), ((1, 0, 0, -1), "lower left", (64, 48)),  # mirrored
    ((0, 1, 1, 0), "upper left", (48, 64)), ((0, -1, -1, 0), "lower right", (48, 64)),
])
def test_a_film_that_was_held_sideways_comes_upright(matrix, white, size):
    data = turned_film(*matrix)
    for frame in (*read_film(data, fps=10).frames, first_frame(data)):
        assert frame.size == size
        pixels = np.asarray(frame.convert("L"))
        halves = [pixels[: size[1] // 2], pixels[size[1] // 2 :]]
        bright = {f"{side} {end}": part.mean() for side, rows in zip(("upper", "lower"), halves, strict=True)
                  for end, part in (("left", rows[:, : size[0] // 2]), ("right", rows[:, size[0] // 2 :]))}
        assert max(bright, key=lambda corner: bright[corner]) == white
        assert sorted(bright.values())[-1] > 200 and sorted(bright.values())[-2] < 50


def test_the_first_frame_of_a_film_is_the_one_that_is_read_first(tmp_path):
    data = film(30, 30)
    assert np.array_equal(np.asarray(first_frame(data)), np.asarray(read_film(data).frames[0]))
    for broken, said in ((b"hello there", "not a film"), (sound(), "only sound")):
        with pytest.raises(DgemmaError, match=said):
            first_frame(broken)


def test_a_file_is_read_like_its_bytes(tmp_path):
    path = tmp_path / "film.mp4"
    path.write_bytes(film(30, 30))
    assert shown(read_film(path)) == shown(read_film(path.read_bytes()))


@pytest.mark.parametrize(("data", "said"), [
    (b"", "not a film"), (b"hello there", "not a film"), (film(30)[:700], "not a film|damaged"),
    (b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/passwd\n", "not a film"),
    (b"ffconcat version 1.0\nfile /etc/passwd\n", "not a film"), (sound(), "only sound"),
    (as_file(random_picture(60, 50), "JPEG"), "this is a picture: give it as one"),
    (as_file(random_picture(60, 50), "WEBP", save_all=True, append_images=[random_picture(60, 50, 1)]),
     "of an animated WebP the first frame is seen")])
def test_what_is_no_film_is_an_error(data, said):
    with pytest.raises(DgemmaError, match=said):
        read_film(data)


@pytest.mark.parametrize(("container", "codec"), [("mp4", "libx264"), ("webm", "libvpx"), ("avi", "mpeg4")])
def test_a_damaged_film_is_a_film_or_an_error(container, codec):
    """Mutations of a film; DGEMMA_FUZZ_FILMS makes more of them than the suite does."""
    whole, generator = film(12, 12, container, codec), random.Random(0)
    outcomes = [0, 0]
    for _ in range(int(os.environ.get("DGEMMA_FUZZ_FILMS", 400))):
        data = bytearray(whole)
        for _ in range(generator.choice((1, 3, 10, 50))):
            place = generator.randrange(len(data))
            if generator.random() < 0.7 or len(data) < 500:
                data[place] = generator.randrange(256)
            else:
                del data[place : place + generator.randrange(1, 200)]
        try:
            outcomes[0] += bool(read_film(bytes(data)).frames)
        except DgemmaError:
            outcomes[1] += 1
    assert min(outcomes) > 20  # not all alike


def test_of_a_film_of_less_than_a_frame_a_second_all_frames_are_taken_at_most():
    assert frame_numbers(2, 0.1) == [0, 1]


def test_a_missing_file_is_named():
    with pytest.raises(DgemmaError, match="nowhere.mp4: cannot be read"):
        read_film("nowhere.mp4")
