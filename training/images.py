"""Stored images to square crops, never enlarged."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from training.config import CropPolicy


@dataclass(frozen=True)
class Square:
    """A square crop; ``crop_top_px`` and ``crop_left_px`` count pixels of the shrunk image."""

    pixels_HW3: NDArray[np.uint8]
    crop_top_px: int
    crop_left_px: int


def decode_image(data: bytes) -> Image.Image:
    """The RGB image in ``data``; raises ``OSError`` or ``ValueError`` for a broken one."""
    with Image.open(io.BytesIO(data)) as image:
        return image.convert("RGB")


def shrink(image: Image.Image, short_side_px: int) -> Image.Image:
    """Area-average the image until its short side is ``short_side_px``; it must not be shorter."""
    width, height = image.size
    short = min(width, height)
    if short == short_side_px:
        return image
    size = tuple(
        max(short_side_px, round(side * short_side_px / short)) for side in (width, height)
    )
    return image.resize((size[0], size[1]), Image.Resampling.BOX)


def square_crop(
    image: Image.Image, side_px: int, policy: CropPolicy, draws: tuple[float, float] = (0.5, 0.5)
) -> Square | None:
    """The square of ``side_px`` that the policy cuts from the image shrunk to fit it.

    ``draws`` in [0, 1) place a random crop. None when the image is smaller than ``side_px``.
    """
    if min(image.size) < side_px:
        return None
    shrunk = shrink(image, side_px)
    spare_width, spare_height = shrunk.width - side_px, shrunk.height - side_px
    if policy == "center":
        top, left = spare_height // 2, spare_width // 2
    else:
        top = math.floor(draws[0] * (spare_height + 1))
        left = math.floor(draws[1] * (spare_width + 1))
    cut = shrunk.crop((left, top, left + side_px, top + side_px))
    return Square(np.asarray(cut), top, left)
