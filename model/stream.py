"""Images while they are painted: a generator of previews, of which the last is the result.

Shape suffixes: B images, H token rows, W token columns.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Unpack

import torch
from PIL import Image
from torch import Tensor

from model.errors import ModelError
from model.paint_options import PaintKeywords, PaintOptions
from model.sampler import unmask_steps
from model.text_to_image import TextToImage, as_prompts


@dataclass(frozen=True)
class Preview:
    """The images after some steps, as the network guesses them then."""

    step: int  # steps done, 1 …
    steps: int  # steps in all
    images: list[Image.Image]  # one per prompt
    masked_ratio: float  # share of the tokens that may still change, in [0, 1]
    tokens_BHW: Tensor  # what is decided; the rest holds the mask token


def stream(
    painter: TextToImage,
    prompts: Sequence[str],
    height: int | None = None,
    width: int | None = None,
    every: int = 1,
    **keywords: Unpack[PaintKeywords],
) -> Iterator[Preview]:
    """Previews of what `painter.generate` paints, after each `every` steps and after the last.

    The last preview holds the images that `generate` would return. All prompts are one batch. Each
    preview costs one decoding; `progress` is called on every step. Arguments are checked before the
    generator is returned.
    """
    prompts, options = as_prompts(prompts), PaintOptions(**keywords)
    if every < 1:
        raise ModelError(f"every is {every}: expected at least 1 step")
    if options.batch_size is not None and options.batch_size < len(prompts):
        raise ModelError("stream paints one batch: leave batch_size out, or stream part by part")
    height_px, width_px = painter.check_size(height, width)
    seeds = options.image_seeds(len(prompts))
    options.sampling(painter.defaults.masking_schedule)
    return _previews(painter, prompts, (height_px, width_px), seeds, every, options)


@torch.no_grad()
def _previews(
    painter: TextToImage,
    prompts: list[str],
    size_px: tuple[int, int],
    seeds: list[int],
    every: int,
    options: PaintOptions,
) -> Iterator[Preview]:
    mask_token_id, factor = painter.transformer.config.mask_token_id, painter.vq.downsample_factor
    grid = (len(prompts), size_px[0] // factor, size_px[1] // factor)
    states = unmask_steps(
        painter.transformer,
        torch.full(grid, mask_token_id, device=painter.device),
        painter.condition(prompts, *size_px, options),
        seeds,
        options.sampling(painter.defaults.masking_schedule),
    )
    for state in states:
        if options.progress is not None:
            options.progress(state.step, state.steps, state.tokens_BHW)
        if state.step % every == 0 or state.step == state.steps:
            masked = state.tokens_BHW == mask_token_id
            yield Preview(
                state.step,
                state.steps,
                painter.decode(state.guess_BHW),
                float(masked.float().mean()),
                state.tokens_BHW,
            )
