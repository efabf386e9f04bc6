"""Painting into pictures: inside a mask, around an image, or where other words change it.

All three fill masked tokens with the sampler that also paints from nothing, and lay what was
painted over the original: a pixel outside the mask is bit for bit what it was. Pictures whose
sides the tokenizer does not divide are continued at the right and the bottom, and cut again.

Shape suffixes: B images, 3 colours, H/W pixels or token rows and columns, L = H·W tokens.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from model.edit_change import change_of_words
from model.edit_operations import DEFAULT_STRENGTH, Operation, operation_of
from model.errors import ModelError
from model.paint_options import PaintOptions
from model.pixels import Picture as Picture
from model.pixels import (
    check_sides,
    feathered,
    grown,
    padded,
    to_images,
    to_masks,
    to_pixels,
    token_masks,
)
from model.sampler import Condition, first_step_of
from model.schedule import mask_schedule

if TYPE_CHECKING:
    from model.text_to_image import TextToImage


def inpaint(
    painter: "TextToImage",
    prompts: list[str],
    images: Sequence[Picture],
    masks: Sequence[Picture],
    strength: float,
    feather_px: int,
    options: PaintOptions,
) -> list[Image.Image]:
    """See `TextToImage.inpaint`."""
    pixels_B3HW = to_pixels(images)
    mask_BHW = to_masks(masks, (pixels_B3HW.shape[3], pixels_B3HW.shape[2]))
    return repaint(painter, prompts, pixels_B3HW, mask_BHW, strength, feather_px, options)


def outpaint(
    painter: "TextToImage",
    prompts: list[str],
    images: Sequence[Picture],
    sides: tuple[int, int, int, int],
    feather_px: int,
    options: PaintOptions,
) -> list[Image.Image]:
    """`sides` are left, top, right, bottom in pixels. See `TextToImage.outpaint`."""
    left, top, right, bottom = sides
    if min(sides) < 0 or max(sides) == 0:
        raise ModelError("outpaint needs sides of 0 px or more, and one of them above 0")
    pixels_B3HW = to_pixels(images)
    check_sides(pixels_B3HW.shape[2] + top + bottom, pixels_B3HW.shape[3] + left + right)
    padding = (left, right, top, bottom)
    canvas_B3HW = torch.nn.functional.pad(pixels_B3HW, padding, mode="replicate")
    inside_BHW = torch.zeros(len(pixels_B3HW), *pixels_B3HW.shape[2:])
    new_BHW = torch.nn.functional.pad(inside_BHW, padding, value=1.0) > 0
    return repaint(painter, prompts, canvas_B3HW, new_BHW, 1.0, feather_px, options)


def find_change(
    painter: "TextToImage",
    prompts: list[str],
    images: Sequence[Picture],
    sources: list[str] | None,
    operation: str | None,
    options: PaintOptions,
) -> list[Image.Image]:
    """See `TextToImage.find_change`."""
    how = operation_of(operation or "local")
    mask_BHW = place_of_change(painter, prompts, to_pixels(images), sources, how, options)
    return [Image.fromarray(mask.cpu().numpy()).convert("L") for mask in mask_BHW]


def edit(
    painter: "TextToImage",
    prompts: list[str],
    images: Sequence[Picture],
    sources: list[str] | None,
    masks: Sequence[Picture] | None,
    operation: str | None,
    strength: float | None,
    feather_px: int,
    options: PaintOptions,
) -> list[Image.Image]:
    """See `TextToImage.edit`."""
    how = None if operation is None else operation_of(operation)
    pixels_B3HW = to_pixels(images)
    if masks is not None:
        mask_BHW = to_masks(masks, (pixels_B3HW.shape[3], pixels_B3HW.shape[2]))
    elif (how is None and sources is None) or (how is not None and how.everywhere):
        mask_BHW = torch.ones(len(pixels_B3HW), *pixels_B3HW.shape[2:], dtype=torch.bool)
        strength = DEFAULT_STRENGTH if how is None and strength is None else strength
    else:
        how = how or operation_of("local")
        mask_BHW = place_of_change(painter, prompts, pixels_B3HW, sources, how, options)
    strength = (how.strength if how else 1.0) if strength is None else strength
    return repaint(painter, prompts, pixels_B3HW, mask_BHW, strength, feather_px, options)


@torch.no_grad()
def place_of_change(
    painter: "TextToImage",
    prompts: list[str],
    pixels_B3HW: Tensor,
    sources: list[str] | None,
    operation: Operation,
    options: PaintOptions,
) -> Tensor:
    """mask_BHW (pixels) of the tokens that `prompts` predict otherwise than `sources` do.

    Where nothing reaches `min_change`, the token that changes most is taken with its neighbours;
    where both texts predict the same, nothing.
    """
    tokens_BHW = encode(painter, pixels_B3HW, options)
    sources = [""] * len(prompts) if sources is None else sources
    factor = painter.vq.downsample_factor
    sizes = tokens_BHW.shape[1] * factor, tokens_BHW.shape[2] * factor
    score = options.preference_score
    score = painter.defaults.preference_score if score is None else score
    seeds = options.image_seeds(len(prompts))
    found = []
    for batch in options.batches(len(prompts)):
        rows = slice(batch.start, batch.stop)
        micro_B5 = painter.micro_conditions(len(batch), *sizes, score)
        target, source = (
            Condition(painter.encode_prompts(words[rows]), micro_B5) for words in (prompts, sources)
        )
        change_BHW = change_of_words(
            painter.transformer, tokens_BHW[rows], target, source, seeds[rows], options.dtype
        )
        found.append(_above(change_BHW, operation.min_change))
    place_BHW = grown(torch.cat(found), operation.grow_tokens)
    mask_BHW = place_BHW.repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2)
    return mask_BHW[:, : pixels_B3HW.shape[2], : pixels_B3HW.shape[3]]


def _above(change_BHW: Tensor, min_change: float) -> Tensor:
    place_BHW = change_BHW > min_change
    most_B11 = change_BHW.flatten(1).amax(dim=1)[:, None, None]
    nothing_B11 = ~place_BHW.flatten(1).any(dim=1)[:, None, None]
    return place_BHW | (nothing_B11 & grown((change_BHW == most_B11) & (most_B11 > 0), 1))


@torch.no_grad()
def repaint(
    painter: "TextToImage",
    prompts: list[str],
    pixels_B3HW: Tensor,
    mask_BHW: Tensor,
    strength: float,
    feather_px: int,
    options: PaintOptions,
) -> list[Image.Image]:
    """Paint the pixels in mask_BHW anew, from where `strength` of the steps are left."""
    first_step = first_step_of(strength, options.steps)
    mask_BHW = mask_BHW.cpu()
    alpha_BHW = feathered(mask_BHW, feather_px)
    tokens_BHW = encode(painter, pixels_B3HW, options)
    factor = painter.vq.downsample_factor
    wide_BHW = padded(mask_BHW[:, None], painter.size_multiple_px)[:, 0]
    hidden_BHW = token_masks(wide_BHW, factor).to(tokens_BHW.device)
    if first_step:
        schedule = mask_schedule(painter.defaults.masking_schedule)
        ratio = float(schedule(torch.tensor(first_step / options.steps)))
        hidden_BHW = _thinned(hidden_BHW, ratio, options.image_seeds(len(prompts)))
    tokens_BHW = tokens_BHW.masked_fill(hidden_BHW, painter.transformer.config.mask_token_id)
    painted_BHW = painter.fill(prompts, tokens_BHW, options, first_step)
    painted_B3HW = torch.cat(
        [
            painter.decode_pixels(painted_BHW[batch.start : batch.stop]).cpu()
            for batch in options.batches(len(prompts))
        ]
    )[:, :, : pixels_B3HW.shape[2], : pixels_B3HW.shape[3]]
    alpha_B1HW = alpha_BHW[:, None]
    mixed_B3HW = torch.lerp(pixels_B3HW, painted_B3HW, alpha_B1HW)
    return to_images(torch.where(alpha_B1HW > 0, mixed_B3HW, pixels_B3HW))


def encode(painter: "TextToImage", pixels_B3HW: Tensor, options: PaintOptions) -> Tensor:
    """tokens_BHW of pictures of any size, on the painter's device, batch by batch."""
    check_sides(*pixels_B3HW.shape[2:])
    wide_B3HW = padded(pixels_B3HW, painter.size_multiple_px)
    return torch.cat(
        [
            painter.encode_pixels(wide_B3HW[batch.start : batch.stop])
            for batch in options.batches(len(pixels_B3HW))
        ]
    )


def _thinned(hidden_BHW: Tensor, ratio: float, seeds: Sequence[int]) -> Tensor:
    """A random `ratio` of each image's hidden tokens, at least one where there is any."""
    kept = torch.zeros(hidden_BHW.shape, dtype=torch.bool)
    for hidden_L, kept_L, seed in zip(hidden_BHW.flatten(1), kept.flatten(1), seeds, strict=True):
        places_N = hidden_L.cpu().nonzero()[:, 0]
        order_N = torch.randperm(len(places_N), generator=torch.Generator().manual_seed(seed))
        kept_L[places_N[order_N[: max(1, round(ratio * len(places_N)))]]] = True
    return kept.to(hidden_BHW.device)
