"""Cached tokens as batches.

Shape suffixes: N samples of a shard, B samples of a batch, H token rows, W token columns, 5 the
micro-conditions: original width, original height, crop top, crop left (pixels), preference score.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from infra.errors import UserError
from training.config import StageConfig
from training.grids import Grid
from training.order import GroupedOrder, Order, PlannedOrder, Visit
from training.randomness import uniforms
from training.resident import ResidentShards

Captions = tuple[tuple[str, str], ...]  # (origin, text) pairs
Rows = NDArray[np.int64] | range


@dataclass(frozen=True)
class TokenShard:
    """The cached samples of one shard. Scores that are unknown are NaN."""

    sample_ids: list[str]
    tokens_NHW: NDArray[np.uint16]
    sizes_and_crops_N4: NDArray[np.float32]
    preference_score_N: NDArray[np.float32]
    aesthetic_score_N: NDArray[np.float32]
    captions: list[Captions]

    def __len__(self) -> int:
        return len(self.sample_ids)

    @property
    def grid(self) -> Grid:
        """Height and width of its tokens."""
        return self.tokens_NHW.shape[1], self.tokens_NHW.shape[2]

    @property
    def num_bytes(self) -> int:
        """About what it takes in memory."""
        text = sum(len(text) + 100 for pairs in self.captions for _, text in pairs)
        return self.tokens_NHW.nbytes + text + 200 * len(self)


@dataclass(frozen=True)
class Batch:
    """Samples as tensors: tokens int64, conditions float32; ``visit`` says which they are."""

    tokens_BHW: Tensor
    captions: list[str]
    micro_conditions_B5: Tensor
    sample_ids: list[str]
    visit: Visit


@dataclass
class TokenDataset:
    """The samples of a stage: shards read when needed, and the rows of each that passed.

    ``load(i)`` reads shard i; ``rows[i]`` are its selected rows and ``grids[i]`` the height and
    width of its tokens; a batch has those of one. At most ``max_resident_bytes`` of
    shards stay in memory (always the one in use), among them, where there is room, those that the
    next steps need: they are read while others are trained on.
    """

    load: Callable[[int], TokenShard]
    rows: list[Rows]
    grids: list[Grid]
    config: StageConfig
    left_out: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sizes = [len(rows) for rows in self.rows]
        self._ends = np.cumsum(sizes)
        self._shards = ResidentShards(self.load, self.config.max_resident_bytes)
        seed, window = self.config.seed, self.config.shuffle_window_shards
        self.order: Order = PlannedOrder(sizes, seed, window)
        if len(set(self.grids)) > 1:
            batch_size = self.config.global_batch_size
            self.order = GroupedOrder(sizes, self.grids, batch_size, seed, window)

    def __len__(self) -> int:
        return self.order.num_samples

    def batch_at(self, number: int, rows: slice = slice(None)) -> Batch:
        """``rows`` of global batch ``number`` (0, 1, …)."""
        size = self.config.global_batch_size
        start, stop, _ = rows.indices(size)
        self._shards.want(self.order.shards_ahead(number * size + start))
        return self.make_batch(self.order.visit(number * size + start, number * size + stop))

    def make_batch(self, visit: Visit) -> Batch:
        """The visited samples, each with the caption that its (seed, epoch, sample) draws."""
        size = len(visit.indices)
        shard_of = np.searchsorted(self._ends, visit.indices, side="right")
        draws = _caption_draws(visit, self.config.seed).tolist()
        mix: dict[str, float] = {o: weight for o, weight in self.config.caption_mix.items()}
        tokens_BHW: NDArray[np.int64] | None = None
        conditions_B5 = np.empty((size, 5), np.float32)
        captions, ids = [""] * size, [""] * size
        for number in np.unique(shard_of).tolist():
            shard, chosen = self._shards.get(number), self.rows[number]
            places = np.flatnonzero(shard_of == number)
            offsets = visit.indices[places] - (self._ends[number] - len(chosen))
            rows = offsets if isinstance(chosen, range) else chosen[offsets]
            if tokens_BHW is None:
                tokens_BHW = np.empty((size, *shard.tokens_NHW.shape[1:]), np.int64)
            tokens_BHW[places] = shard.tokens_NHW[rows]
            conditions_B5[places, :4] = shard.sizes_and_crops_N4[rows]
            conditions_B5[places, 4] = shard.preference_score_N[rows]
            for place, row in zip(places.tolist(), rows.tolist(), strict=True):
                captions[place] = choose_caption(shard.captions[row], mix, draws[place])
                ids[place] = shard.sample_ids[row]
        scores_B = conditions_B5[:, 4]
        scores_B[np.isnan(scores_B)] = self.config.unknown_preference_score
        if tokens_BHW is None:
            raise ValueError("a batch needs one sample at least")
        return Batch(
            torch.from_numpy(tokens_BHW), captions, torch.from_numpy(conditions_B5), ids, visit
        )

    def preference_scores(self, num_shards: int) -> NDArray[np.float32]:
        """The scores of the selected samples of the first shards; unknown ones are filled in."""
        parts = []
        for number, rows in enumerate(self.rows[:num_shards]):
            if len(rows):
                parts.append(self._shards.get(number).preference_score_N[np.asarray(rows)])
        scores = np.concatenate(parts or [np.empty(0, np.float32)])
        unknown = self.config.unknown_preference_score
        return np.nan_to_num(scores, nan=unknown) if len(scores) else np.full(1, unknown, "f4")


def _caption_draws(visit: Visit, seed: int) -> NDArray[np.float64]:
    """A number in [0, 1) for each visit, which depends on seed, epoch and sample alone."""
    draws = np.empty(len(visit.indices))
    for epoch in np.unique(visit.epochs):
        chosen = visit.epochs == epoch
        draws[chosen] = uniforms(visit.indices[chosen], seed, "caption", int(epoch))
    return draws


def choose_caption(captions: Captions, mix: Mapping[str, float], draw: float) -> str:
    """The caption that ``draw`` in [0, 1) falls on.

    A caption weighs its origin's weight in ``mix`` divided by the number of captions of that
    origin; origins that the sample lacks are left out. Raises ``ValueError`` when none is left.
    """
    count = {origin: sum(origin == other for other, _ in captions) for origin in mix}
    weights = [mix.get(origin, 0.0) / max(count.get(origin, 1), 1) for origin, _ in captions]
    total = sum(weights)
    if total <= 0:
        raise ValueError("the sample has no caption of an origin in caption_mix")
    threshold, passed = draw * total, 0.0
    for weight, (_, text) in zip(weights, captions, strict=True):
        passed += weight
        if weight > 0 and threshold < passed:
            return text
    pairs = zip(weights[::-1], captions[::-1], strict=True)
    return next(text for weight, (_, text) in pairs if weight > 0)  # rounding let the draw pass


def select_rows(shard: TokenShard, config: StageConfig) -> tuple[NDArray[np.int64], dict[str, int]]:
    """The rows of a shard that the stage trains on, and how many were left out for which reason."""
    keep = np.ones(len(shard), dtype=bool)
    left_out: dict[str, int] = {}
    wanted = {origin for origin, weight in config.caption_mix.items() if weight > 0}
    checks = [
        ("aesthetic_score", _at_least(shard.aesthetic_score_N, config.min_aesthetic_score)),
        ("preference_score", _at_least(shard.preference_score_N, config.min_preference_score)),
        (
            "caption_origin",
            np.array([any(o in wanted for o, _ in pairs) for pairs in shard.captions], dtype=bool),
        ),
    ]
    for reason, passes in checks:
        left_out[reason] = int((keep & ~passes).sum())
        keep &= passes
    return np.flatnonzero(keep).astype(np.int64), left_out


def _at_least(scores: NDArray[np.float32], minimum: float | None) -> NDArray[np.bool_]:
    if minimum is None:
        return np.ones(len(scores), dtype=bool)
    return np.asarray(scores >= np.float32(minimum))  # an unknown score (NaN) is not at least it


def in_memory(shards: Sequence[TokenShard], config: StageConfig) -> TokenDataset:
    """A dataset over shards that are already loaded."""
    grids = [shard.grid for shard in shards]
    return select(lambda number: shards[number], [None] * len(shards), grids, config)


def select(
    load: Callable[[int], TokenShard],
    whole_sizes: Sequence[int | None],
    grids: list[Grid],
    config: StageConfig,
) -> TokenDataset:
    """Apply the stage's filters to every shard; raises ``UserError`` when no sample is left.

    ``whole_sizes[i]`` is the size of a shard of which every sample is known to pass, else None.
    """
    rows: list[Rows] = []
    left_out: dict[str, int] = {}
    for number, size in enumerate(whole_sizes):
        if size is not None:
            rows.append(range(size))
            continue
        chosen, reasons = select_rows(load(number), config)
        rows.append(chosen)
        for reason, count in reasons.items():
            left_out[reason] = left_out.get(reason, 0) + count
    if not any(len(chosen) for chosen in rows):
        raise UserError(
            expected=f"samples for the stage in dataset {config.dataset!r}",
            got=f"none; left out: {left_out}",
            remedy="loosen min_aesthetic_score, min_preference_score or caption_mix",
        )
    return TokenDataset(load, rows, grids, config, left_out)
