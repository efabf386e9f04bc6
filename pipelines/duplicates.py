"""Which of several copies stays: the highest aesthetic score, then the smallest sample id.

The rule is a total order on content, so the same rows give the same survivors whatever file,
partition or attempt they came through. An unknown score ranks below every known one.
"""

from __future__ import annotations

import functools
import struct
from typing import TYPE_CHECKING

import polars as pl

from pipelines.config import CurationConfig
from pipelines.duplicate_config import PerceptualConfig
from pipelines.spelling import one_addresses

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame

DUPLICATE_ROW = "duplicate_row"
DUPLICATE_URL = "duplicate_url"
DUPLICATE_IMAGE = "duplicate_image"
DUPLICATE_OF_OTHER = "duplicate_of_other"
CONTAMINATED_IMAGE = "contaminated_image"
PLACEHOLDER = "placeholder"
NEAR_DUPLICATE = "near_duplicate"
LIKE = "like "  # what the detail of a copy begins with, before the id of the one that stays
# What is compared of an image, and what comes of it. ``slot`` is whose task writes the image,
# negative for none; ``caption`` tells captions apart.
IMAGES = "slot int, rank string, sha256 string, signature binary, caption long"
DUPLICATES = "slot int, sample_id string, reason string, detail string"
_AS_INTEGER = struct.Struct(">q")
_GREATEST = (1 << 63) - 1
# What ranks of images that are in no partition begin with: before any round's, and by what is
# said of images like them.
REFERENCE = "!"
_REFERENCES = {CONTAMINATED_IMAGE: f"{REFERENCE}0-", DUPLICATE_OF_OTHER: f"{REFERENCE}1-"}


def row_duplicates(rows: pl.DataFrame, *, same_url: bool) -> pl.Series:
    """Per row ``duplicate_row`` (URL and caption seen), ``duplicate_url`` or null.

    A URL is seen whatever its spelling. Rows with a ``reason`` already do not take part. Rows alike
    in URL, caption and score are told apart by their other columns, so that the survivor does not
    depend on the input's order.
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
            pl.col("url")
            .map_batches(one_addresses, return_dtype=pl.String)
            .is_first_distinct()
            .alias("first_of_url"),
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


def reference_rank(reason: str, sample_id: str) -> str:
    """The rank of an image that is never rejected, and for whose sake others are."""
    return f"{_REFERENCES[reason]}{sample_id}"


def duplicates_among(images: DataFrame, config: CurationConfig, num_images: int) -> DataFrame:
    """The ``DUPLICATES`` of all images: who does not stay, and why.

    ``images`` has ``IMAGES``; ``num_images`` is about how many there are. Spark shuffles by sha256,
    and what is left by what it looks like. First go pictures that stand for others (placeholders),
    for none of their copies is what its caption says.
    """
    from pyspark.sql import Window
    from pyspark.sql import functions as sf

    from pipelines.near_images import near_images

    asked = config.duplicates
    by_bytes = Window.partitionBy("sha256")
    parts: list[DataFrame] = []
    if asked.placeholder_captions is not None:
        captions = sf.size(sf.collect_set("caption").over(by_bytes)).alias("captions")
        counted = images.select("*", captions).persist()
        gone = (sf.col("captions") >= asked.placeholder_captions) & (sf.col("slot") >= 0)
        told = sf.concat(sf.col("captions").cast("string"), sf.lit(" captions"))
        parts.append(_named(counted.where(gone), sf.lit(PLACEHOLDER), told))
        images = counted.where(~gone).drop("captions")
    ranking = by_bytes.orderBy("rank")
    ranked = images.select(
        "*",
        sf.row_number().over(ranking).alias("place"),
        sf.first("rank").over(ranking).alias("kept"),
    )
    is_lost = sf.col("place") > 1
    if not asked.same_bytes:
        is_lost &= sf.col("kept").startswith(REFERENCE)
    lost = ranked.where(is_lost)
    parts.append(_named(lost, _reason(DUPLICATE_IMAGE), _like()))
    if config.signs_images:
        left = ranked.where(~is_lost).where("signature is not null")
        perceptual = asked.perceptual or PerceptualConfig()
        among = asked.perceptual is not None
        near = near_images(left, perceptual, num_images, among_all=among)
        parts.append(_named(near, _reason(NEAR_DUPLICATE), _like()))
    return functools.reduce(lambda one, other: one.union(other), parts)


def _named(lost: DataFrame, reason: Column, detail: Column) -> DataFrame:
    from pyspark.sql import functions as sf

    sample_id = sf.substring_index("rank", "-", -1).alias("sample_id")
    return lost.select("slot", sample_id, reason.alias("reason"), detail.alias("detail"))


def _like() -> Column:
    from pyspark.sql import functions as sf

    return sf.concat(sf.lit(LIKE), sf.substring_index("kept", "-", -1))


def _reason(among: str) -> Column:
    """``among`` for what is like another of the dataset; else by the rank of what it is like."""
    from pyspark.sql import functions as sf

    reason = sf.lit(among)
    for name, prefix in _REFERENCES.items():
        reason = sf.when(sf.col("kept").startswith(prefix), sf.lit(name)).otherwise(reason)
    return reason
