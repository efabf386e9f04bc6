"""A second look at one partition's rows that failed in passing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from pipelines.bodies import ListedBodies
from pipelines.build import Build, PartMarker, StagedMarker
from pipelines.ledger import is_worth_a_retry
from pipelines.outcomes import OUTCOME_SCHEMA
from pipelines.stage_images import (
    fetch_rows,
    images_path,
    in_round,
    leave,
    without_removed_images,
)

Rounds = Sequence[tuple[Build, int]]


@dataclass(frozen=True)
class _Waiting:
    """A build's partition in which rows wait for a ``round``, and what it had come to."""

    build: Build
    round: int
    staged: StagedMarker
    part: PartMarker
    rows: pl.DataFrame

    @property
    def retried(self) -> pl.DataFrame:
        """The rows that are asked for again."""
        return self.rows.filter(is_worth_a_retry())


def retry_images(build: Build, partition: int, round: int, companions: Rounds = ()) -> None:
    """Fetch again the partition's rows whose failure may have passed; all others are left alone.

    The images of this ``round`` and the rows of all are left behind a ``StagedMarker`` that
    carries what the partition had come to. Without such rows, or when it has been done, nothing
    happens.

    ``companions`` retry their rows of the partition with the same bodies, each in its own round:
    a URL that failed in several of them is asked for once.
    """
    with build.task(f"retried-{partition:05d}") as folder:
        first = _waiting(build, partition, round, folder)
        if first is None:
            return
        found = [_waiting(each, partition, number, folder) for each, number in companions]
        waiting = [first, *(each for each in found if each is not None)]
        todo = pl.concat([_blank(each.retried) for each in waiting])
        todo = todo.unique("sample_id", keep="first", maintain_order=True)
        with ListedBodies(build.config.fetch, build.tars, build.tombstones) as bodies:
            fetched = fetch_rows(todo, [each.build.config for each in waiting], bodies, folder)
        # The one whose partition this is comes last: until it is marked, all is done again.
        for number, each in reversed(list(enumerate(waiting))):
            again = without_removed_images(fetched[number], each.build.tombstones)
            _leave_again(each, partition, again, folder, images_path(folder, number))


def _waiting(build: Build, partition: int, round: int, folder: Path) -> _Waiting | None:
    staged, part = build.read(StagedMarker, partition), build.read(PartMarker, partition)
    if staged is None or part is None or staged.round >= round:
        return None
    rows = pl.read_parquet(build.fetch_staged(staged.rows, folder))
    found = _Waiting(build, round, staged, part, rows)
    return None if found.retried.is_empty() else found


def _blank(rows: pl.DataFrame) -> pl.DataFrame:
    """The rows as they were before they were fetched."""
    return rows.drop(*OUTCOME_SCHEMA, "round").with_columns(
        pl.lit(None, dtype=pl.String).alias("reason")
    )


def _leave_again(
    waiting: _Waiting, partition: int, fetched: pl.DataFrame, folder: Path, images: Path
) -> None:
    retried, rows = waiting.retried, waiting.rows
    again = fetched.filter(pl.col("sample_id").is_in(retried["sample_id"].implode()))
    if again.height != retried.height:
        raise RuntimeError(f"{retried.height} rows were asked for again, {again.height} came")
    again = again.with_columns(in_round(waiting.round)).select(rows.columns)
    leave(
        waiting.build,
        partition,
        pl.concat([rows.filter(~is_worth_a_retry()), again]),
        folder,
        images,
        round=waiting.round,
        carried=waiting.part,
        kept=waiting.staged.pictures,
        pace=(waiting.staged.seconds, waiting.staged.num_asked),
    )
