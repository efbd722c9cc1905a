"""Pictures for the tests: random ones of any size, files of many kinds, transformers' processor."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image


def random_picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """An RGB picture with smooth and with sharp parts, the same for a size and a seed."""
    generator = np.random.default_rng((width, height, seed))
    small = generator.integers(0, 256, (7, 9, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BILINEAR)).copy()
    noisy = generator.integers(0, 256, (max(1, height // 2), max(1, width // 3), 3), dtype=np.uint8)
    smooth[: noisy.shape[0], : noisy.shape[1]] = noisy
    return Image.fromarray(smooth)


def as_file(image: Image.Image, format: str, **options: Any) -> bytes:
    """The bytes of a picture's file."""
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def reference_processor() -> Any:
    """transformers' processor on Pillow."""
    from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

    return Gemma4ImageProcessorPil()
