"""Second task: the rows of one partition become fetched, checked and encoded images.

Images leave memory as they come: each is appended to one working file, and its row remembers
where. At any time a task holds at most ``num_threads`` bodies, one decoded image, and
``2 * num_threads`` encoded ones.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import polars as pl
import pyarrow as pa

from infra.errors import UserError
from pipelines.build import Build, PartMarker, StagedMarker
from pipelines.captions import CAPTION_COLUMNS, caption_counts, with_captions
from pipelines.columns import CANONICAL_SCHEMA
from pipelines.config import CurationConfig
from pipelines.connection import Failed
from pipelines.duplicates import row_duplicates
from pipelines.fetch import Fetcher, shared_fetcher
from pipelines.filters import caption_filters, first_reason
from pipelines.guard import Rejected
from pipelines.images import StoredImage, store_image
from pipelines.ledger import FAILED, REJECTED, is_worth_a_retry
from pipelines.read_rows import TRAVEL_SCHEMA, without_removed
from pipelines.tombstones import TAKEDOWN, Tombstones

# Fewer downloads than this say nothing about the network.
MIN_ATTEMPTS_TO_JUDGE = 20
MAX_DETAIL_CHARS = 200

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class NotStored:
    """How a row ended that has no image."""

    disposition: str
    reason: str
    retryable: bool
    detail: str


# What the task adds to a canonical row. ``disposition`` is null for rows that have an image.
OUTCOME_SCHEMA: dict[str, pl.DataType] = {
    "disposition": pl.String(),
    "reason": pl.String(),
    "retryable": pl.Boolean(),
    "detail": pl.String(),
    "sha256": pl.String(),
    "image_width_px": pl.Int32(),
    "image_height_px": pl.Int32(),
    "original_width_px": pl.Int32(),
    "original_height_px": pl.Int32(),
    "crop_left_px": pl.Int32(),
    "crop_top_px": pl.Int32(),
    "offset": pl.Int64(),
    "num_bytes": pl.Int64(),
}


def stage_images(build: Build, partition: int, batches: Iterable[pa.RecordBatch]) -> None:
    """Fetch the partition's images and leave them, with its rows, behind a ``StagedMarker``."""
    with build.task(f"staged-{partition:05d}") as folder:
        rows = prepared_rows(pa.Table.from_batches(batches, TRAVEL_SCHEMA), build.config)
        images_path = folder / "images"
        rows = without_removed(rows, build.tombstones)
        rows = fetch_rows(rows, build.config, shared_fetcher(build.config.fetch), images_path)
        _check_network(rows, build.config, partition)
        rows = without_removed_images(rows, build.tombstones)
        _leave(build, partition, rows.with_columns(_round(0)), folder, round=0)


def retry_images(build: Build, partition: int, round: int) -> None:
    """Fetch again the partition's rows whose failure may have passed; all others are left alone.

    The images of this ``round`` and the rows of all are left behind a ``StagedMarker`` that
    carries what the partition had come to. Without such rows, or when it has been done, nothing
    happens.
    """
    with build.task(f"retried-{partition:05d}") as folder:
        staged, part = build.read(StagedMarker, partition), build.read(PartMarker, partition)
        if staged is None or part is None or staged.round >= round:
            return
        rows = pl.read_parquet(build.fetch_staged(staged.rows, folder))
        retried = rows.filter(is_worth_a_retry())
        if retried.is_empty():
            return
        todo = retried.drop(*OUTCOME_SCHEMA, "round").with_columns(
            pl.lit(None, dtype=pl.String).alias("reason")
        )
        fetcher = shared_fetcher(build.config.fetch)
        again = fetch_rows(todo, build.config, fetcher, folder / "images")
        again = without_removed_images(again, build.tombstones)
        again = again.with_columns(_round(round)).select(rows.columns)
        rows = pl.concat([rows.filter(~is_worth_a_retry()), again])
        _leave(build, partition, rows, folder, round=round, carried=part)


def _round(number: int) -> pl.Expr:
    return pl.lit(number, dtype=pl.Int32).alias("round")


def _leave(
    build: Build,
    partition: int,
    rows: pl.DataFrame,
    folder: Path,
    *,
    round: int,
    carried: PartMarker | None = None,
) -> None:
    """Upload ``rows`` and the folder's images, and say so."""
    rows_path = folder / "rows"
    rows.write_parquet(rows_path, row_group_size=10_000)
    num_images = rows.filter(pl.col("round") == round)["offset"].count()
    marker = StagedMarker(
        rows=build.stage(rows_path, "rows", rows.height),
        images=build.stage(folder / "images", "images", num_images),
        captions=caption_counts(rows),
        round=round,
        carried=carried,
    )
    build.write(marker, partition)


def prepared_rows(table: pa.Table, config: CurationConfig) -> pl.DataFrame:
    """Rows by sample id, with their captions and, for those not to be fetched, a ``reason``."""
    everything = pl.DataFrame(pl.from_arrow(table)).drop_nulls("url")
    is_caption = pl.col("is_caption")
    rows = everything.filter(~is_caption).select(CANONICAL_SCHEMA.names)
    long = everything.filter(is_caption).select(CAPTION_COLUMNS)
    rows = with_captions(rows.sort(CANONICAL_SCHEMA.names), long, config.captions)
    drops = config.captions.personal_data == "drop"
    asked = caption_filters(config.filters, drops_personal=drops)
    rows = rows.with_columns(first_reason(asked))
    duplicates = row_duplicates(rows, same_url=config.duplicates.same_url)
    return rows.with_columns(pl.coalesce("reason", duplicates.alias("reason")))


def without_removed_images(rows: pl.DataFrame, tombstones: Tombstones) -> pl.DataFrame:
    """The fetched rows, those whose image is taken down rejected; nothing points at its bytes."""
    if not tombstones:
        return rows
    gone = tombstones.covers(rows.select("sha256"))
    nothing = [pl.lit(None, dtype=kind).alias(name) for name, kind in OUTCOME_SCHEMA.items()]
    blank = [
        pl.when(gone).then(each).otherwise(pl.col(each.meta.output_name())) for each in nothing
    ]
    return rows.with_columns(blank).with_columns(
        pl.when(gone).then(pl.lit(REJECTED)).otherwise("disposition").alias("disposition"),
        pl.when(gone).then(pl.lit(TAKEDOWN)).otherwise("reason").alias("reason"),
        pl.when(gone).then(pl.lit(False)).otherwise("retryable").alias("retryable"),
    )


def fetch_rows(
    rows: pl.DataFrame, config: CurationConfig, fetcher: Fetcher, images_path: Path
) -> pl.DataFrame:
    """Fetch every row without a reason; images go to ``images_path``, outcomes into columns."""
    outcomes = [
        _columns(None if reason is None else NotStored(REJECTED, reason, False, ""))
        for reason in rows["reason"]
    ]
    todo = [
        (index, url)
        for index, (url, reason) in enumerate(rows.select("url", "reason").iter_rows())
        if reason is None
    ]
    offset = 0
    with images_path.open("wb") as images:
        for index, outcome in _in_threads(todo, config, fetcher):
            outcomes[index] = _columns(outcome, offset)
            if isinstance(outcome, StoredImage):
                offset += images.write(outcome.data)
    columns = pl.DataFrame(outcomes, schema=OUTCOME_SCHEMA, orient="row")
    return rows.drop("reason").hstack(columns)


def _columns(outcome: StoredImage | NotStored | None, offset: int = 0) -> dict[str, object]:
    """The outcome under the names of ``OUTCOME_SCHEMA``; the rest is null."""
    if outcome is None:
        return {}
    if isinstance(outcome, NotStored):
        return asdict(outcome)
    return {
        "sha256": outcome.sha256,
        "image_width_px": outcome.width_px,
        "image_height_px": outcome.height_px,
        "original_width_px": outcome.original_width_px,
        "original_height_px": outcome.original_height_px,
        "crop_left_px": outcome.crop_left_px,
        "crop_top_px": outcome.crop_top_px,
        "offset": offset,
        "num_bytes": len(outcome.data),
    }


def _in_threads(
    todo: list[tuple[int, str]], config: CurationConfig, fetcher: Fetcher
) -> Iterator[tuple[int, StoredImage | NotStored]]:
    """Outcomes as they come; at most ``2 * num_threads`` are under way or waiting."""
    num_threads = config.fetch.num_threads
    remaining = iter(todo)
    with ThreadPoolExecutor(num_threads, thread_name_prefix="fetch") as pool:

        def submit(item: tuple[int, str]) -> Future[tuple[int, StoredImage | NotStored]]:
            return pool.submit(lambda: (item[0], fetch_image(item[1], config, fetcher)))

        under_way = {submit(item) for item in islice(remaining, 2 * num_threads)}
        while under_way:
            done, under_way = wait(under_way, return_when=FIRST_COMPLETED)
            under_way |= {submit(item) for item in islice(remaining, len(done))}
            for future in done:
                yield future.result()


def fetch_image(url: str, config: CurationConfig, fetcher: Fetcher) -> StoredImage | NotStored:
    """One row's image, or how the row ended. What nobody foresaw fails this row only."""
    try:
        return store_image(
            fetcher.fetch(url),
            config.resize,
            max_pixels=config.fetch.max_pixels,
            min_width_px=config.filters.min_width_px,
            min_height_px=config.filters.min_height_px,
            max_aspect_ratio=config.filters.max_aspect_ratio,
        )
    except Rejected as rejection:
        return NotStored(REJECTED, rejection.reason, False, rejection.detail[:MAX_DETAIL_CHARS])
    except Failed as failure:
        detail = failure.detail[:MAX_DETAIL_CHARS]
        return NotStored(FAILED, failure.cause, failure.retryable, detail)
    except Exception as error:
        logger.exception("unforeseen while fetching one image")
        return NotStored(FAILED, "internal_error", True, type(error).__name__)


def _check_network(rows: pl.DataFrame, config: CurationConfig, partition: int) -> None:
    """A partition most of whose downloads failed in passing is not worth committing."""
    attempted = rows.filter(pl.col("offset").is_not_null() | (pl.col("disposition") == FAILED))
    passing = attempted.filter(
        pl.col("retryable") | pl.col("reason").is_in(["dns", "dns_no_such_host"])
    )
    ratio = passing.height / max(attempted.height, 1)
    if attempted.height < MIN_ATTEMPTS_TO_JUDGE or ratio <= config.fetch.max_transient_ratio:
        return
    causes = ", ".join(
        f"{cause} {number}" for cause, number in Counter(passing["reason"]).most_common(3)
    )
    raise UserError(
        expected=f"at most {config.fetch.max_transient_ratio:.0%} of partition {partition}'s "
        "downloads to fail for passing causes",
        got=f"{passing.height} of {attempted.height} ({causes})",
        remedy="check the network and run again (finished partitions are kept), "
        "or raise fetch.max_transient_ratio",
    )
