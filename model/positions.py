"""Rotary positions for a text sequence followed by a token grid.

Shape suffixes: S sequence (text then image), F rotary frequencies (half the head's channels), K
heads, A channels of one head.
"""

import torch
from torch import Tensor

from model.layers import widen

THETA = 10000.0


def rotary_tables(
    num_text: int, height: int, width: int, axes_dims: tuple[int, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """cos_SF and sin_SF (float32) for `num_text` text tokens and a token grid of height by width.

    Every text token sits at (0, 0, 0) and the token in row r, column c at (0, r, c). `axes_dims`
    are the channels each of the three axes takes of a head (their sum). Angles are computed in
    float64.
    """
    rows = torch.arange(height, dtype=torch.float64).repeat_interleave(width)
    columns = torch.arange(width, dtype=torch.float64).repeat(height)
    image_ids = torch.stack((torch.zeros_like(rows), rows, columns), dim=1)
    ids_S3 = torch.cat((torch.zeros(num_text, 3, dtype=torch.float64), image_ids))
    angles = [
        torch.outer(ids_S3[:, axis], THETA ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim))
        for axis, dim in enumerate(axes_dims)
    ]
    angles_SF = torch.cat(angles, dim=1)
    return angles_SF.cos().float().to(device), angles_SF.sin().float().to(device)


def rotate(x_BKSA: Tensor, cos_SF: Tensor, sin_SF: Tensor) -> Tensor:
    """Turn each neighbouring pair of channels (2i, 2i+1) by its position's angle i."""
    if x_BKSA.device.type == "cpu" and not torch.compiler.is_compiling():
        return rotate_complex(x_BKSA, cos_SF, sin_SF)
    return rotate_real(x_BKSA, cos_SF, sin_SF)


def rotate_real(x_BKSA: Tensor, cos_SF: Tensor, sin_SF: Tensor) -> Tensor:
    """`rotate` in real arithmetic, which compilers fuse."""
    even, odd = x_BKSA.view(*x_BKSA.shape[:-1], -1, 2).unbind(-1)
    turned = torch.stack((even * cos_SF - odd * sin_SF, odd * cos_SF + even * sin_SF), dim=-1)
    return turned.flatten(-2)


def rotate_complex(x_BKSA: Tensor, cos_SF: Tensor, sin_SF: Tensor) -> Tensor:
    """`rotate` as one complex product in float32: on a CPU some 8 times faster than in parts."""
    pairs = torch.view_as_complex(widen(x_BKSA).view(*x_BKSA.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * torch.complex(cos_SF, sin_SF)).flatten(-2)
