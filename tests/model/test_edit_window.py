"""Pictures larger than the model's resolution: where they are painted, and what of them is seen."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from model.edit_window import window_of
from model.text_to_image import TextToImage
from tests.model.test_edit import box, levels_of, picture

FAST = 2


@given(
    size=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    corners=st.lists(st.integers(0, 89), min_size=4, max_size=4),
)
def test_a_window_holds_the_mask_and_fits_the_network(
    size: tuple[int, int], corners: list[int]
) -> None:
    height, width = size
    mask = torch.zeros(height, width, dtype=torch.bool)
    (top, bottom), (left, right) = sorted(corners[:2]), sorted(corners[2:])
    mask[top : bottom + 1, left : right + 1] = True
    window = window_of(mask, 24)
    if window is None:
        assert not mask.any()
        return
    assert 0 <= window.top <= window.top + window.height <= height
    assert 0 <= window.left <= window.left + window.width <= width
    if bool(mask.all()) or height * width <= 24**2:
        assert (window.height, window.width) == window.seen_px == size
        return
    assert window.seen_px[0] * window.seen_px[1] <= 24**2
    assert window.height >= min(height, 24)
    assert window.width >= min(width, 24)
    outside = mask.clone()
    outside[window.top : window.top + window.height, window.left : window.left + window.width] = (
        False
    )
    assert not outside.any()
    seen = window.of_mask(mask)
    assert seen.shape == window.seen_px
    assert seen.any()
    assert window.of(torch.rand(3, *size)).shape[1:] == window.seen_px


def seen_by(painter: TextToImage) -> list[tuple[int, int]]:
    """The grids (rows, columns) of tokens that its network is asked about from now on."""
    grids: list[tuple[int, int]] = []

    def note(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        grids.append((inputs[0].shape[1], inputs[0].shape[2]))

    painter.transformer.embed.register_forward_pre_hook(note)
    return grids


def test_a_small_mask_in_a_large_picture_is_painted_at_its_own_scale(painter: TextToImage) -> None:
    image, grids = picture(200, 90), seen_by(painter)
    mask = box(200, 90, (120, 40, 130, 48))
    (painted,) = painter.inpaint(["a star"], [image], [mask], steps=FAST, seed=3)
    assert set(grids) == {(6, 6)}
    inside = levels_of(mask) > 0
    assert np.array_equal(levels_of(painted)[~inside], levels_of(image)[~inside])
    # What is painted is what a picture of the window alone gets.
    corner = (113, 32, 137, 56)
    (alone,) = painter.inpaint(
        ["a star"], [image.crop(corner)], [mask.crop(corner)], steps=FAST, seed=3
    )
    assert np.array_equal(levels_of(painted.crop(corner)), levels_of(alone))


def test_a_large_mask_in_a_large_picture_is_seen_smaller(painter: TextToImage) -> None:
    image, grids = picture(96, 96), seen_by(painter)
    mask = box(96, 96, (8, 8, 88, 88))
    (painted,) = painter.inpaint(["a star"], [image], [mask], feather_px=3, steps=FAST)
    inside = levels_of(mask) > 0
    assert set(grids) == {(6, 6)}
    assert np.array_equal(levels_of(painted)[~inside], levels_of(image)[~inside])
    changed = (levels_of(painted) != levels_of(image)).any(axis=2)
    assert changed[inside].mean() > 0.9


def test_a_change_is_found_in_the_network_s_own_size(painter: TextToImage) -> None:
    image, grids = picture(96, 48), seen_by(painter)
    how = {"operation": "add", "sources": ["a blue circle"], "steps": FAST}
    (mask,) = painter.find_change(["a red star"], [image], **how)  # type: ignore[arg-type]  # by name
    assert mask.size == (96, 48)
    assert max(rows * columns for rows, columns in grids) <= 36
    (edited,) = painter.edit(["a red star"], [image], **how)  # type: ignore[arg-type]  # by name
    outside = levels_of(mask) == 0
    assert np.array_equal(levels_of(edited)[outside], levels_of(image)[outside])


def test_windows_of_several_sizes_are_painted_as_alone_and_counted(painter: TextToImage) -> None:
    images = [picture(60, 40, seed) for seed in range(4)]
    masks = [
        box(60, 40, (3, 3, 9, 9)),
        Image.new("L", (60, 40)),
        box(60, 40, (0, 0, 58, 39)),
        box(60, 40, (30, 20, 40, 30)),
    ]
    said: list[tuple[int, int]] = []
    together = painter.inpaint(
        ["a star"] * 4, images, masks, steps=3, seed=7, batch_size=1,
        progress=lambda done, total, tokens: said.append((done, total)),
    )  # fmt: skip
    assert said == [(n + 1, 9) for n in range(9)]
    for row in range(4):
        (alone,) = painter.inpaint(["a star"], [images[row]], [masks[row]], steps=3, seed=7 + row)
        assert np.array_equal(levels_of(together[row]), levels_of(alone))
    assert np.array_equal(levels_of(together[1]), levels_of(images[1]))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_what_is_transparent_stays_so_where_nothing_is_painted(
    painter: TextToImage, mode: str
) -> None:
    """With the colours that nobody sees, which a later edit of the transparency may show."""
    generator = np.random.default_rng(0)
    layers = generator.integers(0, 256, (24, 24, 4), dtype=np.uint8)
    image = Image.fromarray(layers).convert("RGBA" if mode in ("P", "RGB") else mode)
    if mode == "RGB":  # with a colour that means nothing
        image = image.convert("RGB")
        image.info["transparency"] = image.getpixel((2, 2))
    elif mode == "P":
        image = image.convert("RGB").convert("P")
        image.info["transparency"] = image.getpixel((2, 2))
    want = levels_of(image.convert("RGBA"))
    assert (want[..., 3] < 255).any()
    mask = box(24, 24, (8, 8, 16, 16))
    (painted,) = painter.inpaint(["a star"], [image], [mask], steps=FAST)
    assert painted.mode == "RGBA"
    inside = levels_of(mask) > 0
    assert np.array_equal(levels_of(painted)[~inside], want[~inside])
    assert (levels_of(painted)[inside][:, 3] == 255).all()
    (wide,) = painter.outpaint(["a star"], [image], left=4, bottom=3, steps=FAST)
    assert np.array_equal(levels_of(wide)[:24, 4:], want)
    assert (levels_of(wide)[24:, :, 3] == 255).all()
    (whole,) = painter.edit(["a star"], [image], steps=FAST)
    assert whole.mode == "RGB"
