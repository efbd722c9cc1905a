"""Small pictures on a terminal that can show them: kitty's graphics protocol, iTerm2's inline images, sixel.

Works on Pillow's images and a terminal's variables. Nothing is shown where the program does not know that it will be
seen: not in a pipe, not inside tmux or screen, which would have to hand it on. What is written is made here of digits
alone, so it goes past `console`, whose work is to keep escape sequences away.

Formats: https://sw.kovidgoyal.net/kitty/graphics-protocol, https://iterm2.com/documentation-images.html, and DEC's
VT330/VT340 programmer reference manual, chapter 14.
"""

from __future__ import annotations

import base64
import functools
import io
import os
import re
import select
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any

from dgemma.cli.terminal.console import say_warning
from dgemma.errors import DgemmaError

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

ROWS, COLUMNS = 12, 80  # of characters, at most
MOST = 4  # pictures side by side
PATIENCE = 0.3  # seconds that a terminal has to say what it is
CHUNK = 4096  # characters of a picture in one of kitty's sequences
COLOURS = 64  # of a sixel picture
GAP = 4  # pixels between two pictures
_CELL = (8, 16)  # pixels of a character where the terminal does not tell: small, so that no picture comes out too large

_TERMS = {"xterm-kitty": "kitty", "xterm-ghostty": "kitty", "ghostty": "kitty", "wezterm": "iterm"}
_PROGRAMS = {"ghostty": "kitty", "iTerm.app": "iterm", "WezTerm": "iterm"}


def preview(parts: Iterable[Mapping[str, Any]], setting: str = "auto") -> None:
    """Show what parts of a message show: the first few pictures, of a film its first frame, side by side.

    ``setting``: "off", "auto" (what the terminal is known to understand, or nothing), or the name of a protocol. Only
    where stdout is a terminal. What cannot be read is said in a note: who is asked about it says more.
    """
    if setting == "off" or not sys.stdout.isatty():
        return
    protocol = protocol_of(os.environ) if setting == "auto" else setting
    if protocol is None:
        return
    terminal = shutil.get_terminal_size()
    rows, columns = min(ROWS, max(terminal.lines - 4, 1)), min(COLUMNS, max(terminal.columns - 1, 1))
    cell = _cell_size()
    try:
        strip = side_by_side((_seen(part) for part in parts), columns * cell[0], rows * cell[1])
    except DgemmaError as error:
        say_warning(f"no preview: {error}")
        return
    if strip is not None:
        sys.stdout.write(drawn(strip, protocol, -(-strip.height // cell[1])) + "\n")
        sys.stdout.flush()


def protocol_of(environ: Mapping[str, str], has_sixel: Callable[[], bool] | None = None) -> str | None:
    """What the terminal that these variables tell of understands: "kitty", "iterm", "sixel", or None for nothing.

    A terminal that they do not name is asked for sixel (``has_sixel``, by default `terminal_has_sixel`).
    """
    term, program = environ.get("TERM", ""), environ.get("TERM_PROGRAM", "")
    if any(environ.get(name) for name in ("TMUX", "STY", "ZELLIJ")) or term.startswith(("screen", "tmux")):
        return None
    if term in ("", "dumb", "linux"):
        return None
    if known := _TERMS.get(term) or _PROGRAMS.get(program):
        return known
    # Another terminal that was started from one of these has its variables, too, and its own name beside them.
    if not program and environ.get("KITTY_WINDOW_ID"):
        return "kitty"
    if not program and environ.get("LC_TERMINAL") == "iTerm2":  # goes along through ssh
        return "iterm"
    return "sixel" if (has_sixel or terminal_has_sixel)() else None


@functools.cache
def terminal_has_sixel() -> bool:
    """Whether the terminal of this program says that it draws sixel. Asked once."""
    try:
        terminal = os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY)
    except OSError:  # there is none; on Windows never
        return False
    try:
        # In the background, changing a terminal's settings would stop the program.
        return os.tcgetpgrp(terminal) == os.getpgrp() and answers_sixel(terminal)
    except OSError:
        return False
    finally:
        os.close(terminal)


def answers_sixel(terminal: int, patience: float = PATIENCE) -> bool:
    """Whether 4 is among the primary device attributes that a terminal answers with (ESC [ ? 62 ; 4 ; … c).

    What somebody has typed already stays for whom it was meant: then it is not asked. Raises OSError.
    """
    answer = b""
    with _unbuffered(terminal):
        if select.select([terminal], [], [], 0)[0]:
            return False
        os.write(terminal, b"\x1b[c")
        deadline = time.monotonic() + patience
        while not (found := re.search(rb"\x1b\[\?([\d;]*)c", answer)):
            if not select.select([terminal], [], [], max(deadline - time.monotonic(), 0))[0]:
                return False
            answer += os.read(terminal, 64)
    return b"4" in found[1].split(b";")[1:]  # the first one is the terminal's kind


@contextmanager
def _unbuffered(terminal: int) -> Iterator[None]:
    """A terminal that gives what it has at once, and shows nothing of it. Raises OSError."""
    import termios

    try:
        before = termios.tcgetattr(terminal)
    except termios.error as error:
        raise OSError(*error.args) from error
    quiet = [*before]
    quiet[3] &= ~(termios.ICANON | termios.ECHO)
    termios.tcsetattr(terminal, termios.TCSADRAIN, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)


def _cell_size() -> tuple[int, int]:
    """Pixels of a character on stdout's terminal, wide and high."""
    try:
        import fcntl
        import struct
        import termios

        size = fcntl.ioctl(sys.stdout.fileno(), termios.TIOCGWINSZ, bytes(8))
    except (ImportError, OSError, ValueError):  # Windows; a stdout that is no file
        return _CELL
    rows, columns, width, height = struct.unpack("4H", size)
    return (width // columns, height // rows) if columns and rows and width >= columns and height >= rows else _CELL


def _seen(part: Mapping[str, Any]) -> Image:
    """The picture of a part, or its film's first frame. Raises DgemmaError."""
    from dgemma.chat.pictures import open_picture
    from dgemma.chat.video import first_frame

    kind = part["type"]
    return (open_picture if kind == "image" else first_frame)(part.get(kind) or part["path"], part.get("name"))


def side_by_side(images: Iterable[Image], width: int, height: int) -> Image | None:
    """The first few of some pictures beside each other, no larger than ``width`` × ``height`` pixels together.

    Nothing is enlarged; between them and below smaller ones it is transparent. None where there are none.
    """
    from PIL import Image

    small = []
    for image in islice(images, MOST):  # one large one at a time
        image.thumbnail((width, height))
        small.append(image)
    if not small:
        return None
    strip = Image.new("RGBA", (sum(image.width for image in small) + GAP * (len(small) - 1),
                               max(image.height for image in small)))
    left = 0
    for image in small:
        strip.paste(image, (left, 0))
        left += image.width + GAP
    strip.thumbnail((width, height))
    return strip


def drawn(image: Image, protocol: str, rows: int) -> str:
    """What makes a terminal draw a picture of so many rows of characters."""
    return _sixel(image) if protocol == "sixel" else _kitty(image, rows) if protocol == "kitty" else _iterm(image, rows)


def _kitty(image: Image, rows: int) -> str:
    data = base64.b64encode(_png(image)).decode()
    chunks = [data[start : start + CHUNK] for start in range(0, len(data), CHUNK)]
    said = [f"m={int(number < len(chunks))}" for number in range(1, len(chunks) + 1)]
    said[0] = f"a=T,f=100,q=2,r={rows},{said[0]}"  # q=2: no answer, which nobody would read
    return "".join(f"\x1b_G{keys};{chunk}\x1b\\" for keys, chunk in zip(said, chunks, strict=True))


def _iterm(image: Image, rows: int) -> str:
    data = _png(image)
    return (f"\x1b]1337;File=inline=1;size={len(data)};height={rows};preserveAspectRatio=1:"
            f"{base64.b64encode(data).decode()}\x07")


def _png(image: Image) -> bytes:
    stored = io.BytesIO()
    image.save(stored, "PNG")
    return stored.getvalue()


def _sixel(image: Image) -> str:
    """A picture in bands of six rows; of each colour in a band, a character for every column says which of the six."""
    import numpy as np

    reduced = image.convert("RGB").quantize(COLOURS)
    pixels = np.asarray(reduced).copy()
    pixels[np.asarray(image.getchannel("A")) == 0] = COLOURS  # no colour's: it is not drawn
    pixels = np.pad(pixels, ((0, -image.height % 6), (0, 0)), constant_values=COLOURS)
    bands = pixels.reshape(-1, 6, image.width)
    palette = np.asarray(reduced.getpalette()).reshape(-1, 3)
    colours = "".join(f"#{number};2;" + ";".join(str(round(value / 2.55)) for value in palette[number])
                      for number in np.unique(pixels) if number < COLOURS)
    # 0;1: square pixels come from the next line, and what is not drawn stays as it was.
    return (f'\x1bP0;1;0q"1;1;{image.width};{image.height}{colours}' + "-".join(map(_band, bands)) + "\x1b\\")


def _band(band: np.ndarray) -> str:
    """Six rows of colours' numbers [6, width]: the colours one over the other ("$": from the left again)."""
    import numpy as np

    layers = []
    for colour in sorted(set(band.flat) - {COLOURS}):
        signs = (np.packbits(band == colour, axis=0, bitorder="little")[0] + 63).tobytes()
        layers.append(f"#{colour}" + _shortened(signs.decode()))
    return "$".join(layers)


def _shortened(signs: str) -> str:
    """Runs of a character as their length and the character ("!9?"); those at the end that draw nothing are left out.
    """
    return re.sub(r"(.)\1{3,}", lambda run: f"!{len(run[0])}{run[1]}", signs.rstrip("?"))
