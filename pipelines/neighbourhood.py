"""Samples whose images lie near given ones, by their embeddings: all of them, exactly.

Every unit of a dataset's newest embeddings is one Spark task, which returns only what is near
enough; no index stands between, for what a takedown asks for must not be missed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from infra import storage
from infra.environment import applied
from infra.errors import UserError
from pipelines.embed import EmbeddedShard, embeddings_folder, read_rows
from pipelines.embeddings import EmbeddingsManifest
from pipelines.search import latest_embeddings
from pipelines.vector_index import Vectors, normalised, unit_vectors
from pipelines.workspace import Workspace, one_line_errors

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

MAX_FOUND = 100_000
_UNITS_PER_TASK = 4
_NEAR_SCHEMA = "sample_id string, url string, cosine double"
_VECTOR_SCHEMA = "sample_id string, vector binary"


@dataclass(frozen=True)
class Neighbour:
    """A sample near a query; ``cosine`` is that with the nearest query, in [-1, 1]."""

    sample_id: str
    url: str
    cosine: float


@dataclass(frozen=True)
class Neighbourhood(Workspace):
    """A dataset's newest embeddings, looked through by Spark; travels to the workers."""

    dataset_root: str
    embeddings: EmbeddingsManifest
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, dataset_root: str, environment: Mapping[str, str] | None = None) -> Neighbourhood:
        """``UserError`` for a dataset without embeddings."""
        with applied(environment or {}):
            return cls(dataset_root, latest_embeddings(dataset_root), dict(environment or {}))

    @property
    def folder(self) -> str:
        """Where the embeddings lie."""
        return storage.join(
            self.dataset_root, embeddings_folder(self.embeddings.identity.key), "looking"
        )

    def vectors(self, spark: SparkSession, sample_ids: Sequence[str]) -> dict[str, Vectors]:
        """Those of the samples that have an embedding here, each (dim,) float32."""
        wanted = set(sample_ids)

        def look(unit: EmbeddedShard) -> pa.RecordBatch:
            places = _places(self.dataset_root, unit)
            found = {key: row for key, (row, _) in places.items() if key in wanted}
            vectors = unit_vectors(self.dataset_root, self.embeddings, unit) if found else None
            return pa.RecordBatch.from_pydict(
                {
                    "sample_id": pa.array(list(found), pa.string()),
                    "vector": pa.array(
                        [vectors[row].tobytes() for row in found.values()]
                        if vectors is not None
                        else [],
                        pa.binary(),
                    ),
                }
            )

        found = self._run(spark, look, _VECTOR_SCHEMA)
        return {row.sample_id: np.frombuffer(row.vector, np.float32) for row in found}

    def near(self, spark: SparkSession, queries_QD: Vectors, min_cosine: float) -> list[Neighbour]:
        """All samples at ``min_cosine`` or nearer to one of the queries, the nearest first.

        ``UserError`` when there are more than 100,000: that is no neighbourhood.
        """
        queries_QD = normalised(queries_QD)

        def look(unit: EmbeddedShard) -> pa.RecordBatch:
            vectors = unit_vectors(self.dataset_root, self.embeddings, unit)
            cosines = (vectors @ queries_QD.T).max(axis=1)
            near = set(np.flatnonzero(cosines >= min_cosine).tolist())
            places = _places(self.dataset_root, unit) if near else {}
            hits = [(key, url, row) for key, (row, url) in places.items() if row in near]
            return pa.RecordBatch.from_pydict(
                {
                    "sample_id": pa.array([key for key, _, _ in hits], pa.string()),
                    "url": pa.array([url for _, url, _ in hits], pa.string()),
                    "cosine": pa.array([float(cosines[row]) for _, _, row in hits], pa.float64()),
                }
            )

        found: list[Neighbour] = []
        for row in self._run(spark, look, _NEAR_SCHEMA):
            found.append(Neighbour(row.sample_id, row.url or "", row.cosine))
            if len(found) > MAX_FOUND:
                raise UserError(
                    expected=f"at most {MAX_FOUND:,} samples near what is to go",
                    got=f"more, at a cosine of {min_cosine:g}",
                    remedy="raise --min-similarity",
                )
        return sorted(found, key=lambda each: (-each.cosine, each.sample_id))

    def _run(
        self, spark: SparkSession, look: Callable[[EmbeddedShard], pa.RecordBatch], schema: str
    ) -> Iterator[pa.RecordBatch]:
        units = self.embeddings.units

        def work(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
            for batch in batches:
                for index in batch.column(0).to_pylist():
                    with self.task(f"unit-{index:06d}"):
                        yield look(units[index])

        num_tasks = max(1, math.ceil(len(units) / _UNITS_PER_TASK))
        with one_line_errors(self):
            numbers = spark.range(0, len(units), 1, numPartitions=num_tasks)
            yield from numbers.mapInArrow(work, schema).toLocalIterator()


def _places(dataset_root: str, unit: EmbeddedShard) -> dict[str, tuple[int, str]]:
    """Sample id -> row of its vector, and URL."""
    table = read_rows(dataset_root, unit).select(["sample_id", "row", "url"])
    columns = (table[name].to_pylist() for name in ("sample_id", "row", "url"))
    return {key: (row, url) for key, row, url in zip(*columns, strict=True) if row is not None}
