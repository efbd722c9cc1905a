"""The run's record: what is written, what survives, what is mirrored."""

import contextlib
import json
import math
import sys
import types

import pytest

from dgemma.errors import DgemmaError
from dgemma.train.log.journal import Journal, TensorBoardWriter, WandbWriter, read_journal, tagged, writers_for


class Mirror:
    name = "mirror"

    def __init__(self, fail=False):
        self.seen, self.closed, self.fail = [], False, fail

    def write(self, step, kind, values):
        if self.fail:
            raise RuntimeError("no connection")
        self.seen.append((step, kind, dict(values)))

    def close(self):
        self.closed = True


@contextlib.contextmanager
def no_room_beyond(size):
    """The system lets no file grow beyond ``size`` bytes: a write stores what fits, the next one fails."""
    resource = pytest.importorskip("resource")  # not on Windows
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_is_recorded_is_read_back(tmp_path):
    with Journal(tmp_path, 0) as journal:
        journal.record(1, "train", {"loss": 0.5, "count": 3})
        journal.record(2, "samples", {}, samples=[{"prompt": "Grüß\n\u2028 \ud800", "score": float("inf")}])
    first, second = read_journal(tmp_path)
    assert (first.step, first.kind, first.values, first.extra) == (1, "train", {"loss": 0.5, "count": 3}, {})
    assert first.time.endswith("+00:00")
    assert second.extra == {"samples": [{"prompt": "Grüß\n\u2028 \ud800", "score": None}]}


def test_every_record_is_on_disk_at_once(tmp_path):
    journal = Journal(tmp_path, 0)
    journal.record(1, "train", {"loss": 0.5})
    assert len(read_journal(tmp_path)) == 1
    journal.close()


def test_numbers_that_are_not_finite_are_null_in_the_file_and_nan_when_read(tmp_path):
    with Journal(tmp_path, 0) as journal:
        journal.record(1, "train", {"loss": math.nan, "norm": math.inf, "low": -math.inf})

    def refuse(name):
        raise AssertionError(name)

    json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert all(math.isnan(value) for value in read_journal(tmp_path)[0].values.values())


def test_a_run_that_goes_on_drops_what_was_beyond_its_step_and_keeps_the_rest_byte_for_byte(tmp_path):
    with Journal(tmp_path, 0) as journal:
        for step in (10, 20, 30):
            journal.record(step, "train", {"loss": 1 / step})
        journal.record(20, "validation", {"loss": 2.0})
    path = tmp_path / "metrics.jsonl"
    before = path.read_bytes().splitlines()
    with Journal(tmp_path, 20) as journal:
        assert path.read_bytes().splitlines() == [before[0], before[1], before[3]]
        journal.record(21, "train", {"loss": 1.0})
    assert [record.step for record in read_journal(tmp_path)] == [10, 20, 20, 21]
    assert [item.name for item in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_line_torn_by_a_kill_is_left_out_and_then_dropped(tmp_path):
    with Journal(tmp_path, 0) as journal:
        journal.record(1, "train", {"loss": 1.0})
        journal.record(2, "train", {"loss": 2.0})
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    for cut in range(1, len(whole)):  # wherever it was killed
        path.write_bytes(whole[:cut])
        with Journal(tmp_path, 5) as journal:
            journal.record(3, "train", {"loss": 3.0})
        complete = whole[:cut].count(b"\n")
        assert [record.step for record in read_journal(tmp_path)] == [*[1, 2][:complete], 3], cut


@pytest.mark.parametrize("line", ["{", "[]", '{"step": "1", "kind": "train"}', '{"step": 1}',
                                  '{"step": 1, "kind": "train", "values": {"loss": "x"}}', "\xff"])
def test_a_damaged_line_is_named(tmp_path, line):
    good = '{"step": 1, "kind": "train", "values": {}}\n'
    (tmp_path / "metrics.jsonl").write_bytes((good + line + "\n" + good).encode("latin-1"))
    with pytest.raises(DgemmaError, match=r"metrics.jsonl, line 2: "):
        read_journal(tmp_path)
    with pytest.raises(DgemmaError, match=r"metrics.jsonl, line 2: "):
        Journal(tmp_path, 1)


def test_a_folder_without_a_journal_is_named(tmp_path):
    with pytest.raises(DgemmaError, match=r"metrics.jsonl: cannot be read \(No such file"):
        read_journal(tmp_path)


def test_a_full_disk_loses_records_but_no_training(tmp_path):
    told = []
    journal = Journal(tmp_path, 0, warn=told.append)
    journal.record(1, "train", {"loss": 1.0})
    path = tmp_path / "metrics.jsonl"
    with no_room_beyond(path.stat().st_size + 20):
        journal.record(2, "train", {"loss": 2.0})
        assert len(path.read_bytes().splitlines()[-1]) == 20  # torn
        journal.record(3, "train", {"loss": 3.0})
    assert len(told) == 1 and str(path) in told[0] and "training goes on" in told[0]
    journal.record(4, "train", {"loss": 4.0})  # there is room again
    assert [record.step for record in read_journal(tmp_path)] == [1, 4]
    journal.close()
    assert told[1:] == [f"2 records could not be written to {path}"]


def test_a_mirror_that_fails_costs_nothing_else(tmp_path):
    good, bad = Mirror(), Mirror(fail=True)
    journal = Journal(tmp_path, 0, writers=[bad, good])
    with pytest.warns(UserWarning, match=r"mirror \(RuntimeError: no connection\)"):
        journal.record(1, "train", {"loss": 1.0})
    assert good.seen == [(1, "train", {"loss": 1.0})] and len(read_journal(tmp_path)) == 1
    with pytest.warns(UserWarning, match="1 record could not be written to mirror"):
        journal.close()
    assert good.closed and bad.closed


def test_a_mistaken_record_is_refused(tmp_path):
    with Journal(tmp_path, 0) as journal:
        with pytest.raises(ValueError, match="kind 'trian' is unknown"):
            journal.record(1, "trian", {})
        with pytest.raises(ValueError, match="extra may not be called time"):
            journal.record(1, "note", {}, time="now")


def test_tensorboard_shows_what_was_recorded_and_forgets_what_was_undone(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    with Journal(tmp_path, 0, writers=writers_for(tmp_path, 0)) as journal:
        for step in (1, 2, 3):
            journal.record(step, "train", {"loss": step / 2})
        journal.record(3, "task", {"task/exact": 0.25})
    with Journal(tmp_path, 2, writers=[TensorBoardWriter(tmp_path, 2)]) as journal:
        journal.record(3, "train", {"loss": 9.0})
        journal.record(3, "sweep", {"max_steps": 4, "task/exact": 0.5})
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 0.5), (2, 1.0), (3, 9.0)]
    assert [(e.step, e.value) for e in events.Scalars("sweep/exact/max_steps=4")] == [(3, 0.5)]


def test_wandb_gets_one_run_that_goes_on(tmp_path, monkeypatch):
    runs = []

    class Run:
        def __init__(self, **options):
            self.options, self.logged, self.finished = options, [], False
            runs.append(self)

        def log(self, values, step):
            self.logged.append((values, step))

        def finish(self):
            self.finished = True

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=Run))
    for _ in range(2):
        writer = WandbWriter(tmp_path, "my-project", "lora", {"seed": 1})
        writer.write(5, "validation", {"validation/loss": 0.5, "t=0.5": 1.0})
        writer.write(5, "samples", {})
        writer.close()
    first, second = runs
    assert first.options["id"] == second.options["id"] and len(first.options["id"]) == 16
    assert {**first.options, "id": ""} == {"project": "my-project", "name": "lora", "config": {"seed": 1},
                                           "dir": str(tmp_path), "id": "", "resume": "allow"}
    assert first.logged == [({"validation/loss": 0.5, "validation/t=0.5": 1.0}, 5)] and first.finished


def test_wandb_is_asked_for_only_where_the_recipe_does(tmp_path, not_installed):
    not_installed("wandb")
    [writer] = writers_for(tmp_path, 0)
    writer.close()
    with pytest.raises(DgemmaError, match=r"W&B project 'mine', but wandb is not installed: pip install wandb"):
        writers_for(tmp_path, 0, wandb="mine")


def test_a_sweeps_values_are_told_apart():
    assert tagged("sweep", {"max_steps": 8, "task/exact": 0.5}) == {"sweep/exact/max_steps=8": 0.5}
