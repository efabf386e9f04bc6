"""Measures of an image's pixels, ours and plugged in; and the blurring of faces.

Everything is measured on the upright sRGB image with its shorter side brought down to at most
512 px, so that a measure means the same for a photograph of any size. Faces are found by the
cascade of frontal faces that comes with OpenCV: small, fast, blind to profiles and covered faces.

Shape suffixes: H pixel rows, W pixel columns, 3 colours (red, green, blue), uint8; G is grey.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infra.digests import sha256_file
from infra.errors import UserError
from pipelines.guard import Rejected
from pipelines.image_config import BUILT_IN_MEASURES, FaceBlurConfig, ImageCheckConfig
from pipelines.resize import opencv

Pixels = NDArray[np.uint8]
Box = tuple[int, int, int, int]  # left, top, width, height, px
MEASURED_SIDE_PX = 512
BLURRED_FACES = "blurred_faces"
_MIN_FACE_RATIO = 0.08
_MIN_NEIGHBOURS = 5
_SIGNIFICANT_DIGITS = 6
# A line of text, as a closed blob of strokes: pixels, and shares of its box.
_LINE_KERNEL = (15, 3)
_MIN_LINE_HEIGHT_PX, _MIN_LINE_WIDTH_PX = 8, 24
_MIN_LINE_ASPECT = 1.5
_MIN_FILL, _MIN_STROKES, _MAX_STROKES = 0.5, 0.15, 0.75
_MIN_TURNS_PER_HEIGHT = 0.8


def measured(pixels_HW3: Pixels, checks: Sequence[ImageCheckConfig]) -> dict[str, float]:
    """Every check's value by its measure's name; ``Rejected("image_check")`` out of range."""
    if not checks:
        return {}
    small = at_most(pixels_HW3, MEASURED_SIDE_PX)
    found: dict[str, float] = {}
    for check in checks:
        value = float(measure_of(check.measure)(small, **check.options))
        if not math.isfinite(value):
            raise Rejected("image_check", f"{check.measure} is {value}")
        found[check.measure] = value = float(f"{value:.{_SIGNIFICANT_DIGITS}g}")
        if check.min is not None and value < check.min:
            raise Rejected("image_check", f"{check.measure} {value:g} is below {check.min:g}")
        if check.max is not None and value > check.max:
            raise Rejected("image_check", f"{check.measure} {value:g} is above {check.max:g}")
    return found


def at_most(pixels_HW3: Pixels, side_px: int) -> Pixels:
    """The image with its shorter side at most ``side_px``."""
    height_px, width_px = pixels_HW3.shape[:2]
    scale = side_px / min(width_px, height_px)
    if scale >= 1:
        return pixels_HW3
    cv2 = opencv()
    size = (max(1, round(width_px * scale)), max(1, round(height_px * scale)))
    return np.asarray(cv2.resize(pixels_HW3, size, interpolation=cv2.INTER_AREA), np.uint8)


# --- measures ------------------------------------------------------------------------------------


def sharpness(pixels_HW3: Pixels) -> float:
    """Variance of the Laplacian of the grey image; blurred photographs have little."""
    cv2 = opencv()
    return float(cv2.Laplacian(_grey(pixels_HW3), cv2.CV_32F).var())


def text_area(pixels_HW3: Pixels) -> float:
    """Share of the image that lines of text cover, in [0, 1].

    Edges that lie close to each other on a line are closed to a blob; one is text when it is
    wide, fills its box, and its strokes turn from dark to light as often as letters do.
    """
    cv2 = opencv()
    grey = _grey(pixels_HW3)
    cross = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (3, 3))
    edges = cv2.morphologyEx(grey, cv2.MORPH_GRADIENT, cross)
    level, strokes = cv2.threshold(edges, 0, 1, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
    if level < 8:  # nothing but noise
        return 0.0
    line = cv2.getStructuringElement(cv2.MORPH_RECT, _LINE_KERNEL)
    closed = cv2.morphologyEx(strokes, cv2.MORPH_CLOSE, line)
    num_blobs, _, stats, _ = cv2.connectedComponentsWithStats(closed)
    area = 0
    for number in range(1, num_blobs):
        left, top, width, height, num_pixels = (int(each) for each in stats[number])
        if height < _MIN_LINE_HEIGHT_PX or width < _MIN_LINE_WIDTH_PX:
            continue
        if width < _MIN_LINE_ASPECT * height or num_pixels < _MIN_FILL * width * height:
            continue
        inside = strokes[top : top + height, left : left + width]
        share = float(inside.mean())
        turns = float(np.abs(np.diff(inside.astype(np.int8), axis=1)).sum(axis=1).mean())
        is_text = turns * height / width >= _MIN_TURNS_PER_HEIGHT
        if is_text and _MIN_STROKES <= share <= _MAX_STROKES:
            area += width * height
    return min(1.0, area / int(grey.size))


def num_faces(pixels_HW3: Pixels) -> int:
    """Frontal faces of at least 8 % of the shorter side."""
    return len(faces(pixels_HW3, _MIN_FACE_RATIO))


def face_area(pixels_HW3: Pixels) -> float:
    """Share of the image that the boxes of ``num_faces`` cover, in [0, 1]."""
    height_px, width_px = pixels_HW3.shape[:2]
    covered = np.zeros((height_px, width_px), bool)
    for left, top, width, height in faces(pixels_HW3, _MIN_FACE_RATIO):
        covered[top : top + height, left : left + width] = True
    return float(covered.mean())


def faces(pixels_HW3: Pixels, min_face_ratio: float) -> list[Box]:
    """Boxes of frontal faces, from the top down."""
    side_px = max(16, round(min_face_ratio * min(pixels_HW3.shape[:2])))
    cv2 = opencv()
    grey = cv2.equalizeHist(_grey(pixels_HW3))
    found = _cascade().detectMultiScale(
        grey, scaleFactor=1.1, minNeighbors=_MIN_NEIGHBOURS, minSize=(side_px, side_px)
    )
    boxes = ((int(left), int(top), int(width), int(height)) for left, top, width, height in found)
    return sorted(boxes, key=lambda box: (box[1], box[0]))


def _grey(pixels_HW3: Pixels) -> Any:
    cv2 = opencv()
    return cv2.cvtColor(np.ascontiguousarray(pixels_HW3), cv2.COLOR_RGB2GRAY)


@functools.cache
def _cascade() -> Any:
    cv2 = opencv()
    path = Path(cv2.data.haarcascades, "haarcascade_frontalface_alt2.xml")
    cascade = cv2.CascadeClassifier(str(path))
    if cascade.empty():
        raise RuntimeError(f"OpenCV came without {path.name}")
    return cascade


# --- faces ---------------------------------------------------------------------------------------


def without_faces(pixels_HW3: Pixels, config: FaceBlurConfig) -> tuple[Pixels, int]:
    """The image with its faces blurred, and how many there were."""
    small = at_most(pixels_HW3, MEASURED_SIDE_PX)
    scale = pixels_HW3.shape[0] / small.shape[0]
    found = faces(small, config.min_face_ratio)
    if not found:
        return pixels_HW3, 0
    blurred = pixels_HW3.copy()
    for box in found:
        _blur(blurred, [side * scale for side in box], config)
    return blurred, len(found)


def _blur(pixels_HW3: Pixels, box: Sequence[float], config: FaceBlurConfig) -> None:
    """Blur an ellipse about the box in place, its rim fading into the image."""
    cv2 = opencv()
    left, top, width, height = box
    margins = width * config.margin_ratio, height * config.margin_ratio
    x0, y0 = max(0, round(left - margins[0])), max(0, round(top - margins[1]))
    x1 = min(pixels_HW3.shape[1], round(left + width + margins[0]))
    y1 = min(pixels_HW3.shape[0], round(top + height + margins[1]))
    part = pixels_HW3[y0:y1, x0:x1]
    sigma = max(1.0, config.strength * width)
    soft = cv2.GaussianBlur(part, (0, 0), sigma, borderType=cv2.BORDER_REPLICATE)
    mask = np.zeros(part.shape[:2], np.float32)
    middle = (part.shape[1] // 2, part.shape[0] // 2)
    cv2.ellipse(mask, middle, middle, 0, 0, 360, 1.0, -1)
    rim = max(1.0, 0.03 * width)
    weight = cv2.GaussianBlur(mask, (0, 0), rim)[..., None]
    part[:] = np.rint(soft * weight + part * (1 - weight)).astype(np.uint8)


# --- plug-ins ------------------------------------------------------------------------------------


@functools.cache
def measure_of(name: str) -> Callable[..., float]:
    """The function behind a measure's name; ``UserError`` when there is none."""
    if name in BUILT_IN_MEASURES:
        built_in: Callable[..., float] = globals()[name]
        return built_in
    module_name, _, function_name = name.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise UserError(
            expected=f"image_checks: {name} to be a function that Python can import",
            got=str(error),
            remedy="install its package here and on every worker, or correct the name",
        ) from error
    if not callable(function):
        raise UserError(
            expected=f"image_checks: {name} to be a function",
            got=type(function).__name__,
            remedy="name a function that takes uint8 RGB of shape (H, W, 3) and gives a number",
        )
    plugged: Callable[..., float] = function
    return plugged


def _file_of(function: Callable[..., float], check: ImageCheckConfig) -> Path:
    """The file a plug-in is written in; it is never called here, but could be as it will be."""
    try:
        path = Path(inspect.getfile(function))
        inspect.signature(function).bind(None, **check.options)
    except TypeError as error:
        options = ", ".join(check.options) or "none"
        raise UserError(
            expected=f"image_checks: {check.measure} to be written in Python, and to take an image "
            f"and its options ({options})",
            got=str(error),
            remedy="name a function that takes uint8 RGB of shape (H, W, 3) and gives a number",
        ) from error
    return path


def checks_part(checks: Sequence[ImageCheckConfig]) -> dict[str, dict[str, str]]:
    """For keys and manifests: each plug-in's name and the sha256 of the file it is written in.

    Raises ``UserError`` for one that cannot be imported here, is not written in Python, or does not
    take an image and its options.
    """
    digests = {}
    for check in checks:
        function = measure_of(check.measure)
        if check.measure not in BUILT_IN_MEASURES:
            digests[check.measure] = sha256_file(_file_of(function, check))
    return {"image_check_plugins": digests} if digests else {}
