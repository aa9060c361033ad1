"""From a pipeline's floats to an image file's bytes."""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
from PIL import Image

from gaudi_batch.config.sections import EncodingConfig

SUFFIXES = {"png": "png", "jpeg": "jpg", "webp": "webp"}
"""File name endings by type."""


def to_pixels(image: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Rounds an image of shape (height, width, 3), 0 to 1, to 8 bits, as diffusers does.

    Raises:
        ValueError: a value is not finite.
    """
    if not np.isfinite(image).all():
        raise ValueError("the image has values that are not finite")
    pixels: npt.NDArray[np.uint8] = (image.clip(0, 1) * 255).round().astype(np.uint8)
    return pixels


def encode(pixels: npt.NDArray[np.uint8], encoding: EncodingConfig) -> bytes:
    """An image file of the pixels, shape (height, width, 3); the same pixels give the same bytes."""
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    if encoding.type == "png":
        image.save(buffer, "PNG")
    else:
        image.save(buffer, encoding.type.upper(), quality=encoding.quality)
    return buffer.getvalue()
