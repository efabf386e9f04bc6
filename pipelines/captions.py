"""Captions: cleaned, joined by URL, and one of them chosen to train on."""

from __future__ import annotations

from typing import Literal

import polars as pl
import pyarrow as pa

from infra.errors import UserError

CAPTION_COLUMNS = ("url", "caption", "model")
# Control, format (zero width, bidi), private and unassigned characters draw nothing honest.
_INVISIBLE = r"[\p{Cc}\p{Cf}\p{Co}\p{Cn}]"
CAPTIONS_TYPE = pl.List(pl.Struct({"origin": pl.String, "text": pl.String, "model": pl.String}))


def clean_text(text: pl.Expr) -> pl.Expr:
    """One line, composed (NFC), without invisible characters: safe in logs, pages and prompts."""
    one_line = text.str.replace_all(r"\s+", " ")
    visible = one_line.str.replace_all(_INVISIBLE, "").str.normalize("NFC")
    return visible.str.replace_all(r"\s+", " ").str.strip_chars(" ")


def check_caption_schema(schema: pa.Schema, file: str) -> None:
    """A long-caption file holds ``url`` and ``caption``, and may hold ``model``, all text."""
    for name in CAPTION_COLUMNS:
        index = schema.get_field_index(name)
        kind = schema.field(index).type if index >= 0 else None
        is_text = kind is not None and (pa.types.is_string(kind) or pa.types.is_large_string(kind))
        if not is_text and not (kind is None and name == "model"):
            raise UserError(
                expected=f"text columns url, caption and perhaps model in {file}",
                got=f"columns {', '.join(f'{field.name} {field.type}' for field in schema)}",
                remedy="point `captions.files` at parquet with long captions keyed by url",
            )


def canonical_captions(
    table: pa.Table | pl.DataFrame, max_caption_chars: int | None
) -> pl.DataFrame:
    """``url, caption, model`` as text; longer captions than the bound are left out."""
    frame = pl.DataFrame(table)
    if "model" not in frame.columns:
        frame = frame.with_columns(pl.lit(None, dtype=pl.String).alias("model"))
    frame = frame.select(pl.col(name).cast(pl.String) for name in CAPTION_COLUMNS)
    frame = frame.drop_nulls(["url", "caption"])
    if max_caption_chars is not None:
        frame = frame.filter(pl.col("caption").str.len_chars() <= max_caption_chars)
    return frame


def with_captions(
    rows: pl.DataFrame, long: pl.DataFrame, train_on: Literal["synthetic", "alt"]
) -> pl.DataFrame:
    """Add ``captions`` (all, alt text first, then synthetic by length) and ``train_caption``.

    ``rows`` has ``url`` and ``caption``; ``long`` has ``url, caption, model``. The row order stays.
    A caption that is empty once cleaned is none.
    """
    synthetic = (
        long.with_columns(clean_text(pl.col("caption")).alias("text"))
        .filter(pl.col("text") != "")
        .sort(
            "url",
            pl.col("text").str.len_chars(),
            "text",
            "model",
            descending=[False, True, False, False],
            nulls_last=True,
        )
        .unique(["url", "text"], keep="first", maintain_order=True)
        .group_by("url", maintain_order=True)
        .agg(
            _caption("synthetic", pl.col("text"), pl.col("model")).alias("synthetic"),
            pl.col("text").first().alias("longest"),
        )
    )
    alt = clean_text(pl.col("caption"))
    joined = rows.with_columns(alt.alias("alt")).join(
        synthetic, on="url", how="left", maintain_order="left"
    )
    alt_list = (
        pl.when(pl.col("alt") != "")
        .then(pl.concat_list(_caption("alt", pl.col("alt"), pl.lit(None, dtype=pl.String))))
        .otherwise(pl.lit([], dtype=CAPTIONS_TYPE))
    )
    preferred = ["longest", "alt"] if train_on == "synthetic" else ["alt", "longest"]
    chosen = [pl.when(pl.col(name) != "").then(pl.col(name)) for name in preferred]
    return joined.with_columns(
        pl.concat_list(
            alt_list, pl.col("synthetic").fill_null(pl.lit([], dtype=CAPTIONS_TYPE))
        ).alias("captions"),
        pl.coalesce(*chosen, pl.lit("")).alias("train_caption"),
    ).drop("alt", "synthetic", "longest")


def _caption(origin: str, text: pl.Expr, model: pl.Expr) -> pl.Expr:
    return pl.struct(pl.lit(origin).alias("origin"), text.alias("text"), model.alias("model"))
