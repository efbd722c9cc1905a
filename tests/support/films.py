"""Films made for tests: grey frames that grow brighter, so that a frame tells its number."""

from __future__ import annotations

import io
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
