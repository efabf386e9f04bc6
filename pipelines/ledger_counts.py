"""What a report says of a ledger: counted file by file, kept under the file's digest, added up.

A file's counts are made once, whatever versions list it: a derived version counts only what it
wrote. Files are read in batches and hosts are bounded, so memory does not grow with the dataset.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

import polars as pl
from pydantic import TypeAdapter, ValidationError

from infra import storage
from infra.environment import applied
from infra.manifest import DatasetManifest, FileEntry
from pipelines.duplicates import DUPLICATE_IMAGE, LIKE, NEAR_DUPLICATE
from pipelines.histograms import LEDGER_BINS, LEDGER_VALUES, added, counted
from pipelines.ledger import COMMITTED, FAILED, ledger_batches
from pipelines.units import run_units
from pipelines.workspace import Workspace

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

FOLDER = "report"
COUNTS_VERSION = 2
ALL = "all"
# Hosts per outcome, and groups of copies, that a file's counts hold, and that are held while files
# are added up.
HOSTS_PER_FILE = 60
HOSTS_IN_MEMORY = 4_000
VALUES_IN_MEMORY = 200  # of languages and sources
ROWS_ON_DRIVER = 2_000_000
_READ_THREADS = 8
_NOTES_AT_ONCE = 32
_HOST = r"^[^/?#]*//(?:[^/?#@]*@)?([^/?#:\[\]]+)"
_COLUMNS = [
    "url",
    "width_px",
    "height_px",
    "clip_similarity",
    "unsafe_prob",
    "watermark_prob",
    "aesthetic_score",
    "language",
    "source",
    "disposition",
    "reason",
    "retryable",
    "detail",
]


@dataclass
class LedgerCounts:
    """Counts over rows. ``outcomes``, ``hosts``: ``committed``, a reason or ``failed:<cause>``.

    ``retryable``: cause -> failed rows that may be asked for again. ``histograms``: value ->
    ``all`` and ``committed`` -> counts as ``histograms.counted`` has them. ``languages`` and
    ``sources``: value -> rows, committed rows. ``hosts``: outcome -> host -> rows; hosts that are
    rare in a file may be missing, so a host's number is a lower bound where there are many.
    ``copies``: sample that stays -> images that went for being like it, bounded as hosts are.
    """

    num_rows: int = 0
    outcomes: dict[str, int] = field(default_factory=dict)
    retryable: dict[str, int] = field(default_factory=dict)
    histograms: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    languages: dict[str, list[int]] = field(default_factory=dict)
    sources: dict[str, list[int]] = field(default_factory=dict)
    hosts: dict[str, dict[str, int]] = field(default_factory=dict)
    copies: dict[str, int] = field(default_factory=dict)
    version: int = COUNTS_VERSION

    def add(self, other: LedgerCounts, hosts: int = HOSTS_IN_MEMORY) -> None:
        """Take in the counts of other rows; at most ``hosts`` per outcome are kept, the largest."""
        self.num_rows += other.num_rows
        for mine, theirs in (
            (self.outcomes, other.outcomes),
            (self.retryable, other.retryable),
        ):
            for name, number in theirs.items():
                mine[name] = mine.get(name, 0) + number
        for name, sides in other.histograms.items():
            known = self.histograms.setdefault(name, {})
            for side, counts in sides.items():
                known[side] = added(known.get(side, []), counts)
        for pairs, more in ((self.languages, other.languages), (self.sources, other.sources)):
            for name, counts in more.items():
                pairs[name] = added(pairs.get(name, []), counts)
            for name in sorted(pairs, key=lambda n: (-pairs[n][0], n))[VALUES_IN_MEMORY:]:
                del pairs[name]
        for outcome, found in other.hosts.items():
            summed = Counter(self.hosts.get(outcome, {}))
            summed.update(found)
            self.hosts[outcome] = largest(summed, hosts)
        self.copies = largest(Counter(self.copies) + Counter(other.copies), hosts)


def largest(counts: Mapping[str, int], most: int) -> dict[str, int]:
    """The ``most`` entries with the highest counts, then by name."""
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:most])


def counts_of_rows(rows: pl.DataFrame) -> LedgerCounts:
    """The counts of some rows of a ledger."""
    named = rows.with_columns(
        pl.when(pl.col("disposition") == FAILED)
        .then(pl.lit("failed:") + pl.col("reason"))
        .otherwise(pl.col("reason").fill_null(COMMITTED))
        .alias("outcome"),
        pl.col("url").str.extract(_HOST).str.to_lowercase().alias("host"),
    )
    is_committed = named["disposition"] == COMMITTED
    values = {name: named.select(value.alias(name))[name] for name, value in LEDGER_VALUES.items()}
    passing = named.filter((pl.col("disposition") == FAILED) & pl.col("retryable"))
    hosts: dict[str, dict[str, int]] = {}
    by_host = (
        named.drop_nulls("host")
        .group_by("outcome", "host")
        .len()
        .sort(["len", "host"], descending=[True, False])
        .group_by("outcome", maintain_order=True)
        .head(HOSTS_IN_MEMORY)
    )
    for outcome, host, number in by_host.iter_rows():
        hosts.setdefault(outcome, {})[host] = number
    return LedgerCounts(
        num_rows=named.height,
        outcomes=dict(named["outcome"].value_counts().iter_rows()),
        retryable=dict(passing["reason"].value_counts().iter_rows()),
        histograms={
            name: {
                ALL: counted(series, LEDGER_BINS[name]),
                COMMITTED: counted(series.filter(is_committed), LEDGER_BINS[name]),
            }
            for name, series in values.items()
        },
        languages=_by_value(named, "language"),
        sources=_by_value(named, "source"),
        hosts=hosts,
        copies=_copies(named),
    )


def _copies(rows: pl.DataFrame) -> dict[str, int]:
    """Sample that stays -> images that are its copies by bytes or looks."""
    is_copy = pl.col("reason").is_in([DUPLICATE_IMAGE, NEAR_DUPLICATE])
    told = rows.filter(is_copy & pl.col("detail").str.starts_with(LIKE))
    kept = told["detail"].str.strip_prefix(LIKE).value_counts()
    return largest(dict(kept.iter_rows()), HOSTS_IN_MEMORY)


def _by_value(rows: pl.DataFrame, column: str) -> dict[str, list[int]]:
    """Value -> rows and committed rows; null is the empty text."""
    is_committed = (pl.col("disposition") == COMMITTED).sum().cast(pl.Int64)
    found = rows.group_by(pl.col(column).fill_null("")).agg(pl.len().cast(pl.Int64), is_committed)
    return {str(value): list(numbers) for value, *numbers in found.iter_rows()}


@dataclass(frozen=True)
class CountingJob(Workspace):
    """Counts ledger files; travels to the workers."""

    dataset_root: str
    ledgers: tuple[FileEntry, ...]
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def folder(self) -> str:
        """Where failures are noted."""
        return storage.join(self.dataset_root, "work", "report")

    def count(self, index: int) -> None:
        """One task: count the n-th file and leave the counts."""
        ledger = self.ledgers[index]
        with self.task(f"counts-{index:06d}") as folder:
            counts = LedgerCounts()
            for rows in ledger_batches(self.dataset_root, ledger, _COLUMNS, folder):
                counts.add(counts_of_rows(rows))
            counts.hosts = {
                outcome: largest(found, HOSTS_PER_FILE) for outcome, found in counts.hosts.items()
            }
            counts.copies = largest(counts.copies, HOSTS_PER_FILE)
            storage.write_json(storage.join(self.dataset_root, counts_path(ledger)), asdict(counts))


def counts_path(ledger: FileEntry) -> str:
    """Where a ledger file's counts lie, relative to the dataset's root."""
    return f"{FOLDER}/{ledger.sha256[:32]}.json"


def count_ledgers(
    dataset_root: str,
    manifest: DatasetManifest,
    spark: Callable[[], SparkSession] | None = None,
    environment: Mapping[str, str] | None = None,
) -> LedgerCounts:
    """The counts of all ledger files of a version; those that were not counted yet are read.

    ``spark`` is called when these are more than ``ROWS_ON_DRIVER`` rows. Raises ``DigestMismatch``
    or ``ObjectMissing`` for a ledger file that is damaged.
    """
    with applied(environment or {}):
        noted = {info.uri for info in storage.list_objects(storage.join(dataset_root, FOLDER))}
        missing = tuple(
            entry
            for entry in manifest.ledger
            if storage.join(dataset_root, counts_path(entry)) not in noted
        )
        job = CountingJob(dataset_root, missing, dict(environment or {}))
        if spark is not None and sum(entry.num_rows for entry in missing) > ROWS_ON_DRIVER:
            run_units(spark(), job, len(missing), job.count)
        else:
            for index in range(len(missing)):
                job.count(index)
        total = LedgerCounts()
        with ThreadPoolExecutor(_READ_THREADS) as pool:
            for first in range(0, len(manifest.ledger), _NOTES_AT_ONCE):
                some = manifest.ledger[first : first + _NOTES_AT_ONCE]
                for counts in pool.map(lambda entry: _noted(dataset_root, entry), some):
                    total.add(counts)
        return total


def _noted(dataset_root: str, ledger: FileEntry) -> LedgerCounts:
    """A file's counts; made again when the note is not one of this version."""
    uri = storage.join(dataset_root, counts_path(ledger))
    for _ in range(2):
        try:
            found = TypeAdapter(LedgerCounts).validate_json(storage.read_bytes(uri), strict=True)
            if found.version == COUNTS_VERSION:
                return found
        except (storage.ObjectMissing, ValidationError):
            pass
        CountingJob(dataset_root, (ledger,)).count(0)
    raise RuntimeError(f"{uri} cannot be read back")
