"""Rows that lie together and can be read alone: what a sample of the metadata is drawn from."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from infra import storage
from infra.tar_stream import find_header
from pipelines.columns import Layout
from pipelines.config import CurationConfig
from pipelines.inputs import check_inputs, is_tar, one_line_tar, read_range
from pipelines.json_lines import read_lines
from pipelines.parquet import ROWS_PER_BATCH, open_parquet
from pipelines.sources import SOURCE_FORMATS
from pipelines.tar_samples import samples_in, table_of, tar_name

STRETCH_BYTES = 4 << 20
_LINE_BYTES = 1 << 20
_SAMPLE_BYTES = 4 << 20  # in so many bytes of a tar a sample begins
_THREADS = 8


@dataclass(frozen=True)
class Cluster:
    """A row group, or a stretch of a jsonl file or tar from byte ``start`` to byte ``end``.

    A stretch's ``num_records`` are reckoned from the length of the file's first lines or samples.
    """

    uri: str
    layout: Layout
    num_records: int
    row_group: int = 0
    start: int = 0
    end: int = 0

    @property
    def num_rows(self) -> int:
        """Canonical rows: a record of pairs is two."""
        return self.num_records * SOURCE_FORMATS[self.layout.format].rows_per_record


def metadata_clusters(config: CurationConfig) -> list[Cluster]:
    """Every cluster of the metadata, found from footers alone; schemas are checked as ever."""
    checked = check_inputs(config)
    files = [(uri, layout) for _, uri, layout in checked if layout is not None]

    def clusters(item: tuple[str, Layout]) -> list[Cluster]:
        uri, layout = item
        container = SOURCE_FORMATS[layout.format].container
        if container != "parquet":
            return _stretches(uri, layout, in_tar=container == "tar")
        with open_parquet(uri) as parquet:
            groups = parquet.metadata
            return [
                Cluster(uri, layout, groups.row_group(index).num_rows, index)
                for index in range(groups.num_row_groups)
            ]

    with ThreadPoolExecutor(_THREADS) as pool:
        return [cluster for found in pool.map(clusters, files) for cluster in found]


def draw_records(cluster: Cluster, most: int, rng: np.random.Generator) -> tuple[pa.Table, int]:
    """At most ``most`` records of the cluster, evenly drawn, and how many it holds in fact.

    Memory: one batch and what is drawn, however large the row group.
    """
    if cluster.end:
        if is_tar(cluster.uri):
            table = _whole_samples(cluster)
        else:
            table = read_lines(_whole_lines(cluster), cluster.layout.columns)
        return table.take(_chosen(table.num_rows, most, rng)), table.num_rows
    chosen = _chosen(cluster.num_records, most, rng)
    drawn: list[pa.Table] = []
    first = 0
    with open_parquet(cluster.uri) as parquet:
        columns = cluster.layout.columns
        batches = parquet.iter_batches(
            ROWS_PER_BATCH, [cluster.row_group], columns=columns, use_threads=False
        )
        for batch in batches:
            batch.validate(full=True)
            here = chosen[(chosen >= first) & (chosen < first + batch.num_rows)] - first
            drawn.append(pa.Table.from_batches([batch]).take(here))
            first += batch.num_rows
    return pa.concat_tables(drawn), cluster.num_records


def _chosen(num_rows: int, most: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    if num_rows <= most:
        return np.arange(num_rows, dtype=np.int64)
    return np.sort(rng.choice(num_rows, most, replace=False)).astype(np.int64)


def _stretches(uri: str, layout: Layout, *, in_tar: bool) -> list[Cluster]:
    num_bytes = storage.stat(uri).num_bytes
    head = read_range(uri, 0, min(num_bytes, STRETCH_BYTES))
    if in_tar:
        with one_line_tar(uri):
            num_records = sum(1 for _ in samples_in([head], 0, tar_name(uri)))
    else:
        num_records = head.count(b"\n")
    records_per_byte = max(num_records, 1) / len(head)
    ends = [*range(STRETCH_BYTES, num_bytes, STRETCH_BYTES), num_bytes]
    starts = [0, *ends[:-1]]
    return [
        Cluster(uri, layout, max(round((end - start) * records_per_byte), 1), 0, start, end)
        for start, end in zip(starts, ends, strict=True)
    ]


def _whole_lines(cluster: Cluster) -> bytes:
    """The lines that begin within the stretch; one that ends far behind it is cut."""
    num_bytes = storage.stat(cluster.uri).num_bytes
    before = max(cluster.start - 1, 0)
    data = read_range(cluster.uri, before, min(cluster.end + _LINE_BYTES, num_bytes))
    begin = 0 if cluster.start == 0 else data.find(b"\n") + 1
    end = data.find(b"\n", cluster.end - before - 1) + 1 or len(data)
    return data[begin:end]


def _whole_samples(cluster: Cluster) -> pa.Table:
    """The samples that begin within the stretch; one that ends far behind it may be cut."""
    uri, name = cluster.uri, tar_name(cluster.uri)
    num_bytes = storage.stat(uri).num_bytes
    # A sample's first member is known by the one before it.
    before = max(cluster.start - _SAMPLE_BYTES, 0)
    data = read_range(uri, before, min(cluster.end + _SAMPLE_BYTES, num_bytes))
    skipped = find_header(data) if before else 0
    with one_line_tar(uri):
        pieces = [] if skipped is None else [data[skipped:]]
        found = samples_in(pieces, before + (skipped or 0), name)
        own = [each for each in found if cluster.start <= each.start < cluster.end]
    return table_of(own, name, cluster.layout.columns)
