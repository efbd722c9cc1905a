"""How an answer came to be: what is kept of it, and what a browser is sent."""

import base64

import numpy as np
import pytest

from dgemma.diffusion.events import CanvasCommitted, CanvasStarted, Denoised
from dgemma.diffusion.trace import Trace, TraceHeader
from dgemma.errors import DgemmaError
from dgemma.studio.recording import Recording

PIECES = {0: (b"a", False), 1: (b" b", False), 2: (b"\xf0\x9f", False), 3: (b"<eos>", True)}
EVENTS = [
    CanvasStarted(7, 0, [0, 1, 2], [True, False, False], 5, 4),
    Denoised(7, 0, 1, [0, 2, 1], [0, 2, 2], [0.0, 2.0, 12.5], [True, False, False], [True, True, True], 0.8, 0.5),
    Denoised(7, 0, 2, [0, 1, 1], [0, 1, 3], [0.0, 0.004, 0.1], [True, True, True], [False, True, False], 0.7, 0.9),
    CanvasCommitted(7, 0, [0, 1], 2, 1.0),
    CanvasStarted(7, 1, [3, 3, 3], [False] * 3, 8, 4),
]


@pytest.fixture
def recording():
    made = Recording()
    for event in EVENTS:
        made.apply(event, PIECES.__getitem__)
    return made


def test_a_packed_recording_is_the_same_again(recording):
    again = Recording.unpack(recording.pack())
    assert again.texts == recording.texts == {0: "a", 1: " b", 2: "\ufffd", 3: "<eos>"}
    assert again.special == {3}
    assert again.for_page() == recording.for_page()
    assert [canvas.committed for canvas in again.canvases] == [[0, 1], None]


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:20], lambda data: b"XXXX" + data[4:],
                                    lambda data: data[:-1], lambda data: data[:4] + b"nonsense"])
def test_a_damaged_recording_is_refused(recording, damage):
    with pytest.raises(DgemmaError, match="damaged"):
        Recording.unpack(damage(recording.pack()))


def test_frames_tell_what_differs_from_the_step_before(recording):
    first, second = recording.for_page()["canvases"][0]["frames"]
    assert first["ids"] == [[0, 0], [1, 2], [2, 1]] and second["ids"] == [[1, 1]]
    assert list(base64.b64decode(second["f"])) == [1, 3, 1]
    assert list(base64.b64decode(first["f"])) == [3, 2, 2]


def test_small_entropies_stay_apart_in_a_frame(recording):
    first, second = recording.for_page()["canvases"][0]["frames"]
    assert list(base64.b64decode(first["e"])) == [0, 102, 255]
    decoded = (np.frombuffer(base64.b64decode(second["e"]), np.uint8) / 255) ** 2 * 12.5
    assert decoded == pytest.approx([0, 0.004, 0.1], abs=0.01) and decoded[1] > 0


def test_a_canvas_tells_what_is_pinned_and_how_much_was_committed(recording):
    first, second = recording.for_page()["canvases"]
    assert (first["pinned"], first["committed"]) == ([0], 2)
    assert (second["pinned"], second["committed"], second["frames"]) == ([], None, [])


def test_a_trace_becomes_a_recording(recording):
    trace = Trace(TraceHeader("m", "p", "2026-01-01"), PIECES, EVENTS)
    assert Recording.of_trace(trace).for_page() == recording.for_page()
