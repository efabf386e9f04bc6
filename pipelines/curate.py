"""A dataset from metadata, on one page: plan, fetch, write, publish."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from infra import storage
from infra.environment import applied
from infra.errors import UserError
from infra.lease import Lease
from infra.manifest import MANIFEST_NAME, DatasetManifest, load_manifest, publish_manifest
from infra.storage_probe import check_store
from pipelines import engine
from pipelines.build import Build, PartMarker
from pipelines.companions import companions_of
from pipelines.config import CurationConfig
from pipelines.exclusive import refuse_while_removing
from pipelines.inputs import units_of
from pipelines.ledger_counts import count_ledgers
from pipelines.plan import (
    CurationPlan,
    companion_build,
    follows,
    plan_again,
    plan_curation,
    refuse_changed_inputs,
    refuse_new_tombstones,
)
from pipelines.publish import assemble_manifest, funnel_of
from pipelines.rejected import of_build, publish_rejected
from pipelines.report import write_report
from pipelines.watch import ProgressCallback, watching
from pipelines.workspace import noted_version

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

__all__ = ["CurationPlan", "CurationResult", "curate", "plan_curation"]


@dataclass(frozen=True)
class CurationResult:
    """A published dataset. ``funnel``: ``rows_in``, what each reason took, ``committed``."""

    manifest_uri: str
    version: str
    counts: dict[str, int]
    funnel: dict[str, int]
    decision: str
    reason: str
    build_key: str


def curate(
    name: str,
    config: CurationConfig,
    store_uri: str,
    spark: Callable[[], SparkSession],
    environment: Mapping[str, str] | None = None,
    progress: ProgressCallback | None = None,
    *,
    retry_failed: bool = False,
    others: Mapping[str, CurationConfig] | None = None,
) -> CurationResult:
    """Curate ``config`` into ``<store_uri>/datasets/<name>/`` and return the published version.

    ``spark`` is called when there is work to do, so a finished dataset costs no Spark; the caller
    stops the session. ``environment`` (storage credentials) holds here and in every task.
    ``progress`` is called with (rows done, rows in all) from another thread. Killed at any moment,
    a second call does what is missing and publishes the same bytes. Two drivers cannot work on
    one build at once: ``LeaseHeld``.

    ``retry_failed``: of a finished dataset, the rows whose failure may have passed are fetched
    again; images that come are added in shards of their own, the shards that are there stay, and
    a new version is published (the same one when nothing changed). Working files that are gone,
    or of a version before a takedown or a repair, are made again from the ledger and the inputs.
    A retry that was killed is ended by the next call, with or without ``retry_failed``.

    ``others``: further datasets of the store, whose turn comes after this one's. For those that
    differ only in what they store (``companions``), images are stored from the same fetch or
    retry; each is published by a call of its own, which then has nothing to fetch.
    """
    with applied(environment or {}):
        plan = plan_curation(name, config, store_uri)
        if plan.manifest_uri is not None:
            finished = load_manifest(plan.manifest_uri)
            if not (retry_failed and _may_pass(plan.build, finished, spark)):
                return _result(plan, plan.manifest_uri, finished)
            plan = replace(plan, retried=plan.version)
        build = replace(plan.build, environment=dict(environment or {}))
        plan = replace(plan, build=build)
        check_store(storage.join(build.dataset_root, "work"))
        companions = {}
        if plan.partitions or plan.retried is not None:
            companions = companions_of(name, {**(others or {}), name: config})
        with ExitStack() as stack:
            lease = stack.enter_context(Lease(build.lease_uri, f"curation of {name}"))
            found = [companion_build(n, their, store_uri, plan) for n, their in companions.items()]
            # Other takedowns would leave other rows to fetch.
            builds = [
                replace(each, environment=build.environment)
                for each in found
                if each.tombstones == build.tombstones
            ]
            for each in builds:
                stack.enter_context(Lease(each.lease_uri, f"curation of {name}"))
            for each in (build, *builds):
                refuse_while_removing(each.dataset_root)
                refuse_new_tombstones(each)
            stack.enter_context(watching(plan, progress))
            if plan.retried is not None:
                plan = _retried(plan, builds, spark)
            elif plan.units:
                engine.fetch_images(spark(), build, plan.units, plan.partitions, builds)
            if plan.parts:
                engine.write_shards(spark(), build, plan.parts)
            manifest = assemble_manifest(name, plan)
            if plan.units or plan.partitions:
                refuse_changed_inputs(plan)
            lease.check()
            manifest_uri = publish_manifest(build.dataset_root, manifest)
            publish_rejected(build.dataset_root, manifest, of_build(build), plan.retried)
            write_report(manifest_uri, manifest, spark, environment)
            build.finish(manifest.version)
        return _result(plan, manifest_uri, manifest)


def _retried(
    plan: CurationPlan, companions: Sequence[Build], spark: Callable[[], SparkSession]
) -> CurationPlan:
    """Fetch again what failed in passing, here and in ``companions``; what is left to do."""
    build = plan.build
    _restore(plan, build, _version_of(build), spark)
    round = build.begin_round()
    rounds = []
    for each in companions:
        try:
            manifest = _version_of(each)
            may_pass = _may_pass(each, manifest, spark)
        except (storage.ObjectMissing, storage.DigestMismatch):
            continue  # not curated yet, or damaged: its own call says so
        if may_pass:
            _restore(plan, each, manifest, spark)
            rounds.append((each, each.begin_round()))
    if failed := _failed_partitions(build):
        engine.retry_images(spark(), build, failed, round, rounds)
    return replace(
        plan_again(plan),
        decision="RESUME",
        reason=f"rows that failed in passing were fetched again, round {round}",
    )


def _restore(
    plan: CurationPlan, build: Build, manifest: DatasetManifest, spark: Callable[[], SparkSession]
) -> None:
    """Have working files of ``build`` that come to its version."""
    units = units_of(plan.inputs)
    now = plan_again(replace(plan, build=build))
    if not now.units and not now.partitions and follows(build, manifest, units):
        return
    engine.restore(spark(), build, units, manifest)
    try:
        refuse_changed_inputs(plan)
    except UserError:
        build.forget_markers()
        raise


def _version_of(build: Build) -> DatasetManifest:
    """The version that a build came to; ``ObjectMissing`` when it has not."""
    version = noted_version(build.result_uri)
    if version is None:
        raise storage.ObjectMissing(build.result_uri)
    return load_manifest(storage.join(build.dataset_root, version, MANIFEST_NAME))


def _may_pass(build: Build, manifest: DatasetManifest, spark: Callable[[], SparkSession]) -> bool:
    """Whether any row failed for a cause that may have passed, as the ledger has it."""
    if not manifest.failed:
        return False
    return bool(count_ledgers(build.dataset_root, manifest, spark, build.environment).retryable)


def _failed_partitions(build: Build) -> list[int]:
    """Partitions in which any row failed; whether a retry may help, its rows know."""
    parts = build.read_all(PartMarker, build.num_partitions)
    return [index for index, part in sorted(parts.items()) if part.failed]


def _result(plan: CurationPlan, manifest_uri: str, manifest: DatasetManifest) -> CurationResult:
    return CurationResult(
        manifest_uri=manifest_uri,
        version=manifest.version,
        counts=manifest.counts,
        funnel=funnel_of(manifest),
        decision=plan.decision,
        reason=plan.reason,
        build_key=plan.build_key,
    )
