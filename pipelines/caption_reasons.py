"""Why a row does not stay for its captions' sake; asked by a curation and by its estimate alike."""

from __future__ import annotations

import polars as pl

from pipelines.config import CurationConfig
from pipelines.decontaminate import CONTAMINATED, contaminated
from pipelines.filters import caption_filters, first_reason


def with_caption_reasons(rows: pl.DataFrame, config: CurationConfig) -> pl.DataFrame:
    """Rows that ``captions.with_captions`` made, with a ``reason`` or null."""
    drops = config.captions.personal_data == "drop"
    rows = rows.with_columns(first_reason(caption_filters(config.filters, drops_personal=drops)))
    repeats = contaminated(rows, config.decontaminate) & rows["reason"].is_null()
    return rows.with_columns(
        pl.when(repeats).then(pl.lit(CONTAMINATED)).otherwise("reason").alias("reason")
    )
