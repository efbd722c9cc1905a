"""Bars on a terminal, and what there is of them elsewhere."""

import io

import pytest

from dgemma.cli.terminal.console import SafeConsole
from dgemma.cli.terminal.progress import DownloadBar, ProgressBar


@pytest.fixture
def screen():
    return io.StringIO()


@pytest.fixture
def console(screen):
    return SafeConsole(file=screen, force_terminal=True, width=100)


def test_one_bar_for_all_tensors(screen, console):
    with ProgressBar(console=console) as bar:
        bar.step("token_embd.weight", 0, 2_000_000_000)
        bar.step("blk.0.ffn_gate_up_exps.weight", 2_000_000_000, 2_000_000_000)
    assert "blk.0.ffn_gate_up_exps.weight" in screen.getvalue()
    assert "2.0/2.0 GB" in screen.getvalue()


def test_what_is_counted_and_no_bytes(screen, console):
    with ProgressBar(of_bytes=False, console=console) as bar:
        bar.step("easy", 0, 4)
        bar.step("hard", 8, 8)
    assert "8/8" in screen.getvalue() and "hard" in screen.getvalue() and "bytes" not in screen.getvalue()


def test_what_does_not_take_long_has_no_bar(screen, console):
    with ProgressBar("loading", patience=60.0, console=console) as bar:
        bar.update(0, 10)
        bar.update(10, 10)
    assert screen.getvalue() == ""


def test_a_bar_that_is_done_makes_room_for_the_next(screen, console):
    with ProgressBar("loading", console=console) as bar:
        for total in (2_000_000, 3_000_000):
            bar.update(0, total)
            bar.update(total, total)
    assert "2.0/2.0 MB" in screen.getvalue() and "3.0/3.0 MB" in screen.getvalue()


def test_downloads_on_a_terminal(screen, console):
    with DownloadBar(console) as display:
        display.begin("downloading a-rather-long-name-of-a-file-Q4_K_M.gguf", 0, 2_000_000)
        display.advance(1_000_000)
        display.advance(2_000_000)
        display.begin("checking", 0, 2_000_000)
        display.advance(2_000_000)
    text = screen.getvalue()
    assert "2.0/2.0 MB" in text and "downloading" in text and "checking" in text


def test_downloads_elsewhere_are_lines(capsys):
    with pytest.raises(KeyboardInterrupt), DownloadBar() as display:
        display.begin("downloading x.gguf", 0, 2_000_000)
        raise KeyboardInterrupt
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["downloading x.gguf (2.0 MB)",
                     "Stopped. What has arrived is kept: the same command goes on from here."]
