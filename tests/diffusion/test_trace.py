"""Traces survive the way to a file and back, and say what is wrong with a file that is none."""

import json
import os
from dataclasses import replace

import pytest

from dgemma.diffusion.events import (
    CanvasCommitted,
    CanvasStarted,
    Denoised,
    Failed,
    Finished,
    Generation,
    TokenLogprob,
)  # fmt: skip
from dgemma.diffusion.trace import TraceHeader, TraceWriter, read_trace
from dgemma.errors import DgemmaError

PIECES = {
    0: (b"<eos>", True),
    5: (b"\xe6\x97", False),
    6: (" ä\n".encode(), False),
    7: (b"", False),
    8: (b"\xff", True),
}
GENERATION = Generation(
    text="ä", reasoning="\ud800", tool_calls=[{"name": "f", "arguments": {"a": [1, None]}}], token_ids=[6, 5],
    finish_reason="stop", steps=[2], tokens_per_forward=2 / 3, prompt_tokens=3, seconds=0.1 + 0.2, stop_token_id=8
)  # fmt: skip
EVENTS = [
    CanvasStarted(0, 0, [5, 0], [True, False], 3, 48),
    Denoised(0, 0, 1, [6, 5], [6, 7], [0.1234567, 1e-7], [False, True], [True, True], 1 / 3, 1 / 7),
    CanvasCommitted(0, 0, [6], 2, 0.25),
    Finished(0, GENERATION),
]


def write(path, events=EVENTS, **fields):
    fields = {"model": "m", "prompt": "日 \ud800?", "piece_of": PIECES.__getitem__, **fields}
    with TraceWriter(path, **fields) as writer:
        for event in events:
            writer.write(event)
    return path


def test_round_trip(tmp_path):
    trace = read_trace(write(tmp_path / "a.jsonl", created="2026-01-02T03:04:05+00:00"))
    assert trace.header == TraceHeader("m", "日 \ud800?", "2026-01-02T03:04:05+00:00")
    assert trace.events == [EVENTS[0], replace(EVENTS[1], entropies=[0.1235, 0.0]), *EVENTS[2:]]
    assert trace.pieces == PIECES
    assert trace.pieces[5] == (b"\xe6\x97", False)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_what_was_read_of_the_tokens_is_not_kept(tmp_path):
    read = [*EVENTS[:2], replace(EVENTS[2], pieces=["ä"]), replace(EVENTS[3], answer="ä")]
    plain, other = (write(tmp_path / name, events, created="then") for name, events in (("a", EVENTS), ("b", read)))
    assert plain.read_bytes() == other.read_bytes()


LOGPROBS = [TokenLogprob(6, -0.25, [(6, -0.25), (0, -1.5)]), TokenLogprob(5, -3.0, [])]


def test_log_probabilities_and_failures_survive(tmp_path):
    events = [
        CanvasCommitted(0, 0, [6, 5], 2, 0.25, LOGPROBS),
        Finished(0, replace(GENERATION, logprobs=LOGPROBS, cached_tokens=7)),
        Failed(1, "out of memory"),
    ]
    trace = read_trace(write(tmp_path / "a", events))
    assert trace.events == events
    assert set(trace.pieces) == {6, 5, 0, 8}  # alternatives can be shown too


def test_log_probabilities_keep_four_decimals(tmp_path):
    place = TokenLogprob(6, -0.123456, [(6, -0.123456)])
    (event,) = read_trace(write(tmp_path / "a", [CanvasCommitted(0, 0, [6], 2, 0.25, [place])])).events
    assert event.logprobs == [TokenLogprob(6, -0.1235, [(6, -0.1235)])]


def test_a_trace_from_before_there_were_log_probabilities(tmp_path):
    path = write(tmp_path / "a")
    assert '"logprobs"' not in path.read_text()
    path.write_text(path.read_text().replace(',"cached_tokens":0', ""))
    assert read_trace(path).events[2:] == EVENTS[2:]


@pytest.mark.parametrize(
    "logprobs", ["[]", "3", "[6]", "[[6,-1]]", '[["6",-1,[]]]', "[[6,true,[]]]", "[[6,-1,[[6]]]]", "[[9,-1,[]]]"]
)
def test_damaged_log_probabilities_are_named(tmp_path, logprobs):
    path = write(tmp_path / "a", [CanvasCommitted(0, 0, [6], 2, 0.25, LOGPROBS[:1])])
    whole = '"logprobs":[[6,-0.25,[[6,-0.25],[0,-1.5]]]]'
    assert whole in path.read_text()
    path.write_text(path.read_text().replace(whole, f'"logprobs":{logprobs}'))
    with pytest.raises(DgemmaError, match="line 2 is damaged"):
        read_trace(path)


def test_candidates_and_steps_before_survive_and_are_left_out_where_there_are_none(tmp_path):
    started, denoised = replace(EVENTS[0], steps_before=3), replace(
        EVENTS[1], entropies=[0.5, 0.0], candidates=[[(6, 0.75), (8, 0.123456)], [(7, 1.0)]])
    trace = read_trace(write(tmp_path / "a", [started, denoised]))
    assert trace.events == [started, replace(denoised, candidates=[[(6, 0.75), (8, 0.1235)], [(7, 1.0)]])]
    assert set(trace.pieces) == {5, 0, 6, 7, 8}
    plain = write(tmp_path / "b").read_text()
    assert '"candidates"' not in plain and '"steps_before"' not in plain


@pytest.mark.parametrize("candidates", ["3", "[3,4]", "[[6,1]]", '[[["6",1]],[]]', "[[[6,1,2]],[]]", "[[[9,1]],[]]",
                                        "[[[6,1]]]"])
def test_damaged_candidates_are_named(tmp_path, candidates):
    path = write(tmp_path / "a", [replace(EVENTS[1], candidates=[[(6, 0.75)], []])])
    whole = '"candidates":[[[6,0.75]],[]]'
    assert whole in path.read_text()
    path.write_text(path.read_text().replace(whole, f'"candidates":{candidates}'))
    with pytest.raises(DgemmaError, match="line 2 is damaged"):
        read_trace(path)


def test_lines_are_readable_and_pieces_are_written_once(tmp_path):
    lines = [json.loads(line) for line in write(tmp_path / "a.jsonl").read_text().splitlines()]
    assert [line.get("event") for line in lines] == [
        None,
        "CanvasStarted",
        "Denoised",
        "CanvasCommitted",
        "Finished",
    ]
    assert lines[1]["pieces"] == {"5": {"hex": "e697"}, "0": {"text": "<eos>", "special": True}}
    assert lines[2]["pieces"] == {"6": " ä\n", "7": ""}
    assert "pieces" not in lines[3]
    assert lines[2]["accepted"] == "01"
    assert lines[0]["created"].startswith("20")


def interrupt(path, events):
    def and_then():
        yield from events
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(path, and_then())


def test_an_interrupted_trace_is_kept(tmp_path):
    path = tmp_path / "a.jsonl"
    interrupt(path, EVENTS[:1])
    assert read_trace(path).events == EVENTS[:1]
    interrupt(path, [])
    assert read_trace(path).events == EVENTS[:1]  # not replaced by nothing
    assert len(list(tmp_path.iterdir())) == 1


def test_an_interruption_within_a_line_leaves_whole_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    writer = TraceWriter(path, model="m", prompt="", piece_of=PIECES.__getitem__)
    with pytest.raises(KeyboardInterrupt), writer:
        writer.write(EVENTS[0])
        writer._file.write(b'{"event":"Deno')  # what a signal in the middle of a write leaves
        raise KeyboardInterrupt
    assert read_trace(path).events == EVENTS[:1]


class FullDisk:
    """A file that takes ``room`` bytes."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        if len(data) > self.room:
            self.file.write(data[: self.room])
            raise OSError(28, "No space left on device")
        self.room -= len(data)
        self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)


def test_a_full_disk_never_costs_an_older_trace(tmp_path):
    path = write(tmp_path / "a.jsonl")

    def fill():
        with TraceWriter(path, model="m", prompt="", piece_of=PIECES.__getitem__) as writer:
            writer._file = FullDisk(writer._file, 300)
            for event in EVENTS:
                writer.write(event)

    with pytest.raises(DgemmaError, match=r"a\.jsonl: cannot be written \(No space left"):
        fill()
    assert len(read_trace(path).events) == len(EVENTS)
    assert [file.name for file in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_disk_that_is_full_at_the_end(tmp_path):
    path = write(tmp_path / "a.jsonl")
    writer = TraceWriter(path, model="m", prompt="", piece_of=PIECES.__getitem__)

    def full(size):
        raise OSError(28, "No space left on device")

    def fill(error):
        with writer:
            writer.write(EVENTS[0])
            writer._file = FullDisk(writer._file, 0)
            writer._file.truncate = full
            if error:
                raise error

    with pytest.raises(DgemmaError, match="No space left"):
        fill(None)
    with pytest.raises(KeyboardInterrupt):  # the first error is the one to hear of
        fill(KeyboardInterrupt)
    assert len(read_trace(path).events) == len(EVENTS)
    assert [file.name for file in tmp_path.iterdir()] == ["a.jsonl"]


def test_two_programs_may_write_one_trace(tmp_path):
    """Each beside its place under a name of its own; the last one to end wins."""
    with TraceWriter(tmp_path / "a", model="m", prompt="", piece_of=PIECES.__getitem__):
        (name,) = (file.name for file in tmp_path.iterdir())
        assert str(os.getpid()) in name


def test_what_cannot_be_written(tmp_path):
    with pytest.raises(DgemmaError, match=r"no-such/a: cannot be written \(No such file"):
        write(tmp_path / "no-such" / "a")


@pytest.mark.parametrize("first", ["", "{", "[]", '{"a": 1}', '{"format": "x", "version": 1}', "\x00\x01"])
def test_not_a_trace(tmp_path, first):
    path = tmp_path / "a"
    path.write_text(first + "\n")
    with pytest.raises(DgemmaError, match="a is not a trace"):
        read_trace(path)


def test_missing_other_version_and_bad_header(tmp_path):
    with pytest.raises(DgemmaError, match="none cannot be read: No such file"):
        read_trace(tmp_path / "none")
    path = write(tmp_path / "a", [])
    assert read_trace(path).events == []
    text = path.read_text()
    path.write_text(text.replace('"version":1', '"version":2'))
    with pytest.raises(DgemmaError, match="of version 2; this dgemma reads version 1"):
        read_trace(path)
    path.write_text(text.replace('"model":"m"', '"model":3'))
    with pytest.raises(DgemmaError, match="line 1 is damaged"):
        read_trace(path)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"event":"Denoised"', '"event":"Noised"'),
        ('"temperature"', '"heat"'),
        ('"accepted":"01"', '"accepted":"02"'),
        ('"accepted":"01"', '"accepted":"011"'),
        ('"step":1', '"step":"1"'),
        ('"step":1', '"step":true'),
        ('"token_ids":[6,5]', '"token_ids":[6,9]'),
        ('"7":""', '"7":3'),
        ('"7":""', '"x":""'),
        ('{"event"', '["event"'),
    ],
)
def test_a_damaged_line_is_named(tmp_path, old, new):
    path = write(tmp_path / "a")
    lines = path.read_text().split("\n")
    assert old in lines[2]
    lines[2] = lines[2].replace(old, new)
    path.write_text("\n".join(lines))
    with pytest.raises(DgemmaError, match="line 3 is damaged"):
        read_trace(path)


def test_a_cut_off_file_is_named(tmp_path):
    path = write(tmp_path / "a")
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DgemmaError, match="line 5 is cut off"):
        read_trace(path)
