"""Embed, score and select on one page: what `atelier score` and `atelier refilter` do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from infra.manifest import dataset_root, load_manifest
from infra.progress import Progress
from pipelines.derive import DerivationResult, derive
from pipelines.embeddings import EmbeddingsResult, embed_dataset
from pipelines.heads import load_head
from pipelines.near_duplicates import near_duplicates, publish_near_duplicates
from pipelines.pair_check import learn_pairs
from pipelines.scores import ScoresResult, score_dataset
from pipelines.scoring_config import RefilterConfig, ScoringConfig
from pipelines.search import point_to_latest
from pipelines.vector_index import open_index
from pipelines.verdicts import RefilterJob, job_of, preview

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

# (what is done, how many there are, unit) -> a bar to report to
Bars = Callable[[str, int, str], AbstractContextManager[Progress]]


@dataclass(frozen=True)
class Scoring:
    """A published version with its embeddings and scores."""

    manifest_uri: str
    embeddings: EmbeddingsResult
    scores: ScoresResult


def score(
    manifest_uri: str,
    config: ScoringConfig,
    spark: Callable[[], SparkSession],
    bars: Bars,
    environment: Mapping[str, str] | None = None,
) -> Scoring:
    """Embed a dataset version and put every head on it; what is done already is not done again.

    Heads are read first, so that a broken one costs nothing. Searches take these embeddings next.
    """
    heads = [load_head(head) for _, head in sorted(config.heads.items())]
    name, total = _size_of(manifest_uri)
    with bars(f"embedding {name}", total, "images") as bar:
        embedded = embed_dataset(manifest_uri, config.clip, spark, environment, bar.update)
    with bars(f"scoring {name}", total, "images") as bar:
        scored = score_dataset(
            manifest_uri, embedded.manifest, heads, spark, environment, bar.update
        )
    point_to_latest(dataset_root(manifest_uri), embedded.manifest, embedded.manifest_uri)
    return Scoring(manifest_uri, embedded, scored)


def _size_of(manifest_uri: str) -> tuple[str, int]:
    manifest = load_manifest(manifest_uri)
    return manifest.name, manifest.counts["committed"]


def selection(
    scoring: Scoring,
    config: ScoringConfig,
    keep: RefilterConfig,
    bars: Bars,
    environment: Mapping[str, str] | None = None,
) -> RefilterJob:
    """The job that applies the thresholds of ``keep``.

    What pairs are like is learnt already, and near-duplicates are found.
    """
    embeddings, scores = scoring.embeddings.manifest, scoring.scores.manifest
    job = job_of(scoring.manifest_uri, embeddings, scores, keep, environment)
    if keep.mismatches is not None and embeddings.counts["embedded"]:
        pairs, told = learn_pairs(job, keep.mismatches)
        job = replace(job, pairs=pairs, pairs_told=told)
    min_cosine = keep.near_duplicate_cosine
    if min_cosine is None:
        return job
    with bars("indexing", embeddings.counts["embedded"], "images") as bar:
        index = open_index(job.dataset_root, embeddings, config.index, bar.update)
    found = near_duplicates(index, job, min_cosine)
    return replace(job, dropped=publish_near_duplicates(job, found)) if found else job


def select(
    job: RefilterJob, spark: Callable[[], SparkSession], bars: Bars
) -> tuple[DerivationResult, dict[str, int]]:
    """Publish the selection; returns it with what each reason took and how many stay."""
    with bars("rewriting", job.manifest.counts["committed"], "samples") as bar:
        result = derive(job, spark, bar.update)
    return result, preview(job)
