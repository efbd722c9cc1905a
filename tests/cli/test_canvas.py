"""The live canvas on a made-up terminal: what is on the screen during and after a made-up denoising."""

import io
import re
import unicodedata

import pytest
from rich.cells import cell_len
from rich.console import Console

from dgemma.cli.terminal.canvas import LiveCanvas
from dgemma.diffusion.events import CanvasCommitted, Denoised
from support.clock import Clock

SUDOKU = "534678912\n672195348\n198342567\n859761423\n426853791\n713924856\n961537284\n287419635\n345286179"
PROSE = (
    "Text diffusion begins with noise. Everywhere it is sure, it commits; the easy words come first.\n\n"
    "Nothing scrolls by: the paragraph is there from the start, out of focus, and sharpens. "
) * 9 + "The end."
CODE = 'Look:\n\n```python\ndef f(a, b, c):\n    return "' + "a long string " * 9 + '"\n```\n\nDone.'
WIDE = (
    "扩散模型从噪声开始，一次去噪整块画布。日本語の文章も少しずつ焦点が合っていきます。" * 2
    + "\n🎉 👍🏽 🇩🇪 한국어 é ok"
)
EVIL = "a\x1b[31mred\x1b[2J\x07 bell\x00 \x9b31m \x7f \u202eright\u2066 x\ty"
TEXTS = {"sudoku": SUDOKU, "prose": PROSE, "code": CODE, "wide": WIDE, "evil": EVIL}
SIZES = [(80, 24), (60, 15), (160, 50), (20, 4), (7, 1)]


def terminal(width=80, height=24, **options):
    options = {"force_terminal": True, "color_system": "standard", **options}
    return Console(file=io.StringIO(), width=width, height=height, legacy_windows=False, _environ={}, **options)


def play(events, piece_of, screen, console):
    """Shows the events, and time enough between them to draw each; the screen after each of them."""
    read = 0
    with LiveCanvas(console, piece_of, clock=Clock(tick=1)) as live:
        for event in events:
            live.show(event)
            written = console.file.getvalue()
            screen.feed(written[read:])
            read = len(written)
            yield event
    screen.feed(console.file.getvalue()[read:])


def show_all(events, piece_of, console, **options):
    with LiveCanvas(console, piece_of, **options) as live:
        for event in events:
            live.show(event)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", TEXTS)
def test_every_frame_fits_and_steers_nothing(name, size, fake, screen):
    made = fake(TEXTS[name], words=name in ("prose", "code"), canvas=96, steps=6)
    console, seen = terminal(*size), screen(*size)
    for event in play(made.events(), made.piece_of, seen, console):
        assert all(cell_len(line) <= size[0] for line in seen.lines())
        if isinstance(event, Denoised):
            live = len(seen.rows) - seen.top
            assert live <= size[1]
            assert size[0] < 20 or f"step {event.step}/48" in seen.lines()[seen.y]
    codes = re.sub(r"\x1b\[(\?\d+[hl]|[\d;]*[ABKm])", "", console.file.getvalue())
    kinds = {unicodedata.category(char) for char in codes if char not in "\n\r\u200d"}
    assert not kinds & {"Cc", "Cf", "Cs", "Zl", "Zp"}
    assert seen.cursor
    assert seen.autowrap


@pytest.mark.parametrize("size", SIZES[:4], ids=str)
@pytest.mark.parametrize("name", ["sudoku", "prose", "code", "wide"])
def test_the_end_is_the_text_once_and_copies_whole(name, size, fake, screen):
    made = fake(TEXTS[name], words=name in ("prose", "code"), canvas=96, steps=5)
    seen = screen(*size)
    for _ in play(made.events(), made.piece_of, seen, terminal(*size)):
        pass
    *text, summary = seen.copied().rstrip("\n").split("\n")
    assert summary.startswith(f"{len(made.tokens)} tokens")
    if name == "prose":  # breaks at spaces only
        assert " ".join("\n".join(text).split()) == " ".join(PROSE.split())
        assert all(line == line.strip() for line in text)
    else:
        assert "\n".join(text) == TEXTS[name]


def test_committed_canvases_scroll_away_and_stay(fake, screen):
    made = fake(PROSE, canvas=64, steps=4)
    seen = screen(60, 10)
    committed = 0
    for event in play(made.events(), made.piece_of, seen, terminal(60, 10)):
        if isinstance(event, CanvasCommitted):
            committed += len(event.token_ids)
            so_far = b"".join(made.piece_of(i)[0] for i in made.tokens[:committed]).decode()
            shown = " ".join(seen.copied().split())
            assert shown.startswith(" ".join(so_far.split()))
            assert "committed after 4 steps" in shown
            assert shown.count("canvas") == 1  # no old status line is left behind


def test_an_interruption_keeps_what_was_committed(fake, screen):
    made = fake(PROSE, canvas=64, steps=4)
    console, seen = terminal(60, 10), screen(60, 10)
    committed = []

    def interrupted():
        for event in made.events():
            yield event
            if isinstance(event, CanvasCommitted):
                committed.extend(event.token_ids)
            if isinstance(event, Denoised) and (event.canvas, event.step) == (2, 2):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        show_all(interrupted(), made.piece_of, console)
    seen.feed(console.file.getvalue())
    text = b"".join(made.piece_of(i)[0] for i in committed).decode()
    assert seen.copied().split() == text.split()
    assert seen.cursor
    assert seen.autowrap
    assert seen.x == 0


def test_frames_are_throttled_but_the_last_step_is_drawn(fake):
    clock = Clock()
    made = fake(SUDOKU, words=False, canvas=96, steps=40)
    console = terminal()
    with LiveCanvas(console, made.piece_of, clock=clock) as live:
        for event in made.events():
            clock.sleep(0.01)
            live.show(event)
    drawn = [int(step) for step in re.findall(r"step (\d+)/", re.sub(r"\x1b\[[\d;]*m", "", console.file.getvalue()))]
    assert drawn[-1] == 40
    assert 9 <= len(drawn) <= 13


def test_slow_motion_shows_every_step(fake):
    clock = Clock()
    made = fake(SUDOKU, words=False, canvas=96, steps=10)
    console = terminal()
    show_all(made.events(), made.piece_of, console, min_frame_seconds=0.5, clock=clock)
    assert len(re.findall(r"step \d+/", console.file.getvalue())) == 11
    assert clock.now == pytest.approx(0.5 * 11)


def test_plain_terminals(fake):
    made = fake(SUDOKU, words=False, canvas=96, steps=4)
    dumb = terminal(force_terminal=True)
    dumb._environ = {"TERM": "dumb"}
    piped = terminal(force_terminal=False)
    for console in (dumb, piped):
        show_all(made.events(), made.piece_of, console)
        text = re.sub(r"\x1b\[[\d;]*m", "", console.file.getvalue())
        assert "\x1b" not in text
        assert text.startswith(SUDOKU + "\n89 tokens")
    colourless = terminal(no_color=True)
    show_all(made.events(), made.piece_of, colourless)
    styles = set(re.findall(r"\x1b\[([\d;]*)m", colourless.file.getvalue()))
    assert styles <= {"0", "1", "2", "3", "2;3"}


def test_others_may_print_meanwhile(fake, screen):
    made = fake(SUDOKU, words=False, canvas=96, steps=6)
    console, seen = terminal(), screen(80, 24)
    with LiveCanvas(console, made.piece_of) as live:
        for event in made.events():
            live.show(event)
            if isinstance(event, Denoised):
                console.print(f"note {event.step}")
                print("stdout, too")
    seen.feed(console.file.getvalue())
    lines = [line for line in seen.lines() if line and "stdout" not in line]
    assert lines[:15] == [f"note {i}" for i in range(1, 7)] + SUDOKU.split("\n")


def test_importing_it_is_light():
    import subprocess
    import sys
    from pathlib import Path

    code = (
        "import sys, dgemma.cli.terminal.canvas, dgemma.cli.commands.replay\n"
        "assert not {'torch', 'tokenizers', 'jinja2'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": "src"}, cwd=Path(__file__).parents[2])
