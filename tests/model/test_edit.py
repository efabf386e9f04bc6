"""Editing: kept pixels to the bit, sizes and masks of every kind, places found, seeds."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from model.edit import encode
from model.edit_change import change_of_words
from model.edit_operations import OPERATIONS
from model.errors import ModelError
from model.paint_options import PaintOptions
from model.pixels import feathered, to_masks, to_pixels
from model.sampler import Condition
from model.text_to_image import TextToImage

FAST = 3


def picture(width: int = 24, height: int = 24, seed: int = 0) -> Image.Image:
    levels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(levels)


def levels_of(image: Image.Image) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.asarray(image)


def box(width: int, height: int, corners: tuple[int, int, int, int]) -> Image.Image:
    mask = Image.new("L", (width, height))
    mask.paste(255, corners)
    return mask


@pytest.mark.parametrize(("width", "height"), [(22, 24), (1, 1), (23, 9), (7, 50)])
def test_sides_that_nothing_divides(painter: TextToImage, width: int, height: int) -> None:
    image = picture(width, height)
    mask = np.zeros((height, width), dtype=bool)
    mask[: (height + 1) // 2] = True
    (painted,) = painter.inpaint(["a star"], [image], [mask], steps=FAST)
    assert painted.size == image.size
    assert np.array_equal(levels_of(painted)[~mask], levels_of(image)[~mask])
    (edited,) = painter.edit(["a star"], [image], steps=FAST)
    assert edited.size == image.size


@settings(max_examples=15)
@given(
    width=st.integers(1, 30),
    height=st.integers(1, 30),
    seed=st.integers(0, 2**32 - 1),
    share=st.floats(0, 1),
    feather_px=st.integers(0, 12),
    strength=st.floats(0.01, 1),
)
def test_whatever_the_mask_the_rest_is_kept(
    shared_painter: TextToImage,
    width: int,
    height: int,
    seed: int,
    share: float,
    feather_px: int,
    strength: float,
) -> None:
    image = picture(width, height, seed)
    mask = np.random.default_rng(seed).random((height, width)) < share
    (painted,) = shared_painter.inpaint(
        ["a"], [image], [mask], strength, feather_px, steps=2, seed=seed
    )
    assert painted.size == image.size
    assert np.array_equal(levels_of(painted)[~mask], levels_of(image)[~mask])


@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGB", "RGBA", "P", "I", "F", "I;16", "CMYK"])
def test_masks_of_every_mode_say_the_same(mode: str) -> None:
    want = levels_of(box(6, 4, (1, 1, 4, 3))) > 0
    if mode in ("I", "I;16"):
        kind = "int32" if mode == "I" else "uint16"
        mask = Image.fromarray((want * 65535).astype(kind))
    elif mode == "F":
        mask = Image.fromarray(want.astype(np.float32))
    else:
        mask = box(6, 4, (1, 1, 4, 3)).convert("RGB" if mode == "CMYK" else "L").convert(mode)
    assert mask.mode == mode
    assert np.array_equal(to_masks([mask], (6, 4))[0].numpy(), want)


def test_what_is_transparent_in_a_mask_is_kept() -> None:
    mask = Image.new("RGBA", (2, 1), (255, 255, 255, 0))
    mask.putpixel((1, 0), (255, 255, 255, 255))
    assert to_masks([mask], (2, 1)).tolist() == [[[False, True]]]


@pytest.mark.parametrize(
    ("kind", "top"),
    [("bool", 1), ("uint8", 255), ("uint16", 65535), ("float32", 1), ("float64", 1)],
)
def test_masks_as_arrays_and_tensors(kind: str, top: int) -> None:
    want = np.eye(3, dtype=bool)
    mask: np.ndarray[tuple[int, ...], np.dtype[Any]] = (want * top).astype(kind)
    for given_mask in (mask, mask[:, :, None]):
        assert np.array_equal(to_masks([given_mask], (3, 3))[0].numpy(), want)
    if kind != "uint16":
        assert np.array_equal(to_masks([torch.from_numpy(mask)], (3, 3))[0].numpy(), want)


@pytest.mark.parametrize(
    ("mask", "line"),
    [
        (np.ones((3, 3), np.uint8), "holds 0 and 1 only"),
        (np.ones((3, 3), np.int64), "a mask is of int64"),
        (np.full((3, 3), 2.0), r"leaves \[0, 1\]"),
        (np.full((3, 3), np.nan), r"leaves \[0, 1\]"),
        (np.ones((3, 3, 2), np.uint8), "2 channels"),
        (np.ones((3, 3, 3, 3), bool), "expected .height, width."),
        (np.ones((3, 4), bool), r"a mask has size \(4, 3\)"),
        (np.ones((0, 3), bool), "a mask has size"),
    ],
)
def test_masks_that_say_nothing_are_refused(
    mask: np.ndarray[tuple[int, ...], np.dtype[Any]], line: str
) -> None:
    with pytest.raises(ModelError, match=line) as caught:
        to_masks([mask], (3, 3))
    assert "\n" not in str(caught.value)


def test_transparent_pictures_lie_on_white_and_deep_ones_keep_their_tone() -> None:
    clear = Image.new("RGBA", (1, 1), (10, 20, 30, 0))
    assert to_pixels([clear]).flatten().tolist() == [1.0, 1.0, 1.0]
    deep = Image.fromarray(np.full((1, 1), 0x8000, np.uint16))
    assert to_pixels([deep]).flatten().tolist() == pytest.approx([128 / 255] * 3)
    with pytest.raises(ModelError, match="an image is an array"):
        to_pixels([np.zeros((4, 4, 3))])


def test_feathering_rises_inside_the_mask_alone() -> None:
    mask = torch.zeros(1, 1, 9, dtype=torch.bool)
    mask[0, 0, 3:] = True
    alpha = feathered(mask, 3)[0, 0]
    assert alpha.tolist() == [0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1]
    assert feathered(mask, 0)[0, 0].tolist() == mask[0, 0].float().tolist()
    with pytest.raises(ModelError, match="feather_px is -1"):
        feathered(mask, -1)


def test_feathered_paint_lies_between(painter: TextToImage) -> None:
    image, mask = Image.new("RGB", (24, 24), "black"), box(24, 24, (4, 4, 20, 20))
    hard, soft = (
        levels_of(painter.inpaint(["a"], [image], [mask], feather_px=px, steps=FAST)[0])
        for px in (0, 4)
    )
    assert np.all(soft <= hard)
    assert soft[4, 4].astype(int) == pytest.approx(hard[4, 4] / 5, abs=1)
    assert np.array_equal(soft[8:16, 8:16], hard[8:16, 8:16])


def test_the_same_edit_whatever_the_batch(painter: TextToImage) -> None:
    images = [picture(seed=n) for n in range(3)]
    prompts, sources = ["a red circle", "a star", "two"], ["a blue circle", "a star", "one"]
    for keywords in ({}, {"operation": "add"}, {"operation": "style"}, {"sources": sources}):
        together = painter.edit(prompts, images, steps=FAST, seed=5, batch_size=2, **keywords)
        own = {name: [v[1]] if name == "sources" else v for name, v in keywords.items()}
        (alone,) = painter.edit([prompts[1]], [images[1]], steps=FAST, seed=6, **own)  # type: ignore[arg-type]  # keywords by name
        assert np.array_equal(levels_of(together[1]), levels_of(alone))


def test_the_same_words_change_nothing(painter: TextToImage) -> None:
    image = picture()
    (edited,) = painter.edit(["a star"], [image], sources=["a star"], steps=FAST)
    assert np.array_equal(levels_of(edited), levels_of(image))


@torch.no_grad()
def test_change_is_the_variation_between_predictions(painter: TextToImage) -> None:
    """Against a plain double-precision reading of the definition, one token at a time."""
    tokens_BHW = encode(painter, to_pixels([picture(8, 8)]), PaintOptions())
    micro = painter.micro_conditions(1, 8, 8, 6.0)
    conditions = [Condition(painter.encode_prompts([w]), micro) for w in ("a red circle", "a star")]
    target, source = conditions
    change = change_of_words(painter.transformer, tokens_BHW, target, source, [3])
    generator, want = torch.Generator().manual_seed(3), torch.zeros(4, dtype=torch.float64)
    for _ in range(3):
        first = torch.randperm(4, generator=generator)[:2].tolist()
        for hidden in (first, [n for n in range(4) if n not in first]):
            shown = tokens_BHW.flatten().clone()
            shown[hidden] = painter.transformer.config.mask_token_id
            probs = [
                painter.transformer(shown.view(1, 2, 2), *c.text, micro, torch.tensor([0.5]))
                .flatten(2)[0]
                .double()
                .softmax(0)
                for c in conditions
            ]
            for place in hidden:
                want[place] += (probs[0][:, place] - probs[1][:, place]).abs().sum() / 2 / 3
    assert change.flatten().double() == pytest.approx(want, abs=1e-5)
    assert float(change.min()) > 0
    assert float(change.max()) <= 1


@pytest.mark.parametrize("operation", sorted(OPERATIONS))
def test_every_operation_paints(painter: TextToImage, operation: str) -> None:
    image = picture()
    how = {"operation": operation, "sources": ["a blue circle"], "steps": FAST}
    (edited,) = painter.edit(["a red circle"], [image], **how)  # type: ignore[arg-type]  # keywords by name
    assert not np.array_equal(levels_of(edited), levels_of(image))
    mask = box(24, 24, (0, 0, 12, 12))
    (inside,) = painter.edit(["a red circle"], [image], masks=[mask], **how)  # type: ignore[arg-type]  # keywords by name
    assert np.array_equal(levels_of(inside)[12:], levels_of(image)[12:])


def test_misspelt_operations_and_wrong_counts(painter: TextToImage) -> None:
    with pytest.raises(ModelError, match="did you mean 'style'"):
        painter.edit(["a"], [picture()], operation="stile")
    with pytest.raises(ModelError, match="2 sources for 1 prompts"):
        painter.edit(["a"], [picture()], sources=["a", "b"])
    with pytest.raises(ModelError, match="0 masks for 1 prompts"):
        painter.edit(["a"], [picture()], masks=[])
    with pytest.raises(ModelError, match="at least 1 x 1"):
        painter.edit(["a"], [Image.new("RGB", (0, 4))])


def test_pictures_too_large_are_refused(painter: TextToImage) -> None:
    wide = Image.new("RGB", (8196, 8))
    with pytest.raises(ModelError, match="8196 x 8 px: expected at most 8192 px a side"):
        painter.edit(["a"], [wide], steps=1)
    with pytest.raises(ModelError, match="expected at most 8192 px a side"):
        painter.outpaint(["a"], [Image.new("RGB", (24, 24))], bottom=1 << 40, steps=1)
