"""Which of several copies stays: the highest aesthetic score, then the smallest sample id.

The rule is a total order on content, so the same rows give the same survivors whatever file,
partition or attempt they came through. An unknown score ranks below every known one.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import polars as pl

from pipelines.config import DuplicateConfig

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame

DUPLICATE_ROW = "duplicate_row"
DUPLICATE_URL = "duplicate_url"
DUPLICATE_IMAGE = "duplicate_image"
# What is compared of an image, and what comes of it. ``slot`` is whose task writes the image.
IMAGES = "slot int, rank string, sha256 string, signature binary"
DUPLICATES = "slot int, sample_id string, reason string, detail string"
_AS_INTEGER = struct.Struct(">q")
_GREATEST = (1 << 63) - 1


def row_duplicates(rows: pl.DataFrame, *, same_url: bool) -> pl.Series:
    """Per row ``duplicate_row`` (URL and caption seen), ``duplicate_url`` or null.

    Rows with a ``reason`` already do not take part. Rows alike in URL, caption and score are told
    apart by their other columns, so that the survivor does not depend on the input's order.
    """
    others = [
        name
        for name, dtype in rows.schema.items()
        if not dtype.is_nested() and name not in ("aesthetic_score", "sample_id", "reason")
    ]
    ranked = (
        rows.with_row_index("position")
        .filter(pl.col("reason").is_null())
        .sort(
            "aesthetic_score",
            "sample_id",
            *others,
            descending=[True] + [False] * (len(others) + 1),
            nulls_last=True,
        )
        .with_columns(
            pl.col("sample_id").is_first_distinct().alias("first_of_row"),
            pl.col("url").is_first_distinct().alias("first_of_url"),
        )
    )
    is_url_duplicate = ~pl.col("first_of_url") & pl.lit(same_url)
    verdict = (
        pl.when(~pl.col("first_of_row"))
        .then(pl.lit(DUPLICATE_ROW))
        .when(is_url_duplicate)
        .then(pl.lit(DUPLICATE_URL))
    )
    found = ranked.select("position", verdict.alias("duplicate"))
    positions = pl.DataFrame({"position": pl.arange(0, rows.height, dtype=pl.UInt32, eager=True)})
    return positions.join(found, on="position", how="left", maintain_order="left")["duplicate"]


def rank_of(round: int, aesthetic_score: float | None, sample_id: str) -> str:
    """Text that sorts as the rule says, the best first; it ends with the sample id.

    What an earlier round committed stays, whatever a retry brings.
    """
    if aesthetic_score is None or aesthetic_score != aesthetic_score:
        return f"{round:06d}-1{'0' * 16}-{sample_id}"
    (bits,) = _AS_INTEGER.unpack(struct.pack(">d", aesthetic_score))
    ascending = bits if bits >= 0 else -(bits & _GREATEST)
    return f"{round:06d}-0{_GREATEST - ascending:016x}-{sample_id}"


def duplicates_among(images: DataFrame, config: DuplicateConfig, num_images: int) -> DataFrame:
    """The ``DUPLICATES`` of all images: who does not stay, and why.

    ``images`` has ``IMAGES``; ``num_images`` is about how many there are. Spark shuffles by sha256,
    and what is left by what it looks like.
    """
    from pyspark.sql import Window
    from pyspark.sql import functions as sf

    from pipelines.near_images import NEAR_DUPLICATE, near_images

    def named(lost: DataFrame, reason: str, detail: Column) -> DataFrame:
        sample_id = sf.substring_index("rank", "-", -1).alias("sample_id")
        return lost.select(
            "slot", sample_id, sf.lit(reason).alias("reason"), detail.alias("detail")
        )

    nothing = sf.lit(None).cast("string")
    found, left = None, images
    if config.same_bytes:
        ranking = Window.partitionBy("sha256").orderBy("rank")
        ranked = images.withColumn("place", sf.row_number().over(ranking))
        left = ranked.where("place = 1").drop("place")
        found = named(ranked.where("place > 1"), DUPLICATE_IMAGE, nothing)
    if config.perceptual is not None:
        near = near_images(left, config.perceptual, num_images)
        like = sf.concat(sf.lit("like "), sf.substring_index("kept", "-", -1))
        lost = named(near, NEAR_DUPLICATE, like)
        found = lost if found is None else found.union(lost)
    if found is None:
        return named(images.limit(0), DUPLICATE_IMAGE, nothing)
    return found
