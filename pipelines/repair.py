"""A damaged version made whole: with the same bytes, or as a new one that names what was lost."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from infra import storage
from infra.environment import applied
from infra.errors import UserError
from infra.lease import Lease
from infra.manifest import (
    DatasetManifest,
    FileEntry,
    dataset_root,
    listed_files,
    load_manifest,
    verify_dataset,
)
from pipelines.config import CurationConfig, FetchConfig
from pipelines.derive import derive
from pipelines.exclusive import refuse_while_removing
from pipelines.repair_shards import RepairJob
from pipelines.score import Bars
from pipelines.stored import live_versions
from pipelines.tombstones import load_tombstones
from pipelines.units import run_units

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

# Fewer and smaller pieces of work than these are done without Spark.
UNITS_ON_DRIVER = 8
ROWS_ON_DRIVER = 2_000_000


class CannotRepair(UserError):
    """What is damaged can only be made again from the recipe."""


@dataclass(frozen=True)
class RepairResult:
    """The version to use from now on: the same one, or a new one without the ``lost`` samples.

    ``restored``: shards that were put back. ``unproven``: samples of the new version that come
    from a damaged tar, and look right.
    """

    manifest_uri: str
    version: str
    restored: list[str]
    lost: list[str]
    unproven: int


def repair(
    manifest_uri: str,
    spark: Callable[[], SparkSession],
    bars: Bars,
    environment: Mapping[str, str] | None = None,
    fetch: FetchConfig | None = None,
    tars: Mapping[str, str] | None = None,
) -> RepairResult:
    """Read every byte, and make what is damaged again. Killed at any moment, another call goes on.

    ``fetch``: how the web is reached; None: as the version's recipe says. ``tars``: where images
    lie that are not on the web, by name; others lie where they did when they were curated. Raises
    ``CannotRepair`` for a damaged ledger, and ``DigestMismatch`` or ``ObjectMissing`` for a damaged
    manifest.
    """
    with applied(environment or {}):
        root, manifest = dataset_root(manifest_uri), load_manifest(manifest_uri)
        damaged = _damaged(manifest_uri, manifest, bars)
        if not damaged:
            return RepairResult(manifest_uri, manifest.version, [], [], 0)
        others = _others(root, manifest)
        config = _config(manifest, fetch)
        known_tars = {**_noted_tars(root), **(tars or {})}
        job = RepairJob(
            root,
            manifest,
            damaged,
            others,
            config,
            known_tars,
            load_tombstones(root),
            dict(environment or {}),
        )
        with Lease(storage.join(job.folder, "mending", "lease.json"), "repair"):
            refuse_while_removing(root)
            _mend(job, spark, bars)
            mended = job.mended()
            restored = [
                manifest.shards[index].path for index, each in mended.items() if each.restored
            ]
            if len(restored) == len(damaged):
                _verified(manifest_uri)
                return RepairResult(manifest_uri, manifest.version, restored, [], 0)
            with bars("rewriting", manifest.counts["committed"], "samples") as bar:
                made = derive(job, spark, bar.update)
            _verified(made.manifest_uri)
            point_builds(root, manifest.version, made.manifest.version)
            storage.write_json(_done_uri(job), {"version": made.manifest.version})
    unproven = sum(each.unproven for each in mended.values())
    return RepairResult(made.manifest_uri, made.manifest.version, restored, job.lost(), unproven)


def _damaged(manifest_uri: str, manifest: DatasetManifest, bars: Bars) -> tuple[int, ...]:
    """The numbers of the damaged shards."""
    num_bytes = sum(entry.num_bytes for entry in listed_files(manifest))
    with bars("reading", -(-num_bytes // 1_000_000), "MB") as bar:
        problems = verify_dataset(manifest_uri, bar)
    paths = {problem.partition(":")[0] for problem in problems}  # lines begin with the path
    for ledger in manifest.ledger:
        if ledger.path in paths:
            raise CannotRepair(
                f"{ledger.path} is damaged; how rows ended is known from nowhere else",
                remedy="give `atelier run RECIPE --repair`, which makes it again from the metadata",
            )
    found = tuple(index for index, shard in enumerate(manifest.shards) if shard.path in paths)
    if problems and not found:
        raise CannotRepair(problems[0], remedy="give `atelier run RECIPE --repair`")
    return found


def _others(root: str, manifest: DatasetManifest) -> tuple[FileEntry, ...]:
    """Ledger files of other versions that this one does not list; not of its own repairs."""
    listed = {entry.path for entry in manifest.ledger}
    found = {
        entry.path: entry
        for other in live_versions(root)
        if other.attributes.get("derivations", [{}])[-1].get("kind") != RepairJob.kind
        for entry in other.ledger
        if entry.path not in listed
    }
    return tuple(found[path] for path in sorted(found))


def _config(manifest: DatasetManifest, fetch: FetchConfig | None) -> CurationConfig:
    """How the version's images were made, as its manifest has it."""
    recipe: dict[str, Any] = manifest.attributes.get("recipe", {})
    config = CurationConfig.model_validate({**recipe, "metadata": ["(as published)"]})
    return config if fetch is None else config.model_copy(update={"fetch": fetch})


def _noted_tars(root: str) -> dict[str, str]:
    """Where the builds of this dataset found their tars. What is read there has to be proven."""
    found: dict[str, str] = {}
    for result in _results(root).values():
        noted = result.get("tars")
        found |= noted if isinstance(noted, dict) else {}
    return found


def _results(root: str) -> dict[str, dict[str, Any]]:
    """Address -> content of what finished builds left."""
    listed = list(storage.list_objects(storage.join(root, "work")))
    uris = [info.uri for info in listed if info.uri.endswith("/result.json")]
    read = {uri: storage.read_json(uri) for uri in uris}
    return {uri: result for uri, result in read.items() if isinstance(result, dict)}


def _mend(job: RepairJob, spark: Callable[[], SparkSession], bars: Bars) -> None:
    """Gather and write what is not done yet; what was given up before is tried again."""
    if storage.exists(_done_uri(job)):
        for folder in ("mended", "shards", "ledger"):
            job.forget(folder)
        storage.delete(_done_uri(job))
    ledgers = (*job.manifest.ledger, *job.others)
    noted = {info.uri for info in storage.list_objects(storage.join(job.folder, "found"))}
    own = range(len(job.manifest.ledger))
    for numbers in (own, range(len(own), len(ledgers))):
        if numbers and numbers is not own:
            job.note_ids()
        missing = [n for n in numbers if job.marker_uri("found", n) not in noted]
        num_rows = sum(ledgers[n].num_rows for n in missing)
        _run(job, missing, job.look, spark, on_driver=num_rows <= ROWS_ON_DRIVER)
    # One that was put back, and is damaged now, was damaged again.
    done = {index for index, each in job.mended().items() if not each.restored}
    missing = [n for n, index in enumerate(job.damaged) if index not in done]
    job.note_clues(missing)
    with bars("mending", len(job.damaged), "shards") as bar:
        _run(job, missing, job.mend, spark, on_driver=len(missing) <= UNITS_ON_DRIVER)
        bar.update(len(job.damaged))


def _done_uri(job: RepairJob) -> str:
    return storage.join(job.folder, "mending", "done.json")


def _run(
    job: RepairJob,
    numbers: list[int],
    work: Callable[[int], None],
    spark: Callable[[], SparkSession],
    *,
    on_driver: bool,
) -> None:
    if on_driver:
        for number in numbers:
            work(number)
    else:
        run_units(spark(), job, len(numbers), lambda n: work(numbers[n]))


def _verified(manifest_uri: str) -> None:
    problems = verify_dataset(manifest_uri)
    if problems:
        raise UserError(f"after the repair, {problems[0]}; the storage may be failing")


def point_builds(root: str, old: str, new: str) -> None:
    """Builds whose result was the version ``old`` are found done, with ``new``."""
    for uri, result in _results(root).items():
        if result.get("version") == old:
            storage.write_json(uri, {**result, "version": new})
