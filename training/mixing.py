"""Several datasets as one, each as often as its weight says.

A weight is how often a sample comes in an epoch: 2 twice, 0.25 a quarter of the samples, 1.5 all
once and half of them again. Which ones is decided by the sample's place in its dataset, so an epoch
is still an exact list that any number of workers goes through once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from training.config import StageConfig
from training.data import Rows, TokenDataset, TokenShard
from training.randomness import uniforms


@dataclass(frozen=True)
class Part:
    """A dataset of a mixture. ``name`` and the seed decide which samples a fraction takes."""

    name: str
    dataset: TokenDataset
    weight: float


def mixture(parts: Sequence[Part], config: StageConfig) -> TokenDataset:
    """The parts' shards in one order; raises ``UserError`` when not a sample is left."""
    rows: list[Rows] = []
    sources: list[tuple[TokenDataset, int]] = []
    left_out: dict[str, int] = {}
    for part in parts:
        first = 0
        for number, chosen in enumerate(part.dataset.rows):
            rows.append(_as_often(chosen, first, part, config.seed))
            sources.append((part.dataset, number))
            first += len(chosen)
        for reason, count in part.dataset.left_out.items():
            left_out[reason] = left_out.get(reason, 0) + count

    def load(number: int) -> TokenShard:
        dataset, own_number = sources[number]
        return dataset.load(own_number)

    grids = [grid for part in parts for grid in part.dataset.grids]
    return TokenDataset(load, rows, grids, config, left_out)


def _as_often(rows: Rows, first: int, part: Part, seed: int) -> Rows:
    """A shard's rows, each as often as the weight says; ``first`` is the first one's place."""
    if part.weight == 1.0:
        return rows
    places = np.arange(first, first + len(rows), dtype=np.int64)
    times = np.full(len(rows), int(part.weight), np.int64)
    times += uniforms(places, seed, f"mixed in: {part.name}") < part.weight % 1.0
    repeated: NDArray[np.int64] = np.repeat(np.asarray(rows, np.int64), times)
    return repeated
