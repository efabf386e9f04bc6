"""Second task: the rows of one partition become fetched, checked and encoded images.

Threads fetch; what they bring is decoded in a child (``decoder``), one body after the other.
Images leave memory as they come: each is appended to one working file, and its row remembers
where. At any time a task holds at most ``num_threads`` bodies besides the one it decodes.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import polars as pl
import pyarrow as pa

from infra.errors import UserError
from infra.manifest import FileEntry
from pipelines.arrivals import arriving
from pipelines.bodies import Bodies, ListedBodies
from pipelines.build import Build, PartMarker, StagedMarker
from pipelines.caption_reasons import with_caption_reasons
from pipelines.captions import CAPTION_COLUMNS, caption_counts, with_captions
from pipelines.columns import CANONICAL_SCHEMA
from pipelines.config import CurationConfig
from pipelines.decoder import Decoder, shared_decoder
from pipelines.duplicates import row_duplicates
from pipelines.images import Bounds, Looks, StoredImage
from pipelines.img2dataset_engine import outcomes_by_img2dataset
from pipelines.ledger import FAILED, REJECTED
from pipelines.outcomes import (
    OUTCOME_SCHEMA,
    NotStored,
    not_stored,
    outcome_columns,
)
from pipelines.read_rows import TRAVEL_SCHEMA, without_removed
from pipelines.recorded import Recorded, recorded_of
from pipelines.rejected import (
    NUM_PLACES,
    Show,
    Tray,
    offering,
    without_taken_down,
    write_pictures,
)
from pipelines.tombstones import TAKEDOWN, Tombstones

# Fewer downloads than this say nothing about the network.
MIN_ATTEMPTS_TO_JUDGE = 20
_DNS = ("dns", "dns_no_such_host")
_NOTHING_RECORDED = Recorded()
# Reasons that only a body that arrived can give.
_ARRIVED = (
    "hash_mismatch",
    "format",
    "pixels",
    "image_too_small",
    "image_aspect_ratio",
    "decode",
    "image_check",
)


def stage_images(
    build: Build,
    partition: int,
    batches: Iterable[pa.RecordBatch],
    companions: Sequence[Build] = (),
) -> None:
    """Fetch the partition's images and leave them, with its rows, behind a ``StagedMarker``.

    The same bodies are stored for those of ``companions`` that lack the partition.
    """
    started_at = time.monotonic()
    with build.task(f"staged-{partition:05d}") as folder:
        lacking = [each for each in companions if each.read(StagedMarker, partition) is None]
        builds = [build, *lacking]
        rows = prepared_rows(pa.Table.from_batches(batches, TRAVEL_SCHEMA), build.config)
        rows = without_removed(rows, build.tombstones)
        num_asked = rows["reason"].null_count()
        trays = [Tray() for _ in builds if partition < NUM_PLACES]
        with ListedBodies(build.config.fetch, build.tars, build.tombstones) as bodies:
            fetched = fetch_rows(rows, [each.config for each in builds], bodies, folder, trays)
        _check_network(fetched[0], build.config, partition)
        # The one whose partition this is comes last: until it is marked, all is done again.
        for number, each in reversed(list(enumerate(builds))):
            staged = without_removed_images(fetched[number], build.tombstones)
            staged = staged.with_columns(in_round(0))
            pictures = None
            if trays:
                pictures = without_taken_down(trays[number].frame(), build.tombstones)
            images = images_path(folder, number)
            pace = (time.monotonic() - started_at, num_asked)
            leave(each, partition, staged, folder, images, round=0, pictures=pictures, pace=pace)


def in_round(number: int) -> pl.Expr:
    """The column that says in which round a row was fetched."""
    return pl.lit(number, dtype=pl.Int32).alias("round")


def leave(
    build: Build,
    partition: int,
    rows: pl.DataFrame,
    folder: Path,
    images: Path,
    *,
    round: int,
    carried: PartMarker | None = None,
    pictures: pl.DataFrame | None = None,
    kept: FileEntry | None = None,
    pace: tuple[float, int],
) -> None:
    """Upload ``rows``, the images they point into and ``pictures``, and say so.

    ``kept`` are pictures that an earlier round uploaded; ``pace``: seconds of the first round and
    bodies that it asked for.
    """
    if pictures is not None and not pictures.is_empty():
        kept = build.stage(write_pictures(pictures, folder), "pictures", pictures.height)
    rows_path = folder / "rows"
    rows.write_parquet(rows_path, row_group_size=10_000)
    num_images = rows.filter(pl.col("round") == round)["offset"].count()
    marker = StagedMarker(
        rows=build.stage(rows_path, "rows", rows.height),
        images=build.stage(images, "images", num_images),
        captions=caption_counts(rows),
        round=round,
        carried=carried,
        pictures=kept,
        seconds=pace[0],
        num_asked=pace[1],
    )
    build.write(marker, partition)


def prepared_rows(table: pa.Table, config: CurationConfig) -> pl.DataFrame:
    """Rows by sample id, with their captions and, for those not to be fetched, a ``reason``."""
    everything = pl.DataFrame(pl.from_arrow(table)).drop_nulls("url")
    is_caption = pl.col("is_caption")
    rows = everything.filter(~is_caption).select(CANONICAL_SCHEMA.names)
    long = everything.filter(is_caption).select(CAPTION_COLUMNS)
    rows = rows.sort(CANONICAL_SCHEMA.names)
    # An image stands in many comparisons, and what stays of it knows them all.
    rows = rows.with_columns(pl.col("human_preference").mean().over("sample_id"))
    rows = with_captions(rows, long, config.captions)
    rows = with_caption_reasons(rows, config)
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


def images_path(folder: Path, number: int) -> Path:
    """Where ``fetch_rows`` leaves the images of its n-th configuration."""
    return folder / f"images-{number}"


def fetch_rows(
    rows: pl.DataFrame,
    configs: Sequence[CurationConfig],
    bodies: Bodies,
    folder: Path,
    trays: Sequence[Tray] = (),
) -> list[pl.DataFrame]:
    """Fetch every row without a reason, once, and store its image as each of ``configs`` says.

    Per configuration the rows with their outcomes in columns; the images are at ``images_path``.
    ``trays``, one per configuration, are offered bodies that were rejected.
    """
    refused = [
        outcome_columns(None if reason is None else NotStored(REJECTED, reason, False, ""))
        for reason in rows["reason"]
    ]
    outcomes = [list(refused) for _ in configs]
    offsets = [0] * len(configs)
    with ExitStack() as stack:
        files = [
            stack.enter_context(images_path(folder, number).open("wb"))
            for number in range(len(configs))
        ]
        recorded = recorded_of(rows)
        todo = spread_by_host(rows)
        show = stack.enter_context(offering(rows, trays, configs[0]))
        for index, found in _outcomes(todo, recorded, configs, bodies, folder, show):
            for number, outcome in enumerate(found):
                outcomes[number][index] = outcome_columns(outcome, offsets[number])
                if isinstance(outcome, StoredImage):
                    offsets[number] += files[number].write(outcome.data)
    rows = rows.drop("reason")
    return [
        rows.hstack(pl.DataFrame(each, schema=OUTCOME_SCHEMA, orient="row")) for each in outcomes
    ]


def spread_by_host(rows: pl.DataFrame) -> list[tuple[int, str]]:
    """Index and URL of the rows to fetch, every host's evenly spread over the whole.

    Else a run of rows of one host would have all threads wait for its turns.
    """
    host = pl.col("url").str.extract("^[^:]*://([^/?#]*)").fill_null("")
    todo = (
        rows.lazy()
        .select("url", "reason", pl.int_range(pl.len()).alias("index"))
        .filter(pl.col("reason").is_null())
        .with_columns(host.alias("host"), pl.int_range(pl.len()).alias("place"))
    )
    turn = pl.int_range(pl.len()).over("host")
    phase = pl.col("place").first().over("host") / pl.len()
    position = (turn + phase) / pl.len().over("host")
    ordered = todo.with_columns(position.alias("position")).sort("position", "index")
    return list(ordered.select("index", "url").collect().iter_rows())


def _outcomes(
    todo: list[tuple[int, str]],
    recorded: list[Recorded],
    configs: Sequence[CurationConfig],
    bodies: Bodies,
    folder: Path,
    show: Show,
) -> Iterator[tuple[int, Sequence[StoredImage | NotStored]]]:
    """Outcomes as they come; at most ``num_threads`` bodies are under way or waiting."""
    first = configs[0]
    if first.fetch.engine == "img2dataset":
        yield from _outcomes_by_img2dataset(dict(todo), recorded, first, bodies, folder)
        return
    decoder = decoder_for(configs)
    with arriving(todo, bodies, first.fetch.num_threads) as found_bodies:
        for index, found in found_bodies:
            if isinstance(found, NotStored):
                yield index, [found] * len(configs)
            else:
                images = images_of(found, decoder, configs, recorded[index])
                show(index, found, images)
                yield index, images


def _outcomes_by_img2dataset(
    urls: dict[int, str],
    recorded: list[Recorded],
    config: CurationConfig,
    bodies: Bodies,
    folder: Path,
) -> Iterator[tuple[int, Sequence[StoredImage | NotStored]]]:
    md5s: dict[int, str | None] = {}

    def body_of(index: int) -> bytes:
        body = bodies.fetch(urls[index])
        md5s[index] = recorded[index].checked_md5(body, config.fetch.on_hash_mismatch)
        return body

    ended = outcomes_by_img2dataset(list(urls), config, bounds_of(config), body_of, folder)
    for index, outcome in ended:
        md5 = md5s.pop(index, None)
        yield index, [replace(outcome, md5=md5) if isinstance(outcome, StoredImage) else outcome]


def decoder_for(configs: Sequence[CurationConfig]) -> Decoder:
    """This process's decoder, as ``configs`` want it."""
    first = configs[0]
    return shared_decoder([each.resize for each in configs], bounds_of(first), looks_of(first))


def images_of(
    body: bytes,
    decoder: Decoder,
    configs: Sequence[CurationConfig],
    recorded: Recorded = _NOTHING_RECORDED,
) -> Sequence[StoredImage | NotStored]:
    """The body's image as each of ``configs`` stores it, or how the row ended there.

    ``decoder`` is ``decoder_for(configs)``.
    """
    try:
        md5 = recorded.checked_md5(body, configs[0].fetch.on_hash_mismatch)
        found = decoder.store(body)
    except Exception as error:
        return [not_stored(error)] * len(configs)
    return [
        replace(each, md5=md5) if isinstance(each, StoredImage) else not_stored(each)
        for each in found
    ]


def bounds_of(config: CurationConfig) -> Bounds:
    """What the recipe asks of the real image before it is decoded."""
    return Bounds(
        max_pixels=config.fetch.max_pixels,
        min_width_px=config.filters.min_width_px,
        min_height_px=config.filters.min_height_px,
        max_aspect_ratio=config.filters.max_aspect_ratio,
    )


def looks_of(config: CurationConfig) -> Looks:
    """What the recipe asks of the pixels."""
    return Looks(config.signs_images, tuple(config.image_checks), config.blur_faces)


def _check_network(rows: pl.DataFrame, config: CurationConfig, partition: int) -> None:
    """A partition most of whose downloads failed in passing is not worth committing."""
    has_arrived = pl.col("offset").is_not_null() | pl.col("reason").is_in(_ARRIVED)
    attempted = rows.filter(has_arrived | (pl.col("disposition") == FAILED))
    passing = attempted.filter(pl.col("retryable") | pl.col("reason").is_in(_DNS))
    ratio = passing.height / max(attempted.height, 1)
    if attempted.height < MIN_ATTEMPTS_TO_JUDGE or ratio <= config.fetch.max_transient_ratio:
        return
    counted = Counter(passing["reason"]).most_common(3)
    causes = ", ".join(f"{cause} {number}" for cause, number in counted)
    failing = "name resolution, for DNS is failing," if counted[0][0] in _DNS else "the network"
    raise UserError(
        expected=f"at most {config.fetch.max_transient_ratio:.0%} of partition {partition}'s "
        "downloads to fail for passing causes",
        got=f"{passing.height} of {attempted.height} ({causes})",
        remedy=f"check {failing} and run again (finished partitions are kept), "
        "or raise fetch.max_transient_ratio",
    )
