"""A recipe's derived dataset: planned without any work, made once, found again by its key."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from infra import storage
from infra.config import semantic_part
from infra.digests import canonical_json, sha256_bytes
from infra.environment import applied
from infra.manifest import DatasetManifest, dataset_root, load_manifest
from pipelines.build import KEY_CHARS
from pipelines.clip_model import identify
from pipelines.heads import load_head
from pipelines.plan import verify_unless_unchanged
from pipelines.score import Bars, score, select, selection
from pipelines.scoring_config import DerivedConfig, ScoringConfig
from pipelines.verdicts import REFILTER_VERSION
from pipelines.workspace import noted_version

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


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


def plan_derived(manifest_uri: str, scoring: ScoringConfig, config: DerivedConfig) -> DerivedPlan:
    """Decide; reads the model's and heads' files and, when a version is there, all its bytes.

    Raises ``UserError`` for a model or a head that cannot be used.
    """
    heads = sorted(
        (load_head(head).identity() for head in scoring.heads.values()),
        key=lambda each: each["column"],
    )
    identity = {
        "dataset": load_manifest(manifest_uri).version,
        "model": identify(scoring.clip)[0].key,
        "heads": heads,
        "keep": semantic_part(config.keep),
        "version": REFILTER_VERSION,
    }
    plan = DerivedPlan("RUN", "", sha256_bytes(canonical_json(identity)), manifest_uri)
    version = noted_version(plan.result_uri)
    if version is None:
        reason = "these thresholds have not been asked of this version yet"
        return DerivedPlan("RUN", reason, plan.key, manifest_uri)
    problems = verify_unless_unchanged(dataset_root(manifest_uri), version)
    if problems:
        reason = f"{len(problems)} stored files are damaged, first: {problems[0]}"
        return DerivedPlan("RUN", reason, plan.key, manifest_uri, None, problems)
    reason = f"version {version[:12]} is there and verified"
    return DerivedPlan("SKIP", reason, plan.key, manifest_uri, version)


def make_derived(
    plan: DerivedPlan,
    scoring: ScoringConfig,
    config: DerivedConfig,
    spark: Callable[[], SparkSession],
    bars: Bars,
    environment: Mapping[str, str] | None = None,
) -> tuple[str, DatasetManifest]:
    """Score the dataset as far as that is not done, keep what stays, and publish it.

    ``spark`` is called when there is work. Killed at any moment, a second call goes on; what is
    damaged is removed and made again.
    """
    with applied(environment or {}):
        root = dataset_root(plan.parent_uri)
        for problem in plan.problems:  # verify_dataset's lines begin with the file's path
            storage.delete(storage.join(root, problem.partition(":")[0]))
        scored = score(plan.parent_uri, scoring, spark, bars, environment)
        job = selection(scored, scoring, config.keep, bars, environment)
        result, _ = select(job, spark, bars)
        storage.write_json(plan.result_uri, {"version": result.manifest.version})
    return result.manifest_uri, result.manifest
