"""GenEval's six questions asked of the painted world: held-out prompts and exact answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from PIL import Image

from demo.captions import plain_prompt
from demo.oracle import read_scene
from demo.world import (
    RELATIONS,
    SPANS,
    Pixels,
    Scene,
    Thing,
    WorldConfig,
    cells,
    held_out,
    place,
    relation,
    settled,
)

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")


@dataclass(frozen=True)
class EvalPrompt:
    """A question: its GenEval tag, the prompt, and a scene that would answer it."""

    tag: str
    prompt: str
    scene: Scene


@dataclass(frozen=True)
class Answer:
    """One image's answers. None where the question was not asked."""

    tag: str
    prompt: str
    correct: bool
    background: bool
    one_color: bool | None
    one_color_shape: bool | None
    one_place: bool | None
    two_position: bool | None
    reason: str
    seen: Scene


@dataclass(frozen=True)
class Scores:
    """Means in [0, 1] over the images asked, and each image's answer."""

    means: dict[str, float]
    answers: list[Answer] = field(repr=False)


def geneval_prompts(config: WorldConfig, num_prompts: int, seed: int) -> list[EvalPrompt]:
    """num_prompts questions, the six tags in turn; every scene is held out from training."""
    tags = TAGS if config.max_objects > 1 else ("single_object", "colors")
    return [
        _question(tags[index % len(tags)], np.random.default_rng([seed, 77, index]), config)
        for index in range(num_prompts)
    ]


def _question(tag: str, rng: np.random.Generator, config: WorldConfig) -> EvalPrompt:
    for _ in range(100_000):
        scene = _scene(tag, rng, config)
        if held_out(scene, config):
            return EvalPrompt(tag, plain_prompt(scene, config), scene)
    raise ValueError(f"no held-out scene for {tag!r}: expected held_out_ratio > 0")


def _scene(tag: str, rng: np.random.Generator, config: WorldConfig) -> Scene:
    background = str(rng.choice(config.colors))
    colors = [color for color in config.colors if color != background]
    size = "large" if "large" in config.sizes else config.sizes[0]
    far = cells(config) - SPANS[size]  # the last row and column a thing can start at
    middle = float(int(far / 2))
    corners = ((0.0, 0.0), (0.0, far), (far, 0.0), (far, far))

    def thing(at: tuple[float, float], color: str | None = None, shape: str | None = None) -> Thing:
        return Thing(
            shape or str(rng.choice(config.shapes)), color or str(rng.choice(colors)), size, *at
        )

    if tag in ("single_object", "colors"):
        starts = sorted({0.0, middle, far})
        at = (float(rng.choice(starts)), float(rng.choice(starts)))
        return Scene(background, (thing(at),))
    if tag == "counting":
        count = int(rng.integers(2, config.max_objects + 1))
        first = thing(corners[0])
        rest = [thing(at, first.color, first.shape) for at in corners[1:count]]
        return Scene(background, settled((first, *rest), config))
    standing = {
        "left of": ((middle, 0.0), (middle, far)),
        "right of": ((middle, far), (middle, 0.0)),
        "above": ((0.0, middle), (far, middle)),
        "below": ((far, middle), (0.0, middle)),
    }
    places = standing[str(rng.choice(RELATIONS))]
    if tag != "position":
        places = (corners[0], corners[3])  # diagonal: the prompt says "and", no relation
    first = thing(places[0])
    other_shapes = [shape for shape in config.shapes if shape != first.shape]
    other_colors = [color for color in colors if color != first.color]
    second = thing(places[1], str(rng.choice(other_colors)), str(rng.choice(other_shapes)))
    return Scene(background, settled((first, second), config))


def score(
    images: Sequence[Image.Image | Pixels], prompts: Sequence[EvalPrompt], config: WorldConfig
) -> Scores:
    """Means of the six questions, their mean (`overall`), and five that say where it went wrong.

    `background`: solid background right. `one_color`, `one_color_shape`: prompts with one thing;
    `one_place`: such a prompt's place has something of the colour, where prompts name places.
    `two_position`: both colours there and standing as asked, whatever their shapes.
    """
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} images for {len(prompts)} prompts: expected as many")
    answers = [
        _answer(question, _readable(read_scene(image, config), config), config)
        for image, question in zip(images, prompts, strict=True)
    ]
    means = {
        tag: float(np.mean([a.correct for a in answers if a.tag == tag]))
        for tag in TAGS
        if any(a.tag == tag for a in answers)
    }
    means["overall"] = float(np.mean(list(means.values())))
    means["background"] = float(np.mean([a.background for a in answers]))
    for name in ("one_color", "one_color_shape", "one_place", "two_position"):
        asked = [getattr(a, name) for a in answers if getattr(a, name) is not None]
        if asked:
            means[name] = float(np.mean(asked))
    return Scores(means, answers)


def _readable(seen: Scene, config: WorldConfig) -> Scene:
    """The scene without its things when there are more than any scene of this world holds.

    Noise shows something of everything; it answers no question.
    """
    return seen if len(seen.things) <= config.max_objects else replace(seen, things=())


def _answer(question: EvalPrompt, seen: Scene, config: WorldConfig) -> Answer:
    wanted = question.scene.things
    color = shape = placed = stands = None
    if question.tag in ("single_object", "colors"):
        color = any(thing.color == wanted[0].color for thing in seen.things)
        shape = bool(_alike(wanted[0], seen))
        if config.held_out_by == "place":
            asked = place(wanted[0], config)
            matching = _alike(wanted[0], seen, by_shape=False)
            placed = any(place(thing, config) == asked for thing in matching)
    if question.tag == "position":
        stands = _stand(wanted, seen, by_shape=False)
    correct = _correct(question.tag, wanted, seen)
    return Answer(
        question.tag,
        question.prompt,
        correct,
        seen.background == question.scene.background and seen.background_to is None,
        color,
        shape,
        placed,
        stands,
        "as asked" if correct else f"saw {[f'{t.color} {t.shape}' for t in seen.things]}",
        seen,
    )


def _correct(tag: str, wanted: tuple[Thing, ...], seen: Scene) -> bool:
    shapes = {thing.shape for thing in seen.things}
    if tag == "single_object":
        return wanted[0].shape in shapes
    if tag == "two_object":
        return all(thing.shape in shapes for thing in wanted)
    if tag == "counting":
        return sum(thing.shape == wanted[0].shape for thing in seen.things) == len(wanted)
    if tag == "position":
        return _stand(wanted, seen, by_shape=True)
    return all(_alike(thing, seen) for thing in wanted)


def _alike(wanted: Thing, seen: Scene, by_shape: bool = True) -> list[Thing]:
    return [
        thing
        for thing in seen.things
        if thing.color == wanted.color and (thing.shape == wanted.shape or not by_shape)
    ]


def _stand(wanted: tuple[Thing, ...], seen: Scene, by_shape: bool) -> bool:
    """Whether some pair of matching things stands in the wanted relation."""
    first, second = (_alike(thing, seen, by_shape) for thing in wanted)
    return any(relation(a, b) == relation(*wanted) for a in first for b in second)
