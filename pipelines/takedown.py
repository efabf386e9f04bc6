"""Takedown: samples leave every version of a dataset, their bytes leave the store, digests stay.

What is named goes with all that has its bytes, whatever address that came from, and stays out of
every dataset of the store, those made later included.

In this order, so that a kill at any moment costs only doing it again: the tombstones of what was
named and of its bytes (from then on nothing of it can come back), a new version for each that held
such a sample, a note in place of the old ones, and at last the bytes that no version lists any
more: shards, embeddings, scores, tokens, indexes and working files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import polars as pl

from infra import storage
from infra.environment import applied
from infra.manifest import MANIFEST_NAME, successor_of, withdraw
from pipelines.build import KEY_CHARS
from pipelines.derive import derive
from pipelines.exclusive import nobody_else
from pipelines.ledger import COMMITTED, REMOVED
from pipelines.plan import build_key
from pipelines.rejected import forget_taken_down
from pipelines.report import write_report
from pipelines.score import Bars
from pipelines.stored import (
    dataset_names,
    listed_paths,
    live_versions,
    paths_beside,
    sizes_under,
)
from pipelines.takedown_job import ALIKE, COPY, NAMED, WENT, TakedownJob
from pipelines.tombstones import (
    Tombstones,
    load_tombstones,
    publish_tombstones,
)
from pipelines.units import run_units

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

__all__ = ["Looked", "Sample", "Takedown", "TakedownResult", "look_for", "take_down"]


@dataclass(frozen=True)
class Takedown:
    """What is to go from the datasets at ``roots``, and where it stays out.

    ``store_uri``: out of every dataset of this store, also of those made later; None: out of
    ``roots`` alone. ``with_copies``: whether the bytes of what is named go, too, wherever they
    came from.
    """

    roots: tuple[str, ...]
    wanted: Tombstones
    store_uri: str | None = None
    with_copies: bool = True

    def publish(self, tombstones: Tombstones) -> None:
        """Leave these where they hold."""
        for home in self.roots if self.store_uri is None else [self.store_uri]:
            if tombstones:
                publish_tombstones(home, tombstones)


@dataclass(frozen=True)
class Sample:
    """A committed sample, and the address it came from."""

    sample_id: str
    url: str


@dataclass(frozen=True)
class Looked:
    """What a version holds that is to go: samples and all rows, by number, and which these are.

    ``copies``: those of the samples that only their bytes tell, or that would be; they stay where
    the takedown is not ``with_copies``. ``alike``: samples that stay and that a row that goes was
    rejected for being like.
    """

    job: TakedownJob
    noted: pl.DataFrame
    copies: tuple[Sample, ...] = ()
    alike: tuple[Sample, ...] = ()

    @property
    def version(self) -> str:
        return self.job.manifest.version

    @property
    def num_samples(self) -> int:
        return self._going["shard"].count()

    @property
    def num_rows(self) -> int:
        return self._going.height

    @property
    def _going(self) -> pl.DataFrame:
        return self.noted.filter(pl.col("what").is_in([NAMED, COPY]))


@dataclass(frozen=True)
class TakedownResult:
    """Of one dataset: old version -> new one, samples and other rows that went, bytes freed, and
    of all its versions what ``Looked`` says of ``copies`` and ``alike``."""

    dataset: str
    versions: dict[str, str]
    num_samples: int
    num_rows: int
    num_bytes: int
    copies: tuple[Sample, ...]
    alike: tuple[Sample, ...]


def look_for(
    takedown: Takedown,
    spark: Callable[[], SparkSession],
    bars: Bars,
    environment: Mapping[str, str] | None = None,
) -> dict[str, list[Looked]]:
    """Root -> per version what the takedown, and what was taken down before, would remove.

    Reads every ledger file, again where other addresses may have brought the same bytes, and
    changes nothing but working notes.
    """
    with applied(environment or {}):
        first: dict[str, list[Looked]] = {}
        for root in takedown.roots:
            named = load_tombstones(root) | takedown.wanted
            jobs = [
                TakedownJob(root, manifest, named, named, environment=dict(environment or {}))
                for manifest in live_versions(root)
            ]
            first[root] = [Looked(job, _noted(job, spark, bars)) for job in jobs]
        digests = _digests_of(takedown.wanted, first)
        found: dict[str, list[Looked]] = {}
        for root, versions in first.items():
            noted = [each.noted.filter(pl.col("what") == NAMED) for each in versions]
            alike = frozenset(one for rows in noted for one in rows["like"].drop_nulls())
            found[root] = []
            for each in versions:
                widened = each.job.tombstones | digests
                job = replace(each.job, tombstones=widened, alike=alike)
                again = bool(alike) or widened != each.job.tombstones
                looked = Looked(job, _noted(job, spark, bars)) if again else each
                chosen = looked if takedown.with_copies else each
                copies = _samples(looked.noted, COPY)
                found[root].append(
                    replace(chosen, copies=copies, alike=_samples(looked.noted, ALIKE))
                )
        return found


def take_down(
    takedown: Takedown,
    spark: Callable[[], SparkSession],
    bars: Bars,
    environment: Mapping[str, str] | None = None,
) -> tuple[list[TakedownResult], Tombstones]:
    """Carry it out; returns what was done per dataset, and what stays out. Safe to repeat.

    With ``store_uri``, datasets that came since ``roots`` were looked up are among them. Raises
    ``LeaseHeld``, with nothing done, while a curation or a scoring of one of them is at work.
    """
    with applied(environment or {}), ExitStack() as stack:
        for root in takedown.roots:
            stack.enter_context(nobody_else(root, "takedown"))
        takedown.publish(takedown.wanted)
        if takedown.store_uri is not None:
            # Whoever begins later finds the tombstones; who began before is found here.
            for name in dataset_names(takedown.store_uri):
                root = storage.join(takedown.store_uri, "datasets", name)
                if root not in takedown.roots:
                    stack.enter_context(nobody_else(root, "takedown"))
                    takedown = replace(takedown, roots=(*takedown.roots, root))
        looked = look_for(takedown, spark, bars, environment)
        kept_out = takedown.wanted
        if takedown.with_copies:
            digests = _digests_of(takedown.wanted, looked)
            takedown.publish(digests)
            kept_out |= digests
        done = [_carry_out(root, looked[root], spark, bars, environment) for root in looked]
        return done, kept_out


def _carry_out(
    dataset_root: str,
    looked: list[Looked],
    spark: Callable[[], SparkSession],
    bars: Bars,
    environment: Mapping[str, str] | None,
) -> TakedownResult:
    going = [each for each in looked if each.num_rows]
    successors: dict[str, str] = {}
    for each in going:
        each.job.sort_out(each.noted)
        with bars("rewriting", each.job.manifest.counts[COMMITTED], "samples") as bar:
            made = derive(each.job, spark, bar.update)
        successors[each.version] = made.manifest.version
    for old, new in successors.items():
        withdraw(dataset_root, old, new)
    tombstones = load_tombstones(dataset_root)
    _point_builds(dataset_root, tombstones)
    for manifest in live_versions(dataset_root):
        if forget_taken_down(dataset_root, manifest.version, tombstones):
            uri = storage.join(dataset_root, manifest.version, MANIFEST_NAME)
            write_report(uri, manifest, spark, environment)
    num_bytes = purge(dataset_root)
    return TakedownResult(
        dataset_root.rstrip("/").rpartition("/")[2],
        successors,
        *max(((each.num_samples, each.num_rows) for each in going), default=(0, 0)),
        num_bytes,
        all_of(each.copies for each in looked),
        all_of(each.alike for each in looked),
    )


def all_of(samples: Iterable[tuple[Sample, ...]]) -> tuple[Sample, ...]:
    """Those of several versions, each once, by id."""
    return tuple(sorted({one for some in samples for one in some}, key=lambda one: one.sample_id))


def _noted(job: TakedownJob, spark: Callable[[], SparkSession], bars: Bars) -> pl.DataFrame:
    """What is in the ledger files; those that were not looked through yet are, in Spark tasks."""
    num_files = len(job.manifest.ledger)
    found = job.looked()
    missing = [number for number in range(num_files) if number not in found]
    with bars("reading the ledger", num_files, "files") as bar:
        if missing:
            run_units(spark(), job, len(missing), partial(_look, job, missing))
            found = job.looked()
        bar.update(num_files)
    return job.noted(found)


def _look(job: TakedownJob, missing: list[int], number: int) -> None:
    job.look(missing[number])


def _digests_of(wanted: Tombstones, looked: Mapping[str, list[Looked]]) -> Tombstones:
    """The bytes of the rows that go, and of those that went when the same was asked before."""
    images: set[str] = set()
    for each in (one for versions in looked.values() for one in versions):
        asked = pl.col("url").str.strip_prefix(REMOVED).is_in(list(wanted.urls))
        goes = pl.col("what").is_in([NAMED, COPY]) | ((pl.col("what") == WENT) & asked)
        images.update(each.noted.filter(goes)["sha256"].drop_nulls())
    return Tombstones(images=frozenset(images))


def _samples(noted: pl.DataFrame, what: str) -> tuple[Sample, ...]:
    rows = noted.filter((pl.col("what") == what) & pl.col("shard").is_not_null())
    return tuple(Sample(*row) for row in rows.select("sample_id", "url").iter_rows())


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
