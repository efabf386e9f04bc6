"""AdamW whose two moments take a byte each: 2.03 bytes a weight in place of 8.

Moments are kept in blocks of 256 values of a row, each with its largest as a scale (Dettmers et al.
2022, "8-bit Optimizers via Block-wise Quantization", arXiv:2110.02861): networks in parts are cut
between rows, so that blocks are the same for any number of workers. Codes lie on a power law, so
that values far below their block's largest keep a share of their bits. Rounding is random and right
on average: a second moment that decays by 1 % a step would otherwise stay where it is for ever. It
is a function of (step, place), so that a run that goes on rounds as one that never stopped.

Shape suffixes: R rows, M blocks of a row, N blocks in all, K values of a block.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from training.sharding import like, own_part

BLOCK = 256
MIN_VALUES = 4096  # smaller tensors (norms, biases) keep AdamW's own float32 moments
MIN_COLUMNS = 16  # as do those of shorter rows, which would be all scales
MEAN_CODES, MEAN_SCALES = "mean_codes", "mean_scales"
SQUARE_CODES, SQUARE_SCALES = "square_codes", "square_scales"
MOMENTS = (MEAN_CODES, MEAN_SCALES, SQUARE_CODES, SQUARE_SCALES)
SCALES = (MEAN_SCALES, SQUARE_SCALES)
MEAN_LEVELS, SQUARE_LEVELS = 127, 256
MEAN_POWER, SQUARE_POWER = 2, 4
_PLACES = 1 << 20  # more parameters than any network has


def scales_shape(parameter: Tensor) -> tuple[int, int]:
    """Rows, and blocks of a row."""
    columns = math.prod(parameter.shape[1:])
    return len(parameter), -(-columns // BLOCK)


def _is_large(parameter: Tensor) -> bool:
    columns = math.prod(parameter.shape[1:])
    return parameter.ndim >= 2 and columns >= MIN_COLUMNS and parameter.numel() >= MIN_VALUES


class AdamW8bit(torch.optim.AdamW):
    """AdamW with moments of 8 bits for matrices and kernels of ``MIN_VALUES`` and more; of those
    in parts, every worker moves its own."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # the closure is AdamW's; nothing here gives one
        """Move the large tensors, then let AdamW move what still has a gradient."""
        place = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                place += 1
                if parameter.grad is not None and _is_large(parameter):
                    self._move(parameter, group, place)
                    parameter.grad = None
        return super().step(closure)

    def _move(self, parameter: nn.Parameter, group: dict[str, Any], place: int) -> None:
        state = self.state[parameter]
        if not state:
            _begin(state, parameter)
        state["step"] += 1
        step = int(state["step"].item())
        beta1, beta2 = group["betas"]
        assert parameter.grad is not None  # the caller chose it
        mine = own_part(parameter)
        kept = {name: own_part(state[name]) for name in MOMENTS}
        gradient_NK = _blocks(own_part(parameter.grad).float())
        mean_NK = decode_means(kept[MEAN_CODES], kept[MEAN_SCALES])
        square_NK = decode_squares(kept[SQUARE_CODES], kept[SQUARE_SCALES])
        mean_NK.lerp_(gradient_NK, 1.0 - beta1)
        square_NK.mul_(beta2).addcmul_(gradient_NK, gradient_NK, value=1.0 - beta2)
        root_NK = square_NK.sqrt().div_(math.sqrt(1.0 - beta2**step)).add_(group["eps"])
        move = _unblocked(mean_NK / root_NK, mine.shape)
        mine.mul_(1.0 - group["lr"] * group["weight_decay"])
        mine.add_(move, alpha=-group["lr"] / (1.0 - beta1**step))
        draws = torch.Generator(mine.device).manual_seed(step * _PLACES + place)
        means = encode_means(mean_NK, draws, mine.shape)
        squares = encode_squares(square_NK, draws, mine.shape)
        for name, value in zip(MOMENTS, (*means, *squares), strict=True):
            kept[name].copy_(value)


def _begin(state: dict[str, Any], parameter: Tensor) -> None:
    state["step"] = torch.zeros((), dtype=torch.float32)
    for codes, scales in ((MEAN_CODES, MEAN_SCALES), (SQUARE_CODES, SQUARE_SCALES)):
        kind = torch.int8 if codes == MEAN_CODES else torch.uint8
        state[codes] = torch.zeros_like(parameter, dtype=kind)
        state[scales] = like(torch.zeros(scales_shape(parameter)), parameter)


def _blocks(values: Tensor) -> Tensor:
    """Values in blocks of a row's ``BLOCK`` values, or of all that a shorter row has; zeros at the
    end of a row."""
    values_RC = values.flatten(1)
    columns = values_RC.shape[1]
    size = min(BLOCK, columns)
    num_blocks = len(values_RC) * -(-columns // size)
    return nn.functional.pad(values_RC, (0, -columns % size)).reshape(num_blocks, size)


def _unblocked(values_NK: Tensor, shape: torch.Size) -> Tensor:
    columns = shape[1:].numel()
    blocks_of_a_row = -(-columns // values_NK.shape[1])
    values_RC = values_NK.reshape(shape[0], blocks_of_a_row * values_NK.shape[1])
    return values_RC[:, :columns].reshape(shape)


def encode_means(
    values_NK: Tensor, draws: torch.Generator, shape: torch.Size
) -> tuple[Tensor, Tensor]:
    """(int8 codes of ``shape``, scales RM): code c stands for sign(c) (|c| / 127)² scale."""
    scales_N = values_NK.abs().amax(1)
    shares_NK = values_NK.abs() / _not_zero(scales_N)[:, None]
    low_NK = (shares_NK.sqrt() * MEAN_LEVELS).floor_().clamp_(max=MEAN_LEVELS - 1)
    low_value_NK, high_value_NK = ((low_NK + up) / MEAN_LEVELS for up in (0, 1))
    levels_NK = _up_or_down(
        low_NK, low_value_NK**MEAN_POWER, high_value_NK**MEAN_POWER, shares_NK, draws
    )
    codes_NK = torch.copysign(levels_NK, values_NK).to(torch.int8)
    return _unblocked(codes_NK, shape), scales_N.view(shape[0], -(-shape[1:].numel() // BLOCK))


def decode_means(codes: Tensor, scales_RM: Tensor) -> Tensor:
    """The values (N, K) of ``encode_means``."""
    shares_NK = _blocks(codes.float()) / MEAN_LEVELS
    return shares_NK * shares_NK.abs() * scales_RM.flatten()[:, None]


def encode_squares(
    values_NK: Tensor, draws: torch.Generator, shape: torch.Size
) -> tuple[Tensor, Tensor]:
    """(uint8 codes of ``shape``, scales RM): code c stands for ((c + 1) / 256)⁴ scale.

    The smallest is not 0: a second moment that is rounded to nothing would make a giant step.
    """
    scales_N = values_NK.amax(1)
    shares_NK = (values_NK / _not_zero(scales_N)[:, None]).clamp_(min=SQUARE_LEVELS**-SQUARE_POWER)
    low_NK = (shares_NK.sqrt().sqrt_() * SQUARE_LEVELS - 1).floor_().clamp_(0, SQUARE_LEVELS - 2)
    low_value_NK, high_value_NK = ((low_NK + up) / SQUARE_LEVELS for up in (1, 2))
    codes_NK = _up_or_down(
        low_NK, low_value_NK**SQUARE_POWER, high_value_NK**SQUARE_POWER, shares_NK, draws
    ).to(torch.uint8)
    return _unblocked(codes_NK, shape), scales_N.view(shape[0], -(-shape[1:].numel() // BLOCK))


def decode_squares(codes: Tensor, scales_RM: Tensor) -> Tensor:
    """The values (N, K) of ``encode_squares``."""
    shares_NK = (_blocks(codes.float()) + 1.0) / SQUARE_LEVELS
    return shares_NK**SQUARE_POWER * scales_RM.flatten()[:, None]


def _not_zero(scales_N: Tensor) -> Tensor:
    return torch.where(scales_N > 0, scales_N, torch.ones_like(scales_N))


def _up_or_down(
    low_NK: Tensor, low_value_NK: Tensor, high_value_NK: Tensor, value_NK: Tensor,
    draws: torch.Generator,
) -> Tensor:  # fmt: skip
    """``low_NK`` or one more, so that the mean of what these stand for is ``value_NK``."""
    chance_NK = (value_NK - low_value_NK) / (high_value_NK - low_value_NK)
    draw_NK = torch.rand(low_NK.shape, generator=draws, device=low_NK.device)
    return low_NK + (draw_NK < chance_NK)
