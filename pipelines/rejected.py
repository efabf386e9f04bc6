"""Pictures of some images that did not stay, for the report: few, small, and always the same ones.

Of each reason the smallest sample ids are kept, from a fixed number of partitions or shards (these
are spread by hashes, so it is as if drawn); whatever the order of arrival, the same ones remain.
They lie in ``<version>/rejected.parquet``, which the manifest does not list: no reader of the
dataset needs them, and a takedown may remove them without a new version. Nothing that is taken
down, or may look like it, is among them.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import polars as pl

from infra import storage
from infra.digests import sha256_bytes
from infra.manifest import DatasetManifest, ShardEntry
from pipelines.build import Build, PartMarker, StagedMarker
from pipelines.config import CurationConfig, ResizeConfig
from pipelines.connection import Failed
from pipelines.decoder import Decoder
from pipelines.guard import Rejected
from pipelines.images import Bounds, Looks, StoredImage
from pipelines.ledger import REJECTED
from pipelines.outcomes import NotStored
from pipelines.shard_sample import Picture
from pipelines.thumbnails import QUALITY, SIDE_PX, thumbnail
from pipelines.tombstones import TAKEDOWN, Tombstones, load_tombstones

NUM_PLACES = 16  # partitions of a build, or shards of a version, whose rejects are kept
PER_PLACE = 6
PER_REASON = 12
MAX_TEXT_CHARS = 300
FILE_NAME = "rejected.parquet"
# Which other image they are like is not in every such row, so they go with any takedown.
_LOOK_LIKE_OTHERS = (
    "duplicate_image",
    "near_duplicate",
    "duplicate_of_other",
    "contaminated_image",
    "placeholder",
)
_UNDECODABLE = ("format", "pixels", "decode", TAKEDOWN)
SCHEMA: dict[str, pl.DataType] = {
    "sample_id": pl.String(),
    "reason": pl.String(),
    "text": pl.String(),
    "url": pl.String(),
    "sha256": pl.String(),
    "jpeg": pl.Binary(),
}


class Tray:
    """The pictures of one partition or shard: per reason those of the smallest sample ids."""

    def __init__(self) -> None:
        self._kept: dict[str, dict[str, tuple[str, str, str | None, bytes]]] = {}

    def offer(
        self,
        reason: str,
        row: Mapping[str, str | None],
        make: Callable[[], bytes | None],
    ) -> None:
        """Take the picture that ``make`` makes, which is called only if it would be kept.

        ``row``: ``sample_id``, ``url``, ``sha256`` of the image as fetched, and ``text``.
        """
        kept = self._kept.setdefault(reason, {})
        sample_id = str(row["sample_id"])
        if reason in _UNDECODABLE or sample_id in kept:
            return
        if len(kept) >= PER_PLACE and sample_id > max(kept):
            return
        if (jpeg := make()) is None:
            return
        text = " ".join((row["text"] or "").split())[:MAX_TEXT_CHARS]
        kept[sample_id] = (text, row["url"] or "", row["sha256"], jpeg)
        if len(kept) > PER_PLACE:
            del kept[max(kept)]

    def frame(self) -> pl.DataFrame:
        """One row per picture, by reason and sample id."""
        rows = [
            (sample_id, reason, *kept[sample_id])
            for reason, kept in sorted(self._kept.items())
            for sample_id in sorted(kept)
        ]
        return pl.DataFrame(rows, schema=SCHEMA, orient="row")


class StrangersThumbnails:
    """Thumbnails of bodies from the web, decoded where all others are, in a child.

    Faces are blurred where the recipe asks for it.
    """

    def __init__(self, config: CurationConfig) -> None:
        small = ResizeConfig(
            image_size_px=SIDE_PX, crop="none", encode_format="jpg", encode_quality=QUALITY
        )
        looks = Looks(blur_faces=config.blur_faces)
        self._decoder = Decoder([small], Bounds(config.fetch.max_pixels), looks)

    def __call__(self, body: bytes) -> bytes | None:
        """The thumbnail, or None of what does not decode."""
        try:
            (found,) = self._decoder.store(body)
        except (Rejected, Failed):
            return None
        return thumbnail(found.data) if isinstance(found, StoredImage) else None

    def close(self) -> None:
        """End the child, if one was started."""
        self._decoder.close()


Show = Callable[[int, bytes, Sequence[StoredImage | NotStored]], None]


@contextmanager
def offering(rows: pl.DataFrame, trays: Sequence[Tray], config: CurationConfig) -> Iterator[Show]:
    """What offers a row's body, by the row's index, to the trays of those that rejected it.

    The engine that hands no bodies over (img2dataset) offers none.
    """
    make = StrangersThumbnails(config)
    known = rows.select("sample_id", "url", text="train_caption") if trays else rows

    def show(index: int, body: bytes, found: Sequence[StoredImage | NotStored]) -> None:
        for tray, outcome in zip(trays, found, strict=False):
            if isinstance(outcome, StoredImage) or outcome.disposition != REJECTED:
                continue
            row = known.row(index, named=True)
            row["text"] = f"{outcome.detail}: {row['text']}"
            row["sha256"] = sha256_bytes(body)
            tray.offer(outcome.reason, row, lambda: make(body))

    try:
        yield show
    finally:
        make.close()


def offer_sample(tray: Tray, reason: str, key: str, members: Mapping[str, bytes]) -> None:
    """A sample that leaves its shard."""
    known = json.loads(members["json"])
    row = {"sample_id": key, "text": known.get("caption")}
    row |= {name: known.get(name) for name in ("url", "sha256")}
    image = next(data for name, data in members.items() if name not in ("json", "txt"))
    tray.offer(reason, row, lambda: thumbnail(image))


def shards_pictured(manifest: DatasetManifest) -> set[str]:
    """The paths of the shards whose rejects a derived version keeps pictures of."""
    ordered: Sequence[ShardEntry] = sorted(manifest.shards, key=lambda shard: shard.sha256)
    return {shard.path for shard in ordered[:NUM_PLACES]}


def of_build(build: Build) -> pl.DataFrame:
    """The pictures that a build's tasks left."""
    entries = []
    for index in range(min(NUM_PLACES, build.num_partitions)):
        for marker in (build.read(StagedMarker, index), build.read(PartMarker, index)):
            if marker is not None and marker.pictures is not None:
                entries.append(marker.pictures)
    return read_pictures(storage.join(build.dataset_root, entry.path) for entry in entries)


def read_pictures(uris: Iterable[str]) -> pl.DataFrame:
    """The pictures of several files; one that is gone or torn is left out, for nobody needs it."""
    frames = [pl.DataFrame(schema=SCHEMA)]
    for uri in uris:
        try:
            rows = pl.read_parquet(io.BytesIO(storage.read_bytes(uri)), columns=list(SCHEMA))
        except (storage.ObjectMissing, pl.exceptions.PolarsError, OSError):
            continue
        frames.append(rows)
    return pl.concat(frames)


def publish_rejected(
    dataset_root: str, manifest: DatasetManifest, made: pl.DataFrame, parent: str | None = None
) -> None:
    """Leave the pictures ``made``, and those of the version ``parent``, beside the manifest."""
    rows = made
    if parent is not None:
        rows = pl.concat([rows, read_pictures([_uri(dataset_root, parent)])])
    _write(dataset_root, manifest.version, without_taken_down(rows, load_tombstones(dataset_root)))


def without_taken_down(rows: pl.DataFrame, tombstones: Tombstones) -> pl.DataFrame:
    """The pictures that may be shown."""
    if not tombstones:
        return rows
    return rows.filter(~tombstones.covers(rows) & ~pl.col("reason").is_in(_LOOK_LIKE_OTHERS))


def forget_taken_down(dataset_root: str, version: str, tombstones: Tombstones) -> bool:
    """Remove from a version's pictures what is taken down; whether anything was."""
    rows = read_pictures([_uri(dataset_root, version)])
    kept = without_taken_down(rows, tombstones)
    if kept.height == rows.height:
        return False
    _write(dataset_root, version, kept)
    return True


def rejected_pictures(dataset_root: str, version: str) -> dict[str, list[Picture]]:
    """Reason -> pictures, of what may be shown."""
    rows = read_pictures([_uri(dataset_root, version)])
    rows = without_taken_down(rows, load_tombstones(dataset_root))
    found: dict[str, list[Picture]] = {}
    for row in rows.sort("reason", "sample_id").iter_rows(named=True):
        found.setdefault(row["reason"], []).append(
            Picture(row["sample_id"], row["text"], row["jpeg"])
        )
    return found


def _write(dataset_root: str, version: str, rows: pl.DataFrame) -> None:
    ordered = rows.unique(["reason", "sample_id"], keep="first", maintain_order=True)
    ordered = ordered.sort("reason", "sample_id")
    first = ordered.group_by("reason", maintain_order=True).head(PER_REASON).select(list(SCHEMA))
    uri = _uri(dataset_root, version)
    if first.is_empty():
        storage.delete(uri)
        return
    made = io.BytesIO()
    first.write_parquet(made)
    storage.write_bytes(uri, made.getvalue())


def _uri(dataset_root: str, version: str) -> str:
    return storage.join(dataset_root, version, FILE_NAME)


def write_pictures(rows: pl.DataFrame, folder: Path) -> Path:
    """The pictures as a local file."""
    path = folder / "pictures.parquet"
    rows.write_parquet(path)
    return path
