"""The mask schedule, shared by training and sampling: which share of the tokens is masked when.

Shape suffixes: B batch, H token rows, W token columns.
`progress` runs from 0 (everything masked) to 1 (nothing masked).
"""

import math
from collections.abc import Callable
from typing import overload

import torch
from torch import Tensor

from model.errors import ModelError

STEP_INDEX = "step_index"
MASK_RATIO = "mask_ratio"
TIMESTEP_CONVENTIONS = (STEP_INDEX, MASK_RATIO)

# The published sampling scripts run this many steps; weights that were trained with step indices
# know the indices 0 … 63.
PUBLISHED_NUM_STEPS = 64


@overload
def cosine_schedule(progress: float) -> float: ...
@overload
def cosine_schedule(progress: Tensor) -> Tensor: ...
def cosine_schedule(progress: float | Tensor) -> float | Tensor:
    """Mask ratio cos(π/2 · progress), in [0, 1] for progress in [0, 1]."""
    if isinstance(progress, Tensor):
        return torch.cos(progress * (math.pi / 2)).clamp(0.0, 1.0)
    return min(max(math.cos(progress * (math.pi / 2)), 0.0), 1.0)


@overload
def linear_schedule(progress: float) -> float: ...
@overload
def linear_schedule(progress: Tensor) -> Tensor: ...
def linear_schedule(progress: float | Tensor) -> float | Tensor:
    """Mask ratio 1 - progress, in [0, 1] for progress in [0, 1]."""
    if isinstance(progress, Tensor):
        return (1 - progress).clamp(0.0, 1.0)
    return min(max(1.0 - progress, 0.0), 1.0)


Schedule = Callable[[Tensor], Tensor]


def mask_schedule(name: str) -> Schedule:
    """The schedule that a scheduler_config.json calls `name` ("cosine" or "linear")."""
    if name == "cosine":
        return cosine_schedule
    if name == "linear":
        return linear_schedule
    raise ModelError(f"masking_schedule is {name!r}: expected 'cosine' or 'linear'")


def sample_mask(
    batch_size: int,
    height: int,
    width: int,
    schedule: Schedule = cosine_schedule,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw training masks: mask_BHW (bool, True = masked) and the mask_ratio_B (float32) they have.

    progress ~ U(0, 1); round(schedule(progress) · H · W) tokens, at least one, are masked at random
    places. The ratio returned is the share really masked, which is also what the sampler passes.
    Both tensors are on the CPU.
    """
    num_tokens = height * width
    progress_B = torch.rand(batch_size, generator=generator)
    num_masked_B = (schedule(progress_B) * num_tokens).round().clamp(min=1)
    order_BL = torch.rand(batch_size, num_tokens, generator=generator).argsort(dim=1)
    rank_BL = torch.empty_like(order_BL)
    rank_BL.scatter_(1, order_BL, torch.arange(num_tokens).expand(batch_size, num_tokens))
    mask_BHW = (rank_BL < num_masked_B[:, None]).view(batch_size, height, width)
    return mask_BHW, num_masked_B / num_tokens


def training_timestep(mask_ratio_B: Tensor, convention: str) -> Tensor:
    """What training passes to the network as `timestep` for images with this mask ratio.

    "mask_ratio": the ratio itself, in [0, 1]. "step_index": the (fractional) index that the
    published sampler would pass when the cosine schedule reaches this ratio in
    `PUBLISHED_NUM_STEPS` steps.
    """
    if convention == MASK_RATIO:
        return mask_ratio_B.float()
    progress_B = torch.acos(mask_ratio_B.float().clamp(0.0, 1.0)) * (2 / math.pi)
    return ((1 - progress_B) * PUBLISHED_NUM_STEPS - 1).clamp(min=0.0)
