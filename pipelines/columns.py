"""LAION's drifting schemas, renamed once into ours.

``layout_of`` checks a file's schema in milliseconds, before any work; ``canonical_rows`` turns a
piece of the file into canonical rows. Values that say nothing (NULL, NaN, a probability of -1, a
width of 0) become null here, so that later steps know one kind of unknown only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl
import pyarrow as pa

from infra.errors import UserError
from pipelines.config import CurationConfig, FilterConfig

SAMPLE_ID_CHARS = 32
MAX_SIDE_PX = 1_000_000

# Canonical column -> the names it goes by, the first one present wins.
LAION_COLUMNS: dict[str, tuple[str, ...]] = {
    "url": ("url", "URL", "image_url"),
    "caption": ("caption", "TEXT", "text", "org_caption"),
    "width_px": ("original_width", "WIDTH", "width"),
    "height_px": ("original_height", "HEIGHT", "height"),
    "clip_similarity": ("similarity", "clip_l14_similarity_score", "clip_similarity_vitb32"),
    "unsafe_prob": ("punsafe", "nsfw_score_opennsfw2"),
    "watermark_prob": ("pwatermark", "watermark_score"),
    "language": ("LANGUAGE", "language"),
}
AESTHETIC_COLUMNS: dict[str, tuple[str, ...]] = {
    "v1": ("aesthetic",),
    "v2": ("AESTHETIC_SCORE", "aesthetic_score_laion_v2"),
}
# Raw laion2B-en files carry these and have WIDTH and HEIGHT exchanged; the joined ones are right.
RAW_LAION_COLUMNS = frozenset({"SAMPLE_ID", "LICENSE", "NSFW", "WIDTH", "HEIGHT"})

# Values outside are unknown, not extreme.
RANGES: dict[str, tuple[float, float]] = {
    "clip_similarity": (-1.0, 1.0),
    "unsafe_prob": (0.0, 1.0),
    "watermark_prob": (0.0, 1.0),
    "aesthetic_score": (0.0, 10.0),
}

CANONICAL_SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("url", pa.string()),
        ("caption", pa.string()),
        ("width_px", pa.int32()),
        ("height_px", pa.int32()),
        ("clip_similarity", pa.float64()),
        ("unsafe_prob", pa.float64()),
        ("watermark_prob", pa.float64()),
        ("aesthetic_score", pa.float64()),
        ("aesthetic_scale", pa.string()),
        ("language", pa.string()),
        ("source", pa.string()),
    ]
)
_TEXT_COLUMNS = frozenset({"url", "caption", "language"})


@dataclass(frozen=True)
class Layout:
    """How one file spells the canonical columns."""

    names: dict[str, str]
    aesthetic_scale: str | None
    swapped_sizes: bool

    @property
    def columns(self) -> list[str]:
        """The file's columns to read."""
        return list(self.names.values())


def sample_id(url: str, caption: str) -> str:
    """The identity of a row: 32 hex digits of the sha256 over URL, line feed, caption."""
    return hashlib.sha256(f"{url}\n{caption}".encode()).hexdigest()[:SAMPLE_ID_CHARS]


def layout_of(schema: pa.Schema, config: CurationConfig, file: str) -> Layout:
    """Match ``schema`` with the canonical columns; a ``UserError`` lists all that does not fit.

    URL and caption must be there, and whatever a filter that is on looks at.
    """
    found = set(schema.names)
    names = {
        canonical: name
        for canonical, spellings in LAION_COLUMNS.items()
        if (name := _first(spellings, found)) is not None
    }
    scale = config.filters.aesthetic_scale
    spelled = _first(AESTHETIC_COLUMNS[scale], found)
    if spelled is None and config.filters.min_aesthetic_score is None:
        scale = "v1" if scale == "v2" else "v2"
        spelled = _first(AESTHETIC_COLUMNS[scale], found)
    if spelled is not None:
        names["aesthetic_score"] = spelled
    problems = _missing(names, config.filters) + _mistyped(schema, names)
    if problems:
        raise UserError(
            expected=f"{', '.join(problems)} in {file}",
            got=f"columns {', '.join(f'{field.name} {field.type}' for field in schema)}",
            remedy="point `metadata` at LAION-shaped parquet, or switch the filter off (null)",
        )
    swapped = config.swapped_sizes
    return Layout(
        names=names,
        aesthetic_scale=scale if spelled is not None else None,
        swapped_sizes=found >= RAW_LAION_COLUMNS if swapped is None else swapped,
    )


def _first(spellings: Sequence[str], found: set[str]) -> str | None:
    return next((name for name in spellings if name in found), None)


def _missing(names: dict[str, str], filters: FilterConfig) -> list[str]:
    asks_for_size = (filters.min_width_px, filters.min_height_px, filters.max_aspect_ratio)
    required = {
        "url": True,
        "caption": True,
        "width_px": any(bound is not None for bound in asks_for_size),
        "height_px": any(bound is not None for bound in asks_for_size),
        "aesthetic_score": filters.min_aesthetic_score is not None,
        "watermark_prob": filters.max_watermark_prob is not None,
        "unsafe_prob": filters.max_unsafe_prob is not None,
        "clip_similarity": filters.min_clip_similarity is not None,
    }
    spellings = LAION_COLUMNS | {"aesthetic_score": AESTHETIC_COLUMNS[filters.aesthetic_scale]}
    return [
        f"{canonical} ({' or '.join(spellings[canonical])})"
        for canonical, is_required in required.items()
        if is_required and canonical not in names
    ]


def _mistyped(schema: pa.Schema, names: dict[str, str]) -> list[str]:
    problems = []
    for canonical, name in names.items():
        kind = schema.field(name).type
        if canonical in _TEXT_COLUMNS:
            fits = pa.types.is_string(kind) or pa.types.is_large_string(kind)
        else:
            fits = pa.types.is_integer(kind) or pa.types.is_floating(kind)
        if not (fits or pa.types.is_null(kind)):
            problems.append(f"{name} as {'text' if canonical in _TEXT_COLUMNS else 'a number'}")
    return problems


def canonical_rows(table: pa.Table, layout: Layout, source: str) -> pl.DataFrame:
    """Rows of ``CANONICAL_SCHEMA`` in the order of ``table``. Memory: about twice the table."""
    raw = pl.DataFrame(pl.from_arrow(table))
    names = dict(layout.names)
    if layout.swapped_sizes and "width_px" in names and "height_px" in names:
        names["width_px"], names["height_px"] = names["height_px"], names["width_px"]

    def column(canonical: str, dtype: pl.DataType) -> pl.Expr:
        if canonical not in names:
            return pl.lit(None, dtype=dtype).alias(canonical)
        return pl.col(names[canonical]).cast(dtype, strict=False).alias(canonical)

    def score(canonical: str) -> pl.Expr:
        low, high = RANGES[canonical]
        value = column(canonical, pl.Float64())
        # Polars ranks NaN above every number, so it falls out with what is out of range.
        return pl.when(value.is_between(low, high)).then(value)

    def side(canonical: str) -> pl.Expr:
        value = column(canonical, pl.Float64())
        return pl.when(value.is_between(1, MAX_SIDE_PX)).then(value).cast(pl.Int32).alias(canonical)

    rows = raw.select(
        column("url", pl.String()).fill_null(""),
        column("caption", pl.String()).fill_null(""),
        side("width_px"),
        side("height_px"),
        *(score(name).alias(name) for name in RANGES),
        pl.lit(layout.aesthetic_scale, dtype=pl.String).alias("aesthetic_scale"),
        column("language", pl.String()),
        pl.lit(source).alias("source"),
    )
    ids = [sample_id(url, caption) for url, caption in rows.select("url", "caption").iter_rows()]
    rows = rows.with_columns(pl.Series("sample_id", ids, dtype=pl.String))
    return rows.select(CANONICAL_SCHEMA.names)
