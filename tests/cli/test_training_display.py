"""What a person sees of a long run, on a terminal and in a pipe."""

import contextlib
import dataclasses
import io
import re

import pytest
from rich.console import Console

from dgemma.cli.terminal.training import HINT, TrainingDisplay, sparkline
from dgemma.formats import long_duration_text
from dgemma.train.eval.tasks import TaskScore
from dgemma.train.log.events import Evaluated, Noted, Started, Stepped, Working


def pipe():
    return Console(file=io.StringIO(), highlight=False, width=60)


def terminal(width=100):
    return Console(file=io.StringIO(), force_terminal=True, width=width, height=20, color_system=None,
                   legacy_windows=False)


def block(shown, width=100, ascii_only=False):
    return [row.plain for row in shown._rows(width, ascii_only)]


def step(shown, number, loss=0.5):
    shown(Stepped(number, {"loss": loss, "learning_rate": 1e-4}, 2.0, 8312.0, 3_400_000_000))


def evaluation(step, values, best):
    losses = {name: value for name, value in values.items() if not name.startswith("task/")}
    score = TaskScore(1, "task/exact", {name: values[name] for name in values if name not in losses}, {}, [])
    return Evaluated(step, losses, score, best)


@contextlib.contextmanager
def display(name, first, last, console, clock):
    """A display of a run that has started."""
    with TrainingDisplay(console, lambda: clock[0]) as shown:
        shown(Started(name, first, last))
        yield shown


@pytest.fixture
def clock():
    """A clock that a test moves on by hand: ``clock[0] += seconds``."""
    return [0.0]


def lines_at(console):
    return [int(n) for n in re.findall(r"^step (\d+)/", console.file.getvalue(), re.MULTILINE)]


@pytest.mark.parametrize(("seconds", "expected"), [(2.0, [1, 21, 41, 60]), (0.5, [1, 60]), (10.0, [1, 21, 41, 60])])
def test_a_pipe_gets_a_line_after_20_steps_or_30_seconds_whichever_is_later(clock, seconds, expected):
    console = pipe()
    with display("run", 0, 60, console, clock) as shown:
        for number in range(1, 61):
            clock[0] += seconds
            step(shown, number)
    assert lines_at(console) == expected


def test_quick_steps_wait_for_30_seconds(clock):
    console = pipe()
    with display("run", 0, 200, console, clock) as shown:
        for number in range(1, 201):
            clock[0] += 0.5
            step(shown, number)
    assert lines_at(console) == [1, 61, 121, 181, 200]


def test_a_pipe_gets_whole_lines_without_control_characters(clock):
    console = pipe()
    with display("run", 0, 4000, console, clock) as shown:
        shown(Noted("a note that is longer than the sixty columns of the console, [bold]as it is[/bold]"))
        step(shown, 1)
        shown(Working("evaluating", 0, 64))
        shown(evaluation(1, {"validation/loss": 0.25, "task/exact": 0.75}, best=True))
    text = console.file.getvalue()
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", text)
    assert text.splitlines() == [
        f"run: 4000 steps. {HINT}.",
        "a note that is longer than the sixty columns of the console, [bold]as it is[/bold]",
        "step 1/4000  loss 0.5000  learning rate 0.0001  8,312 tokens/s  2.00 s/step  3.4 GB  2 h 13 min left",
        "evaluating 0/64",
        "step 1: validation/loss 0.2500, exact 0.7500  (best so far)"]


def test_a_run_that_stops_early_says_where(clock):
    console = pipe()
    with pytest.raises(KeyboardInterrupt), display("run", 10, 100, console, clock) as shown:
        step(shown, 11)
        step(shown, 12)
        raise KeyboardInterrupt
    assert console.file.getvalue().startswith("run: steps 10 to 100.") and lines_at(console) == [11, 12]


def test_a_terminal_shows_where_the_run_stands(clock):
    with display("sudoku", 0, 4000, terminal(), clock) as shown:
        for number in range(1, 1001):
            step(shown, number, loss=3.0 if number < 500 else 0.5)
        clock[0] += 90
        shown(evaluation(900, {"validation/loss": 0.4, "task/steps_per_canvas": 12.0, "task/exact": 0.75}, best=True))
        shown(evaluation(1000, {"validation/loss": 0.3, "task/steps_per_canvas": 11.0, "task/exact": 0.7}, best=False))
        shown(Working("evaluating", 48, 64))
        rows = block(shown)
    assert "1,000/4,000  1 h 40 min left  2 min so far" in rows[0] and rows[0].count("━") * 3 == rows[0].count("─")
    assert rows[1] == "loss 0.5000 ████████▂▁▁▁▁▁▁▁  learning rate 0.0001  8,312 tokens/s  2.00 s/step  3.4 GB"
    assert rows[2] == "exact 0.7000 at 1,000  best 0.7500 at 900  validation loss 0.3000"
    assert rows[3:] == ["evaluating 48/64", HINT]


@pytest.mark.parametrize("width", [24, 40, 60, 200])
@pytest.mark.parametrize("ascii_only", [False, True])
def test_the_block_fits_any_width_and_loses_no_figure(clock, width, ascii_only):
    with display("a name that is rather long for a run", 0, 100_000, terminal(width), clock) as shown:
        for number in range(1, 30):
            step(shown, number, loss=1 / number)
        shown(evaluation(29, {"validation/loss": 0.4, "task/exact": 0.75}, best=True))
        rows = block(shown, width, ascii_only)
    assert all(len(row) <= width for row in rows)
    assert all(figure in "\n".join(rows) for figure in ("29/100,000", "loss 0.", "0.0001", "8,312", "3.4 GB", HINT))
    assert not ascii_only or "\n".join(rows).isascii()


def test_the_hint_goes_when_the_run_is_over_and_the_rest_stays(clock):
    console = terminal()
    with display("run", 0, 10, console, clock) as shown:
        step(shown, 10)
    assert HINT not in "".join(block(shown)) and "10/10" in console.file.getvalue()


def test_an_empty_display_is_drawn(clock):
    with display("run", 0, 10, terminal(), clock) as shown:
        assert len(block(shown)) == 2


def test_a_loss_that_is_not_finite_does_not_stay(clock):
    with display("run", 0, 10, terminal(), clock) as shown:
        step(shown, 1, loss=float("nan"))
        step(shown, 2, loss=float("inf"))
        step(shown, 3, loss=0.25)
        assert "loss 0.2500" in block(shown)[1]


@pytest.mark.parametrize(("values", "scored", "shown"), [
    ({"validation/loss": 1, "task/steps_per_canvas": 2, "task/exact": 3}, True, "exact 3.0000"),
    ({"validation/t=0.5": 2, "validation/loss": 1}, False, "validation/loss 1.0000"), ({}, False, None)])
def test_what_the_user_wants_comes_before_losses(clock, values, scored, shown):
    with display("run", 0, 10, terminal(), clock) as seen:
        event = evaluation(1, values, best=False)
        seen(event if scored else dataclasses.replace(event, score=None))
        rows = block(seen)
    assert len(rows) == (3 if shown else 2) and rows[1].startswith(shown or HINT)


def test_sparklines_go_from_the_least_to_the_greatest():
    assert sparkline([0.0, 7.0, 3.5]) == "▁█▅"
    assert sparkline([1.0, 1.0]) == "▁▁" and sparkline([1.0]) == ""
    assert len(sparkline(list(range(1000)))) == 16


@pytest.mark.parametrize(("seconds", "text"), [(12.3, "12 s"), (59.7, "60 s"), (600, "10 min"), (3599, "1 h 0 min"),
                                               (12_000, "3 h 20 min"), (187_200, "2 d 4 h")])
def test_durations(seconds, text):
    assert long_duration_text(seconds) == text
