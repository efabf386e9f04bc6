"""Counts per bin: small, exact, and added up over any number of files."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import polars as pl


def equal_edges(low: float, high: float, num_bins: int) -> tuple[float, ...]:
    """The inner edges of ``num_bins`` bins of one width from ``low`` to ``high``."""
    return tuple(low + (high - low) * step / num_bins for step in range(1, num_bins))


# Name -> inner edges: a bin holds what is at least its lower edge and below its upper one; the
# first and the last one are open.
LEDGER_BINS: Mapping[str, tuple[float, ...]] = {
    "shorter_side_px": (64, 128, 192, 256, 320, 384, 512, 768, 1024, 1536, 2048, 4096),
    "aspect_ratio": (1 / 3, 1 / 2, 2 / 3, 4 / 5, 0.95, 1.05, 5 / 4, 3 / 2, 2, 3),
    "aesthetic_score": equal_edges(0, 10, 20),
    "watermark_prob": equal_edges(0, 1, 20),
    "unsafe_prob": equal_edges(0, 1, 20),
    "clip_similarity": equal_edges(0, 0.5, 20),
}
SAMPLE_BINS: Mapping[str, tuple[float, ...]] = {
    "caption_words": (3, 5, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192),
    "caption_tokens": (8, 16, 24, 32, 48, 64, 77, 96, 128, 192, 256, 512),
    "image_bytes": tuple(1000.0 * 2**step for step in range(1, 13)),
}
# Of the ledger's columns, what a histogram counts.
LEDGER_VALUES: Mapping[str, pl.Expr] = {
    "shorter_side_px": pl.min_horizontal("width_px", "height_px"),
    "aspect_ratio": pl.col("width_px") / pl.col("height_px"),
    **{
        name: pl.col(name)
        for name in ("aesthetic_score", "watermark_prob", "unsafe_prob", "clip_similarity")
    },
}


def counted(values: pl.Series, edges: tuple[float, ...]) -> list[int]:
    """How many values lie in each bin, and at the end how many are null."""
    known = values.drop_nulls().to_numpy()
    bins = np.searchsorted(np.asarray(edges), known, side="right")
    counts: list[int] = np.bincount(bins, minlength=len(edges) + 1).tolist()
    return [*counts, values.null_count()]


def added(a: list[int], b: list[int]) -> list[int]:
    """Two counts over the same bins as one; an empty one is nothing."""
    if not a or not b:
        return a or b
    return [x + y for x, y in zip(a, b, strict=True)]
