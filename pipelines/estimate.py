"""What a curation would keep, store and cost, from a sample of its metadata and nothing fetched.

The sample is of row groups, drawn with replacement and with a chance in proportion to their rows:
the mean of the drawn groups' shares is then an unbiased estimate of the share among all rows,
however files and groups differ (Hansen and Hurwitz, 1943), and the spread between the groups gives
its interval. Inside a group, rows are drawn evenly. Where there are no more groups than would be
drawn, all are read and the shares are exact.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from statistics import NormalDist, fmean, stdev
from typing import Any

import numpy as np
import polars as pl

from infra import storage
from infra.errors import UserError
from infra.manifest import DatasetManifest, load_manifest
from pipelines.captions import with_captions
from pipelines.clusters import Cluster, draw_records, metadata_clusters
from pipelines.columns import canonical_rows, own_captions
from pipelines.config import CurationConfig
from pipelines.filters import caption_filters, first_reason, metadata_filters, unknown_kept
from pipelines.ledger import COMMITTED, REASONS
from pipelines.sources import SOURCE_FORMATS

CONFIDENCE = 0.95
MAX_RECORDS_PER_GROUP = 20_000
_THREADS = 8
# What a row can be rejected for before it is asked for over the web.
_BEFORE_FETCH = REASONS[: REASONS.index("duplicate_row")]
_DUPLICATES = ("duplicate_row", "duplicate_url")


@dataclass(frozen=True)
class Share:
    """``rows`` of all, their ``ratio``, and the half width of its 95 % interval."""

    rows: int
    ratio: float
    margin: float


@dataclass(frozen=True)
class Measured:
    """What an earlier version of the dataset tells: all ratios in [0, 1]."""

    version: str
    fetch_success_ratio: float | None
    duplicate_ratio: float
    bytes_per_sample: float | None


@dataclass(frozen=True)
class Estimate:
    """The funnel before it happens. ``funnel``: reason -> share, in the order of asking.

    ``to_fetch`` is what the metadata leave; ``samples`` what becomes of it after duplicates and
    link rot, with its interval from the sample alone. ``unknown``: policy and value -> share.
    """

    rows_in: int
    rows_sampled: int
    groups_sampled: int
    groups: int
    funnel: dict[str, Share]
    unknown: dict[str, Share]
    to_fetch: Share
    fetches: int
    samples: int
    samples_margin: int
    fetch_success_ratio: float | None
    duplicate_ratio: float | None
    known_from: str
    stored_bytes: int
    core_hours: float
    hours: float
    cost: float | None
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """For a program."""
        return asdict(self)


@dataclass(frozen=True)
class _Judged:
    """A group: its rows, those drawn, how many of these each reason takes, a kept one's pixels."""

    num_rows: int
    num_drawn: int
    reasons: Counter[str]
    pixels: float


def estimate_curation(config: CurationConfig, dataset_root: str) -> Estimate:
    """Sample the metadata and reckon; reads no more than ``estimate.row_groups`` row groups.

    Raises ``UserError`` for inputs that cannot be curated. Deterministic for the same inputs.
    """
    clusters = metadata_clusters(config)
    rows_in = sum(cluster.num_rows for cluster in clusters)
    if rows_in == 0:
        raise UserError("the metadata hold no rows; check `metadata` in the recipe")
    drawn, is_census = _draw([cluster.num_rows for cluster in clusters], config)
    seeds = np.random.SeedSequence(config.estimate.seed).spawn(len(drawn))

    def judge(item: tuple[int, np.random.SeedSequence]) -> _Judged:
        return _judged(clusters[item[0]], config, np.random.default_rng(item[1]))

    with ThreadPoolExecutor(_THREADS) as pool:
        judged = list(pool.map(judge, zip(drawn, seeds, strict=True)))
    if is_census:
        rows_in = sum(found.num_rows for found in judged)

    def share(count: Sequence[int]) -> Share:
        ratio, margin = _ratio(count, judged, is_census)
        return Share(round(ratio * rows_in), ratio, margin)

    names = {name for found in judged for name in found.reasons}
    shares = {name: share([found.reasons[name] for found in judged]) for name in names}
    to_fetch = share(
        [found.num_drawn - sum(found.reasons[name] for name in _BEFORE_FETCH) for found in judged]
    )
    pixels = [found.pixels for found in judged if found.pixels > 0]
    return _reckoned(
        config,
        _measured(dataset_root),
        rows_in=rows_in,
        rows_sampled=sum(found.num_drawn for found in judged),
        groups=(len(drawn), len(clusters)),
        funnel={name: shares[name] for name in _BEFORE_FETCH if name in shares},
        unknown={name: shares[name] for name in sorted(names - set(_BEFORE_FETCH))},
        to_fetch=to_fetch,
        pixels=fmean(pixels) if pixels else float(config.resize.image_size_px**2),
    )


def _draw(num_rows: Sequence[int], config: CurationConfig) -> tuple[list[int], bool]:
    """Indices of the groups to read, and whether they are all."""
    filled = [index for index, number in enumerate(num_rows) if number > 0]
    if len(filled) <= config.estimate.row_groups:
        return filled, True
    sizes = np.array([num_rows[index] for index in filled], np.float64)
    rng = np.random.default_rng(config.estimate.seed)
    drawn = rng.choice(len(filled), config.estimate.row_groups, p=sizes / sizes.sum())
    return sorted(filled[index] for index in drawn.tolist()), False


def _ratio(
    counts: Sequence[int], judged: Sequence[_Judged], is_census: bool
) -> tuple[float, float]:
    """The share among all rows and the half width of its interval."""
    ratios = [count / found.num_drawn for count, found in zip(counts, judged, strict=True)]
    z = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)
    if not is_census:
        student = z + (z**3 + z) / (4 * (len(ratios) - 1))
        return fmean(ratios), student * stdev(ratios) / math.sqrt(len(ratios))
    rows = sum(found.num_rows for found in judged)
    mean = variance = 0.0
    for ratio, found in zip(ratios, judged, strict=True):
        weight = found.num_rows / rows
        mean += weight * ratio
        # Of a group larger than the bound, rows were drawn.
        left_out = 1 - found.num_drawn / found.num_rows
        variance += weight**2 * ratio * (1 - ratio) / found.num_drawn * left_out
    return mean, z * math.sqrt(variance)


def _judged(cluster: Cluster, config: CurationConfig, rng: np.random.Generator) -> _Judged:
    """Ask every filter that needs no image; captions of other files are not looked at."""
    table, num_records = draw_records(cluster, MAX_RECORDS_PER_GROUP, rng)
    layout = cluster.layout
    rows = canonical_rows(table, layout, config.source)
    rows = rows.with_columns(first_reason(metadata_filters(config.filters)))
    if not config.captions.files:
        long = own_captions(table, rows["url"], layout, config.filters.max_caption_chars)
        rows = with_captions(rows, long, config.captions)
        drops = config.captions.personal_data == "drop"
        asked = first_reason(caption_filters(config.filters, drops_personal=drops))
        asked = asked.alias("about_caption")
        rows = rows.with_columns(asked).with_columns(pl.coalesce("reason", "about_caption"))
    reasons = Counter(dict(rows["reason"].drop_nulls().value_counts().iter_rows()))
    kept = rows.filter(pl.col("reason").is_null())
    for policy, values in unknown_kept(config.filters).items():
        for name, is_unknown in values.items():
            reasons[f"{policy}:{name}"] = int(kept.select(is_unknown.sum()).item())
    num_rows = num_records * SOURCE_FORMATS[layout.format].rows_per_record
    return _Judged(num_rows, rows.height, reasons, _stored_pixels(kept, config))


def _stored_pixels(kept: pl.DataFrame, config: CurationConfig) -> float:
    """Mean pixels of a stored image: never enlarged, cropped or not. 0 when no size is known."""
    short = pl.min_horizontal("width_px", "height_px").cast(pl.Float64)
    long = pl.max_horizontal("width_px", "height_px").cast(pl.Float64)
    side = pl.min_horizontal(short, pl.lit(float(config.resize.image_size_px)))
    pixels = side * side if config.resize.crop != "none" else side * side * long / short
    mean = kept.drop_nulls(["width_px", "height_px"]).select(pixels.mean()).item()
    return float(mean) if mean is not None else 0.0


def _measured(dataset_root: str) -> Measured | None:
    """What an earlier version of the dataset says, or None."""
    manifest = _earlier_manifest(dataset_root)
    if manifest is None:
        return None
    rejected = manifest.rejected
    duplicates = sum(rejected.get(name, 0) for name in _DUPLICATES)
    left = manifest.counts["rows_in"] - sum(rejected.get(name, 0) for name in _BEFORE_FETCH)
    fetched = left - duplicates
    samples = manifest.counts[COMMITTED]
    num_bytes = sum(shard.num_bytes for shard in manifest.shards)
    return Measured(
        version=manifest.version,
        fetch_success_ratio=samples / fetched if fetched else None,
        duplicate_ratio=duplicates / left if left else 0.0,
        bytes_per_sample=num_bytes / samples if samples else None,
    )


def _earlier_manifest(dataset_root: str) -> DatasetManifest | None:
    """The version with the most rows: of several recipes, the one that measured most."""
    found = [
        load_manifest(info.uri)
        for info in storage.list_objects(dataset_root)
        if info.uri.endswith("/manifest.json")
    ]
    return max(found, key=lambda known: (known.counts["rows_in"], known.version), default=None)


def _reckoned(
    config: CurationConfig,
    measured: Measured | None,
    *,
    rows_in: int,
    rows_sampled: int,
    groups: tuple[int, int],
    funnel: dict[str, Share],
    unknown: dict[str, Share],
    to_fetch: Share,
    pixels: float,
) -> Estimate:
    asked = config.estimate
    success, duplicates = asked.fetch_success_ratio, asked.duplicate_ratio
    known_from = "recipe" if success is not None else "nothing"
    bytes_per_sample = pixels * asked.bytes_per_pixel
    if measured is not None:
        if success is None and measured.fetch_success_ratio is not None:
            success, known_from = measured.fetch_success_ratio, f"version {measured.version[:12]}"
        duplicates = measured.duplicate_ratio if duplicates is None else duplicates
        bytes_per_sample = measured.bytes_per_sample or bytes_per_sample
    fetches = to_fetch.rows * (1 - (duplicates or 0.0))
    yielded = 1.0 if success is None else success
    core_hours = (
        rows_in / asked.rows_per_core_second + fetches / asked.fetches_per_core_second
    ) / 3600
    price = asked.price_per_core_hour
    return Estimate(
        rows_in=rows_in,
        rows_sampled=rows_sampled,
        groups_sampled=groups[0],
        groups=groups[1],
        funnel=funnel,
        unknown=unknown,
        to_fetch=to_fetch,
        fetches=round(fetches),
        samples=round(fetches * yielded),
        samples_margin=round(to_fetch.margin * rows_in * (1 - (duplicates or 0.0)) * yielded),
        fetch_success_ratio=success,
        duplicate_ratio=duplicates,
        known_from=known_from,
        stored_bytes=round(fetches * yielded * bytes_per_sample),
        core_hours=core_hours,
        hours=core_hours / (asked.num_cores or os.cpu_count() or 1),
        cost=None if price is None else core_hours * price,
        notes=_notes(config, success, duplicates),
    )


def _notes(
    config: CurationConfig, success: float | None, duplicates: float | None
) -> tuple[str, ...]:
    """What the figures leave out."""
    notes = []
    if success is None:
        notes.append("link rot is not known: set estimate.fetch_success_ratio")
    if duplicates is None:
        notes.append("copies are not known: set estimate.duplicate_ratio")
    if config.captions.files:
        notes.append("captions are joined later: filters on the caption to train on are not asked")
    return tuple(notes)
