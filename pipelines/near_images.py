"""Copies that are not the same bytes: cropped, resized, encoded again, recoloured.

The rule is that of ``pipelines.duplicates``, as ranks that sort. From the best down, each picture
that is still there takes away those that look like it, so two that both look like a third need not
fall for each other.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.duplicate_config import PerceptualConfig
from pipelines.duplicates import REFERENCE
from pipelines.perceptual import NUM_TABLES, Floats, Signatures, Views, alike, bits_for, buckets

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

# Entries one task looks at: each some 420 bytes, and four times that while it works.
ENTRIES_PER_TASK = 200_000
# Pairs the driver decides on by itself, some 200 bytes each.
MAX_PAIRS_ON_DRIVER = 1_000_000
# Pictures of one bucket beyond which only those nothing resembles yet are compared with.
MAX_IN_BUCKET = 2_000
_PARSED_AT_ONCE = 500
_PAIRS_AT_ONCE = 20_000
# One view that falls into a bucket need not be the best of them.
_VIEW_MARGIN = 0.3

ENTRIES = "bucket long, is_whole boolean, view int, slot int, rank string, signature binary"
PAIRS = "kept string, lost string, slot int, similarity double"
_PAIR_SCHEMA: dict[str, pl.DataType] = {
    "kept": pl.String(),
    "lost": pl.String(),
    "slot": pl.Int32(),
    "similarity": pl.Float64(),
}


def near_images(
    images: DataFrame, config: PerceptualConfig, num_images: int, *, among_all: bool = True
) -> DataFrame:
    """``slot, rank, kept`` of every image that one which stays, ``kept``, looks like.

    References are never lost; without ``among_all``, only what looks like one of them is.
    ``images`` has ``slot, rank, signature``, ranks being those of ``rank_of``; Spark shuffles by
    bucket, some 120 entries of 480 bytes an image, or 3 when nothing may be cropped.
    """
    from pyspark.sql import functions as sf

    num_bits = bits_for(num_images)
    per_image = NUM_TABLES * (40 if config.max_crop_ratio else 1) * (1 + config.mirrored)
    num_tasks = max(1, math.ceil(num_images * per_image / ENTRIES_PER_TASK))

    def enter(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            for found in entries(pl.DataFrame(batch), config, num_bits):
                yield from found.to_arrow(compat_level=pl.CompatLevel.oldest()).to_batches()

    def compare(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        frames = [pl.DataFrame(batch) for batch in batches]
        if frames:
            found = pairs(pl.concat(frames), config, among_all=among_all)
            yield from found.to_arrow(compat_level=pl.CompatLevel.oldest()).to_batches()

    entered = images.mapInArrow(enter, ENTRIES).repartition(num_tasks, "bucket")
    found = (
        entered.mapInArrow(compare, PAIRS)
        .groupBy("kept", "lost")
        .agg(sf.first("slot").alias("slot"))
    )
    found = found.persist()
    lost = _lost(found)
    stays = found.join(lost.select(sf.col("lost").alias("kept")), "kept", "left_anti")
    by = stays.join(lost, "lost").groupBy("slot", "lost").agg(sf.min("kept").alias("kept"))
    return by.withColumnRenamed("lost", "rank")


def entries(
    images: pl.DataFrame, config: PerceptualConfig, num_bits: int
) -> Iterator[pl.DataFrame]:
    """The buckets in which the images lie and are looked for; ``is_whole`` where they lie.

    ``view`` is one of those that fall into the bucket, the whole image if it does.
    """
    views = Views(config.max_crop_ratio, config.mirrored)
    for batch in images.iter_slices(_PARSED_AT_ONCE):
        luma_NVF = views.luma(Signatures.parse(batch["signature"].to_list()))
        found_NVT = buckets(luma_NVF, num_bits)
        num_images, num_views, num_tables = found_NVT.shape
        view = np.repeat(np.arange(num_views, dtype=np.int32), num_tables)
        places = pl.DataFrame(
            {
                "number": np.repeat(np.arange(num_images), num_views * num_tables),
                "bucket": found_NVT.ravel(),
                "view": np.tile(view, num_images),
            }
        )
        distinct = (
            places.filter(pl.col("bucket") >= 0)
            .group_by("number", "bucket", maintain_order=True)
            .agg(
                (pl.col("view") == 0).any().alias("is_whole"),
                pl.when((pl.col("view") == 0).any())
                .then(0)
                .otherwise(pl.col("view").get(pl.len() // 2))
                .alias("view"),
            )
        )
        taken = batch.select("slot", "rank", "signature")[distinct["number"]]
        yield distinct.select("bucket", "is_whole", "view").hstack(taken)


def pairs(
    entries: pl.DataFrame, config: PerceptualConfig, *, among_all: bool = True
) -> pl.DataFrame:
    """``kept, lost, slot, similarity`` of the images that share a bucket and look alike.

    ``kept`` ranks above ``lost``; ``slot`` is that of ``lost``. A pair may come several times.
    """
    if entries.is_empty():
        return pl.DataFrame(schema=_PAIR_SCHEMA)
    images = entries.unique("rank", keep="first").sort("rank").select("slot", "rank", "signature")
    number = pl.DataFrame({"rank": images["rank"], "number": np.arange(images.height)})
    # They sort first, so the smaller number of a pair tells.
    num_references = int(images["rank"].str.starts_with(REFERENCE).sum())
    smaller = pl.min_horizontal("number", "other")
    larger = pl.max_horizontal("number", "other")
    is_asked = (larger >= num_references) & (pl.lit(among_all) | (smaller < num_references))
    placed = entries.select("bucket", "is_whole", "view", "rank").join(number, on="rank")
    whole = placed.filter("is_whole").select("bucket", pl.col("number").alias("other"))
    crowded = whole.group_by("bucket").len().filter(pl.col("len") > MAX_IN_BUCKET)["bucket"]
    is_crowded = pl.col("bucket").is_in(crowded.implode())
    met = (
        placed.filter(~is_crowded)
        .join(whole.filter(~is_crowded), on="bucket")
        .filter(pl.col("number") != pl.col("other"))
        .filter(is_asked)
        .select("number", "view", "other")
        .unique()
    )
    known = _Known(images["signature"], config)
    found = _compare(known, _promising(known, met, config), config)
    for _, members in placed.filter(is_crowded).group_by("bucket", maintain_order=True):
        numbers = members["number"].unique().sort().to_numpy()
        found += _compare_to_first(known, numbers, num_references, among_all=among_all)
    return _oriented(images, found)


class _Known:
    """The signatures of a task's images, and their whole views."""

    def __init__(self, raw: pl.Series, config: PerceptualConfig) -> None:
        self._signatures = Signatures.parse(raw.to_list())
        self._views = Views(config.max_crop_ratio, config.mirrored)
        self._min_similarity = config.min_similarity
        every = np.arange(len(raw))
        self.luma_NF = self.seen_as(every, 0)
        whole = Views(0.0)
        self.chroma_NF = np.concatenate(
            [whole.chroma(self._signatures[part])[:, 0] for part in _parts(every)]
        )

    def seen_as(self, numbers: NDArray[np.int64], view: int) -> Floats:
        """(N, 144): some images' luma in one view."""
        return np.concatenate(
            [self._views.luma_of_view(self._signatures[part], view) for part in _parts(numbers)]
        )

    def views(self, numbers: NDArray[np.int64]) -> tuple[Floats, Floats]:
        """Luma and chroma of all views of some images."""
        signatures = self._signatures[numbers]
        return self._views.luma(signatures), self._views.chroma(signatures)

    def alike(
        self, luma_VF: Floats, chroma_VF: Floats, others: NDArray[np.int64]
    ) -> list[tuple[int, float]]:
        """Those of ``others`` that an image with these views looks like, each with the cosine."""
        cosines, agree = alike(luma_VF, chroma_VF, self.luma_NF[others], self.chroma_NF[others])
        hits = np.flatnonzero((cosines >= self._min_similarity) & agree)
        return [(int(others[hit]), float(cosines[hit])) for hit in hits]


_Found = list[tuple[int, int, float]]


def _promising(known: _Known, met: pl.DataFrame, config: PerceptualConfig) -> pl.DataFrame:
    """Those who met and whose one view is not too far from the other: few are left."""
    enough = config.min_similarity - _VIEW_MARGIN
    passed = []
    for (view,), group in met.group_by("view"):
        numbers = group["number"].unique().sort().to_numpy()
        seen_NF = known.seen_as(numbers, int(str(view)))
        one = np.searchsorted(numbers, group["number"].to_numpy())
        other = group["other"].to_numpy()
        for part in _parts(np.arange(group.height), _PAIRS_AT_ONCE):
            cosines = (seen_NF[one[part]] * known.luma_NF[other[part]]).sum(axis=1)
            passed.append(group[part[cosines >= enough]])
    promising: pl.DataFrame = pl.concat(passed or [met]).select("number", "other").unique()
    return promising


def _compare(known: _Known, close: pl.DataFrame, config: PerceptualConfig) -> _Found:
    found: _Found = []
    grouped = close.group_by("number").agg("other").sort("number")
    for batch in grouped.iter_slices(_PARSED_AT_ONCE):
        lumas, chromas = known.views(batch["number"].to_numpy())
        for (number, others), luma, chroma in zip(batch.iter_rows(), lumas, chromas, strict=True):
            found += [(number, *hit) for hit in known.alike(luma, chroma, np.asarray(others))]
    return found


def _compare_to_first(
    known: _Known, numbers: NDArray[np.int64], num_references: int, *, among_all: bool
) -> _Found:
    """In a crowded bucket, each image is compared with those that look like none before them.

    A million copies of one picture then cost a million comparisons, not their square.
    """
    found: _Found = []
    first: list[int] = []
    for batch in _parts(numbers):
        lumas, chromas = known.views(batch)
        for number, luma, chroma in zip(batch.tolist(), lumas, chromas, strict=True):
            if number < num_references:
                first.append(number)
                continue
            hits = known.alike(luma, chroma, np.asarray(first, np.int64))
            found += [(number, *hit) for hit in hits]
            if among_all and not hits:
                first.append(number)
    return found


def _parts(numbers: NDArray[np.int64], size: int = 0) -> Iterator[NDArray[np.int64]]:
    size = size or _PARSED_AT_ONCE
    return (numbers[at : at + size] for at in range(0, len(numbers), size))


def _oriented(images: pl.DataFrame, found: _Found) -> pl.DataFrame:
    """Numbers follow ranks, so the smaller of two is the one that is kept."""
    best: dict[tuple[int, int], float] = {}
    for one, other, cosine in found:
        pair = (min(one, other), max(one, other))
        best[pair] = max(cosine, best.get(pair, cosine))
    kept, lost = [pair[0] for pair in best], [pair[1] for pair in best]
    columns = {
        "kept": images["rank"][kept],
        "lost": images["rank"][lost],
        "slot": images["slot"][lost],
        "similarity": pl.Series(list(best.values()), dtype=pl.Float64),
    }
    return pl.DataFrame(columns, schema=_PAIR_SCHEMA)


def losers(pairs: Iterable[tuple[str, str]]) -> set[str]:
    """Who goes: from the best down, each that is still there takes away those it is paired with."""
    worse: dict[str, list[str]] = defaultdict(list)
    for kept, lost in pairs:
        worse[kept].append(lost)
    gone: set[str] = set()
    for kept in sorted(worse):
        if kept not in gone:
            gone.update(worse[kept])
    return gone


def _lost(pairs: DataFrame) -> DataFrame:
    """``lost``: the ranks of those that go. Many pairs are decided on the workers, in rounds.

    In a round, those above which nobody is left stay, and what they are paired with goes.
    """
    from pyspark.sql import functions as sf

    spark = pairs.sparkSession
    decided = []
    left = pairs.select("kept", "lost")
    while left.count() > MAX_PAIRS_ON_DRIVER:
        below = left.select(sf.col("lost").alias("kept")).distinct()
        stay = left.join(below, "kept", "left_anti")
        gone = stay.select("lost").distinct().localCheckpoint()
        decided.append(gone)
        as_kept = gone.withColumnRenamed("lost", "kept")
        left = left.join(gone, "lost", "left_anti").join(as_kept, "kept", "left_anti")
        left = left.select("kept", "lost").localCheckpoint()
    rest = losers((row.kept, row.lost) for row in left.toLocalIterator())
    found = spark.createDataFrame([(rank,) for rank in sorted(rest)], "lost string")
    for gone in decided:
        found = found.union(gone)
    return found
