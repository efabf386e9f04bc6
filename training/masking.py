"""What a step hides: image tokens from the network, and now and then the whole prompt.

Draws are made for the whole global batch, whatever part of it a worker holds, so the number of
workers changes nothing. Shape suffixes: B samples, H token rows, W token columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from model import cosine_schedule, sample_mask
from training.randomness import torch_generator

EMPTY_PROMPT = ""


def draw_masks(
    batch_size: int, height: int, width: int, seed: int, step: int
) -> tuple[Tensor, Tensor]:
    """mask_BHW (bool, True = masked) and mask_ratio_B (float32) of a step.

    progress ~ U(0, 1) for each sample; round(cosine_schedule(progress) * H * W) tokens at random
    places are masked, at least one.
    """
    generator = torch_generator(seed, "mask", step)
    return sample_mask(batch_size, height, width, cosine_schedule, generator)


def draw_dropped(batch_size: int, prompt_dropout_prob: float, seed: int, step: int) -> Tensor:
    """dropped_B (bool): True, with this probability, where the prompt is dropped."""
    generator = torch_generator(seed, "prompt dropout", step)
    return torch.rand(batch_size, generator=generator) < prompt_dropout_prob


def drop_prompts(prompts: Sequence[str], dropped_B: Tensor) -> list[str]:
    """The prompts, with an empty one in place of each that is dropped."""
    pairs = zip(prompts, dropped_B.tolist(), strict=True)
    return [EMPTY_PROMPT if dropped else prompt for prompt, dropped in pairs]
