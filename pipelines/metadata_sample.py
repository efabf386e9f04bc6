"""A sample of the metadata, and what each filter takes of it.

The sample is of row groups: all rows are cut into as many even stretches as there are draws, and of
each stretch the group is taken in which one random row lies. A group's chance is in proportion to
its rows, so the mean of the drawn groups' shares is an unbiased estimate of the share among all
rows, however files and groups differ, and where files are sorted by a score, all their scores are
in it. The spread between the groups gives an interval, too wide rather than too narrow where rows
are sorted. Inside a group, rows are drawn evenly. Where there are no more groups than would be
drawn, all are read and the shares are exact.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev

import numpy as np
import polars as pl

from infra.errors import UserError
from pipelines.caption_reasons import with_caption_reasons
from pipelines.captions import with_captions
from pipelines.clusters import Cluster, draw_records, metadata_clusters
from pipelines.columns import canonical_rows, own_captions
from pipelines.config import CurationConfig
from pipelines.decontaminate import CONTAMINATED
from pipelines.filters import first_reason, metadata_filters, unknown_kept
from pipelines.foreseen import BY_METADATA
from pipelines.inputs import is_tar
from pipelines.read_rows import without_removed
from pipelines.sources import SOURCE_FORMATS
from pipelines.spelling import one_addresses
from pipelines.tombstones import Tombstones

MAX_RECORDS_PER_GROUP = 20_000
Z_SCORE = NormalDist().inv_cdf(0.975)  # of 95 % intervals
_THREADS = 8


@dataclass(frozen=True)
class Share:
    """``rows`` of all, their ``ratio``, and the half width of its 95 % interval."""

    rows: int
    ratio: float
    margin: float


@dataclass(frozen=True)
class MetadataSample:
    """What a sample says of all ``rows_in``. ``funnel``: reason -> share, in the order of asking.

    ``to_fetch`` is what is left, ``unknown``: policy and value -> share of it all; ``copies``: the
    share of ``to_fetch`` that has the row or URL of another, counted where every row was read.
    ``pixels``: of a stored image on average, None where no size is known. ``on_web``: whether any
    image is; others lie in tars.
    """

    rows_in: int
    rows_sampled: int
    groups_sampled: int
    groups: int
    funnel: dict[str, Share]
    unknown: dict[str, Share]
    to_fetch: Share
    copies: float | None
    pixels: float | None
    on_web: bool


@dataclass(frozen=True)
class _Judged:
    """A group: its rows, those drawn, and how many of these each reason takes.

    ``keys`` of those kept are alike where one is a copy of the other; ``pixels`` is their mean.
    """

    num_rows: int
    num_drawn: int
    reasons: Counter[str]
    keys: pl.Series
    pixels: float | None


def sample_metadata(config: CurationConfig, tombstones: Tombstones) -> MetadataSample:
    """Draw and judge; reads no more than ``estimate.row_groups`` row groups.

    Raises ``UserError`` for inputs that cannot be curated. Deterministic for the same inputs.
    """
    clusters = metadata_clusters(config)
    rows_in = sum(cluster.num_rows for cluster in clusters)
    if rows_in == 0:
        raise UserError("the metadata hold no rows; check `metadata` in the recipe")
    drawn, is_census = _draw([cluster.num_rows for cluster in clusters], config)
    judged = _judged_groups(clusters, drawn, config, tombstones)
    if is_census:
        rows_in = sum(found.num_rows for found in judged)

    def share(count: Sequence[int]) -> Share:
        ratio, margin = _ratio(count, judged, is_census)
        return Share(round(ratio * rows_in), ratio, margin)

    names = {name for found in judged for name in found.reasons}
    shares = {name: share([found.reasons[name] for found in judged]) for name in names}
    is_whole = is_census and all(found.num_drawn == found.num_rows for found in judged)
    return MetadataSample(
        rows_in=rows_in,
        rows_sampled=sum(found.num_drawn for found in judged),
        groups_sampled=len(drawn),
        groups=len(clusters),
        funnel={name: shares[name] for name in BY_METADATA if name in shares},
        unknown={name: shares[name] for name in sorted(names - set(BY_METADATA))},
        to_fetch=share([len(found.keys) for found in judged]),
        copies=_copies(judged) if is_whole else None,
        pixels=_mean_pixels(judged, is_census),
        on_web=not all(is_tar(cluster.uri) for cluster in clusters),
    )


def _judged_groups(
    clusters: Sequence[Cluster],
    drawn: Sequence[int],
    config: CurationConfig,
    tombstones: Tombstones,
) -> list[_Judged]:
    """Those drawn that have rows. A group that is read whole is read once, however often drawn."""
    seeds = np.random.SeedSequence(config.estimate.seed).spawn(len(drawn))
    first: dict[int, int] = {}
    for place, index in enumerate(drawn):
        if clusters[index].num_records <= MAX_RECORDS_PER_GROUP:
            first.setdefault(index, place)
    places = [first.get(index, place) for place, index in enumerate(drawn)]

    def judge(place: int) -> _Judged:
        rng = np.random.default_rng(seeds[place])
        return _judged(clusters[drawn[place]], config, tombstones, rng)

    with ThreadPoolExecutor(_THREADS) as pool:
        asked = sorted(set(places))
        found = dict(zip(asked, pool.map(judge, asked), strict=True))
    return [found[place] for place in places if found[place].num_drawn]


def _copies(judged: Sequence[_Judged]) -> float:
    keys = pl.concat([found.keys for found in judged])
    return 1 - keys.n_unique() / len(keys) if len(keys) else 0.0


def _mean_pixels(judged: Sequence[_Judged], is_census: bool) -> float | None:
    """Over images, not over groups."""
    weighed = [
        (found.pixels, len(found.keys) / found.num_drawn * (found.num_rows if is_census else 1))
        for found in judged
        if found.pixels is not None
    ]
    total = sum(weight for _, weight in weighed)
    return sum(pixels * weight for pixels, weight in weighed) / total if total else None


def _draw(num_rows: Sequence[int], config: CurationConfig) -> tuple[list[int], bool]:
    """Indices of the groups to read, and whether they are all."""
    filled = [index for index, number in enumerate(num_rows) if number > 0]
    if len(filled) <= config.estimate.row_groups:
        return filled, True
    ends = np.cumsum([num_rows[index] for index in filled])
    num_draws = config.estimate.row_groups
    within = np.random.default_rng(config.estimate.seed).random(num_draws)
    rows = (np.arange(num_draws) + within) * (ends[-1] / num_draws)
    drawn = np.searchsorted(ends, rows, side="right")
    return [filled[index] for index in drawn.tolist()], False


def _ratio(
    counts: Sequence[int], judged: Sequence[_Judged], is_census: bool
) -> tuple[float, float]:
    """The share among all rows and the half width of its interval."""
    ratios = [count / found.num_drawn for count, found in zip(counts, judged, strict=True)]
    if not is_census:
        student = Z_SCORE + (Z_SCORE**3 + Z_SCORE) / (4 * (len(ratios) - 1))
        return fmean(ratios), student * stdev(ratios) / math.sqrt(len(ratios))
    rows = sum(found.num_rows for found in judged)
    mean = variance = 0.0
    for ratio, found in zip(ratios, judged, strict=True):
        weight = found.num_rows / rows
        mean += weight * ratio
        # Of a group larger than the bound, rows were drawn.
        left_out = 1 - found.num_drawn / found.num_rows
        variance += weight**2 * ratio * (1 - ratio) / found.num_drawn * left_out
    return mean, Z_SCORE * math.sqrt(variance)


def _judged(
    cluster: Cluster, config: CurationConfig, tombstones: Tombstones, rng: np.random.Generator
) -> _Judged:
    """Ask everything that needs no image, as a curation does; captions of other files are not
    looked at."""
    table, num_records = draw_records(cluster, MAX_RECORDS_PER_GROUP, rng)
    layout = cluster.layout
    address = pl.col("url").map_batches(one_addresses, return_dtype=pl.String)
    key = address if config.duplicates.same_url else pl.struct("url", "caption")
    rows = canonical_rows(table, layout, config.source).with_columns(
        first_reason(metadata_filters(config.filters)), key.hash().alias("key")
    )
    rows = without_removed(rows, tombstones)
    reasons = Counter(dict(rows["reason"].drop_nulls().value_counts().iter_rows()))
    kept = rows.filter(pl.col("reason").is_null())
    long = own_captions(table, rows["url"], layout, config.filters.max_caption_chars)
    asked = with_caption_reasons(with_captions(kept, long, config.captions), config)
    if config.captions.files:  # which may bring another caption to train on, but no other alt text
        repeats = pl.col("reason") == CONTAMINATED
        asked = asked.with_columns(pl.when(repeats).then("reason").alias("reason"))
    reasons.update(dict(asked["reason"].drop_nulls().value_counts().iter_rows()))
    kept = asked.filter(pl.col("reason").is_null())
    for policy, values in unknown_kept(config.filters).items():
        for name, is_unknown in values.items():
            reasons[f"{policy}:{name}"] = int(kept.select(is_unknown.sum()).item())
    num_rows = num_records * SOURCE_FORMATS[layout.format].rows_per_record
    return _Judged(num_rows, rows.height, reasons, kept["key"], _stored_pixels(kept, config))


def _stored_pixels(kept: pl.DataFrame, config: CurationConfig) -> float | None:
    """Mean pixels of a stored image: never enlarged, cropped or not."""
    short = pl.min_horizontal("width_px", "height_px").cast(pl.Float64)
    long = pl.max_horizontal("width_px", "height_px").cast(pl.Float64)
    side = pl.min_horizontal(short, pl.lit(float(config.resize.image_size_px)))
    pixels = side * side if config.resize.crop != "none" else side * side * long / short
    mean = kept.drop_nulls(["width_px", "height_px"]).select(pixels.mean()).item()
    return float(mean) if mean is not None else None
