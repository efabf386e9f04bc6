"""Captions: cleaned, joined by URL, and one of them chosen to train on."""

from __future__ import annotations

import hashlib
from collections import Counter

import polars as pl
import pyarrow as pa

from infra.errors import UserError
from pipelines.caption_clean import CHANGES, cleaned
from pipelines.caption_config import CaptionConfig
from pipelines.caption_personal import KINDS
from pipelines.caption_tokens import budgeted, load_tokenizer
from pipelines.columns import is_text, refuse_twins, sample_ids

CAPTION_COLUMNS = ("url", "caption", "model")
SHORT_SYNTHETIC = "short_synthetic"
CAPTIONS_TYPE = pl.List(pl.Struct({"origin": pl.String, "text": pl.String, "model": pl.String}))


def check_caption_schema(schema: pa.Schema, file: str) -> None:
    """A long-caption file holds ``url`` and ``caption``, and may hold ``model``, all text."""
    refuse_twins(schema, file)
    for name in CAPTION_COLUMNS:
        index = schema.get_field_index(name)
        kind = schema.field(index).type if index >= 0 else None
        fits = name == "model" if kind is None else is_text(kind)
        if not fits:
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


def with_captions(rows: pl.DataFrame, long: pl.DataFrame, config: CaptionConfig) -> pl.DataFrame:
    """Add ``captions`` (all, alt text first, then synthetic by length) and ``train_caption``.

    ``rows`` has ``url`` and ``caption``, which becomes the clean one; ``long`` has ``url, caption,
    model``. The row order stays. A caption that is empty once cleaned is none. What was done is
    told by ``caption_origin`` (of ``train_caption``: alt, synthetic or null), ``caption_notes``
    (names of ``CHANGES``, ``short_synthetic``, ``cut_at_*``) and ``has_personal_data``.
    """
    ids = rows["sample_id"] if "sample_id" in rows.columns else None
    if ids is None and (config.train_on == "mix" or config.synthetic_choice == "hash"):
        ids = sample_ids(rows)
    alt = cleaned(rows["caption"], config, is_alt=True)
    joined = rows.with_columns(alt["text"].alias("alt")).join(
        _synthetic(long.join(rows, on="url", how="semi"), config),
        on="url",
        how="left",
        maintain_order="left",
    )
    joined = choose_caption(joined, ids, config)
    chosen, cut = within_budget(joined["train_caption"], config)
    alt_list = (
        pl.when(pl.col("alt") != "")
        .then(pl.concat_list(_caption("alt", pl.col("alt"), pl.lit(None, dtype=pl.String))))
        .otherwise(pl.lit([], dtype=CAPTIONS_TYPE))
    )
    flags = [(alt[name] | joined[name].fill_null(False)).alias(name) for name in CHANGES]
    notes = [pl.when(name).then(pl.lit(name)) for name in (*CHANGES, SHORT_SYNTHETIC)]
    noted = joined.with_columns(*flags, cut.alias("cut")).with_columns(
        pl.concat_list(
            alt_list, pl.col("synthetic").fill_null(pl.lit([], dtype=CAPTIONS_TYPE))
        ).alias("captions"),
        pl.concat_list(*notes, pl.lit("cut_at_") + pl.col("cut"))
        .list.drop_nulls()
        .alias("caption_notes"),
        pl.any_horizontal(KINDS).alias("has_personal_data"),
        pl.col("alt").alias("caption"),
        chosen.alias("train_caption"),
    )
    added = ["captions", "train_caption", "caption_origin", "caption_notes", "has_personal_data"]
    return noted.select(*rows.columns, *added)


def _synthetic(long: pl.DataFrame, config: CaptionConfig) -> pl.DataFrame:
    """Per URL its synthetic captions, longest first, their texts, the first by model, and what
    was done to any of them."""
    made = cleaned(long["caption"], config, is_alt=False)
    found = long.drop("caption").hstack(made).filter(pl.col("text") != "")
    num_words = pl.col("text").str.split(" ").list.len()
    found = found.with_columns(
        (num_words < (config.min_synthetic_words or 0)).alias(SHORT_SYNTHETIC)
    )
    ordered = found.sort(
        "url",
        pl.col("text").str.len_chars(),
        "text",
        "model",
        descending=[False, True, False, False],
        nulls_last=True,
    )
    distinct = ordered.unique(["url", "text"], keep="first", maintain_order=True)
    counted = pl.col("text").filter(~pl.col(SHORT_SYNTHETIC))
    model = pl.col("model").filter(~pl.col(SHORT_SYNTHETIC))
    return distinct.group_by("url", maintain_order=True).agg(
        _caption("synthetic", counted, model).alias("synthetic"),
        counted.alias("texts"),
        counted.sort_by(model, counted, nulls_last=True).first().alias("first"),
        *(pl.col(name).any() for name in (*CHANGES, SHORT_SYNTHETIC)),
    )


def choose_caption(
    rows: pl.DataFrame, ids: pl.Series | None, config: CaptionConfig
) -> pl.DataFrame:
    """``train_caption`` and ``caption_origin``, from ``alt``, ``texts`` and ``first``.

    Draws are made by a hash of the sample id: the same whatever order or place a row comes in.
    """
    num_texts = pl.col("texts").list.len().fill_null(0)
    draws = [0.0] * rows.height
    indices = [0] * rows.height
    if ids is not None:
        for position, (sample_id, number) in enumerate(
            zip(ids, rows.select(num_texts).to_series(), strict=True)
        ):
            if number:
                digest = hashlib.sha256(f"{config.mix_seed}\n{sample_id}".encode()).digest()
                draws[position] = int.from_bytes(digest[:8]) / 2**64
                indices[position] = int.from_bytes(digest[8:16]) % number
    if config.synthetic_choice == "first":
        synthetic = pl.col("first")
    else:
        at = indices if config.synthetic_choice == "hash" else [0] * rows.height
        synthetic = pl.col("texts").list.get(pl.lit(pl.Series(at)), null_on_oob=True)
    ratio = {"synthetic": 1.0, "alt": 0.0, "mix": config.synthetic_ratio}[config.train_on]
    has_both = (num_texts > 0) & (pl.col("alt") != "")
    is_synthetic = (num_texts > 0) & (~has_both | (pl.lit(pl.Series(draws)) < ratio))
    origin = (
        pl.when(is_synthetic)
        .then(pl.lit("synthetic"))
        .otherwise(pl.when(pl.col("alt") != "").then(pl.lit("alt")))
    )
    return rows.with_columns(
        pl.when(is_synthetic).then(synthetic).otherwise("alt").alias("train_caption"),
        origin.alias("caption_origin"),
    )


def within_budget(texts: pl.Series, config: CaptionConfig) -> tuple[pl.Series, pl.Series]:
    """The texts within the budget, and where they were cut."""
    if config.token_budget is None:
        return texts, pl.Series([None], dtype=pl.String).new_from_index(0, len(texts))
    made = budgeted(texts, config.token_budget, load_tokenizer(config.tokenizer))
    return made["text"], made["cut"]


def caption_counts(rows: pl.DataFrame) -> dict[str, int]:
    """How many rows have each of ``caption_notes``, and which origin is trained on."""
    counts = Counter(rows["caption_notes"].explode().drop_nulls().to_list())
    for origin in rows["caption_origin"].drop_nulls():
        counts[f"train_on_{origin}"] += 1
    return dict(sorted(counts.items()))


def _caption(origin: str, text: pl.Expr, model: pl.Expr) -> pl.Expr:
    return pl.struct(pl.lit(origin).alias("origin"), text.alias("text"), model.alias("model"))
