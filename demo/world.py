"""The painted world: seeded scenes of coloured shapes, and how they are drawn.

A scene is a background and up to four things on it. With `grid_cells` a thing stands on whole cells
(a large one spans 2 x 2, a small one a single cell); without, anywhere. Everything follows from
seeds, so the world can be asked the same question twice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "green": (36, 150, 60),
    "blue": (40, 80, 220),
    "yellow": (245, 215, 50),
    "purple": (150, 60, 190),
    "orange": (240, 135, 30),
    "white": (245, 245, 245),
    "black": (25, 25, 25),
    "cyan": (60, 200, 225),
    "pink": (250, 150, 190),
}
SHAPES = ("circle", "square", "triangle", "cross", "diamond", "star")
TEXTURES = ("plain", "striped", "dotted")
SPANS = {"small": 1, "large": 2}  # cells a side
RELATIONS = ("left of", "right of", "above", "below")
TEXTURE_SHADE = 0.78  # the darker tone of a texture, as a share of the colour
MARGIN = 0.08  # of a thing's block, left free on each side
_SUPERSAMPLE = 4
_FREE_CELLS = 4.0  # without a grid, sizes are still counted in quarters of the image

Pixels = NDArray[np.uint8]
Floats = NDArray[np.float32]


class WorldConfig(BaseModel):
    """How hard the world is, how much of it there is, and which traps its metadata holds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seed: int = Field(default=0, ge=0, description="start of all randomness")
    num_rows: int = Field(default=3000, ge=20, description="metadata rows, traps included")
    num_parts: int = Field(default=4, ge=1, description="Parquet files the rows are spread over")
    colors: tuple[str, ...] = Field(
        default=tuple(PALETTE)[:8], description="names from the palette"
    )
    shapes: tuple[str, ...] = Field(default=SHAPES[:4], description="shapes of things")
    sizes: tuple[str, ...] = Field(
        default=("large",), description="'large' (2 x 2 cells), 'small' (1)"
    )
    textures: tuple[str, ...] = Field(
        default=("plain",), description="'plain', 'striped', 'dotted'"
    )
    gradient_ratio: float = Field(
        default=0.0, ge=0, le=1, description="share of gradient backgrounds"
    )
    max_objects: int = Field(default=4, ge=1, le=4, description="things in a scene")
    grid_cells: int | None = Field(
        default=4, ge=2, le=8, description="cells a side; null = free placement"
    )
    settled_pairs: bool = Field(
        default=False,
        description="the words for two things leave one picture: side by side in the middle row, "
        "one above the other in the middle column, else on the diagonal, the first at the top left",
    )
    held_out_ratio: float = Field(
        default=0.1, ge=0, lt=1, description="combinations kept for questions"
    )
    held_out_by: Literal["thing", "place"] = Field(
        default="thing",
        description="what is never seen together: a thing's colour, shape and background, or these "
        "three at one place, which prompts then name",
    )
    native_sizes_px: tuple[int, ...] = Field(
        default=(128, 256), description="shorter sides of the images"
    )
    trap_ratio: float = Field(
        default=0.2, ge=0, lt=0.9, description="share of rows that must not pass"
    )
    clean_images: bool = Field(
        default=True, description="false adds noise that falls with the score"
    )


@dataclass(frozen=True)
class Thing:
    """One shape. `row` and `column` are its block's top-left corner, in cells."""

    shape: str
    color: str
    size: str = "large"
    row: float = 0.0
    column: float = 0.0
    texture: str = "plain"

    @property
    def centre(self) -> tuple[float, float]:
        """(row, column) of the middle, in cells."""
        half = SPANS[self.size] / 2
        return self.row + half, self.column + half


@dataclass(frozen=True)
class Scene:
    """A background (top to bottom colour when `background_to` is set) and the things on it."""

    background: str
    things: tuple[Thing, ...] = ()
    background_to: str | None = None


def relation(first: Thing, second: Thing) -> str | None:
    """How `first` stands to `second`: the axis of the larger distance decides; None if neither."""
    down = first.centre[0] - second.centre[0]
    right = first.centre[1] - second.centre[1]
    if abs(down) == abs(right):
        return None
    if abs(right) > abs(down):
        return "left of" if right < 0 else "right of"
    return "above" if down < 0 else "below"


def held_out(scene: Scene, config: WorldConfig) -> bool:
    """Whether the scene holds a combination that training never sees.

    Combinations: (colour, shape, background) of one thing, with its place where `held_out_by` says
    so, and the unordered pair of two things.
    """
    return any(_withheld(key, config) for key in combinations(scene, config))


def combinations(scene: Scene, config: WorldConfig) -> list[str]:
    """The attribute combinations that a scene shows, as stable strings."""
    things = sorted({(thing.color, thing.shape) for thing in scene.things})
    ground = f"{scene.background}-{scene.background_to}"
    single = [f"{color} {shape} on {ground}" for color, shape in things]
    if config.held_out_by == "place":
        single = sorted(
            {f"{t.color} {t.shape} on {ground} at {place(t, config)}" for t in scene.things}
        )
    pairs = [
        f"{a[0]} {a[1]} with {b[0]} {b[1]}" for i, a in enumerate(things) for b in things[i + 1 :]
    ]
    return single + pairs


def place(thing: Thing, config: WorldConfig) -> str:
    """Which ninth of the picture the thing's middle is in, in words."""
    row, column = (middle / cells(config) for middle in thing.centre)
    vertical = "top" if row < 0.425 else "bottom" if row > 0.575 else "middle"
    horizontal = "left" if column < 0.425 else "right" if column > 0.575 else "centre"
    return f"{vertical} {horizontal}"


def _withheld(combination: str, config: WorldConfig) -> bool:
    return _unit(f"{config.seed}:{combination}") < config.held_out_ratio


@lru_cache(maxsize=100_000)
def _unit(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def sample_scene(rng: np.random.Generator, config: WorldConfig) -> Scene:
    """A random scene for training: never a held-out one."""
    while True:
        scene = _propose(rng, config)
        if not held_out(scene, config):
            return scene


def _propose(rng: np.random.Generator, config: WorldConfig) -> Scene:
    """One thing, two things, several alike (for counting), or several of all kinds."""
    background = str(rng.choice(config.colors))
    background_to = None
    if rng.random() < config.gradient_ratio:
        background_to = str(rng.choice([c for c in config.colors if c != background]))
    kinds = ["one", "two", "alike", "mixed"][: 1 if config.max_objects == 1 else 4]
    shares = np.array([0.3, 0.4, 0.2, 0.1][: len(kinds)])
    kind = str(rng.choice(kinds, p=shares / shares.sum()))
    most = config.max_objects
    count = {"one": 1, "two": 2}.get(kind) or int(rng.integers(2, most + 1))
    free = [color for color in config.colors if color not in (background, background_to)]
    template: Thing | None = None
    things: list[Thing] = []
    for _ in range(count):
        thing = template or _thing(rng, config, free)
        placed = _place(rng, config, thing, things)
        if placed is not None:
            things.append(placed)
        template = thing if kind == "alike" else None
    return Scene(background, settled(things, config), background_to)


def _thing(rng: np.random.Generator, config: WorldConfig, colors: list[str]) -> Thing:
    return Thing(
        str(rng.choice(config.shapes)),
        str(rng.choice(colors)),
        str(rng.choice(config.sizes)),
        texture=str(rng.choice(config.textures)),
    )


def _place(
    rng: np.random.Generator, config: WorldConfig, thing: Thing, others: list[Thing]
) -> Thing | None:
    """The thing at a random place where it covers no other; None when there is no room."""
    span = SPANS[thing.size]
    for _ in range(40):
        if config.grid_cells is None:
            row, column = (float(x) for x in rng.uniform(0, _FREE_CELLS - span, 2).round(2))
        else:
            row, column = (float(x) for x in rng.integers(0, config.grid_cells - span + 1, 2))
        if all(_apart(row, column, span, other) for other in others):
            return Thing(thing.shape, thing.color, thing.size, row, column, thing.texture)
    return None


def settled(things: Sequence[Thing], config: WorldConfig) -> tuple[Thing, ...]:
    """The things; two of them moved to the places their words leave, where the world settles pairs.

    Two that differ in position only have no relation in words, so they stand on the diagonal.
    """
    if len(things) != 2 or not config.settled_pairs:
        return tuple(things)
    first, second = things
    far, middle = (
        [(cells(config) - SPANS[thing.size]) / part for thing in things] for part in (1, 2)
    )
    is_alike = replace(first, row=second.row, column=second.column) == second
    link = None if is_alike else relation(first, second)
    if link in ("left of", "right of"):
        return replace(first, row=middle[0]), replace(second, row=middle[1])
    if link in ("above", "below"):
        return replace(first, column=middle[0]), replace(second, column=middle[1])
    return replace(first, row=0.0, column=0.0), replace(second, row=far[1], column=far[1])


def _apart(row: float, column: float, span: int, other: Thing) -> bool:
    size = SPANS[other.size]
    return (
        row >= other.row + size
        or other.row >= row + span
        or column >= other.column + size
        or other.column >= column + span
    )


def cells(config: WorldConfig) -> float:
    """Cells along a side of the image."""
    return _FREE_CELLS if config.grid_cells is None else float(config.grid_cells)


@lru_cache(maxsize=512)
def shape_mask(shape: str, size_px: int, margin: float = MARGIN) -> Floats:
    """Coverage of a shape in its block, (size_px, size_px) in [0, 1]."""
    fine = size_px * _SUPERSAMPLE
    axis = ((np.arange(fine) + 0.5) / fine * 2 - 1) / (1 - 2 * margin)
    x, y = np.meshgrid(axis, axis)
    inside = _inside(shape, x, y)
    blocks = inside.reshape(size_px, _SUPERSAMPLE, size_px, _SUPERSAMPLE)
    mask: Floats = blocks.mean(axis=(1, 3)).astype(np.float32)
    return mask


def _inside(shape: str, x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Where a shape that fills [-1, 1] x [-1, 1] covers; y grows downwards."""
    ax, ay = np.abs(x), np.abs(y)
    if shape == "circle":
        return x * x + y * y <= 1
    if shape == "square":
        return (ax <= 1) & (ay <= 1)
    if shape == "triangle":
        return (ay <= 1) & (2 * ax <= y + 1)
    if shape == "cross":
        return ((ax <= 0.34) & (ay <= 1)) | ((ay <= 0.34) & (ax <= 1))
    if shape == "diamond":
        return ax + ay <= 1
    if shape == "star":
        angle = np.arctan2(x, -y) % (2 * np.pi / 5) - np.pi / 5
        edge = np.cos(np.pi / 5) * 0.5 / np.cos(np.pi / 5 - np.abs(angle))
        spike = 0.5 + 0.5 * np.abs(angle) / (np.pi / 5)
        inside: NDArray[np.bool_] = np.hypot(x, y) <= np.maximum(edge, spike**2)
        return inside
    raise ValueError(f"no shape is called {shape!r}: expected one of {', '.join(SHAPES)}")


def render_array(scene: Scene, size_px: int, config: WorldConfig) -> Floats:
    """The scene as (size_px, size_px, 3) float32 in [0, 255]."""
    top = np.array(PALETTE[scene.background], np.float32)
    bottom = np.array(PALETTE[scene.background_to or scene.background], np.float32)
    blend = np.linspace(0, 1, size_px, dtype=np.float32)[:, None, None]
    canvas: Floats = np.broadcast_to(top + (bottom - top) * blend, (size_px, size_px, 3)).copy()
    cell_px = size_px / cells(config)
    for thing in scene.things:
        side = round(SPANS[thing.size] * cell_px)
        row, column = round(thing.row * cell_px), round(thing.column * cell_px)
        region = canvas[row : row + side, column : column + side]
        cover = shape_mask(thing.shape, side)[: region.shape[0], : region.shape[1], None]
        region += cover * (_paint(thing, side)[: region.shape[0], : region.shape[1]] - region)
    return canvas


def _paint(thing: Thing, side: int) -> Floats:
    """The thing's colour over its block, with its texture."""
    color = np.array(PALETTE[thing.color], np.float32)
    tone = np.ones((side, side, 1), np.float32)
    band = (np.arange(side) * 8 // max(side, 1)) % 2 == 1
    if thing.texture == "striped":
        tone[:, band] = TEXTURE_SHADE
    elif thing.texture == "dotted":
        tone[np.ix_(band, band)] = TEXTURE_SHADE
    paint: Floats = tone * color
    return paint


def render(scene: Scene, size_px: int, config: WorldConfig) -> Image.Image:
    """The scene as an RGB image, antialiased; small ones look like area-downsized large ones."""
    return Image.fromarray(render_array(scene, size_px, config).round().astype(np.uint8))
