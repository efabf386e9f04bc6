"""Cropping, shrinking and encoding of pixels: what img2dataset's ``Resizer`` does, directly.

That class takes encoded bytes; handing it pixels would cost an encoding, a second decode and two
objects of albumentations per image. Here are its OpenCV calls alone, with its parameters (area
interpolation, sides rounded as it rounds them), and tests hold the bytes equal to its own.

Shape suffixes: H pixel rows, W pixel columns, 3 colours (red, green, blue), all uint8.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from pipelines.buckets import Size, bucket_of
from pipelines.config import ResizeConfig

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Crop:
    """A rectangle of the upright original, pixels."""

    left_px: int
    top_px: int
    width_px: int
    height_px: int


def bucket_for(width_px: int, height_px: int, config: ResizeConfig) -> Size | None:
    """The bucket of an image of this size; None where there are no buckets."""
    return bucket_of(width_px, height_px, config) if config.crop == "bucket" else None


def is_large_enough(width_px: int, height_px: int, config: ResizeConfig) -> bool:
    """Whether an image of this size may be stored: it is never made larger."""
    if config.crop != "bucket" and config.if_smaller == "keep":
        return True
    return spare_detail(width_px, height_px, config) >= 1


def spare_detail(width_px: int, height_px: int, config: ResizeConfig) -> float:
    """How many times larger, per side, an image is than what is stored of it."""
    bucket = bucket_for(width_px, height_px, config)
    if bucket is not None:
        return min(width_px / bucket[0], height_px / bucket[1])
    return min(width_px, height_px) / config.image_size_px


def crop_of(width_px: int, height_px: int, config: ResizeConfig, bucket: Size | None) -> Crop:
    """The part of an image of this size that is stored: as much of its middle as may be."""
    if config.crop == "none":
        return Crop(0, 0, width_px, height_px)
    wide, high = bucket or (1, 1)
    scale = min(width_px / wide, height_px / high)
    wide, high = min(width_px, round(wide * scale)), min(height_px, round(high * scale))
    return Crop((width_px - wide) // 2, (height_px - high) // 2, wide, high)


def cropped(pixels_HW3: Pixels, config: ResizeConfig, bucket: Size | None = None) -> Pixels:
    """A view of the part that is stored; the pixels may be those of a smaller decode."""
    height_px, width_px = pixels_HW3.shape[:2]
    crop = crop_of(width_px, height_px, config, bucket)
    return pixels_HW3[
        crop.top_px : crop.top_px + crop.height_px, crop.left_px : crop.left_px + crop.width_px
    ]


def shrunk(pixels_HW3: Pixels, config: ResizeConfig, bucket: Size | None = None) -> Pixels:
    """Cropped pixels at exactly ``bucket``, or with ``image_size_px`` as the shorter side.

    Without a bucket, what is not longer stays as it is.
    """
    height_px, width_px = pixels_HW3.shape[:2]
    scale = config.image_size_px / min(width_px, height_px)
    if bucket == (width_px, height_px) or (bucket is None and scale >= 1):
        return pixels_HW3
    size = bucket or (max(1, round(width_px * scale)), max(1, round(height_px * scale)))
    cv2 = opencv()
    return np.asarray(cv2.resize(pixels_HW3, size, interpolation=cv2.INTER_AREA), np.uint8)


def encoded(pixels_HW3: Pixels, config: ResizeConfig) -> bytes:
    """The pixels in ``config.encode_format``, without any metadata."""
    cv2 = opencv()
    quality = {
        "jpg": cv2.IMWRITE_JPEG_QUALITY,
        "webp": cv2.IMWRITE_WEBP_QUALITY,
        "png": cv2.IMWRITE_PNG_COMPRESSION,
    }[config.encode_format]
    pixels_bgr = cv2.cvtColor(pixels_HW3, cv2.COLOR_RGB2BGR)
    parameters = [quality, config.encode_quality]
    is_done, data = cv2.imencode(f".{config.encode_format}", pixels_bgr, parameters)
    if not is_done:
        raise ValueError(f"OpenCV cannot write {config.encode_format}")
    return bytes(data)


@functools.cache
def opencv() -> ModuleType:
    """OpenCV, with one thread: Spark runs a task per core."""
    import cv2

    cv2.setNumThreads(1)
    return cv2
