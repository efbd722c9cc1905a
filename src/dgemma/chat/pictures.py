"""Pictures made ready for the vision tower: opened safely, turned upright, resized to a budget of soft tokens.

Works on files, bytes and Pillow's images; knows nothing of the network. Preprocessing is that of `transformers`'
`Gemma4ImageProcessorPil`, bit for bit. Whatever comes in, the outcome is a picture or a DgemmaError that says why not.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dgemma.config import BUDGETS, VisionConfig
from dgemma.errors import DgemmaError
from dgemma.fields import read_bytes

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_PIXELS = 89_478_485  # of a picture as it comes: Pillow's own limit, a quarter of a gigabyte in RGB

# What Pillow may decode, as far as it can: PostScript, which it would have run by a program, is not among them. HEIF is
# there once a package for it is registered with Pillow.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF", "JPEG2000", "PPM", "QOI", "ICO")
# How things begin that are no pictures to Pillow, and what to say of them.
_OTHERS = (
    (b"%PDF", "a PDF: give its pages as pictures (PNG or JPEG)"),
    (b"%!PS", "PostScript, which is not run: convert it to PNG"),
    (b"\x1aE\xdf\xa3", "a video: give it as one"),
    (b"version https://git-lfs", "a Git LFS pointer, not the picture itself: fetch it with `git lfs pull`"),
)
_HEIC = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")
_MARKUP = {b"<svg": "an SVG drawing: convert it to PNG", b"<html": "a web page, not a picture",
           b"<!doctype html": "a web page, not a picture"}
_ORIENTATION = 0x0112  # EXIF's tag
_GEMMA = VisionConfig()
# What a config calls a picture's tokens, and how Gemma's vocabulary spells them.
PICTURE_TOKENS = {"boi_token_id": "<|image>", "image_token_id": "<|image|>", "eoi_token_id": "<image|>",
                  "video_token_id": "<|video|>"}


@dataclass(frozen=True)
class Fitted:
    """A picture's size in pixels after resizing, and its soft tokens."""

    width: int
    height: int
    tokens: int


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture as the tower sees it: ``pixels`` uint8 [height, width, 3], resized for ``budget`` soft tokens."""

    pixels: np.ndarray
    budget: int
    tokens: int
    patch_size: int

    @cached_property
    def digest(self) -> bytes:
        """A hash of the pixels, their arrangement and the budget: pictures of one digest have the same soft tokens."""
        found = hashlib.blake2b(repr((self.pixels.shape, self.budget, self.patch_size)).encode(), digest_size=16)
        found.update(self.pixels.tobytes())
        return found.digest()

    def patches(self) -> Tensor:
        """Patches [rows, columns, 3p²], float32 between 0 and 1, each in the order pixel row, pixel column, colour."""
        size = self.patch_size
        rows, columns = (side // size for side in self.pixels.shape[:2])
        parts = self.pixels.reshape(rows, size, columns, size, 3).transpose(0, 2, 1, 3, 4)
        return torch.from_numpy(_SCALED[parts.reshape(rows, columns, -1)])


# The reference multiplies by 1/255 in float64 and rounds to float32.
_SCALED = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)


def fitted(width: int, height: int, budget: int, config: VisionConfig = _GEMMA) -> Fitted:
    """What a picture of this size (in pixels) becomes: always scaled, up or down, to as many soft tokens as fit.

    Both sides become multiples of a soft token's side, near the picture's own proportions; of a picture longer than
    ``budget`` times its width that is one row of them. Raises DgemmaError for another budget than `BUDGETS`.
    """
    if budget not in BUDGETS:
        raise DgemmaError(f"a picture has at most {', '.join(map(str, BUDGETS[:-1]))} or {BUDGETS[-1]} soft tokens, "
                          f"got {budget!r}")
    side = config.patch_size * config.pooling_kernel_size
    factor = math.sqrt(budget * side**2 / (height * width))
    rows, columns = math.floor(factor * height / side), math.floor(factor * width / side)
    if not rows:  # both cannot be: the budget is more than one
        rows, columns = 1, min(width // height, budget)
    elif not columns:
        rows, columns = min(height // width, budget), 1
    return Fitted(columns * side, rows * side, rows * columns)


def prepare(source: str | Path | bytes | Image, budget: int = 280, config: VisionConfig = _GEMMA,
            name: str | None = None) -> Picture:
    """A picture resized for ``budget`` soft tokens; ``source`` and ``name`` as in `open_picture`."""
    return resized(open_picture(source, name), budget, config)


def resized(image: Image, budget: int, config: VisionConfig = _GEMMA) -> Picture:
    """A picture as `open_picture` gives it, resized for ``budget`` soft tokens."""
    size = fitted(*image.size, budget, config)
    if image.size != (size.width, size.height):
        image = image.resize((size.width, size.height), _pillow().Resampling.BICUBIC)
    return Picture(np.asarray(image), budget, size.tokens, config.patch_size)


def open_picture(source: str | Path | bytes | Image, name: str | None = None) -> Image:
    """A file, its bytes or Pillow's image as RGB and upright: of an animation the first frame.

    Transparency is shown on white; 16 bits a colour become 8; colour profiles are not applied, as in the reference.
    ``name`` names the picture in errors (a file's is its path). Raises DgemmaError for what is not a picture, cannot be
    decoded, or has more than `MOST_PIXELS` (which is known before anything is decoded).
    """
    image, name = _begun(source, name)
    try:
        image.load()
        return _rgb(_upright(image))
    except DgemmaError as error:
        raise DgemmaError(f"{name}: {error}") from error
    except Exception as error:  # damaged data makes Pillow's decoders raise anything
        raise DgemmaError(f"{name}: this picture is damaged or cut off ({error or type(error).__name__})") from error


def size_of(source: str | Path | bytes | Image, name: str | None = None) -> tuple[int, int]:
    """Width and height of what `open_picture` gives; what is not needed for that is not decoded.

    Raises DgemmaError as that does, but for damage behind the header.
    """
    image, name = _begun(source, name)
    try:
        sideways = _orientation(image) in (5, 6, 7, 8)
    except DgemmaError as error:
        raise DgemmaError(f"{name}: {error}") from error
    width, height = image.size
    return (height, width) if sideways else (width, height)


def _begun(source: Any, name: str | None) -> tuple[Image, str]:
    """A picture whose header has been read, of a size that may be decoded, and what it is called in errors."""
    if isinstance(source, (str, Path)):
        name = name or str(source)
        image = _identified(read_bytes(Path(source), DgemmaError), name)
    elif isinstance(source, (bytes, bytearray, memoryview)):
        name = name or "the picture"
        image = _identified(bytes(source), name)
    elif isinstance(source, _pillow().Image):
        image, name = source, name or "the picture"
    else:
        raise DgemmaError(f"a picture is a path, the bytes of a file or a PIL.Image, not {type(source).__name__}")
    width, height = image.size
    if not width or not height:
        raise DgemmaError(f"{name}: a picture of {width} × {height} pixels has nothing in it")
    if width * height > MOST_PIXELS:
        raise _too_large(name, f"{width:,} × {height:,} pixels")
    return image, name


def with_picture_tokens(config: VisionConfig, token_to_id: Callable[[str], int | None]) -> VisionConfig | None:
    """A tower's config with the ids that a vocabulary has for picture tokens; None where it has none of them.

    For models whose files name no ids. Tokens of videos may be missing.
    """
    ids = {name: found for name, token in PICTURE_TOKENS.items() if (found := token_to_id(token)) is not None}
    return replace(config, **ids) if {*PICTURE_TOKENS} - {*ids} <= {"video_token_id"} else None


def _pillow() -> Any:
    """Pillow's module of images; loaded when there is a picture."""
    try:
        from PIL import Image
    except ImportError as error:
        raise DgemmaError(f"pictures need Pillow ({error}): pip install 'dgemma[vision]'") from error
    return Image


def _identified(data: bytes, name: str) -> Image:
    """The picture in a file, whose header has been read and nothing else."""
    import io

    pillow = _pillow()
    pillow.init()
    formats = [format for format in _FORMATS if format in pillow.OPEN]
    try:
        return pillow.open(io.BytesIO(data), formats=formats)
    # A warning where those are errors.
    except (pillow.DecompressionBombError, pillow.DecompressionBombWarning) as error:
        raise _too_large(name, "far more pixels") from error
    except Exception as error:  # as in `open_picture`
        known = [format for format in formats if (accept := pillow.OPEN[format][1]) and accept(data[:16]) is True]
        raise DgemmaError(f"{name}: {_what_it_is(data, known)}") from error


def _too_large(name: str, what: str) -> DgemmaError:
    return DgemmaError(f"{name}: {what} than are decoded: at most {MOST_PIXELS / 1e6:.0f} million; make it smaller")


def _what_it_is(data: bytes, known: Sequence[str]) -> str:
    """What to say of something that Pillow cannot open, though it begins like a file of a ``known`` format, if any."""
    if not data:
        return "there is nothing in it"
    for begin, what in _OTHERS:
        if data.startswith(begin):
            return f"this is {what}"
    if data[4:8] == b"ftyp":
        if data[8:12] in _HEIC:
            return "this is HEIC, which Pillow cannot read by itself: convert it to JPEG or PNG"
        if data[8:12] not in (b"avif", b"avis"):
            return "this is a video: give it as one"
    start = data[:1024].lower()
    for mark, what in _MARKUP.items():
        if mark in start:
            return f"this is {what}"
    if known:
        return f"this {known[0]} picture is damaged or cut off"
    return ("this is not a picture of a kind that can be read here (PNG, JPEG, WebP, GIF, BMP, TIFF, AVIF), or it is "
            "damaged")


def _upright(image: Image) -> Image:
    """The picture turned as its EXIF says."""
    turn = _pillow().Transpose
    method = {2: turn.FLIP_LEFT_RIGHT, 3: turn.ROTATE_180, 4: turn.FLIP_TOP_BOTTOM, 5: turn.TRANSPOSE,
              6: turn.ROTATE_270, 7: turn.TRANSVERSE, 8: turn.ROTATE_90}.get(_orientation(image))
    return image if method is None else image.transpose(method)


def _orientation(image: Image) -> int:
    """How a picture lies, by EXIF's numbers."""
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # EXIF that cannot be read says nothing: viewers show such a picture as it lies
        return 1


def _rgb(image: Image) -> Image:
    """The picture in RGB, what is transparent shown on white."""
    if image.mode == "F":
        raise DgemmaError("pictures of floating-point numbers do not say which of them is white: save it with 8 or 16 "
                          "bits a colour")
    if image.mode.startswith("I"):
        image = _eight_bits(image)
    if {"A", "a"} & set(image.getbands()) or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        white = _pillow().new("RGBA", image.size, (255, 255, 255, 255))
        image = _pillow().alpha_composite(white, image)
    return image.convert("RGB")


def _eight_bits(image: Image) -> Image:
    """A grey picture of whole numbers, of 16 bits if any of them needs more than 8; Pillow would cut those off."""
    values = np.asarray(image)
    if image.mode != "I" or values.max(initial=0) > 255:
        values = values.clip(0, 65535) >> 8
    return _pillow().fromarray(values.clip(0, 255).astype(np.uint8))
