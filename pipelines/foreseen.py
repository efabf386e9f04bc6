"""What earlier work tells about rows that are not fetched yet: link rot, copies, bytes, seconds.

Told by a version of the dataset, by the partitions that a build under way has fetched (a row's
partition is drawn by its URL, so they are a fair sample), or by another dataset of the store.
Files are read for counts alone, without their digests: nothing is made of them but an estimate.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import polars as pl

from infra import storage
from infra.errors import UserError
from infra.manifest import DatasetManifest, dataset_root, load_manifest
from pipelines.distinct import distinct_of
from pipelines.duplicates import DUPLICATE_IMAGE, DUPLICATE_ROW, DUPLICATE_URL
from pipelines.ledger import COMMITTED, FAILED, PART, READ, REASONS
from pipelines.parquet import open_parquet

# What a row can be rejected for before it is compared with others and asked for over the web.
BY_METADATA = REASONS[: REASONS.index(DUPLICATE_ROW)]
ROW_COPIES = (DUPLICATE_ROW, DUPLICATE_URL)
MAX_ROWS = 1_000_000
MAX_FILES = 64
# Of a tar: three headers, padding, caption and JSON, beside the image.
BYTES_BESIDE_IMAGE = 3_000
_STAGED = re.compile(r"work/([0-9a-f]+)/staged-\d+\.json\Z")
_PART = re.compile(r"work/[0-9a-f]+/part-\d+\.json\Z")
_RESULT = re.compile(r"work/([0-9a-f]+)/result\.json\Z")
_COLUMNS = ["sample_id", "url", "disposition", "reason", "sha256"]


@dataclass(frozen=True)
class Told:
    """What became of rows that metadata and captions left. ``where``: in words.

    ``copies``: of them, those that have the row or URL of another; ``outcomes``: how the others
    ended, ``committed``, a reason or ``failed:<cause>``. ``urls`` and ``images``: how often each
    came -> how many of them, in all rows or a sample; ``urls`` is None where it tells nothing.
    ``seconds_per_fetch``: of a task, from asking for a body to the shard that it lies in.
    """

    where: str
    copies: int
    outcomes: Mapping[str, int]
    images: Mapping[int, int]
    urls: Mapping[int, int] | None
    bytes_per_sample: float | None
    seconds_per_fetch: float | None = None

    @property
    def num_asked(self) -> int:
        """Rows that were asked for over the web."""
        return sum(self.outcomes.values())

    def copies_among(self, num_rows: int) -> float:
        """The share of copies by row or URL that so many rows would have."""
        if not self.urls or not num_rows:
            return self.copies / max(self.copies + self.num_asked, 1)
        return max(1 - distinct_of(self.urls, num_rows) / num_rows, 0.0)

    def ends_of(self, num_asked: float) -> dict[str, float]:
        """How so many rows would end, were they asked for: outcome -> rows. Copies grow with
        the rows, everything else is in proportion."""
        share = num_asked / max(self.num_asked, 1)
        ends = {name: number * share for name, number in self.outcomes.items()}
        had_image = ends.get(COMMITTED, 0.0) + ends.get(DUPLICATE_IMAGE, 0.0)
        distinct = min(distinct_of(self.images, had_image), had_image) if self.images else had_image
        ends |= {COMMITTED: distinct, DUPLICATE_IMAGE: had_image - distinct}
        return {name: number for name, number in ends.items() if number > 0}


def told_by_dataset(root: str, *, same_url: bool) -> Told | None:
    """By the largest version of a dataset, or by its build under way where that has asked more.

    ``same_url``: whether rows of one URL are copies, or only those of one caption, too.
    """
    work = _work_in(root)
    open_builds = [uris for key, uris in work.staged.items() if key not in work.finished]
    found = [_by_partitions(root, max(open_builds, key=len))] if open_builds else []
    if work.manifests:
        largest = _largest(map(load_manifest, work.manifests))
        found.append(_by_version(root, largest, same_url=same_url))
    told = max(found, key=lambda each: each.num_asked, default=None)
    return told and replace(told, seconds_per_fetch=work.seconds_per_fetch())


def told_by_others(store_uri: str, root: str) -> Told | None:
    """By that dataset of the store that asked for most; its rows and sizes are its own."""
    datasets = storage.join(store_uri, "datasets") + "/"
    manifests = {
        info.uri: load_manifest(info.uri)
        for info in storage.list_objects(datasets)
        if info.uri.endswith("/manifest.json") and not info.uri.startswith(f"{root.rstrip('/')}/")
    }
    if not manifests:
        return None
    largest = _largest(manifests.values())
    uri = next(uri for uri, each in manifests.items() if each is largest)
    told = _by_version(dataset_root(uri), largest, same_url=True)
    return replace(
        told,
        where=f"dataset {largest.name}, {told.where}",
        copies=0,
        urls=None,
        bytes_per_sample=None,
        seconds_per_fetch=_work_in(dataset_root(uri)).seconds_per_fetch(),
    )


@dataclass
class _Work:
    """What builds left of a dataset: addresses, those of ``staged`` markers by build."""

    manifests: list[str] = field(default_factory=list)
    staged: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    parts: set[str] = field(default_factory=set)
    finished: set[str] = field(default_factory=set)

    def seconds_per_fetch(self) -> float | None:
        """By the build that fetched most; None where nothing was timed."""
        most = max(map(len, self.staged.values()), default=0)
        found = [self._pace(markers) for markers in self.staged.values() if len(markers) == most]
        return max(found, default=(0, 0.0))[1] or None

    def _pace(self, markers: list[str]) -> tuple[int, float]:
        """Bodies that some partitions asked for, and seconds for one of them."""
        asked = written = 0
        fetching = writing = 0.0
        for uri in _spread(sorted(markers), MAX_FILES):
            marker = _marker(uri)
            num_asked = marker.get("num_asked", 0)
            asked += num_asked
            fetching += marker.get("seconds", 0.0)
            part = uri.replace("/staged-", "/part-")
            if part in self.parts:
                written += num_asked
                writing += _marker(part).get("seconds", 0.0)
        return asked, fetching / max(asked, 1) + writing / max(written, 1)


def _work_in(root: str) -> _Work:
    work = _Work()
    for info in storage.list_objects(root):
        path = info.uri.removeprefix(root.rstrip("/") + "/")
        if path.endswith("/manifest.json"):
            work.manifests.append(info.uri)
        elif match := _STAGED.fullmatch(path):
            work.staged[match[1]].append(info.uri)
        elif _PART.fullmatch(path):
            work.parts.add(info.uri)
        elif match := _RESULT.fullmatch(path):
            work.finished.add(match[1])
    return work


def _largest(manifests: Iterable[DatasetManifest]) -> DatasetManifest:
    """Of several versions the one that measured most, before anything was taken out of it."""
    return max(
        manifests,
        key=lambda each: (each.counts["rows_in"], each.counts[COMMITTED], each.version),
    )


def _outcomes(manifest: DatasetManifest) -> dict[str, int]:
    outcomes = {
        name: number
        for name, number in manifest.rejected.items()
        if name not in BY_METADATA and name not in ROW_COPIES
    }
    outcomes |= {f"failed:{cause}": number for cause, number in manifest.failed.items()}
    return {**outcomes, COMMITTED: manifest.counts[COMMITTED]}


def _by_version(root: str, manifest: DatasetManifest, *, same_url: bool) -> Told:
    files = [storage.join(root, entry.path) for entry in manifest.ledger]
    rows = _rows_left(files, _COLUMNS)
    samples = manifest.counts[COMMITTED]
    num_bytes = sum(shard.num_bytes for shard in manifest.shards)
    return Told(
        where=f"version {manifest.version[:12]}",
        copies=sum(manifest.rejected.get(name, 0) for name in ROW_COPIES),
        outcomes=_outcomes(manifest),
        images=_times(rows.filter(pl.col("outcome").is_in([COMMITTED, DUPLICATE_IMAGE])), "sha256"),
        urls=_times(rows, "url" if same_url else "sample_id"),
        bytes_per_sample=num_bytes / samples if samples else None,
    )


def _by_partitions(root: str, markers: list[str]) -> Told:
    """Copies of a URL meet in one partition, so their share is what it will be in all."""
    found = [_marker(uri) for uri in _spread(sorted(markers), MAX_FILES)]
    files = [storage.join(root, str(each["rows"]["path"])) for each in found if "rows" in each]
    rows = _rows_left(files, [*_COLUMNS, "num_bytes"])
    outcomes = Counter(rows["outcome"].to_list())
    copies = sum(outcomes.pop(name, 0) for name in ROW_COPIES)
    images = rows.filter(pl.col("outcome") == COMMITTED)
    mean = images["num_bytes"].cast(pl.Float64).mean()
    return Told(
        where=f"{len(markers):,} partitions fetched",
        copies=copies,
        outcomes=outcomes,
        images=_times(images, "sha256"),
        urls=None,
        bytes_per_sample=mean + BYTES_BESIDE_IMAGE if isinstance(mean, float) else None,
    )


def _marker(uri: str) -> dict[str, Any]:
    """What it says; nothing where it is damaged or gone, which is the next build's to mend."""
    try:
        found = storage.read_json(uri)
    except (UserError, storage.ObjectMissing):
        return {}
    return found if isinstance(found, dict) else {}


def _spread(files: list[str], most: int) -> list[str]:
    return files[:: -(-len(files) // most)] if files else []


def _rows_left(files: list[str], columns: list[str]) -> pl.DataFrame:
    """Rows of some files that the metadata left, with their ``outcome``; bounded in both."""
    found = [pl.DataFrame(schema={**dict.fromkeys(columns, pl.String), "outcome": pl.String})]
    num_rows = 0
    for uri in _spread(files, MAX_FILES):
        if num_rows >= MAX_ROWS:
            break
        for rows in _row_groups(uri, columns):
            ended = pl.col("reason").fill_null(COMMITTED)
            is_failed = pl.col("disposition") == FAILED
            outcome = pl.when(is_failed).then(pl.lit("failed:") + ended).otherwise(ended)
            left = rows.with_columns(outcome.alias("outcome"))
            found.append(left.filter(~pl.col("outcome").is_in(BY_METADATA)))
            num_rows += found[-1].height
    return pl.concat(found[1:] or found)


def _row_groups(uri: str, columns: list[str]) -> Iterable[pl.DataFrame]:
    """Those of a file; none of a ledger of rows that the metadata rejected."""
    try:
        with open_parquet(uri) as parquet:
            part = (parquet.schema_arrow.metadata or {}).get(PART.encode(), b"")
            if part.startswith(READ.encode()):
                return
            for index in range(parquet.num_row_groups):
                yield pl.DataFrame(pl.from_arrow(parquet.read_row_group(index, columns)))
    except UserError:  # a version may be damaged, and still tell something
        return


def _times(rows: pl.DataFrame, column: str) -> dict[int, int]:
    """How often a value comes -> how many values come so often."""
    if rows.is_empty():
        return {}
    counts = rows[column].drop_nulls().value_counts(name="times")["times"]
    return {int(times): int(number) for times, number in counts.value_counts().iter_rows()}
