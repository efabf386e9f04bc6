"""Which of several copies stays: the highest aesthetic score, then the smallest sample id.

The rule is a total order on content, so the same rows give the same survivors whatever file,
partition or attempt they came through. An unknown score ranks below every known one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import polars as pl

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

DUPLICATE_ROW = "duplicate_row"
DUPLICATE_URL = "duplicate_url"
DUPLICATE_IMAGE = "duplicate_image"


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


def image_duplicates(images: DataFrame) -> DataFrame:
    """The ``(slot, sample_id)`` of every image that another with the same bytes outranks.

    ``images`` has ``slot, sample_id, aesthetic_score, sha256, round``; Spark shuffles by
    ``sha256``. What an earlier round committed stays, whatever a retry brings.
    """
    from pyspark.sql import Window
    from pyspark.sql import functions as sf

    ranking = Window.partitionBy("sha256").orderBy(
        sf.col("round"), sf.col("aesthetic_score").desc_nulls_last(), sf.col("sample_id")
    )
    ranked = images.withColumn("rank", sf.row_number().over(ranking))
    return ranked.where("rank > 1").select("slot", "sample_id")
