"""Images that look alike by their embeddings: found through the index, one of each kept.

The rule is that of ``pipelines.duplicates``: the highest aesthetic score stays, then the smallest
sample id; an unknown score ranks below every known one. From the best down, each image that is
still there takes away the ones close to it, so two that both look like a third need not fall for
each other.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import polars as pl

from infra.manifest import FileEntry
from pipelines.embed import embeddings_folder, publish_file, read_rows
from pipelines.vector_index import VectorIndex
from pipelines.verdicts import RefilterJob, verdicts


@dataclass(frozen=True)
class NearDuplicate:
    """``sample_id`` looks like ``kept_id``, which ranks above it."""

    sample_id: str
    kept_id: str
    cosine: float


def near_duplicates(index: VectorIndex, job: RefilterJob, min_cosine: float) -> list[NearDuplicate]:
    """The samples that ``job``'s thresholds keep and that a kept one outranks, by sample id."""
    ids, scores, stays = _samples(job)
    rank = {
        vector: position
        for position, vector in enumerate(
            sorted(
                (vector for vector in range(len(ids)) if stays[vector]),
                key=lambda v: (scores[v] is None, -(scores[v] or 0.0), ids[v]),
            )
        )
    }
    near: dict[int, dict[int, float]] = defaultdict(dict)
    for one, other, cosine in index.near_pairs(min_cosine):
        if one in rank and other in rank:
            near[one][other] = near[other][one] = cosine
    gone: dict[int, tuple[int, float]] = {}
    for vector in sorted(near, key=lambda v: rank[v]):
        if vector in gone:
            continue
        for other, cosine in near[vector].items():
            if rank[other] > rank[vector] and other not in gone:
                gone[other] = (vector, cosine)
    return sorted(
        (NearDuplicate(ids[v], ids[kept], cosine) for v, (kept, cosine) in gone.items()),
        key=lambda found: found.sample_id,
    )


def _samples(job: RefilterJob) -> tuple[list[str], list[float | None], list[bool]]:
    """Per vector its sample's id, its aesthetic score, and whether the thresholds keep it."""
    ids: list[str] = []
    scores: list[float | None] = []
    stays: list[bool] = []
    for unit, scored in zip(job.embeddings.units, job.scores.units, strict=True):
        rows = pl.DataFrame(pl.from_arrow(read_rows(job.dataset_root, unit)))
        found = verdicts(job, unit, scored.scores).with_columns(rows["row"])
        embedded = found.filter(pl.col("row").is_not_null()).sort("row")
        ids += embedded["sample_id"].to_list()
        scores += embedded["aesthetic_score"].to_list()
        stays += embedded["reason"].is_null().to_list()
    return ids, scores, stays


def publish_near_duplicates(job: RefilterJob, found: Sequence[NearDuplicate]) -> FileEntry:
    """Write the list as a content-named file, for a refilter to drop."""
    folder = f"{embeddings_folder(job.embeddings.identity.key)}/near"
    rows = [(each.sample_id, each.kept_id, each.cosine) for each in found]
    schema = {"sample_id": pl.String, "kept_id": pl.String, "cosine": pl.Float64}
    with TemporaryDirectory(prefix="atelier-near-") as temporary:
        path = Path(temporary, "near.parquet")
        pl.DataFrame(rows, schema=schema, orient="row").write_parquet(path)
        return publish_file(path, job.dataset_root, folder, "parquet", len(rows))
