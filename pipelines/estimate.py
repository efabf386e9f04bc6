"""What a curation would keep, store and cost, from a sample of its metadata and nothing fetched.

``metadata_sample`` says what the filters leave; what the web then does is told by what was fetched
before (``foreseen``), as far as anything was.
"""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass
from typing import Any

from pipelines.clip_model import as_uri
from pipelines.config import CurationConfig
from pipelines.foreseen import BYTES_BESIDE_IMAGE, Told, told_by_dataset, told_by_others
from pipelines.ledger import COMMITTED, REASONS
from pipelines.metadata_sample import Z_SCORE, MetadataSample, Share, sample_metadata
from pipelines.tombstones import load_tombstones, read_block_lists

NOTHING, RECIPE, COUNTED = "nothing", "recipe", "all rows"
FETCHES_PER_CORE_SECOND = 60.0  # where nothing was fetched yet


@dataclass(frozen=True)
class Estimate:
    """The funnel before it happens. ``funnel``: reason -> share, in the order of asking.

    ``to_fetch`` is what the metadata leave, ``fetches`` without the copies among them; ``web``:
    outcome -> how many of these end so, where that is known, and ``samples`` what stays. Its
    margin is that of both samples, the metadata's and the fetched rows'. ``unknown``: policy and
    value -> share. ``known_from``: who tells of the web, ``copies_known_from``: of the copies,
    ``pace_known_from``: how fast it goes.
    """

    rows_in: int
    rows_sampled: int
    groups_sampled: int
    groups: int
    funnel: dict[str, Share]
    unknown: dict[str, Share]
    to_fetch: Share
    fetches: int
    web: dict[str, int]
    samples: int
    samples_margin: int
    fetch_success_ratio: float | None
    duplicate_ratio: float | None
    known_from: str
    copies_known_from: str
    stored_bytes: int
    fetches_per_core_second: float
    pace_known_from: str
    core_hours: float
    hours: float
    num_cores: int
    cost: float | None
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """For a program."""
        return asdict(self)


@dataclass(frozen=True)
class _Yield:
    """What becomes of the rows to fetch; ``margin``: of ``success``, by how few were asked."""

    copies: float | None
    copies_known_from: str
    success: float | None
    known_from: str
    margin: float
    web: dict[str, int]


def estimate_curation(
    config: CurationConfig, dataset_root: str, store_uri: str | None = None
) -> Estimate:
    """Sample the metadata and reckon.

    What the dataset at ``dataset_root`` does not tell, other datasets of the store may. Raises
    ``UserError`` for inputs that cannot be curated. Deterministic for the same inputs and store.
    """
    tombstones = load_tombstones(dataset_root) | read_block_lists(map(as_uri, config.block))
    sample = sample_metadata(config, tombstones)
    told = told_by_dataset(dataset_root, same_url=config.duplicates.same_url)
    asked = told
    if (told is None or not told.num_asked) and store_uri is not None and sample.on_web:
        asked = told_by_others(store_uri, dataset_root)
    found = _yield_of(config, sample, told, asked)
    return _reckoned(config, sample, told, found, _pace_of(config, asked))


def _pace_of(config: CurationConfig, asked: Told | None) -> tuple[float, str]:
    """Fetches per core and second, and who says so."""
    stated = config.estimate.fetches_per_core_second
    if stated is not None:
        return stated, RECIPE
    if asked is not None and asked.seconds_per_fetch:
        return 1 / asked.seconds_per_fetch, asked.where
    return FETCHES_PER_CORE_SECOND, NOTHING


def _yield_of(
    config: CurationConfig, sample: MetadataSample, told: Told | None, asked: Told | None
) -> _Yield:
    """The recipe's word counts first, then what is counted, then what was measured."""
    rows = sample.to_fetch.rows
    copies, copies_from = config.estimate.duplicate_ratio, RECIPE
    if copies is None:
        copies, copies_from = sample.copies, COUNTED
    if copies is None:
        copies, copies_from = None, NOTHING
        if told is not None:
            copies, copies_from = told.copies_among(rows), told.where
    success = config.estimate.fetch_success_ratio
    if success is not None:
        return _Yield(copies, copies_from, success, RECIPE, 0.0, {})
    fetches = rows * (1 - (copies or 0.0))
    if asked is None or not asked.num_asked or not fetches:
        return _Yield(copies, copies_from, None, NOTHING, 0.0, {})
    ends = asked.ends_of(fetches)
    success = ends.pop(COMMITTED, 0.0) / fetches
    margin = Z_SCORE * math.sqrt(success * (1 - success) / asked.num_asked)
    order = {reason: place for place, reason in enumerate(REASONS)}
    ordered = sorted(ends, key=lambda name: (order.get(name, len(order)), name))
    web = {name: round(ends[name]) for name in ordered if round(ends[name])}
    return _Yield(copies, copies_from, success, asked.where, margin, web)


def _reckoned(
    config: CurationConfig,
    sample: MetadataSample,
    told: Told | None,
    found: _Yield,
    pace: tuple[float, str],
) -> Estimate:
    stated = config.estimate
    pixels = sample.pixels or float(config.resize.image_size_px**2)
    bytes_per_sample = pixels * stated.bytes_per_pixel + BYTES_BESIDE_IMAGE
    if told is not None and told.bytes_per_sample:
        bytes_per_sample = told.bytes_per_sample
    left = 1 - (found.copies or 0.0)
    fetches = sample.to_fetch.rows * left
    success = 1.0 if found.success is None else found.success
    margin = math.hypot(
        sample.to_fetch.margin * sample.rows_in * left * success, found.margin * fetches
    )
    core_hours = (sample.rows_in / stated.rows_per_core_second + fetches / pace[0]) / 3600
    num_cores = stated.num_cores or os.cpu_count() or 1
    price = stated.price_per_core_hour
    return Estimate(
        rows_in=sample.rows_in,
        rows_sampled=sample.rows_sampled,
        groups_sampled=sample.groups_sampled,
        groups=sample.groups,
        funnel=sample.funnel,
        unknown=sample.unknown,
        to_fetch=sample.to_fetch,
        fetches=round(fetches),
        web=found.web,
        samples=round(fetches * success),
        samples_margin=round(margin),
        fetch_success_ratio=found.success,
        duplicate_ratio=found.copies,
        known_from=found.known_from,
        copies_known_from=found.copies_known_from,
        stored_bytes=round(fetches * success * bytes_per_sample),
        fetches_per_core_second=pace[0],
        pace_known_from=pace[1],
        core_hours=core_hours,
        hours=core_hours / num_cores,
        num_cores=num_cores,
        cost=None if price is None else core_hours * price,
        notes=_notes(config, sample, found),
    )


def _notes(config: CurationConfig, sample: MetadataSample, found: _Yield) -> tuple[str, ...]:
    """What the figures leave out."""
    notes = []
    if not sample.on_web:
        notes.append("all images lie in tars: no link rots, and nothing is asked of the web")
    elif found.success is None:
        notes.append(
            "link rot is not known: curate one metadata file first, or begin and stop, and it "
            "will be; or set estimate.fetch_success_ratio"
        )
    elif found.known_from.startswith("dataset "):
        notes.append("links, copies of images and the pace are told by another dataset")
    if found.copies is None:
        notes.append("copies of URLs are not known: set estimate.duplicate_ratio")
    if config.captions.files:
        notes.append("captions are joined later: filters on the caption to train on are not asked")
    return tuple(notes)
