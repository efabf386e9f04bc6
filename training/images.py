"""Stored images to crops of a wanted size, never enlarged."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from training.config import SquareCrop


@dataclass(frozen=True)
class Crop:
    """What is left of an image that was shrunk, and how many of its pixels lie above and left."""

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
    image: Image.Image, side_px: int, policy: SquareCrop, draws: tuple[float, float] = (0.5, 0.5)
) -> Crop | None:
    """The square of ``side_px`` that the policy cuts from the image shrunk to fit it.

    ``draws`` in [0, 1) place a random crop. None when the image is smaller than ``side_px``.
    """
    if min(image.size) < side_px:
        return None
    return _cut(shrink(image, side_px), (side_px, side_px), policy, draws)


def fill(image: Image.Image, width_px: int, height_px: int) -> Crop | None:
    """The middle of the image, shrunk as far as it still fills ``width_px`` by ``height_px``.

    None when the image is smaller than that.
    """
    width, height = image.size
    if width < width_px or height < height_px:
        return None
    if width * height_px <= height * width_px:  # the width decides
        size = width_px, max(height_px, round(height * width_px / width))
    else:
        size = max(width_px, round(width * height_px / height)), height_px
    if size != image.size:
        image = image.resize(size, Image.Resampling.BOX)
    return _cut(image, (width_px, height_px), "center", (0.5, 0.5))


def _cut(
    image: Image.Image, size: tuple[int, int], policy: SquareCrop, draws: tuple[float, float]
) -> Crop:
    spare_width, spare_height = image.width - size[0], image.height - size[1]
    if policy == "center":
        top, left = spare_height // 2, spare_width // 2
    else:
        top = math.floor(draws[0] * (spare_height + 1))
        left = math.floor(draws[1] * (spare_width + 1))
    cut = image.crop((left, top, left + size[0], top + size[1]))
    return Crop(np.asarray(cut), top, left)
