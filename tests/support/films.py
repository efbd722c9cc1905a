"""Films made for tests: grey frames that grow brighter, so that a frame tells its number."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from fractions import Fraction

import av
import numpy as np

STEP = 2  # of brightness, from one frame to the next


def film(frames: int, rate: int = 30, container: str = "mp4", codec: str = "libx264", size: tuple[int, int] = (64, 48),
         at: Callable[[int], float] | None = None) -> bytes:
    """A film of so many frames; ``at`` tells the second that each is shown at (None: evenly)."""
    stored = io.BytesIO()
    with av.open(stored, "w", format=container) as output:
        stream = output.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        if at is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number in range(frames):
            pixels = np.full((size[1], size[0], 3), number * STEP % 250, np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if at is not None:
                frame.pts, frame.time_base = round(at(number) * 1000), Fraction(1, 1000)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return stored.getvalue()


def turned_film(a: int, b: int, c: int, d: int, frames: int = 3) -> bytes:
    """A film of 64 × 48 pixels, white in its upper left quarter, that says it is shown by the matrix a b · c d.

    That takes (x, y) to (a·x + c·y, b·x + d·y), as an MP4's track header has it.
    """
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[:24, :32] = 255
    stored = io.BytesIO()
    with av.open(stored, "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(frames):
            output.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        output.mux(stream.encode())
    data, one = stored.getvalue(), 1 << 16
    upright, wanted = (struct.pack(">9i", *(number * one for number in (e, f, 0, g, h, 0, 0, 0)), 1 << 30)
                       for e, f, g, h in ((1, 0, 0, 1), (a, b, c, d)))
    place = data.index(upright, data.index(b"tkhd"))
    return data[:place] + wanted + data[place + len(upright) :]


def sound(seconds: float = 0.5) -> bytes:
    """A file of sound alone."""
    stored = io.BytesIO()
    with av.open(stored, "w", format="mp4") as output:
        stream = output.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, int(16000 * seconds)), np.float32), "fltp", "mono")
        frame.sample_rate = 16000
        output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return stored.getvalue()
