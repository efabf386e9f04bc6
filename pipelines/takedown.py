"""Takedown: samples leave every version of a dataset, their bytes leave the store, digests stay.

In this order, so that a kill at any moment costs only doing it again: the tombstones (from then on
nothing that is taken down can come back), a new version for each that held such a sample, a note in
place of the old ones, and at last the bytes that no version lists any more: shards, embeddings,
scores, tokens, indexes and working files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import polars as pl
from pydantic import TypeAdapter, ValidationError

from infra import storage
from infra.digests import canonical_json, sha256_bytes
from infra.environment import applied
from infra.manifest import (
    MANIFEST_NAME,
    DatasetManifest,
    FileEntry,
    successor_of,
    withdraw,
)
from pipelines.build import KEY_CHARS
from pipelines.derive import Derivation, derive
from pipelines.embed import publish_file
from pipelines.exclusive import nobody_else
from pipelines.ledger import COMMITTED, REJECTED, without_addresses
from pipelines.plan import build_key
from pipelines.rejected import forget_taken_down
from pipelines.report import write_report
from pipelines.score import Bars
from pipelines.stored import (
    listed_paths,
    live_versions,
    paths_beside,
    sizes_under,
)
from pipelines.tombstones import (
    TAKEDOWN,
    Tombstones,
    load_tombstones,
    publish_tombstones,
)
from pipelines.units import run_units

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

TAKEDOWN_VERSION = 1


@dataclass(frozen=True)
class Found:
    """What one ledger file holds that is to go: ``rows`` lists committed samples and shards."""

    num_rows: int
    rows: FileEntry | None


@dataclass(frozen=True)
class TakedownJob(Derivation):
    """One version without what the tombstones cover; travels to the workers."""

    kind: ClassVar[str] = "takedown"

    dataset_root: str
    manifest: DatasetManifest
    tombstones: Tombstones
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def key(self) -> str:
        """The sha256 over everything that decides the new version."""
        identity = {
            "dataset": self.manifest.version,
            "tombstones": self.tombstones.digest,
            "version": TAKEDOWN_VERSION,
        }
        return sha256_bytes(canonical_json(identity))

    def look(self, index: int) -> None:
        """One Spark task: note what the n-th ledger file holds that is to go."""
        with self.task(f"found-{index:06d}") as folder:
            rows = _ledger_rows(self.dataset_root, self.manifest.ledger[index])
            covered = rows.filter(self._covers(rows))
            committed = covered.filter(pl.col("disposition") == COMMITTED)
            entry = None
            if committed.height:
                path = folder / "found.parquet"
                committed.select("sample_id", "shard").write_parquet(path)
                relative = f"{self.relative}/rows"
                entry = publish_file(path, self.dataset_root, relative, "parquet", committed.height)
            marker = Found(covered.height, entry)
            storage.write_json(self.marker_uri("found", index), asdict(marker))

    def found(self) -> dict[int, Found]:
        """Ledger file's number -> what was noted of it."""
        noted = {}
        for index in range(len(self.manifest.ledger)):
            try:
                data = storage.read_bytes(self.marker_uri("found", index))
                noted[index] = TypeAdapter(Found).validate_json(data, strict=True)
            except (storage.ObjectMissing, ValidationError):
                continue
        return noted

    def decide(self, index: int, folder: Path) -> pl.DataFrame:
        """The shard's samples that are to go."""
        shard = self.manifest.shards[index].path
        gone: list[str] = []
        for each in self.found().values():
            if each.rows is not None:
                uri = storage.join(self.dataset_root, each.rows.path)
                rows = pl.read_parquet(storage.read_bytes(uri, each.rows.sha256))
                gone += rows.filter(pl.col("shard") == shard)["sample_id"].to_list()
        samples = pl.Series("sample_id", sorted(gone), dtype=pl.String)
        return samples.to_frame().with_columns(reason=pl.lit(TAKEDOWN))

    def edit_ledger(self, rows: pl.DataFrame) -> pl.DataFrame:
        """Whatever else is covered, rejected or failed, ends as a takedown too, address and all."""
        covered = self._covers(rows)
        return without_addresses(
            rows.with_columns(
                pl.when(covered)
                .then(pl.lit(REJECTED))
                .otherwise("disposition")
                .alias("disposition"),
                pl.when(covered).then(pl.lit(TAKEDOWN)).otherwise("reason").alias("reason"),
                pl.when(covered).then(pl.lit(False)).otherwise("retryable").alias("retryable"),
                pl.when(pl.col("reason").eq_missing(TAKEDOWN) | covered)
                .then(pl.lit(None, pl.String))
                .otherwise("detail")
                .alias("detail"),
            )
        )

    def choices(self) -> dict[str, Any]:
        """Which tombstones, by their digest alone."""
        return {"tombstones": self.tombstones.digest}

    def parents(self) -> list[dict[str, Any]]:
        """What the version it came from was made of: that one is withdrawn."""
        return self.manifest.parents

    def _covers(self, rows: pl.DataFrame) -> pl.Series:
        return self.tombstones.covers(rows) & rows["reason"].ne_missing(TAKEDOWN)


@dataclass(frozen=True)
class TakedownResult:
    """Of one dataset: old version -> new one, samples and other rows that went, bytes freed."""

    dataset: str
    versions: dict[str, str]
    num_samples: int
    num_rows: int
    num_bytes: int


def look_for(
    dataset_root: str,
    wanted: Tombstones,
    spark: Callable[[], SparkSession],
    bars: Bars,
    environment: Mapping[str, str] | None = None,
) -> dict[str, tuple[int, int]]:
    """Version -> (samples, all rows) that ``wanted`` and what was taken down before would remove.

    Reads every ledger file, and changes nothing but working notes.
    """
    with applied(environment or {}):
        tombstones = load_tombstones(dataset_root) | wanted
        counts = {}
        for manifest in live_versions(dataset_root):
            job = TakedownJob(dataset_root, manifest, tombstones, dict(environment or {}))
            missing = [n for n in range(len(manifest.ledger)) if n not in job.found()]
            with bars("reading the ledger", len(manifest.ledger), "files") as bar:
                if missing:
                    run_units(spark(), job, len(missing), partial(_look, job, missing))
                bar.update(len(manifest.ledger))
            found = job.found().values()
            samples = sum(each.rows.num_rows for each in found if each.rows is not None)
            counts[manifest.version] = (samples, sum(each.num_rows for each in found))
        return counts


def take_down(
    dataset_root: str,
    wanted: Tombstones,
    spark: Callable[[], SparkSession],
    bars: Bars,
    environment: Mapping[str, str] | None = None,
) -> TakedownResult:
    """Remove ``wanted`` from every version of a dataset and from the store. Safe to repeat.

    Raises ``LeaseHeld`` while a curation or a scoring of the dataset is at work.
    """
    with applied(environment or {}), nobody_else(dataset_root, "takedown"):
        publish_tombstones(dataset_root, wanted)
        tombstones = load_tombstones(dataset_root)
        counts = look_for(dataset_root, tombstones, spark, bars, environment)
        successors: dict[str, str] = {}
        for manifest in live_versions(dataset_root):
            if counts[manifest.version][1] == 0:
                continue
            job = TakedownJob(dataset_root, manifest, tombstones, dict(environment or {}))
            with bars("rewriting", manifest.counts[COMMITTED], "samples") as bar:
                made = derive(job, spark, bar.update)
            successors[manifest.version] = made.manifest.version
        for old, new in successors.items():
            withdraw(dataset_root, old, new)
        _point_builds(dataset_root, tombstones)
        for manifest in live_versions(dataset_root):
            if forget_taken_down(dataset_root, manifest.version, tombstones):
                uri = storage.join(dataset_root, manifest.version, MANIFEST_NAME)
                write_report(uri, manifest, spark, environment)
        num_bytes = purge(dataset_root)
        gone = [counts[old] for old in successors]
        name = dataset_root.rstrip("/").rpartition("/")[2]
        most = max(gone, default=(0, 0))
        return TakedownResult(name, successors, *most, num_bytes)


def _look(job: TakedownJob, missing: list[int], number: int) -> None:
    job.look(missing[number])


def _point_builds(dataset_root: str, tombstones: Tombstones) -> None:
    """Finished builds are found under the key they have from now on, with the new version."""
    work = storage.join(dataset_root, "work")
    for info in list(storage.list_objects(work)):
        if not info.uri.endswith("/result.json"):
            continue
        result: Any = storage.read_json(info.uri)
        base_key = result.get("base_key") if isinstance(result, dict) else None
        if not base_key:
            continue
        folder = storage.join(work, build_key(str(base_key), tombstones)[:KEY_CHARS])
        version = successor_of(dataset_root, str(result["version"]))
        storage.write_json(storage.join(folder, "result.json"), {**result, "version": version})


def purge(dataset_root: str) -> int:
    """Delete what no version lists, and every working file; returns the bytes.

    Finished builds keep the note of their result. A build that was under way begins again.
    """
    live = live_versions(dataset_root)
    sizes = sizes_under(dataset_root)
    kept = listed_paths(live) | paths_beside(dataset_root, live, sizes)
    kept |= {path for path in sizes if _is_note_of_work(path)}
    num_bytes = 0
    for path, size in sizes.items():
        if path not in kept:
            storage.delete(storage.join(dataset_root, path))
            num_bytes += size
    return num_bytes


def _is_note_of_work(path: str) -> bool:
    """Results of builds, and what is known of inputs and verified files."""
    folder, _, name = path.rpartition("/")
    if not path.startswith("work/"):
        return False
    return name == "result.json" or folder in ("work/inputs", "work/verified")


def _ledger_rows(dataset_root: str, entry: FileEntry) -> pl.DataFrame:
    columns = ["sample_id", "url", "sha256", "shard", "disposition", "reason"]
    data = storage.read_bytes(storage.join(dataset_root, entry.path), entry.sha256)
    return pl.read_parquet(data, columns=columns)
