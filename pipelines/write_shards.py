"""Third task: the staged rows and images of one partition become shards and a ledger."""

from __future__ import annotations

import mmap
import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl

from infra import storage
from infra.manifest import FileEntry, ShardEntry
from pipelines.build import Build, PartMarker, StagedMarker
from pipelines.config import CurationConfig
from pipelines.duplicates import rank_of
from pipelines.ledger import (
    COMMITTED,
    LEDGER_SCHEMA,
    REJECTED,
    LedgerFile,
    count,
    is_worth_a_retry,
)
from pipelines.recorded import FETCHED, matches
from pipelines.rejected import NUM_PLACES, Tray, without_taken_down, write_pictures
from pipelines.shards import ShardWriter, sample_members
from pipelines.thumbnails import thumbnail

_ROWS_AT_ONCE = 1000


def staged_images(build: Build, partition: int, slot: int) -> pl.DataFrame:
    """The ``IMAGES`` of the partition, for its task's ``slot``."""
    with build.task(f"index-{partition:05d}") as folder:
        rows_path = build.fetch_staged(_staged(build, partition).rows, folder)
        columns = [
            "sample_id", "aesthetic_score", "sha256", "round", "signature", "train_caption",
        ]  # fmt: skip
        rows = pl.read_parquet(rows_path, columns=columns).drop_nulls("sha256")
        ranked = rows.select("round", "aesthetic_score", "sample_id").iter_rows()
        ranks = pl.Series("rank", [rank_of(*row) for row in ranked], dtype=pl.String)
        place = pl.lit(slot, dtype=pl.Int32).alias("slot")
        caption = pl.col("train_caption").hash().reinterpret(signed=True).alias("caption")
        return rows.select(place, ranks, "sha256", "signature", caption)


def write_shards(build: Build, partition: int, duplicates: pl.DataFrame) -> None:
    """Publish the partition's shards, its ledger, and its ``PartMarker``.

    ``duplicates`` has ``sample_id, reason, detail`` of the images that stay out.

    After a retry, only what that round brought is written; the shards before it stay, and the
    ledger is theirs with the retried rows replaced.
    """
    started_at = time.monotonic()
    with build.task(f"part-{partition:05d}") as folder:
        staged = _staged(build, partition)
        rows = pl.read_parquet(build.fetch_staged(staged.rows, folder)).sort("sample_id")
        rows = rows.filter(pl.col("round") == staged.round)
        rows = rows.join(duplicates, on="sample_id", how="left", suffix="_duplicate")
        is_duplicate = pl.col("reason_duplicate").is_not_null() & pl.col("offset").is_not_null()
        told = pl.lit("caption: ") + pl.col("caption_notes").list.join(", ")
        is_told = (pl.col("caption_notes").list.len() > 0) & (pl.col("detail").fill_null("") == "")
        rows = rows.with_columns(
            pl.when(is_duplicate & pl.col("detail_duplicate").is_not_null())
            .then("detail_duplicate")
            .when(is_told)
            .then(told)
            .otherwise("detail")
            .alias("detail"),
            pl.when(is_duplicate)
            .then(pl.lit(REJECTED))
            .otherwise(pl.col("disposition").fill_null(COMMITTED))
            .alias("disposition"),
            pl.when(is_duplicate).then("reason_duplicate").otherwise("reason").alias("reason"),
        ).drop("reason_duplicate", "detail_duplicate")
        images_path = build.fetch_staged(staged.images, folder)
        kept = rows.filter(pl.col("disposition") == COMMITTED)
        shards: list[ShardEntry] = []
        shard_of: dict[str, str] = {}
        sizes = dict(staged.carried.shard_sizes) if staged.carried else {}
        for size, alike in _by_bucket(kept, build.config):
            with ShardWriter(build.config.shards, build.dataset_root, folder) as writer:
                _pack(alike, images_path, build.config, writer)
                shards += writer.finish()
            shard_of |= writer.shard_of
            sizes |= {entry.path: size for entry in writer.shards if size}
        # A rejected copy of a row has the id of the one that stayed, and no shard.
        in_shard = pl.col("sample_id").replace_strict(
            shard_of, default=None, return_dtype=pl.String
        )
        is_committed = pl.col("disposition") == COMMITTED
        rows = rows.with_columns(pl.when(is_committed).then(in_shard).alias("shard"))
        carried = _carried_rows(build, staged, rows.height, folder)
        columns = ["disposition", "reason", *FETCHED, *FETCHED.values()]
        every = pl.concat([carried.select(columns), rows.select(columns)])
        counts = count(every)
        with LedgerFile(folder, f"part-{partition:05d}") as ledger:
            ledger.add(carried)
            ledger.add(rows)
            ledger_entry = ledger.publish(build.dataset_root)
        marker = PartMarker(
            shards=[*(staged.carried.shards if staged.carried else []), *shards],
            ledger=ledger_entry,
            committed=counts.committed,
            rejected=counts.rejected,
            failed=counts.failed,
            round=staged.round,
            shard_sizes=sizes,
            captions=staged.captions,
            recorded=matches(every),
            pictures=_pictures(build, partition, staged, rows, images_path),
            seconds=staged.carried.seconds if staged.carried else time.monotonic() - started_at,
        )
        build.write(marker, partition)


def _pictures(
    build: Build, partition: int, staged: StagedMarker, rows: pl.DataFrame, images_path: Path
) -> FileEntry | None:
    """Those of copies that stay out; after a retry, what the rounds before left."""
    if partition >= NUM_PLACES or staged.carried is not None:
        return None if staged.carried is None else staged.carried.pictures
    copies = rows.filter((pl.col("disposition") == REJECTED) & pl.col("offset").is_not_null())
    tray = Tray()
    with images_path.open("rb") as images:

        def image(row: dict[str, Any]) -> bytes | None:
            images.seek(row["offset"])
            return thumbnail(images.read(row["num_bytes"]))

        for row in copies.sort("sample_id").iter_rows(named=True):
            row["text"] = f"{row['detail'] or 'the same bytes'}: {row['train_caption']}"
            tray.offer(row["reason"], row, partial(image, row))
    pictures = without_taken_down(tray.frame(), build.tombstones)
    if pictures.is_empty():
        return None
    return build.stage(write_pictures(pictures, images_path.parent), "pictures", pictures.height)


def _by_bucket(
    rows: pl.DataFrame, config: CurationConfig
) -> Iterator[tuple[list[int], pl.DataFrame]]:
    """The rows of each bucket with its width and height, or all rows and no size."""
    if config.resize.crop != "bucket":
        yield [], rows
        return
    columns = ["image_width_px", "image_height_px"]
    for size in rows.select(columns).unique().sort(columns).iter_rows():
        yield list(size), rows.filter(pl.col(columns[0]) == size[0], pl.col(columns[1]) == size[1])


def _carried_rows(
    build: Build, staged: StagedMarker, num_retried: int, folder: Path
) -> pl.DataFrame:
    """How the rows that were not retried ended, from the ledger before the retry."""
    before = staged.carried.ledger if staged.carried else None
    if before is None:
        return pl.DataFrame(pl.from_arrow(LEDGER_SCHEMA.empty_table()))
    rows = pl.read_parquet(build.fetch_staged(before, folder))
    carried = rows.filter(~is_worth_a_retry())
    if carried.height + num_retried != rows.height:
        raise RuntimeError(
            f"{rows.height} rows were in the ledger, {carried.height} stayed, {num_retried} came"
        )
    return carried


def _staged(build: Build, partition: int) -> StagedMarker:
    marker = build.read(StagedMarker, partition)
    if marker is None:
        raise storage.ObjectMissing(build.marker_uri(StagedMarker, partition))
    return marker


def _pack(
    rows: pl.DataFrame, images_path: Path, config: CurationConfig, writer: ShardWriter
) -> None:
    """Add every row's sample, in the order of ``rows``; images are read where they lie."""
    if rows.is_empty():
        return
    with ExitStack() as stack:
        file = stack.enter_context(images_path.open("rb"))
        images = stack.enter_context(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        for batch in rows.iter_slices(_ROWS_AT_ONCE):
            for row in batch.iter_rows(named=True):
                image = images[row["offset"] : row["offset"] + row["num_bytes"]]
                extension = config.resize.encode_format
                members = sample_members(row, image, extension, config.preference)
                writer.add(row["sample_id"], members)
