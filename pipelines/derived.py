"""A recipe's derived dataset: planned without any work, made once, found again by its key."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from infra import storage
from infra.config import semantic_part
from infra.digests import canonical_json, sha256_bytes
from infra.environment import applied
from infra.errors import UserError
from infra.manifest import DatasetManifest, dataset_root, load_manifest
from pipelines.build import KEY_CHARS
from pipelines.caption_answers import identity_of
from pipelines.caption_local import identify_local
from pipelines.caption_version import (
    CAPTION_VERSION,
    ask_captions,
    plan_captions,
    version_job,
)
from pipelines.captioning_config import CaptioningConfig
from pipelines.clip_model import identify
from pipelines.derive import derive
from pipelines.heads import load_head
from pipelines.plan import verify_unless_unchanged
from pipelines.preference import PREFERENCE_VERSION, prefer, preference_part
from pipelines.prune import PRUNE_VERSION, judge, prune_job, prune_part
from pipelines.score import Bars, score, select, selection
from pipelines.scoring_config import DerivedConfig, PruneConfig, ScoringConfig
from pipelines.verdicts import REFILTER_VERSION
from pipelines.workspace import noted_version

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

_Section = TypeVar("_Section", ScoringConfig, CaptioningConfig)


@dataclass(frozen=True)
class DerivedPlan:
    """SKIP: a verified version is there. RUN: it has to be made, again when it is damaged."""

    decision: Literal["SKIP", "RUN"]
    reason: str
    key: str
    parent_uri: str
    version: str | None = None
    problems: list[str] = field(default_factory=list)

    @property
    def manifest_uri(self) -> str | None:
        """The address of the version that is there, if one is."""
        if self.version is None:
            return None
        return storage.join(dataset_root(self.parent_uri), self.version, "manifest.json")

    @property
    def result_uri(self) -> str:
        """Where the version that came out is noted."""
        root = dataset_root(self.parent_uri)
        return storage.join(root, "work", f"derived-{self.key[:KEY_CHARS]}", "result.json")


@dataclass(frozen=True)
class Sections:
    """The parts of a recipe that derived datasets draw on."""

    scoring: ScoringConfig | None = None
    captioning: CaptioningConfig | None = None


def plan_derived(manifest_uri: str, sections: Sections, config: DerivedConfig) -> DerivedPlan:
    """Decide; reads the models' and heads' files, and of a version that is there what was written
    since it was verified.

    Raises ``UserError`` for a model or a head that cannot be used.
    """
    identity: dict[str, Any] = {"dataset": load_manifest(manifest_uri).version}
    if config.keep is not None:
        scoring = _needed(sections.scoring, "scoring")
        heads = [load_head(head).identity() for head in scoring.heads.values()]
        identity |= {
            "model": identify(scoring.clip)[0].key,
            "heads": sorted(heads, key=lambda each: each["column"]),
            "keep": semantic_part(config.keep),
            "version": REFILTER_VERSION,
        }
    if config.prune is not None:
        identity |= {
            "prune": semantic_part(config.prune),
            "prune_against": prune_part(config.prune),
            "prune_version": PRUNE_VERSION,
        }
    if config.caption:
        captioning = _needed(sections.captioning, "captioning")
        model = None if captioning.local is None else identify_local(captioning.local)
        identity |= {
            "captioner": identity_of(captioning, model),
            "take": semantic_part(captioning.take),
            "caption_version": CAPTION_VERSION,
        }
    if config.preference is not None:
        identity |= {
            "preference": preference_part(config.preference),
            "preference_version": PREFERENCE_VERSION,
        }
    plan = DerivedPlan("RUN", "", sha256_bytes(canonical_json(identity)), manifest_uri)
    version = noted_version(plan.result_uri)
    if version is None:
        reason = "this has not been made of this version yet"
        return DerivedPlan("RUN", reason, plan.key, manifest_uri)
    problems = verify_unless_unchanged(dataset_root(manifest_uri), version)
    if problems:
        reason = f"{len(problems)} stored files are damaged, first: {problems[0]}"
        return DerivedPlan("RUN", reason, plan.key, manifest_uri, None, problems)
    reason = f"version {version[:12]} is there and verified"
    return DerivedPlan("SKIP", reason, plan.key, manifest_uri, version)


def make_derived(
    plan: DerivedPlan,
    sections: Sections,
    config: DerivedConfig,
    spark: Callable[[], SparkSession],
    bars: Bars,
    environment: Mapping[str, str] | None = None,
) -> tuple[str, DatasetManifest]:
    """Score and caption the dataset as far as that is not done, and publish what it comes to.

    ``spark`` is called when there is work. Killed at any moment, a second call goes on; what is
    damaged is removed and made again.
    """
    with applied(environment or {}):
        root = dataset_root(plan.parent_uri)
        for problem in plan.problems:  # verify_dataset's lines begin with the file's path
            storage.delete(storage.join(root, problem.partition(":")[0]))
        uri = plan.parent_uri
        if config.keep is not None:
            scoring = _needed(sections.scoring, "scoring")
            scored = score(uri, scoring, spark, bars, environment)
            job = selection(scored, scoring, config.keep, bars, environment)
            uri = select(job, spark, bars)[0].manifest_uri
        if config.prune is not None:
            uri = prune(uri, config.prune, spark, bars, environment)
        if config.caption:
            asking = plan_captions(uri, _needed(sections.captioning, "captioning"), environment)
            total = asking.manifest.counts["committed"]
            with bars("captioning", total, "images") as bar:
                answers, _ = ask_captions(asking, spark, bar.update)
            with bars("rewriting", total, "samples") as bar:
                uri = derive(version_job(asking, answers), spark, bar.update).manifest_uri
        if config.preference is not None:
            uri = prefer(uri, config.preference, spark, bars, environment)
        manifest = load_manifest(uri)
        storage.write_json(plan.result_uri, {"version": manifest.version})
    return uri, manifest


def prune(
    manifest_uri: str,
    config: PruneConfig,
    spark: Callable[[], SparkSession],
    bars: Bars,
    environment: Mapping[str, str] | None = None,
) -> str:
    """Publish a version without copies and evaluation sets; returns its manifest's address."""
    job = prune_job(manifest_uri, config, environment)
    with bars("pruning", job.manifest.counts["committed"], "samples") as bar:
        judge(job, spark)
        return derive(job, spark, bar.update).manifest_uri


def _needed(section: _Section | None, name: str) -> _Section:
    if section is None:
        raise UserError(f"a derived dataset needs the section `{name}`, and the recipe has none")
    return section
