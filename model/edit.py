"""Painting into pictures: inside a mask, around an image, or where other words change it.

All three fill masked tokens with the sampler that also paints from nothing, and lay what was
painted over the original: a pixel outside the mask is bit for bit what it was, its transparency
included. Pictures whose sides the tokenizer does not divide are continued at the right and the
bottom, and cut again. Of pictures larger than the model's resolution a window is painted.

Shape suffixes: B images, 3 colours, H/W pixels or token rows and columns, L = H·W tokens.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from model.edit_change import change_of_words
from model.edit_operations import DEFAULT_STRENGTH, Operation, operation_of
from model.edit_window import Window, resized, seen_size, window_of
from model.errors import ModelError
from model.paint_options import PaintOptions
from model.pixels import Picture as Picture
from model.pixels import (
    check_sides,
    feathered,
    grown,
    laid_over,
    layers_of,
    on_white,
    padded,
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
    layers_B4HW = layers_of(images)
    mask_BHW = to_masks(masks, (layers_B4HW.shape[3], layers_B4HW.shape[2]))
    windows = windows_of(painter, mask_BHW)
    return repaint(painter, prompts, layers_B4HW, mask_BHW, windows, strength, feather_px, options)


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
    layers_B4HW = layers_of(images)
    height, width = layers_B4HW.shape[2] + top + bottom, layers_B4HW.shape[3] + left + right
    check_sides(height, width)
    padding = (left, right, top, bottom)
    canvas_B4HW = F.pad(layers_B4HW, padding, mode="replicate")
    new_BHW = F.pad(torch.zeros(layers_B4HW[:, 0].shape), padding, value=1.0) > 0
    whole = [Window(0, 0, height, width, (height, width))] * len(images)
    return repaint(painter, prompts, canvas_B4HW, new_BHW, whole, 1.0, feather_px, options)


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
    layers_B4HW = layers_of(images)
    if masks is not None:
        mask_BHW = to_masks(masks, (layers_B4HW.shape[3], layers_B4HW.shape[2]))
    elif (how is None and sources is None) or (how is not None and how.everywhere):
        mask_BHW = torch.ones(layers_B4HW[:, 0].shape, dtype=torch.bool)
        strength = DEFAULT_STRENGTH if how is None and strength is None else strength
    else:
        how = how or operation_of("local")
        pixels_B3HW = on_white(layers_B4HW)
        mask_BHW = place_of_change(painter, prompts, pixels_B3HW, sources, how, options).cpu()
    strength = (how.strength if how else 1.0) if strength is None else strength
    windows = windows_of(painter, mask_BHW)
    return repaint(painter, prompts, layers_B4HW, mask_BHW, windows, strength, feather_px, options)


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

    A picture of more pixels than the model's resolution has is looked at in that many. Where
    nothing reaches `min_change`, the token that changes most is taken with its neighbours;
    where both texts predict the same, nothing.
    """
    height, width = pixels_B3HW.shape[2:]
    check_sides(height, width)
    pixels_B3HW = resized(pixels_B3HW, seen_size(height, width, painter.defaults.resolution_px))
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
    mask_BHW = mask_BHW[:, : pixels_B3HW.shape[2], : pixels_B3HW.shape[3]]
    return F.interpolate(mask_BHW.float()[:, None], (height, width))[:, 0] > 0


def _above(change_BHW: Tensor, min_change: float) -> Tensor:
    place_BHW = change_BHW > min_change
    most_B11 = change_BHW.flatten(1).amax(dim=1)[:, None, None]
    nothing_B11 = ~place_BHW.flatten(1).any(dim=1)[:, None, None]
    return place_BHW | (nothing_B11 & grown((change_BHW == most_B11) & (most_B11 > 0), 1))


def windows_of(painter: "TextToImage", mask_BHW: Tensor) -> list[Window | None]:
    """Each picture's window, as `window_of` chooses it."""
    return [window_of(mask_HW, painter.defaults.resolution_px) for mask_HW in mask_BHW.cpu()]


@torch.no_grad()
def repaint(
    painter: "TextToImage",
    prompts: list[str],
    layers_B4HW: Tensor,
    mask_BHW: Tensor,
    windows: Sequence[Window | None],
    strength: float,
    feather_px: int,
    options: PaintOptions,
) -> list[Image.Image]:
    """Paint the pixels in mask_BHW anew, from where `strength` of the steps are left.

    Each picture is painted in its window, and not at all without one. Windows of one size are
    painted together.
    """
    first_step = first_step_of(strength, options.steps)
    options.sampling(painter.defaults.masking_schedule)  # checked also where nothing is painted
    seeds = options.image_seeds(len(prompts))
    check_sides(*layers_B4HW.shape[2:])
    alpha_BHW = feathered(mask_BHW, feather_px)
    pixels_B3HW = on_white(layers_B4HW)
    painted_B3HW = pixels_B3HW.clone()
    together: dict[tuple[int, int], list[tuple[int, Window]]] = {}
    for row, window in enumerate(windows):
        if window is not None:
            together.setdefault(window.seen_px, []).append((row, window))
    num_batches = [len(options.batches(len(group))) for group in together.values()]
    for number, group in enumerate(together.values()):
        part_B3HW = _painted(
            painter,
            [prompts[row] for row, _ in group],
            torch.stack([window.of(pixels_B3HW[row]) for row, window in group]),
            torch.stack([window.of_mask(mask_BHW[row]) for row, window in group]),
            first_step,
            options.part([seeds[row] for row, _ in group], num_batches, number),
        )
        for (row, window), part_3HW in zip(group, part_B3HW, strict=True):
            window.put(painted_B3HW[row], part_3HW)
    return laid_over(layers_B4HW, painted_B3HW, alpha_BHW[:, None])


def _painted(
    painter: "TextToImage",
    prompts: list[str],
    pixels_B3HW: Tensor,
    mask_BHW: Tensor,
    first_step: int,
    options: PaintOptions,
) -> Tensor:
    """pixels_B3HW with every token that mask_BHW touches painted anew, on the CPU."""
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
    return torch.cat(
        [
            painter.decode_pixels(painted_BHW[batch.start : batch.stop]).cpu()
            for batch in options.batches(len(prompts))
        ]
    )[:, :, : pixels_B3HW.shape[2], : pixels_B3HW.shape[3]]


def encode(painter: "TextToImage", pixels_B3HW: Tensor, options: PaintOptions) -> Tensor:
    """tokens_BHW of pictures of any size, on the painter's device, batch by batch."""
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
