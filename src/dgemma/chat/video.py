"""Films as pictures with times: which frames are taken of one, and their decoding.

Works on files and bytes; knows nothing of the network. Frames are chosen as `transformers`' `Gemma4VideoProcessor`
does. Sound is not read. Only the formats listed here are opened, and none of them may name another file or address.
"""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dgemma.chat.pictures import MOST_PIXELS
from dgemma.errors import DgemmaError

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_FRAMES = 60  # of a film: what the model was trained on
FRAME_BUDGET = 70  # soft tokens of a frame
_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,ogg,flv,gif,apng,webp_pipe,asf"
_PICTURES = (b"\x89PNG", b"\xff\xd8\xff", b"II*\0", b"MM\0*", b"BM")  # how their files begin


@dataclass(frozen=True, eq=False)
class Film:
    """Frames in RGB, upright, and the second that each is shown at."""

    frames: tuple[Image, ...]
    seconds: tuple[float, ...]

    @property
    def stamps(self) -> list[str]:
        """The seconds as the model reads them, MM:SS."""
        return [f"{int(second // 60):02d}:{int(second % 60):02d}" for second in self.seconds]


def frame_numbers(total: int, rate: float, fps: float | None = None) -> list[int]:
    """Which of ``total`` frames, ``rate`` a second, are taken: ``fps`` a second, evenly.

    Without ``fps`` one a second, or of a film of more than `MOST_FRAMES` seconds so many over all of it. Raises
    DgemmaError for a rate that gives more frames than that, or than there are.
    """
    seconds = total / rate
    if fps is None:
        count = min(max(1, int(seconds)), MOST_FRAMES, total)
    elif not (math.isfinite(fps) and fps > 0):
        raise DgemmaError(f"fps must be a number above 0, got {fps!r}")
    else:
        count = max(1, int(seconds * fps))
    if count > MOST_FRAMES:
        raise DgemmaError(f"{fps:g} frames a second of {seconds:.0f} seconds are {count} frames, and the model takes "
                          f"{MOST_FRAMES} at most: give at most {math.floor(MOST_FRAMES / seconds * 1000) / 1000:g}")
    if count > total:
        raise DgemmaError(f"{fps:g} frames a second are more than this film has ({total} in {seconds:.1f} seconds)")
    return [number * total // count for number in range(count)]


def read_film(source: str | Path | bytes, fps: float | None = None, name: str | None = None) -> Film:
    """The frames of a film that the model is shown, by `frame_numbers`.

    ``name`` names the film in errors (a file's is its path). Raises DgemmaError for what is no film, has no pictures,
    or cannot be decoded, and where PyAV is not installed.
    """
    name = name or (str(source) if isinstance(source, (str, Path)) else "the video")
    with _opened(source, name) as container:
        stream = _pictures_of(container, name)
        shown = sorted(packet.pts for packet in container.demux(stream) if packet.pts is not None and packet.size)
        if not shown:
            raise DgemmaError(f"{name}: this film has no frames")
        rate = float(stream.average_rate or 0) or 24.0
        numbers = frame_numbers(len(shown), rate, fps)
    # Opened anew: not every format finds back to its first frame.
    with _opened(source, name) as container:
        stream = _pictures_of(container, name)
        wanted = [shown[number] for number in numbers]
        found = [(_upright(frame), frame.pts) for frame in _decoded(container, stream, wanted)]
        seconds = tuple(float((time - shown[0]) * stream.time_base) for _, time in found)
    if len(found) < len(numbers):
        raise DgemmaError(f"{name}: damaged or cut off: {len(found)} of {len(numbers)} frames could be decoded")
    return Film(tuple(image for image, _ in found), seconds)


def first_frame(source: str | Path | bytes, name: str | None = None) -> Image:
    """The first frame of a film in RGB, upright; nothing else of it is decoded. Raises DgemmaError as `read_film`."""
    name = name or (str(source) if isinstance(source, (str, Path)) else "the video")
    with _opened(source, name) as container:
        frame = next(container.decode(_pictures_of(container, name)), None)
        if frame is None:
            raise DgemmaError(f"{name}: this film has no frames")
        return _upright(frame)


@contextmanager
def _opened(source: str | Path | bytes, name: str) -> Iterator[Any]:
    """A film's container; what goes wrong within is a DgemmaError."""
    try:
        import av
        import av.error
    except ImportError as error:
        raise DgemmaError(f"videos need PyAV ({error}): pip install 'dgemma[vision]'") from error
    try:
        file = io.BytesIO(source) if isinstance(source, bytes) else Path(source).open("rb")  # noqa: SIM115
    except OSError as error:
        raise DgemmaError(f"{name}: cannot be read: {error.strerror or error}") from error
    with file:
        try:
            # By file, never by name: names may be addresses.
            with av.open(file, options={"format_whitelist": _FORMATS, "protocol_whitelist": "none"}) as container:
                yield container
        # IndexError: a damaged packet names a stream that is not there.
        except (av.error.FFmpegError, ValueError, EOFError, IndexError) as error:
            file.seek(0)
            if (head := file.read(12)).startswith(_PICTURES) or head[8:] == b"WEBP":
                raise DgemmaError(f"{name}: this is a picture: give it as one (of an animated WebP the first frame is "
                                  "seen), or make a film of it") from error
            raise DgemmaError(f"{name}: not a film that can be read (MP4, MOV, WebM, MKV, AVI, MPEG, GIF): "
                              f"{getattr(error, 'strerror', None) or error}") from error


def _pictures_of(container: Any, name: str) -> Any:
    """The stream of a film that is to be seen. Raises DgemmaError for none, an unknown kind, or one too large."""
    stream = next(iter(container.streams.video), None)
    if stream is None:
        raise DgemmaError(f"{name}: there is no picture in it, only sound or nothing")
    if (codec := stream.codec_context) is None:
        raise DgemmaError(f"{name}: its pictures are coded in a way that cannot be read here")
    if codec.width * codec.height > MOST_PIXELS:
        raise DgemmaError(f"{name}: frames of {codec.width} × {codec.height} pixels are too large: at most 89 million "
                          "pixels")
    codec.options = {"max_pixels": str(MOST_PIXELS)}  # a frame may say otherwise than the file
    return stream


def _decoded(container: Any, stream: Any, wanted: list[int]) -> Iterator[Any]:
    """The frames of these times, in order; over a long gap the reading jumps to the last key frame before the next."""
    gap = 10 / float(stream.time_base)  # more than the distance of key frames in most films
    stream.thread_type = "AUTO"
    last = wanted[0]
    decoding = container.decode(stream)  # one for all: a decoder gives several frames at a time, at the end most of all
    for time in wanted:
        if time - last > gap:
            container.seek(time, stream=stream)
            decoding = container.decode(stream)
        for frame in decoding:
            if frame.pts is not None and frame.pts >= time:
                last = frame.pts
                yield frame
                break


def _upright(frame: Any) -> Image:
    """A frame as RGB, turned and mirrored as the film says: phones are held any way.

    It says so by a matrix a b · c d · …, in fixed point, that takes (x, y) to (a·x + c·y, b·x + d·y). Between two
    quarter turns the nearer one counts.
    """
    from PIL import Image

    image = frame.to_image()
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return image
    a, b, _, c, d = struct.unpack_from("=5i", bytes(matrix))
    sideways = abs(a) + abs(d) < abs(b) + abs(c)
    turn = Image.Transpose
    right, down = (b >= 0, c >= 0) if sideways else (a >= 0, d >= 0)  # whether x and y still grow that way
    method = ({(True, True): turn.TRANSPOSE, (True, False): turn.ROTATE_270, (False, True): turn.ROTATE_90,
               (False, False): turn.TRANSVERSE} if sideways else
              {(True, False): turn.FLIP_TOP_BOTTOM, (False, True): turn.FLIP_LEFT_RIGHT,
               (False, False): turn.ROTATE_180}).get((right, down))
    return image if method is None else image.transpose(method)
