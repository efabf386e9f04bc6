"""Pictures to tell apart, and the ways in which copies of them differ. Pixels are RGB, uint8."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from pipelines.resize import Pixels

SIDE_PX = 96
# Crops take up to 10 % off each side.
KINDS = ("crop", "resize", "encode", "colour", "all of them")
_FONTS = (cv2.FONT_HERSHEY_SIMPLEX, cv2.FONT_HERSHEY_COMPLEX, cv2.FONT_HERSHEY_TRIPLEX)
_NUM_LAYOUTS = 400


def scene(seed: int) -> Pixels:
    """Half have natural spectra, the others gradients with things, pages of text, and things of
    other colours and shapes at the places where those of a hundred other scenes are."""
    rng = np.random.default_rng(seed)
    kind = rng.random()
    if kind < 0.5:
        return _with_things(rng, _texture(rng), int(rng.integers(0, 5)))
    if kind < 0.8:
        ends = rng.integers(0, 256, (2, 3))
        ramp = np.linspace(0, 1, SIDE_PX)
        along = np.broadcast_to(ramp[:, None] if rng.random() < 0.5 else ramp, (SIDE_PX, SIDE_PX))
        pixels = ends[0] + (ends[1] - ends[0]) * along[..., None]
        return _with_things(rng, pixels, int(rng.integers(2, 9)))
    return _page(rng) if kind < 0.9 else _laid_out(rng, seed % _NUM_LAYOUTS)


def _texture(rng: np.random.Generator) -> NDArray[np.float64]:
    slope = rng.uniform(0.8, 1.6)
    frequencies = np.fft.fftfreq(SIDE_PX)[:, None] ** 2 + np.fft.rfftfreq(SIDE_PX) ** 2
    frequencies[0, 0] = np.inf  # no mean
    fields = []
    for _ in range(3):
        spectrum = rng.normal(size=frequencies.shape) + 1j * rng.normal(size=frequencies.shape)
        falling = frequencies ** (-slope / 2)
        field = np.fft.irfft2(spectrum * falling, s=(SIDE_PX, SIDE_PX))
        fields.append(field / field.std())
    mixed = np.stack(fields, -1) @ (rng.normal(size=(3, 3)) * 0.35 + np.eye(3) * 0.3 + 0.5)
    pixels: NDArray[np.float64] = mixed * rng.uniform(20, 50) + rng.uniform(60, 190, 3)
    return pixels


def _colour(rng: np.random.Generator) -> tuple[int, ...]:
    return tuple(int(value) for value in rng.integers(0, 256, 3))


def _with_things(rng: np.random.Generator, pixels: NDArray[np.float64], count: int) -> Pixels:
    canvas: Any = np.ascontiguousarray(np.clip(pixels, 0, 255).astype(np.uint8))
    for _ in range(count):
        colour, kind = _colour(rng), rng.integers(0, 4)
        x, y = (int(value) for value in rng.integers(0, SIDE_PX, 2))
        r = int(rng.integers(SIDE_PX // 12, SIDE_PX // 3))
        if kind == 0:
            cv2.circle(canvas, (x, y), r, colour, -1, cv2.LINE_AA)
        elif kind == 1:
            cv2.rectangle(canvas, (x - r, y - r // 2), (x + r, y + r // 2), colour, -1)
        elif kind == 2:
            corners: Any = rng.integers(0, SIDE_PX, (3, 2)).astype(np.int32)
            cv2.fillPoly(canvas, [corners], colour, cv2.LINE_AA)
        else:
            angle = float(rng.uniform(0, 180))
            cv2.ellipse(canvas, (x, y), (r, max(2, r // 3)), angle, 0, 360, colour, -1, cv2.LINE_AA)
    return np.asarray(canvas)


def _page(rng: np.random.Generator) -> Pixels:
    canvas: Any = np.full((SIDE_PX, SIDE_PX, 3), rng.integers(200, 256), np.uint8)
    for y in range(SIDE_PX // 8, SIDE_PX, SIDE_PX // 7):
        letters = rng.integers(97, 123, int(rng.integers(4, 14)))
        word = "".join(chr(letter) for letter in letters)
        place = (3 + int(rng.integers(0, 8)), y)
        font = _FONTS[rng.integers(0, 3)]
        cv2.putText(canvas, word, place, font, SIDE_PX / 220, (20, 20, 20), 1, cv2.LINE_AA)
    return np.asarray(canvas)


def _laid_out(rng: np.random.Generator, layout: int) -> Pixels:
    shared = np.random.default_rng(1_000_000 + layout)
    places = shared.integers(SIDE_PX // 6, SIDE_PX * 5 // 6, (4, 2))
    canvas: Any = np.empty((SIDE_PX, SIDE_PX, 3), np.uint8)
    canvas[:] = shared.integers(150, 256, 3)
    for x, y in places.tolist():
        colour, r = _colour(rng), int(rng.integers(SIDE_PX // 12, SIDE_PX // 6))
        if rng.random() < 0.5:
            cv2.circle(canvas, (x, y), r, colour, -1, cv2.LINE_AA)
        else:
            cv2.rectangle(canvas, (x - r, y - r), (x + r, y + r), colour, -1)
    return np.asarray(canvas)


def altered(pixels: Pixels, rng: np.random.Generator, kind: str) -> Pixels:
    """A copy as the web makes them."""
    if kind == "crop":
        height, width = pixels.shape[:2]
        left, top, right, bottom = rng.uniform(0, 0.1, 4)
        rows = slice(int(top * height), height - int(bottom * height))
        return pixels[rows, int(left * width) : width - int(right * width)]
    if kind == "resize":
        scale, stretch = rng.uniform(0.4, 1.5), rng.uniform(0.8, 1.25)
        size = (
            max(24, int(pixels.shape[1] * scale)),
            max(24, int(pixels.shape[0] * scale * stretch)),
        )
        how = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
        return np.asarray(cv2.resize(pixels, size, interpolation=how))
    if kind == "encode":
        quality = int(rng.integers(30, 96))
        is_jpeg = rng.random() < 0.6
        option = cv2.IMWRITE_JPEG_QUALITY if is_jpeg else cv2.IMWRITE_WEBP_QUALITY
        _, data = cv2.imencode(".jpg" if is_jpeg else ".webp", pixels, [option, quality])
        return np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR))
    if kind == "colour":
        levels = (pixels.astype(np.float32) / 255) ** rng.uniform(0.7, 1.4)
        grey = levels.mean(-1, keepdims=True)
        levels = grey + (levels - grey) * rng.uniform(0.5, 1.4)
        levels = (levels - 0.5) * rng.uniform(0.7, 1.2) + 0.5 + rng.uniform(-0.08, 0.08)
        levels = levels * rng.uniform(0.93, 1.07, 3)
        return np.asarray((np.clip(levels, 0, 1) * 255).astype(np.uint8))
    for each in ("crop", "colour", "resize", "encode"):
        pixels = altered(pixels, rng, each)
    return pixels
