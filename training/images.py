"""Stored images to crops of a wanted size, never enlarged."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from training.config import SquareCrop

Pixels = NDArray[np.uint8]  # (height, width, 3), RGB
_JPEG_START = b"\xff\xd8"
_PLAIN = ("Gray", "YCbCr")  # colour spaces that libjpeg itself turns into RGB, as Pillow has it do


@dataclass(frozen=True)
class Crop:
    """What is left of an image that was shrunk, and how many of its pixels lie above and left."""

    pixels_HW3: Pixels
    crop_top_px: int
    crop_left_px: int


def decode_image(data: bytes) -> Pixels:
    """The RGB image in ``data``; raises ``OSError`` or ``ValueError`` for a broken one."""
    if data.startswith(_JPEG_START):
        plain = _plain_jpeg(data)
        if plain is not None:
            return plain
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def _plain_jpeg(data: bytes) -> Pixels | None:
    """What Pillow would make of an ordinary JPEG, without its copies of the pixels. None for what
    libjpeg has anything to say about: of that, Pillow decides."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if colours not in _PLAIN or height * width > (Image.MAX_IMAGE_PIXELS or 0):
            return None
        pixels: Pixels = simplejpeg.decode_jpeg(data, "RGB")
    except ValueError:
        return None
    return pixels


def shrink(pixels: Pixels, short_side_px: int) -> Pixels:
    """Area-average the image until its short side is ``short_side_px``; it must not be shorter."""
    height, width = pixels.shape[:2]
    short = min(width, height)
    if short == short_side_px:
        return pixels
    sides = (max(short_side_px, round(side * short_side_px / short)) for side in (width, height))
    return _resized(pixels, *sides)


def _resized(pixels: Pixels, width_px: int, height_px: int) -> Pixels:
    image = Image.fromarray(pixels)
    return np.asarray(image.resize((width_px, height_px), Image.Resampling.BOX))


def square_crop(
    pixels: Pixels, side_px: int, policy: SquareCrop, draws: tuple[float, float] = (0.5, 0.5)
) -> Crop | None:
    """The square of ``side_px`` that the policy cuts from the image shrunk to fit it.

    ``draws`` in [0, 1) place a random crop. None when the image is smaller than ``side_px``.
    """
    if min(pixels.shape[:2]) < side_px:
        return None
    return _cut(shrink(pixels, side_px), (side_px, side_px), policy, draws)


def fill(pixels: Pixels, width_px: int, height_px: int) -> Crop | None:
    """The middle of the image, shrunk as far as it still fills ``width_px`` by ``height_px``.

    None when the image is smaller than that.
    """
    height, width = pixels.shape[:2]
    if width < width_px or height < height_px:
        return None
    if width * height_px <= height * width_px:  # the width decides
        size = width_px, max(height_px, round(height * width_px / width))
    else:
        size = max(width_px, round(width * height_px / height)), height_px
    if size != (width, height):
        pixels = _resized(pixels, *size)
    return _cut(pixels, (width_px, height_px), "center", (0.5, 0.5))


def _cut(
    pixels: Pixels, size: tuple[int, int], policy: SquareCrop, draws: tuple[float, float]
) -> Crop:
    width_px, height_px = size
    spare_height, spare_width = pixels.shape[0] - height_px, pixels.shape[1] - width_px
    if policy == "center":
        top, left = spare_height // 2, spare_width // 2
    else:
        top = math.floor(draws[0] * (spare_height + 1))
        left = math.floor(draws[1] * (spare_width + 1))
    return Crop(pixels[top : top + height_px, left : left + width_px], top, left)
