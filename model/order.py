"""Which of the new tokens stay: every way gives each token a confidence, and the least are masked.

Shape suffixes: H token rows, W token columns, L = H·W, N masked tokens of all images (row-major),
V codebook size.
"""

from functools import lru_cache

import torch
from torch import Tensor

from model.errors import ModelError

CONFIDENCE = "confidence"  # the drawn token's probability, as published
MARGIN = "margin"  # how far the likeliest token leads the second
ENTROPY = "entropy"  # one over the number of tokens that compete (exp of minus the entropy)
RANDOM = "random"  # any
HALTON = "halton"  # spread evenly over the image, whatever the network says
ORDERS = (CONFIDENCE, MARGIN, ENTROPY, RANDOM, HALTON)
FIXED_ORDERS = (RANDOM, HALTON)  # those that do not ask the network

_MAX_HALTON_POINTS = 1 << 24


def check_order(order: str) -> None:
    """ModelError unless `order` is one of ORDERS."""
    if order not in ORDERS:
        raise ModelError(f"order is {order!r}: expected one of {', '.join(ORDERS)}")


def certainty(probs_NV: Tensor, drawn_prob_N: Tensor, order: str) -> Tensor:
    """certainty_N in [0, 1] of each row of probabilities; its logarithm is the confidence."""
    if order == MARGIN:
        first_N, second_N = probs_NV.topk(2, dim=-1).values.unbind(-1)
        return first_N - second_N
    if order == ENTROPY:
        spread_N: Tensor = torch.special.entr(probs_NV).sum(dim=-1)
        return spread_N.neg().exp()
    return drawn_prob_N


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # what is kept must serve anybody
def halton_ranks(height: int, width: int) -> Tensor:
    """ranks_HW (int64, on the CPU): when the Halton sequence first meets each cell of the grid.

    Bases 2 (rows) and 3 (columns), from index 1. Neighbouring ranks lie far apart, and the first n
    cells cover the grid about evenly for every n. Source: Halton-MaskGIT (Besnier et al., 2025).
    """
    num_cells, num_points = height * width, 2 * height * width
    while True:
        index = torch.arange(1, num_points + 1)
        rows = (_radical_inverse(index, 2) * height).long().clamp(max=height - 1)
        columns = (_radical_inverse(index, 3) * width).long().clamp(max=width - 1)
        cells = rows * width + columns
        first = torch.full((num_cells,), num_points).scatter_reduce_(
            0, cells, torch.arange(num_points), "amin"
        )
        if bool((first < num_points).all()) or num_points >= _MAX_HALTON_POINTS:
            return first.argsort(stable=True).argsort(stable=True).view(height, width)
        num_points *= 2


def _radical_inverse(index: Tensor, base: int) -> Tensor:
    """The digits of `index` in `base`, mirrored at the point: float64 in [0, 1)."""
    inverse, scale = torch.zeros(index.shape, dtype=torch.float64), 1.0
    while bool(index.any()):
        scale /= base
        inverse += (index % base) * scale
        index = index // base
    return inverse
