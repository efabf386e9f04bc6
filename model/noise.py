"""Chance for painting: each image has its own, from its seed alone."""

from collections.abc import Sequence

import torch
from torch import Tensor

TINY_PROB = 1e-20


class ImageNoise:
    """A CPU generator per image: its numbers depend neither on the batch nor on the device."""

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.device = device

    def uniform(self, counts: Sequence[int]) -> Tensor:
        """`counts[b]` numbers in [0, 1) from each image b, one after another."""
        parts = [torch.rand(n, generator=g) for n, g in zip(counts, self.generators, strict=True)]
        return torch.cat(parts).to(self.device)

    def gumbel(self, counts: Sequence[int]) -> Tensor:
        """Standard Gumbel noise, laid out like `uniform`."""
        exponential = -self.uniform(counts).clamp(min=TINY_PROB).log()
        return -exponential.clamp(min=TINY_PROB).log()
