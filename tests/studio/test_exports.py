"""A denoising as files: a film that moves by itself, a page that needs nothing else, a trace."""

import io
import json
import re
from xml.etree import ElementTree

import pytest
from PIL import Image

from dgemma.diffusion.events import Denoised
from dgemma.diffusion.trace import read_trace
from dgemma.errors import DgemmaError
from dgemma.studio.exports import KINDS, Source, export, recording_of, to_html, to_trace
from dgemma.studio.films import MOST_FRAMES, frames_of, to_gif, to_svg
from dgemma.studio.recording import Recording
from dgemma.tokenizer_files import STOPS
from support.studio import PUZZLE

SVG = "{http://www.w3.org/2000/svg}"
SOURCE = Source("sudoku", f"{PUZZLE} </script><b>", STOPS)


@pytest.fixture(scope="module")
def events(model):
    return list(model.stream(PUZZLE, seed=1, candidates=2))


@pytest.fixture(scope="module")
def recording(model, events):
    made = Recording()
    for event in events:
        made.apply(event, lambda token: (model.tokenizer.token_bytes(token), model.tokenizer.is_special(token)))
    return made


@pytest.fixture(scope="module")
def steps(events):
    return [event for event in events if isinstance(event, Denoised)]


def test_every_step_is_a_group_of_the_svg_that_is_visible_in_its_turn(recording, steps):
    root = ElementTree.fromstring(to_svg(recording, STOPS, PUZZLE))
    groups = root.findall(f"{SVG}g[@class='step']")
    assert len(groups) == len(steps)
    times = []
    for number, group in enumerate(groups, 1):
        animation = group.find(f"{SVG}animate")
        states = dict(zip(animation.get("values").split(";"), animation.get("keyTimes").split(";"), strict=False))
        times.append(float(states["visible"]))
        assert group.find(f"{SVG}text").text.startswith(f"step {number}/{len(steps)}")
    assert times == sorted(times) and times[0] == 0
    last = ["".join(text.itertext()) for text in groups[-1].findall(f"{SVG}text")[1:]]
    assert last[0] == "534678912↵" and len(last) == 9


def test_a_gif_has_a_picture_for_every_step(recording, steps):
    picture = Image.open(io.BytesIO(to_gif(recording, STOPS)))
    assert (picture.n_frames, picture.info["loop"]) == (len(steps), 0)
    assert picture.size[0] < 800 and picture.size[1] < 800


def test_of_many_steps_some_are_left_out_but_never_the_last(recording, steps):
    long = Recording(recording.canvases * 60, recording.texts, recording.special)
    frames = frames_of(long, STOPS)
    assert len(frames) == MOST_FRAMES
    assert sum(frame.share == 1 for frame in frames) == 60


def test_a_page_holds_all_steps_and_nothing_that_a_text_could_run(recording, steps):
    page = to_html(recording, SOURCE).decode()
    assert page.count("<script") == page.count("</script>") == 2 and "<b>" not in page
    film = json.loads(re.search(r'<script type="application/json" id="film">(.*?)</script>', page)[1])
    assert len(film["recording"]["canvases"][0]["frames"]) == len(steps)
    assert "default-src 'none'" in page and not re.search(r'(src|href)="|url\(|@import|\bimport ', page)


def test_a_saved_trace_is_the_one_that_was_recorded(recording, steps, tmp_path):
    file = tmp_path / "trace.jsonl"
    file.write_bytes(to_trace(recording, SOURCE))
    trace = read_trace(file)
    assert (trace.header.model, trace.header.prompt) == ("sudoku", SOURCE.prompt)
    again = [event for event in trace.events if isinstance(event, Denoised)]
    assert [(event.token_ids, event.canvas_ids, event.accepted) for event in again] == [
        (event.token_ids, event.canvas_ids, event.accepted) for event in steps]
    for one, other in zip(again, steps, strict=True):
        assert one.entropies == pytest.approx(other.entropies, abs=2e-3, rel=1e-3)


def test_a_trace_is_opened_as_the_recording_that_it_was(recording):
    again, source = recording_of(to_trace(recording, SOURCE))
    assert source == SOURCE
    assert again.for_page()["texts"] == recording.for_page()["texts"]
    assert again.generation == recording.generation
    assert again.canvases[0].steps[0].number_of_candidates == 2


@pytest.mark.parametrize("data", [b"", b"{}\n", b"\xff\xfe", b'{"format":"dgemma-trace","version":9}\n'])
def test_what_is_no_trace_is_refused_without_its_temporary_name(data):
    with pytest.raises(DgemmaError) as refused:
        recording_of(data)
    assert "this file" in str(refused.value) and "/" not in str(refused.value)


@pytest.mark.parametrize("kind", KINDS)
def test_where_nothing_was_recorded_that_is_said(kind):
    with pytest.raises(DgemmaError, match="no step of this answer"):
        export(kind, Recording(), SOURCE)


def test_an_unknown_kind_is_refused(recording):
    with pytest.raises(DgemmaError, match="svg, gif, html, trace"):
        export("exe", recording, SOURCE)
