"""Any published schema, renamed once into ours.

``layout_of`` checks a file's schema in milliseconds, before any work; ``canonical_rows`` turns a
piece of the file into canonical rows. Values that say nothing (NULL, NaN, a probability of -1, a
width of 0) become null here, so that later steps know one kind of unknown only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import polars as pl
import polars_hash
import pyarrow as pa

from infra.errors import UserError
from pipelines.config import CurationConfig, FilterConfig, FormatName, OnUnknown
from pipelines.filters import may_stay
from pipelines.sources import SOURCE_FORMATS, Container, SyntheticColumn, format_of

SAMPLE_ID_CHARS = 32
MAX_SIDE_PX = 1_000_000

# Values outside are unknown, not extreme.
RANGES: dict[str, tuple[float, float]] = {
    "clip_similarity": (-1.0, 1.0),
    "unsafe_prob": (0.0, 1.0),
    "watermark_prob": (0.0, 1.0),
    "aesthetic_score": (0.0, 10.0),
    "human_preference": (0.0, 1.0),
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
        ("human_preference", pa.float64()),
        ("recorded_sha256", pa.string()),
        ("recorded_md5", pa.string()),
    ]
)
# Of the bytes as downloaded; anything but a digest in hex is unknown.
DIGESTS = {"recorded_sha256": r"^[0-9a-f]{64}$", "recorded_md5": r"^[0-9a-f]{32}$"}
_TEXT_COLUMNS = frozenset({"url", "caption", "language", *DIGESTS})
_WATERMARK, _NO_WATERMARK = 0, (1, 2)  # PixelProse's classes: watermark, none, other text
_NO_LANGUAGE = ("", "xx", "und")  # codes that name none

RawRows: TypeAlias = pa.Table | pl.DataFrame  # columns as a file has them


@dataclass(frozen=True)
class Layout:
    """How one file spells the canonical columns, once per image of a record."""

    format: FormatName
    views: tuple[Mapping[str, str], ...]
    synthetic: tuple[SyntheticColumn, ...]
    aesthetic_scale: str | None
    swapped_sizes: bool
    watermark_class: str | None = None
    url_prefix: str = ""

    @property
    def has_digests(self) -> bool:
        """Whether the file says what the bytes of its images were."""
        return any(not DIGESTS.keys().isdisjoint(view) for view in self.views)

    @property
    def columns(self) -> list[str]:
        """The file's columns to read."""
        names = [name for view in self.views for name in view.values()]
        for found in self.synthetic:
            names += [found.column] + ([found.model_column] if found.model_column else [])
        return list(dict.fromkeys(names + ([self.watermark_class] if self.watermark_class else [])))


def sample_id(url: str, caption: str) -> str:
    """The identity of a row: 32 hex digits of the sha256 over URL, line feed, caption."""
    return hashlib.sha256(f"{url}\n{caption}".encode()).hexdigest()[:SAMPLE_ID_CHARS]


def sample_ids(rows: pl.DataFrame) -> pl.Series:
    """``sample_id`` of every row of a frame with ``url`` and ``caption``, neither of them null."""
    text = polars_hash.concat_str("url", pl.lit("\n"), "caption")
    digests = text.chash.sha2_256().str.head(SAMPLE_ID_CHARS)
    return rows.select(digests.alias("sample_id")).to_series()


def layout_of(
    schema: pa.Schema, config: CurationConfig, file: str, container: Container = "parquet"
) -> Layout:
    """Match ``schema`` with a published one; a ``UserError`` lists all that does not fit.

    URL and caption must be there, and whatever a filter that is on looks at, on its scale.
    """
    refuse_twins(schema, file)
    are_sizes_told = config.swapped_sizes is not None
    name = format_of(schema.names, container, config.format, file, are_sizes_told=are_sizes_told)
    known = SOURCE_FORMATS[name]
    found = set(schema.names)
    shared = _present(known.columns, found)
    scale, spelled = _aesthetic(known.aesthetic, config.filters, found)
    if spelled is not None:
        shared["aesthetic_score"] = spelled
    views = tuple(shared | _present(view, found) for view in known.views)
    synthetic = tuple(
        SyntheticColumn(
            column.column,
            column.model,
            column.model_column if column.model_column in found else None,
            column.prefix,
        )
        for column in known.synthetic
        if column.column in found
    )
    by_class = known.watermark_class if known.watermark_class in found else None
    _refuse_scale(known.aesthetic, scale, config.filters, name, file)
    has = set(views[0]) | ({"watermark_prob"} if by_class else set())
    problems = _missing(has, config.filters) + _mistyped(schema, views, synthetic)
    if known.has_paths and config.image_base_url is None:
        problems.append("`image_base_url` in the recipe, for the images are named by paths,")
    if problems:
        raise UserError(
            expected=f"{', '.join(problems)} in {file} ({name})",
            got=f"columns {', '.join(f'{field.name} {field.type}' for field in schema)}",
            remedy="take a set that has them, or switch the filter off (null) or its unknown "
            "policy to keep or later",
        )
    swapped = config.swapped_sizes
    return Layout(
        format=name,
        views=views,
        synthetic=synthetic,
        aesthetic_scale=scale,
        swapped_sizes=known.swapped_sizes if swapped is None else swapped,
        watermark_class=by_class,
        url_prefix=(config.image_base_url or "") if known.has_paths else "",
    )


def refuse_twins(schema: pa.Schema, file: str) -> None:
    """Two columns of one name: nobody can say which is meant."""
    twins = sorted({name for name in schema.names if len(schema.get_all_field_indices(name)) > 1})
    if twins:
        raise UserError(
            expected=f"every column of {file} once",
            got=f"{', '.join(twins)} more than once",
            remedy="rename or remove the copies",
        )


def _present(spellings: Mapping[str, tuple[str, ...]], found: set[str]) -> dict[str, str]:
    chosen = {
        canonical: next((name for name in names if name in found), None)
        for canonical, names in spellings.items()
    }
    return {canonical: name for canonical, name in chosen.items() if name is not None}


def _aesthetic(
    columns: Sequence[tuple[str, str]], filters: FilterConfig, found: set[str]
) -> tuple[str | None, str | None]:
    """The scale and the column read: the recipe's scale where both are there."""
    there = {scale: name for scale, name in columns if name in found}
    scale = filters.aesthetic_scale if filters.aesthetic_scale in there else min(there, default="")
    return (scale, there[scale]) if scale else (None, None)


def _refuse_scale(
    columns: Sequence[tuple[str, str]],
    scale: str | None,
    filters: FilterConfig,
    name: str,
    file: str,
) -> None:
    """A threshold means nothing on the other scale, whatever happens to unknown scores."""
    wanted = filters.aesthetic_scale
    if filters.min_aesthetic_score is None or scale is None or scale == wanted:
        return
    raise UserError(
        expected=f"aesthetic scores on scale {wanted} in {file}",
        got=f"scale {scale} ({name}, column {dict(columns)[scale]}), which is another",
        remedy=f"set filters.aesthetic_scale to {scale} with a threshold for it, or "
        "filters.min_aesthetic_score to null",
    )


def _missing(has: set[str], filters: FilterConfig) -> list[str]:
    asks_for_size = any(
        bound is not None
        for bound in (filters.min_width_px, filters.min_height_px, filters.max_aspect_ratio)
    )
    unknown = filters.unknown
    asked: dict[str, tuple[bool, OnUnknown]] = {
        "url": (True, "drop"),
        "caption": (True, "drop"),
        "width_px": (asks_for_size, unknown.size),
        "height_px": (asks_for_size, unknown.size),
        "aesthetic_score": (filters.min_aesthetic_score is not None, unknown.aesthetic_score),
        "watermark_prob": (filters.max_watermark_prob is not None, unknown.watermark_prob),
        "unsafe_prob": (filters.max_unsafe_prob is not None, unknown.unsafe_prob),
        "clip_similarity": (filters.min_clip_similarity is not None, unknown.clip_similarity),
        "language": (filters.languages is not None, unknown.language),
    }
    return [
        f"a column for {canonical}"
        for canonical, (is_on, on_unknown) in asked.items()
        if is_on and on_unknown == "drop" and canonical not in has
    ]


def _mistyped(
    schema: pa.Schema, views: Sequence[Mapping[str, str]], synthetic: Sequence[SyntheticColumn]
) -> list[str]:
    wanted = {
        name: canonical in _TEXT_COLUMNS for view in views for canonical, name in view.items()
    }
    problems = []
    for name, wants_text in wanted.items():
        kind = schema.field(name).type
        fits = (
            is_text(kind) if wants_text else pa.types.is_integer(kind) or pa.types.is_floating(kind)
        )
        if not (fits or pa.types.is_null(kind)):
            problems.append(f"{name} as {'text' if wants_text else 'a number'}")
    for column in synthetic:
        kind = schema.field(column.column).type
        is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
        if not (is_text(kind.value_type if is_list else kind) or pa.types.is_null(kind)):
            problems.append(f"{column.column} as text")
    return problems


def is_text(kind: pa.DataType) -> bool:
    """Whether a column holds text, plain or as categories."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    )


def canonical_rows(table: RawRows, layout: Layout, source: str) -> pl.DataFrame:
    """Rows of ``CANONICAL_SCHEMA`` in the order of ``table``, one view after the other.

    Without ``sample_id``: see ``sample_ids``. Memory: about twice the table.
    """
    raw = pl.DataFrame(table)
    views = [raw.select(_expressions(layout, view, source)) for view in layout.views]
    return pl.concat(views) if len(views) > 1 else views[0]


def records_that_may_stay(layout: Layout, filters: FilterConfig) -> pl.Expr:
    """A condition over a file's own columns that every record with a row to keep fulfils."""
    conditions = []
    for view in layout.views:
        known = {each.meta.output_name(): each for each in _expressions(layout, view, "")}
        conditions.append(may_stay(filters, known.__getitem__))
    return pl.any_horizontal(*conditions)


def _expressions(layout: Layout, view: Mapping[str, str], source: str) -> list[pl.Expr]:
    names = dict(view)
    if layout.swapped_sizes and "width_px" in names and "height_px" in names:
        names["width_px"], names["height_px"] = names["height_px"], names["width_px"]

    def column(canonical: str, dtype: pl.DataType) -> pl.Expr:
        if canonical not in names:
            return pl.lit(None, dtype=dtype).alias(canonical)
        return pl.col(names[canonical]).cast(dtype, strict=False).alias(canonical)

    def score(canonical: str) -> pl.Expr:
        if canonical == "watermark_prob" and layout.watermark_class is not None:
            found = pl.col(layout.watermark_class)
            is_clean = pl.when(found.is_in(_NO_WATERMARK)).then(0.0)
            return pl.when(found == _WATERMARK).then(1.0).otherwise(is_clean).alias(canonical)
        if canonical not in names:
            return column(canonical, pl.Float64())
        low, high = RANGES[canonical]
        value = column(canonical, pl.Float64())
        # Polars ranks NaN above every number, so it falls out with what is out of range.
        return pl.when(value.is_between(low, high)).then(value).alias(canonical)

    def side(canonical: str) -> pl.Expr:
        if canonical not in names:
            return column(canonical, pl.Int32())
        value = column(canonical, pl.Float64())
        return pl.when(value.is_between(1, MAX_SIDE_PX)).then(value).cast(pl.Int32).alias(canonical)

    def digest(canonical: str) -> pl.Expr:
        if canonical not in names:
            return column(canonical, pl.String())
        lower = column(canonical, pl.String()).str.to_lowercase()
        return pl.when(lower.str.contains(DIGESTS[canonical])).then(lower).alias(canonical)

    url = column("url", pl.String()).fill_null("")
    if layout.url_prefix:
        path = url.str.strip_prefix("./").str.strip_chars_start("/")
        url = pl.when(path != "").then(pl.lit(layout.url_prefix) + path).otherwise(pl.lit(""))
    language: pl.Expr = column("language", pl.String())
    if "language" in names:
        code = language.str.strip_chars().str.to_lowercase()
        language = pl.when(~code.is_in(_NO_LANGUAGE)).then(code).alias("language")
    return [
        url.alias("url"),
        column("caption", pl.String()).fill_null(""),
        side("width_px"),
        side("height_px"),
        score("clip_similarity"),
        score("unsafe_prob"),
        score("watermark_prob"),
        score("aesthetic_score"),
        pl.lit(layout.aesthetic_scale, dtype=pl.String).alias("aesthetic_scale"),
        language,
        pl.lit(source).alias("source"),
        score("human_preference"),
        *map(digest, DIGESTS),
    ]


def own_captions(
    table: RawRows, urls: pl.Series, layout: Layout, max_chars: int | None
) -> pl.DataFrame:
    """The long captions inside ``table``: ``url, caption, model``; ``urls`` are its rows' URLs.

    A row whose URL is null has none. Captions that are empty or longer than the bound are left out.
    """
    raw = pl.DataFrame(table)
    frames = [pl.DataFrame(schema={"url": pl.String, "caption": pl.String, "model": pl.String})]
    for found in layout.synthetic:
        model = pl.lit(found.model)
        if found.model_column is not None:
            model = pl.coalesce(pl.col(found.model_column).cast(pl.String), model)
        frame = raw.select(
            urls.alias("url"), pl.col(found.column).alias("caption"), model.alias("model")
        ).drop_nulls("url")
        if isinstance(frame.schema["caption"], pl.List):
            frame = frame.explode("caption")
        caption = pl.col("caption").cast(pl.String).str.strip_chars()
        caption = caption.str.strip_prefix(found.prefix).str.strip_chars()
        frames.append(frame.with_columns(caption).filter(pl.col("caption") != ""))
    captions = pl.concat(frames)
    if max_chars is None:
        return captions
    return captions.filter(pl.col("caption").str.len_chars() <= max_chars)
