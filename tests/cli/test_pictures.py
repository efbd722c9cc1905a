"""Pictures on the terminal: decoded from what each protocol is sent, and where nothing is sent at all."""

from __future__ import annotations

import base64
import io
import os
import pty
import re
import subprocess
import sys
import threading

import numpy as np
import pytest
from PIL import Image

from dgemma.cli.terminal.pictures import CHUNK, GAP, MOST, PATIENCE, answers_sixel, drawn, protocol_of, side_by_side
from support.films import film
from support.pictures import as_file, random_picture
from support.vision import save_seeing_model

ESCAPES = ("\x1b_G", "\x1b]1337", "\x1bP")
QUICK = ("--max-tokens", "4", "--max-denoising-steps", "1")


def strip(width=90, height=40, transparent=False):
    """A picture as `side_by_side` makes it, of few colours."""
    pixels = np.zeros((height, width, 4), np.uint8)
    pixels[..., 3] = 255
    pixels[: height // 2, : width // 3, 0] = 255
    pixels[height // 2 :, width // 2 :] = (20, 200, 100, 255)
    if transparent:
        pixels[-5:, :7] = 0
    return Image.fromarray(pixels)


def kitty(text):
    """The picture, and the keys of every sequence."""
    found = re.findall(r"\x1b_G([^;]*);([A-Za-z0-9+/=]*)\x1b\\", text)
    assert "".join(f"\x1b_G{keys};{data}\x1b\\" for keys, data in found) == text
    data = base64.b64decode("".join(data for _, data in found), validate=True)
    return Image.open(io.BytesIO(data)), [dict(key.split("=") for key in keys.split(",")) for keys, _ in found], [
        len(data) for _, data in found]


def iterm(text):
    """The picture, and what is said of it."""
    keys, data = re.fullmatch(r"\x1b\]1337;File=([^:]*):([A-Za-z0-9+/=]*)\x07", text).groups()
    data = base64.b64decode(data, validate=True)
    return Image.open(io.BytesIO(data)), dict(key.split("=") for key in keys.split(";")), len(data)


def sixel(text):
    """The picture in RGBA, drawn as a terminal does."""
    width, height, body = re.fullmatch(r'\x1bP0;1;0q"1;1;(\d+);(\d+)(.*)\x1b\\', text).groups()
    pixels = np.zeros((-(-int(height) // 6) * 6, int(width), 4), np.uint8)
    palette, colour, x, y, end = {}, None, 0, 0, 0
    for match in re.finditer(r"#(\d+);2;(\d+);(\d+);(\d+)|#(\d+)|(\$)|(-)|(?:!(\d+))?([?-~])", body):
        assert match.start() == end, body[end : end + 20]
        end = match.end()
        number, *rgb, chosen, back, down, count, sign = match.groups()
        if number is not None:
            palette[number] = [round(int(value) * 2.55) for value in rgb] + [255]
        elif chosen is not None:
            colour = palette[chosen]
        elif back or down:
            x, y = 0, y + 6 * bool(down)
        else:
            for row in range(6):
                if (ord(sign) - 63) >> row & 1:
                    pixels[y + row, x : x + int(count or 1)] = colour
            x += int(count or 1)
            assert x <= int(width)
    assert end == len(body) and not pixels[int(height) :].any()
    return Image.fromarray(pixels[: int(height)])


def test_kitty_gets_a_png_in_chunks_and_is_told_to_say_nothing():
    image = side_by_side([random_picture(300, 200)], 320, 200)
    found, keys, lengths = kitty(drawn(image, "kitty", 12))
    assert np.array_equal(np.asarray(found), np.asarray(image))
    assert keys[0] == {"a": "T", "f": "100", "q": "2", "r": "12", "m": "1"} and len(keys) > 2
    assert [key["m"] for key in keys] == ["1"] * (len(keys) - 1) + ["0"]
    assert set(lengths[:-1]) == {CHUNK} and CHUNK % 4 == 0
    small = kitty(drawn(strip(9, 9), "kitty", 1))
    assert small[1] == [{"a": "T", "f": "100", "q": "2", "r": "1", "m": "0"}]


def test_iterm_gets_a_png_with_its_size():
    found, said, size = iterm(drawn(strip(), "iterm", 3))
    assert np.array_equal(np.asarray(found), np.asarray(strip()))
    assert said == {"inline": "1", "size": str(size), "height": "3", "preserveAspectRatio": "1"}


@pytest.mark.parametrize("height", [1, 6, 40, 41])
def test_sixel_draws_every_pixel_and_nothing_where_it_is_transparent(height):
    image = strip(height=height, transparent=height > 6)
    wanted, found = np.asarray(image).astype(int), np.asarray(sixel(drawn(image, "sixel", 3))).astype(int)
    assert np.array_equal(found[..., 3], wanted[..., 3])
    assert np.abs(found - wanted).max() <= 3  # colours in hundredths


def test_sixel_of_many_colours_is_near_them():
    image = Image.linear_gradient("L").convert("RGBA")
    found, wanted = (np.asarray(each).astype(int) for each in (sixel(drawn(image, "sixel", 7)), image))
    assert np.abs(found - wanted).mean() < 4


def test_pictures_stand_side_by_side_within_their_bounds():
    three = side_by_side([random_picture(*size) for size in ((30, 20), (400, 100), (10, 900))], 300, 96)
    assert three.size[0] <= 300 and three.size[1] <= 96
    two = side_by_side([random_picture(30, 20), random_picture(10, 40)], 300, 96)
    assert two.size == (30 + GAP + 10, 40)  # nothing is enlarged
    assert np.asarray(two)[30, 0, 3] == 0 == np.asarray(two)[0, 31, 3]
    many = side_by_side((random_picture(30, 20) for _ in range(9)), 300, 96)
    assert many.size == (30 * MOST + GAP * (MOST - 1), 20)
    assert side_by_side([], 300, 96) is None
    assert side_by_side([random_picture(1, 5000)], 300, 96).size == (1, 96)


XTERM = {"TERM": "xterm-256color"}


@pytest.mark.parametrize(("environ", "found"), [
    ({"TERM": "xterm-kitty"}, "kitty"), ({"TERM": "xterm-ghostty"}, "kitty"), ({"TERM": "wezterm"}, "iterm"),
    (XTERM | {"KITTY_WINDOW_ID": "1"}, "kitty"), (XTERM | {"TERM_PROGRAM": "ghostty"}, "kitty"),
    (XTERM | {"TERM_PROGRAM": "iTerm.app"}, "iterm"), (XTERM | {"TERM_PROGRAM": "WezTerm"}, "iterm"),
    (XTERM | {"LC_TERMINAL": "iTerm2"}, "iterm"),  # through ssh
    (XTERM, "asked"), (XTERM | {"TERM_PROGRAM": "Apple_Terminal"}, "asked"), ({"TERM": "foot"}, "asked"),
    (XTERM | {"TERM_PROGRAM": "vscode", "KITTY_WINDOW_ID": "1"}, "asked"),  # started from a kitty
    ({}, None), ({"TERM": "dumb", "KITTY_WINDOW_ID": "1"}, None), ({"TERM": "linux"}, None),
    ({"TERM": "xterm-kitty", "TMUX": "/tmp/tmux-0/default,1,0"}, None), ({"TERM": "tmux-256color"}, None),
    ({"TERM": "screen", "KITTY_WINDOW_ID": "1"}, None), (XTERM | {"STY": "1.pts-0.here"}, None),
    ({"TERM": "xterm-kitty", "ZELLIJ": "0"}, None), (XTERM | {"TERM_PROGRAM": "tmux", "TMUX": "x"}, None),
])
def test_what_a_terminal_understands(environ, found):
    asked = []

    def says(answer):
        return lambda: asked.append(1) or answer

    assert protocol_of(environ, says(True)) == ("sixel" if found == "asked" else found)
    assert protocol_of(environ, says(False)) == (None if found == "asked" else found)
    assert len(asked) == 2 * (found == "asked")


@pytest.fixture
def terminal():
    """Both ends of one: what is written into the first comes out of the second."""
    ends = pty.openpty()
    yield ends
    for end in ends:
        os.close(end)


@pytest.mark.parametrize(("answer", "found"), [
    (b"\x1b[?62;4;22c", True), (b"\x1b[?63;1;2;4c", True), (b"\x1b[?1;2c", False), (b"\x1b[?4;6c", False),
    (b"\x1b[?64;14;40c", False), (b"\x1b[?62c", False)])
def test_a_terminal_is_asked_for_sixel(terminal, answer, found):
    outside, inside = terminal

    def reply():
        assert os.read(outside, 64) == b"\x1b[c"
        for byte in answer:  # however it comes
            os.write(outside, bytes([byte]))

    other = threading.Thread(target=reply)
    other.start()
    assert answers_sixel(inside, patience=30) is found
    other.join()
    os.write(outside, b"next\n")  # its settings are as they were: lines, shown as they are typed
    assert os.read(inside, 64) == b"next\n"
    assert os.read(outside, 64) == b"next\r\n"


def test_a_terminal_that_says_nothing_has_none(terminal):
    assert not answers_sixel(terminal[1], patience=PATIENCE / 100)


def test_what_was_typed_already_is_left_alone(terminal):
    outside, inside = terminal
    os.write(outside, b"typed\n")
    assert not answers_sixel(inside, patience=30)
    assert os.read(inside, 64) == b"typed\n"


@pytest.mark.parametrize(("answer", "found"), [(b"\x1b[?62;4c", "True"), (b"\x1b[?62;22c", "False"), (b"", "False")])
def test_a_program_asks_its_own_terminal(terminal, answer, found):
    outside, inside = terminal
    code = ("import os, sys; os.setsid(); os.open(sys.argv[1], os.O_RDWR)\n"  # its terminal from now on
            "from dgemma.cli.terminal.pictures import terminal_has_sixel; print(terminal_has_sixel())")
    with subprocess.Popen([sys.executable, "-c", code, os.ttyname(inside)], stdout=subprocess.PIPE, text=True) as asks:
        assert os.read(outside, 64) == b"\x1b[c"
        os.write(outside, answer)
        assert asks.communicate()[0].strip() == found


def test_without_a_terminal_there_is_no_sixel():
    code = "import os; os.setsid(); from dgemma.cli.terminal.pictures import terminal_has_sixel as h; print(h())"
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_what_is_no_terminal_cannot_be_asked():
    reading, writing = os.pipe()
    with pytest.raises(OSError, match="ioctl"):
        answers_sixel(reading)
    os.close(reading)
    os.close(writing)


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    return save_seeing_model(tmp_path_factory.mktemp("seeing"))


@pytest.fixture
def shown(tmp_path):
    """A picture and a film in files."""
    picture, video = tmp_path / "picture.png", tmp_path / "film.mp4"
    picture.write_bytes(as_file(random_picture(60, 50), "PNG"))
    video.write_bytes(film(30))
    return picture, video


def test_run_shows_what_the_model_is_shown(dgemma_command, seeing, shown):
    picture, video = shown
    out = dgemma_command("run", "-m", seeing, *QUICK, "--preview", "kitty", "--image", picture, "--video", video, "Hi",
                         terminal=True).out
    begin, end = out.index("\x1b_G"), out.rindex("\x1b\\") + 2
    found, keys, _ = kitty(out[begin:end])
    assert found.size == (60 + GAP + 64, 50) and keys[0]["r"] == "4"
    assert out[end] == "\n"


def test_a_picture_on_stdin_is_shown(dgemma_command, seeing, shown):
    out = dgemma_command("run", "-m", seeing, *QUICK, "--preview", "sixel", "--image", "-", "Hi", terminal=True,
                         stdin=shown[0].read_bytes()).out
    assert sixel(out[out.index("\x1bP") : out.index("\x1b\\") + 2]).size == (60, 50)


def test_chat_shows_what_goes_along_with_the_next_message(dgemma_command, seeing, shown):
    picture, video = shown
    out = dgemma_command("chat", "-m", seeing, "--preview", "iterm", terminal=True,
                         stdin=f"/image {picture}\n{picture}\n/video {video}\n").out
    images = [iterm(text)[0] for text in re.findall(r"\x1b\]1337[^\x07]*\x07", out)]
    assert [image.size for image in images] == [(60, 50), (60, 50), (64, 48)]
    assert out.index("\x1b]1337") < out.index("picture.png, 60 × 50 pixels: shown with the next message")


@pytest.mark.parametrize(("arguments", "where"), [
    ((), {}), (("--json",), {"terminal": True}), (("--no-visual",), {"terminal": True}),
    (("--preview", "off"), {"terminal": True})])
def test_nothing_is_shown_in_a_pipe_or_where_it_is_not_wanted(dgemma_command, seeing, shown, arguments, where,
                                                              monkeypatch):
    monkeypatch.setenv("DGEMMA_PREVIEW", "kitty")
    outcome = dgemma_command("run", "-m", seeing, *QUICK, *arguments, "--image", shown[0], "Hi", **where)
    assert outcome.code == 0 and not any(escape in outcome.out + outcome.err for escape in ESCAPES)


def test_the_environment_decides_and_its_mistakes_are_said(dgemma_command, seeing, shown, monkeypatch):
    def out(value, term, tmux):
        for name, text in (("DGEMMA_PREVIEW", value), ("TERM", term), ("TMUX", tmux)):
            monkeypatch.setenv(name, text)
        return dgemma_command("chat", "-m", seeing, stdin=f"/image {shown[0]}\n", terminal=True)

    assert "\x1b_G" in out("auto", "xterm-kitty", "").out
    for value, term, tmux in (("auto", "xterm-kitty", "/tmp/tmux-0/default,1,0"), ("off", "xterm-kitty", "")):
        found = out(value, term, tmux)
        assert not any(escape in found.out + found.err for escape in ESCAPES) and "next message" in found.out
    wrong = out("sixels", "xterm-kitty", "")
    assert wrong.code == 2 and "sixels" in wrong.err


def test_a_film_that_cannot_be_previewed_is_said_in_a_note(dgemma_command, seeing, tmp_path):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(film(30)[:200])
    outcome = dgemma_command("chat", "-m", seeing, "--preview", "kitty", stdin=f"/video {broken}\n", terminal=True)
    assert outcome.code == 0 and "no preview: " in outcome.err and "broken.mp4: shown with" in outcome.out
