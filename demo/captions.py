"""Words for scenes: plain prompts, noisy alt-texts, and captions of more than fifty words."""

from __future__ import annotations

import numpy as np

from demo.world import Scene, Thing, WorldConfig, place, relation

COUNTS = {2: "two", 3: "three", 4: "four"}
CAPTIONER = "scene-graph/1"
_BEFORE = ("", "", "", "a photo of ", "picture of ", "stock image: ", "wall art, ")
_AFTER = ("", "", "", " | free download", " - print", " (high quality)", " no. {number}")


def thing_words(thing: Thing, config: WorldConfig) -> str:
    """Colour and shape, with size and texture where the world has more than one of them."""
    words = [thing.color, thing.shape]
    if thing.texture != "plain":
        words.insert(0, thing.texture)
    if len(config.sizes) > 1:
        words.insert(0, thing.size)
    return " ".join(words)


def background_words(scene: Scene) -> str:
    if scene.background_to is None:
        return f"{article(scene.background)} background"
    return f"{article(scene.background)} to {scene.background_to} background"


def plain_prompt(scene: Scene, config: WorldConfig, says_place: bool = True) -> str:
    """The facts in one sentence, the grammar that every caption and question shares.

    One thing's place is among them where held-out combinations have places, and `says_place`.
    """
    names = [thing_words(thing, config) for thing in scene.things]
    ground = background_words(scene)
    if len(names) == 1 and says_place and config.held_out_by == "place":
        return f"{article(names[0])} at the {place(scene.things[0], config)} on {ground}"
    if not names:
        return ground
    if len(names) > 1 and len(set(names)) == 1:
        return (
            f"{COUNTS[len(names)]} {names[0]}{'es' if names[0].endswith('s') else 's'} on {ground}"
        )
    if len(names) == 2:
        link = relation(*scene.things)
        return f"{article(names[0])} {link or 'and'} {article(names[1])} on {ground}"
    listed = ", ".join(article(name) for name in names[:-1])
    return f"{listed}{' and ' if listed else ''}{article(names[-1])} on {ground}"


def article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def alt_text(scene: Scene, rng: np.random.Generator, config: WorldConfig) -> str:
    """What a web page might say: the prompt with a shop's noise around it, in any case.

    Half of those of one thing leave out where it stands.
    """
    text = plain_prompt(scene, config, says_place=rng.random() < 0.5)
    before, after = str(rng.choice(_BEFORE)), str(rng.choice(_AFTER))
    text = before + text + after.format(number=int(rng.integers(100, 999)))
    style = rng.random()
    return text.title() if style < 0.1 else text.capitalize() if style < 0.4 else text


def long_caption(scene: Scene, rng: np.random.Generator, config: WorldConfig) -> str:
    """More than fifty words: the prompt, each thing's place, then background, count and padding."""
    ground = (
        f"the background is plain {scene.background} from edge to edge"
        if scene.background_to is None
        else f"the background fades from {scene.background} at the top to {scene.background_to}"
    )
    count = {0: "no shape", 1: "one shape", **{n: f"{w} shapes" for n, w in COUNTS.items()}}
    sentences = [
        plain_prompt(scene, config),
        *(
            f"the {thing_words(thing, config)} is at the {place(thing, config)}"
            for thing in scene.things
        ),
        ground,
        f"there is {count[len(scene.things)]} in the picture"
        if len(scene.things) < 2
        else f"there are {count[len(scene.things)]} in the picture",
    ]
    padding = [
        "the drawing is flat and clean with sharp edges",
        "nothing else can be seen and no text is present",
        "it is a simple and quiet picture in few colors",
        "every shape keeps clear of the others",
        "the light is even and there are no shadows",
    ]
    order = rng.permutation(len(padding))
    for index in order:
        if len(" ".join(sentences).split()) > 51:
            break
        sentences.append(padding[index])
    return ". ".join(sentences) + "."
