"""Metadata filters. Each gives a row a reason to be rejected or none; the first reason counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import polars as pl

from pipelines.config import FilterConfig, OnUnknown

PERSONAL_DATA = "personal_data"
_TEXTS = frozenset({"url", "caption", "language"})

Column = Callable[[str], pl.Expr]  # by the name of a canonical column


@dataclass(frozen=True)
class Filter:
    """``rejects`` is a condition over canonical columns; null keeps the row, as False does."""

    rejects: pl.Expr
    reason: str


def metadata_filters(config: FilterConfig, column: Column = pl.col) -> list[Filter]:
    """The filters that are on, in the order in which they are asked."""
    found = [_reject(column("url").str.contains(r"^\s*$"), "no_url")]
    found += _size_filters(config, column)
    found += _threshold(
        column,
        "aesthetic_score",
        config.min_aesthetic_score,
        None,
        "low_aesthetic_score",
        config.unknown.aesthetic_score,
    )
    found += _threshold(
        column,
        "watermark_prob",
        None,
        config.max_watermark_prob,
        "watermarked",
        config.unknown.watermark_prob,
    )
    found += _threshold(
        column, "unsafe_prob", None, config.max_unsafe_prob, "unsafe", config.unknown.unsafe_prob
    )
    found += _threshold(
        column,
        "clip_similarity",
        config.min_clip_similarity,
        None,
        "low_clip_similarity",
        config.unknown.clip_similarity,
    )
    found += _language_filters(config, column)
    if config.max_caption_chars is not None:
        too_long = column("caption").str.len_chars() > config.max_caption_chars
        found.append(_reject(too_long, "caption_too_long"))
    return found


def caption_filters(config: FilterConfig, *, drops_personal: bool = False) -> list[Filter]:
    """Asked of the caption to train on (column ``train_caption``), so after captions are joined.

    ``drops_personal``: rows with ``has_personal_data`` are rejected.
    """
    found = [_reject(pl.col("has_personal_data"), PERSONAL_DATA)] if drops_personal else []
    found.append(_reject(pl.col("train_caption") == "", "no_caption"))
    if config.min_caption_words is not None:
        num_words = pl.col("train_caption").str.split(" ").list.len()
        found.append(_reject(num_words < config.min_caption_words, "short_caption"))
    return found


def unknown_kept(config: FilterConfig) -> dict[OnUnknown, dict[str, pl.Expr]]:
    """Per policy that keeps unknown values, per filter that is on, whether a row's is unknown."""
    asks_for_size = (config.min_width_px, config.min_height_px, config.max_aspect_ratio)
    unknown = config.unknown
    asked: dict[str, tuple[bool, OnUnknown]] = {
        "size": (any(bound is not None for bound in asks_for_size), unknown.size),
        "aesthetic_score": (config.min_aesthetic_score is not None, unknown.aesthetic_score),
        "watermark_prob": (config.max_watermark_prob is not None, unknown.watermark_prob),
        "unsafe_prob": (config.max_unsafe_prob is not None, unknown.unsafe_prob),
        "clip_similarity": (config.min_clip_similarity is not None, unknown.clip_similarity),
        "language": (config.languages is not None, unknown.language),
    }
    is_unknown = {
        "size": pl.col("width_px").is_null() | pl.col("height_px").is_null(),
        "language": pl.col("language").is_null(),
    }
    found: dict[OnUnknown, dict[str, pl.Expr]] = {}
    for name, (is_on, on_unknown) in asked.items():
        if is_on and on_unknown != "drop":
            found.setdefault(on_unknown, {})[name] = is_unknown.get(name, pl.col(name).is_null())
    return found


def first_reason(filters: list[Filter]) -> pl.Expr:
    """The reason of the first filter that rejects, or null."""
    # Numbers, named at the end: text would be copied at every filter.
    names = list(dict.fromkeys(found.reason for found in filters))
    numbers = [
        pl.when(found.rejects).then(pl.lit(names.index(found.reason), dtype=pl.UInt8))
        for found in filters
    ]
    number = pl.coalesce(*numbers, pl.lit(None, dtype=pl.UInt8))
    return pl.lit(pl.Series(names, dtype=pl.String)).gather(number).alias("reason")


def may_stay(config: FilterConfig, column: Column) -> pl.Expr:
    """Whether no filter of numbers rejects a row of raw columns: what all rows that stay fulfil.

    ``column`` gives the expression of a canonical column. Filters of text are left to
    ``first_reason``, so that a reader can decide by numbers which texts it decodes.
    """
    asked = zip(metadata_filters(config), metadata_filters(config, column), strict=True)
    numeric = [
        raw.rejects.fill_null(False)
        for canonical, raw in asked
        if _TEXTS.isdisjoint(canonical.rejects.meta.root_names())
    ]
    return ~pl.any_horizontal(pl.lit(False), *numeric)


def _reject(when: pl.Expr, reason: str) -> Filter:
    return Filter(when, reason)


def _size_filters(config: FilterConfig, column: Column) -> list[Filter]:
    width, height = column("width_px"), column("height_px")
    bounds = (config.min_width_px, config.min_height_px, config.max_aspect_ratio)
    found: list[Filter] = []
    if any(bound is not None for bound in bounds) and config.unknown.size == "drop":
        found.append(_reject(width.is_null() | height.is_null(), "unknown_size"))
    if config.min_width_px is not None or config.min_height_px is not None:
        too_small = (width < (config.min_width_px or 0)) | (height < (config.min_height_px or 0))
        found.append(_reject(too_small, "too_small"))
    if config.max_aspect_ratio is not None:
        ratio = pl.max_horizontal(width, height) / pl.min_horizontal(width, height)
        known = width.is_not_null() & height.is_not_null()
        found.append(_reject(known & (ratio > config.max_aspect_ratio), "aspect_ratio"))
    return found


def _language_filters(config: FilterConfig, column: Column) -> list[Filter]:
    if config.languages is None:
        return []
    language = column("language")
    wanted = sorted({code.strip().lower() for code in config.languages})
    drops = config.unknown.language == "drop"
    found = [_reject(language.is_null(), "unknown_language")] if drops else []
    found.append(_reject(~language.is_in(wanted), "other_language"))
    return found


def _threshold(
    column: Column,
    name: str,
    minimum: float | None,
    maximum: float | None,
    reason: str,
    on_unknown: OnUnknown,
) -> list[Filter]:
    """Nothing when both bounds are off; else the unknown values first, then the bound."""
    if minimum is None and maximum is None:
        return []
    value = column(name)
    found = [_reject(value.is_null(), f"unknown_{name}")] if on_unknown == "drop" else []
    if minimum is not None:
        found.append(_reject(value < minimum, reason))
    if maximum is not None:
        found.append(_reject(value > maximum, reason))
    return found
