"""The oracle against the painter: exact on clean renders, measured on noisy ones."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from demo.oracle import components, read_scene
from demo.questions import TAGS, geneval_prompts, score
from demo.world import PALETTE, Pixels, Scene, Thing, WorldConfig, render, sample_scene

CONFIG = WorldConfig()


def facts(scene: Scene) -> tuple[str, list[tuple[float, float, str, str]]]:
    things = [(t.row, t.column, t.color, t.shape) for t in scene.things]
    return scene.background, sorted(things)


def accuracy(config: WorldConfig, size_px: int, spoil: object = None, count: int = 150) -> float:
    rng = np.random.default_rng(5)
    right = 0
    for _ in range(count):
        scene = sample_scene(rng, config)
        image = render(scene, size_px, config)
        if callable(spoil):
            image = spoil(image, rng)
        right += facts(read_scene(image, config)) == facts(scene)
    return right / count


@pytest.mark.parametrize("size_px", [64, 128, 256])
def test_exact_on_clean_renders(size_px: int) -> None:
    assert accuracy(CONFIG, size_px) == 1.0


def noise(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    pixels = np.asarray(image, np.float32) + rng.normal(0, 12, (*image.size, 3))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def jpeg(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=75)
    return Image.open(buffer)


def blur(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    small = image.resize((64, 64), Image.Resampling.BILINEAR)
    return small.resize(image.size, Image.Resampling.BILINEAR)


@pytest.mark.parametrize("spoil", [noise, jpeg, blur])
def test_measured_on_spoilt_renders(spoil: object) -> None:
    measured = accuracy(CONFIG, 128, spoil)
    print(f"{getattr(spoil, '__name__', spoil)}: {measured:.3f} of scenes read exactly")
    assert measured >= 0.9


@pytest.mark.parametrize(
    ("config", "floor"),
    [
        (WorldConfig(sizes=("large", "small")), 0.95),
        (WorldConfig(colors=tuple(PALETTE)), 0.95),
        (WorldConfig(gradient_ratio=0.5), 0.9),
    ],
)
def test_harder_worlds(config: WorldConfig, floor: float) -> None:
    assert accuracy(config, 128) >= floor


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        WorldConfig(grid_cells=2, sizes=("small",), held_out_by="place"),
        WorldConfig(grid_cells=2, sizes=("small",), held_out_by="place", settled_pairs=True),
        WorldConfig(grid_cells=4, sizes=("small", "large"), settled_pairs=True),
        WorldConfig(grid_cells=4, sizes=("small",)),
        WorldConfig(grid_cells=3, sizes=("small",), max_objects=2),
        WorldConfig(grid_cells=None),
    ],
)
def test_renders_of_the_asked_scenes_answer_every_question(config: WorldConfig) -> None:
    questions = geneval_prompts(config, 60, seed=3)
    assert {question.tag for question in questions} == set(TAGS)
    images = [render(question.scene, 128, config) for question in questions]
    means = score(images, questions, config).means
    assert set(means.values()) == {1.0}


def test_wrong_pictures_answer_nothing() -> None:
    questions = geneval_prompts(CONFIG, 60, seed=3)
    blank = [np.full((64, 64, 3), 128, np.uint8)] * 60
    means = score(blank, questions, CONFIG).means
    assert means["overall"] == 0.0
    assert means["two_position"] == 0.0


@pytest.mark.parametrize("patch_px", [4, 8, 16])
def test_clutter_answers_nothing(patch_px: int) -> None:
    questions = geneval_prompts(CONFIG, 60, seed=3)
    rng = np.random.default_rng(0)
    tones = np.array([PALETTE[color] for color in CONFIG.colors], np.uint8)
    small = tones[rng.integers(len(tones), size=(60, 64 // patch_px, 64 // patch_px))]
    images = list(small.repeat(patch_px, axis=1).repeat(patch_px, axis=2))
    assert score(images, questions, CONFIG).means["overall"] <= 0.1


def recolored(scene: Scene) -> Pixels:
    spare = [
        c for c in CONFIG.colors if c not in {scene.background, *(t.color for t in scene.things)}
    ]
    things = tuple(
        Thing(t.shape, spare[i % 2], t.size, t.row, t.column) for i, t in enumerate(scene.things)
    )
    return np.asarray(render(Scene(scene.background, things), 64, CONFIG))


def test_right_shapes_in_wrong_colours_are_told_apart() -> None:
    questions = geneval_prompts(CONFIG, 60, seed=4)
    means = score([recolored(q.scene) for q in questions], questions, CONFIG).means
    assert means["single_object"] == means["two_object"] == means["counting"] == 1.0
    assert means["colors"] == means["color_attr"] == means["one_color"] == 0.0


def test_as_many_images_as_questions() -> None:
    with pytest.raises(ValueError, match="expected as many"):
        score([], geneval_prompts(CONFIG, 6, 0), CONFIG)


def test_components_against_flood_fill() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        classes = rng.integers(-1, 2, (12, 12)).astype(np.int32)
        found = components(classes, 1)
        assert sum(int(mask.sum()) for _, mask in found) == int((classes >= 0).sum())
        for number, mask in found:
            start = tuple(int(x) for x in np.argwhere(mask)[0])
            assert np.array_equal(mask, flood(classes == number, start))


def flood(same: np.ndarray, start: tuple[int, ...]) -> np.ndarray:
    reached = np.zeros_like(same)
    todo = [start]
    while todo:
        row, column = todo.pop()
        inside = 0 <= row < same.shape[0] and 0 <= column < same.shape[1]
        if inside and same[row, column] and not reached[row, column]:
            reached[row, column] = True
            todo += [(row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)]
    return reached
