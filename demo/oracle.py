"""The oracle reads an image back into a scene, so that questions about it have exact answers.

Pixels are matched to the palette, runs of one colour become components, and a component's outline
is compared with every shape's. Exact on clean renders of 64 px and more; see tests for noisy ones.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from demo.world import (
    PALETTE,
    TEXTURE_SHADE,
    Floats,
    Pixels,
    Scene,
    Thing,
    WorldConfig,
    cells,
    shape_mask,
)

_WORK_PX = 64  # images are read at this size
_OUTLINE_PX = 24  # outlines are compared at this size
_MIN_AREA = 0.012  # of the image: smaller components are specks
_MIN_FILL = 0.25  # of its box: the blended rim of a shape is a thin ring in a third colour
_DISTANCE = 60.0  # RGB distance up to which a pixel counts as background

Labels = NDArray[np.int32]


def read_scene(image: Image.Image | Pixels, config: WorldConfig) -> Scene:
    """The scene an RGB image shows, as far as the palette and the shapes of `config` can say."""
    pixels = _working_pixels(image)
    top, bottom = _edge_color(pixels[:2], config), _edge_color(pixels[-2:], config)
    gradient = top != bottom and config.gradient_ratio > 0
    ground = _ground(top, bottom if gradient else top)
    distance = np.linalg.norm(pixels - ground[:, None, :], axis=2)
    names = [name for name in config.colors if gradient or name != top]
    textured = config.textures != ("plain",)
    tones = [np.array(PALETTE[name], np.float32) for name in names]
    if textured:
        tones += [tone * TEXTURE_SHADE for tone in tones]
    to_tones = np.linalg.norm(pixels[:, :, None, :] - np.stack(tones), axis=3)
    nearest = to_tones.argmin(axis=2)
    drawn = (to_tones.min(axis=2) < distance) & (distance > _DISTANCE / 2)
    classes = np.where(drawn, nearest % len(names), -1).astype(np.int32)
    shaded = drawn & (nearest >= len(names))
    things = [
        _thing(part, names[color], shaded, config)
        for color, part in components(classes, round(_MIN_AREA * _WORK_PX**2))
        if _fill(part) >= _MIN_FILL
    ]
    things.sort(key=lambda thing: (thing.row, thing.column))
    return Scene(top, tuple(things), bottom if gradient else None)


def _working_pixels(image: Image.Image | Pixels) -> NDArray[np.float32]:
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    image = image.convert("RGB")
    if image.size != (_WORK_PX, _WORK_PX):
        shrinks = min(image.size) > _WORK_PX
        method = Image.Resampling.BOX if shrinks else Image.Resampling.BICUBIC
        image = image.resize((_WORK_PX, _WORK_PX), method)
    return np.asarray(image, np.float32)


def _edge_color(rows: NDArray[np.float32], config: WorldConfig) -> str:
    """The palette colour that most pixels of these rows are nearest to."""
    tones = np.array([PALETTE[name] for name in config.colors], np.float32)
    nearest = np.linalg.norm(rows[..., None, :] - tones, axis=-1).argmin(axis=-1)
    return config.colors[int(np.bincount(nearest.ravel()).argmax())]


def _ground(top: str, bottom: str) -> NDArray[np.float32]:
    first, last = (np.array(PALETTE[name], np.float32) for name in (top, bottom))
    blend = np.linspace(0, 1, _WORK_PX, dtype=np.float32)[:, None]
    ground: NDArray[np.float32] = first + (last - first) * blend
    return ground


def components(classes: Labels, min_pixels: int) -> list[tuple[int, NDArray[np.bool_]]]:
    """(class, mask) of each 4-connected region of one class (>= 0) with at least min_pixels."""
    height, width = classes.shape
    labels = np.where(classes >= 0, np.arange(1, height * width + 1).reshape(height, width), 0)
    down = (classes[1:] == classes[:-1]) & (classes[1:] >= 0)
    right = (classes[:, 1:] == classes[:, :-1]) & (classes[:, 1:] >= 0)
    while True:
        before = labels.copy()
        for same, first, second in (
            (down, labels[:-1], labels[1:]),
            (right, labels[:, :-1], labels[:, 1:]),
        ):
            largest = np.where(same, np.maximum(first, second), 0)
            np.maximum(first, largest, out=first)
            np.maximum(second, largest, out=second)
        # Jump: a label names a pixel; take over that pixel's own label.
        flat = np.concatenate(([0], labels.ravel()))
        labels = flat[labels]
        if np.array_equal(before, labels):
            break
    found, counts = np.unique(labels[labels > 0], return_counts=True)
    masks = [labels == label for label in found[counts >= min_pixels]]
    return [(int(classes[mask][0]), mask) for mask in masks]


def _box(mask: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) of the true pixels, ends excluded."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1


def _fill(mask: NDArray[np.bool_]) -> float:
    top, bottom, left, right = _box(mask)
    return float(mask[top:bottom, left:right].mean())


def _thing(
    mask: NDArray[np.bool_], color: str, shaded: NDArray[np.bool_], config: WorldConfig
) -> Thing:
    top, bottom, left, right = _box(mask)
    side_cells = max(bottom - top, right - left) / _WORK_PX * cells(config)
    size = "large" if side_cells > 1.3 else "small"
    if len(config.sizes) == 1:
        size = config.sizes[0]
    span = 2.0 if size == "large" else 1.0
    middle = (top + bottom) / 2, (left + right) / 2
    row, column = (x / _WORK_PX * cells(config) - span / 2 for x in middle)
    if config.grid_cells is not None:
        parts = 2 if config.settled_pairs else 1  # a settled thing may stand half a cell off
        row, column = (
            float(min(max(round(x * parts) / parts, 0), config.grid_cells - span))
            for x in (row, column)
        )
    shape = _shape(mask[top:bottom, left:right], config.shapes)
    return Thing(shape, color, size, row, column, _texture(mask & shaded, mask, config))


def _shape(outline: NDArray[np.bool_], shapes: tuple[str, ...]) -> str:
    """The shape whose outline overlaps best: least absolute difference of coverage."""
    image = Image.fromarray(outline.astype(np.uint8) * 255)
    method = Image.Resampling.BOX if min(outline.shape) > _OUTLINE_PX else Image.Resampling.BILINEAR
    cover = np.asarray(image.resize((_OUTLINE_PX, _OUTLINE_PX), method), np.float32) / 255
    errors = [float(np.abs(cover - _outline(shape)).mean()) for shape in shapes]
    return shapes[int(np.argmin(errors))]


@lru_cache(maxsize=64)
def _outline(shape: str) -> Floats:
    mask = shape_mask(shape, 4 * _OUTLINE_PX, margin=0.0)
    drawn = mask > 0.5
    top, bottom, left, right = _box(drawn)
    tight = drawn[top:bottom, left:right]
    image = Image.fromarray(tight.astype(np.uint8) * 255)
    size = (_OUTLINE_PX, _OUTLINE_PX)
    cover: Floats = np.asarray(image.resize(size, Image.Resampling.BOX), np.float32) / np.float32(
        255
    )
    return cover


def _texture(shaded: NDArray[np.bool_], mask: NDArray[np.bool_], config: WorldConfig) -> str:
    if len(config.textures) == 1:
        return config.textures[0]
    share = shaded.sum() / max(1, mask.sum())
    if share < 0.08:
        return "plain"
    return "striped" if share > 0.36 else "dotted"
