"""Every flipped bit and every cut of what a dataset consists of is found by whoever reads it."""

from __future__ import annotations

import io
import random
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra import storage
from infra.errors import UserError
from infra.manifest import load_manifest, load_whole, verify_dataset
from infra.manifest_verify import unlisted_files
from pipelines.embed import (
    ROWS_SCHEMA,
    EmbeddedShard,
    EmbedTask,
    publish_file,
    read_embeddings,
    read_rows,
)
from pipelines.embeddings import EmbeddingsManifest
from pipelines.search import latest_embeddings, point_to_latest
from pipelines.workspace import Workspace, one_line_errors
from tests.pipelines.scoring.conftest import SmallDataset, make_dataset

if TYPE_CHECKING:
    from tests.conftest import S3Server

NUM_CHANGES = 1000
NUM_CUTS = 500
DIM = 8


@dataclass
class Stored:
    """A dataset with embeddings of its first shard, and per kind of file who reads it."""

    dataset: SmallDataset
    readers: dict[str, tuple[Path, Callable[[], object]]]


def stored(folder: Path) -> Stored:
    dataset = make_dataset(folder.as_uri(), num_samples=12, per_shard=4, num_ledgers=1)
    root, manifest = dataset.root, dataset.manifest
    shard, ledger = manifest.shards[0], manifest.ledger[0]
    ids = sorted(dataset.images)[:4]
    rng = np.random.default_rng(0)
    files = {}
    for kind in ("images", "texts"):
        np.save(folder / f"{kind}.npy", rng.normal(size=(4, DIM)).astype(np.float16))
        files[kind] = publish_file(folder / f"{kind}.npy", root, f"embeddings/m/{kind}", "npy", 4)
    rows = [{"sample_id": key, "row": row} for row, key in enumerate(ids)]
    pq.write_table(pa.Table.from_pylist(rows, ROWS_SCHEMA), folder / "rows.parquet")
    files["rows"] = publish_file(folder / "rows.parquet", root, "embeddings/m/rows", "parquet", 4)
    unit = EmbeddedShard(shard.path, shard.sha256, 4, 4, **files)
    counts = {"samples": 4, "embedded": 4, "failed": 0}
    embeddings = EmbeddingsManifest("small", manifest.version, {}, [unit], counts)
    uri = storage.join(root, "embeddings", "m", manifest.version, "manifest.json")
    storage.write_bytes(uri, embeddings.to_bytes())
    point_to_latest(root, embeddings, uri)

    def path(relative: str) -> Path:
        return folder / "datasets" / "small" / relative

    def shard_bytes() -> bytes:
        return storage.read_bytes(storage.join(root, shard.path), shard.sha256)

    return Stored(
        dataset,
        {
            "shard": (path(shard.path), shard_bytes),
            "ledger": (
                path(ledger.path),
                lambda: storage.read_bytes(storage.join(root, ledger.path), ledger.sha256),
            ),
            "manifest": (
                path(f"{manifest.version}/manifest.json"),
                lambda: load_manifest(dataset.manifest_uri),
            ),
            "image embeddings": (
                path(unit.images.path), lambda: read_embeddings(root, unit.images, DIM),
            ),
            "text embeddings": (
                path(unit.texts.path), lambda: read_embeddings(root, unit.texts, DIM),
            ),
            "rows of embeddings": (path(unit.rows.path), lambda: read_rows(root, unit)),
            "manifest of embeddings": (
                path(uri.removeprefix(f"{root}/")), lambda: latest_embeddings(root),
            ),
        },
    )  # fmt: skip


def test_a_thousand_flips_and_cuts_of_every_kind_of_file_are_detected_on_read(
    tmp_path: Path,
) -> None:
    made = stored(tmp_path)
    draw = random.Random(11)
    kinds = sorted(made.readers)
    for number in range(NUM_CHANGES):
        path, read = made.readers[kinds[number % len(kinds)]]
        whole = path.read_bytes()
        hurt = bytearray(whole)
        if draw.random() < 0.2:
            del hurt[draw.randrange(len(whole)) :]
        else:
            hurt[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        path.write_bytes(hurt)
        with pytest.raises(storage.DigestMismatch) as caught:
            read()
        assert path.name in str(caught.value)
        path.write_bytes(whole)
    for _, read in made.readers.values():
        read()


def places_to_cut(data: bytes) -> list[int]:
    """Where a tar looks whole though it is not: before and in each header, and between blocks."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        headers = [member.offset for member in tar]
    places = {place + more for place in headers for more in (0, 1, 100, 511, 512)}
    return sorted(place for place in places | set(range(0, len(data), 512)) if place < len(data))


def test_a_shard_cut_between_members_or_with_a_zeroed_tail_is_found_and_named(
    tmp_path: Path,
) -> None:
    made = stored(tmp_path)
    shard = made.dataset.manifest.shards[0]
    path, read = made.readers["shard"]
    whole = path.read_bytes()
    places = places_to_cut(whole)
    places += random.Random(3).sample(range(len(whole)), NUM_CUTS - len(places) // 2)
    num_tried = 0
    for number, place in enumerate(places):
        cut = whole[:place]
        for hurt in (cut, cut + bytes(len(whole) - place)):
            if hurt == whole:  # nothing but zeroes was there
                continue
            path.write_bytes(hurt)
            with pytest.raises(storage.DigestMismatch):
                read()
            if number % 10 == 0:
                problems = verify_dataset(made.dataset.manifest_uri)
                assert {problem.partition(": ")[0] for problem in problems} == {shard.path}
            num_tried += 1
    assert num_tried >= NUM_CUTS
    path.write_bytes(whole)
    assert verify_dataset(made.dataset.manifest_uri) == []


def test_a_pointer_to_embeddings_that_is_damaged_finds_none(tmp_path: Path) -> None:
    made = stored(tmp_path)
    (path,) = (tmp_path / "datasets" / "small").rglob("latest.json")
    whole = path.read_bytes()
    expected = latest_embeddings(made.dataset.root)
    for position in range(len(whole)):
        for bit in (0, 3, 6):
            hurt = bytearray(whole)
            hurt[position] ^= 1 << bit
            path.write_bytes(hurt)
            try:
                found = latest_embeddings(made.dataset.root)
            except (UserError, UnicodeDecodeError):
                continue
            assert found == expected, "its digest is in the pointer"


@pytest.mark.parametrize("damage", [b"", b"{", b"null", b"[]", "shard", "count"])
def test_a_marker_of_embeddings_that_is_not_whole_counts_as_not_written(
    tmp_path: Path, damage: bytes | str
) -> None:
    made = stored(tmp_path)
    shard = made.dataset.manifest.shards[0]
    unit = latest_embeddings(made.dataset.root).units[0]
    identity: Any = type("Identity", (), {"key": "m" * 64})
    task = EmbedTask(made.dataset.root, identity, "", 1, 1, 1, 1.0, 1.0)
    storage.write_json(task.marker_uri(shard.sha256), asdict(unit))
    assert task.read_marker(shard) == unit
    data = damage if isinstance(damage, bytes) else b""
    if damage == "shard":
        data = storage.read_bytes(task.marker_uri(shard.sha256)).replace(b"a", b"b")
    if damage == "count":
        data = storage.read_bytes(task.marker_uri(shard.sha256)).replace(b":4", b':"4"')
    storage.write_bytes(task.marker_uri(shard.sha256), data)
    assert task.read_marker(shard) is None


@pytest.mark.parametrize("damage", ["gone", "short"])
def test_a_shard_that_is_missing_is_named_before_any_is_read(tmp_path: Path, damage: str) -> None:
    """By every reader of training, from listings alone."""
    from training.image_data import ImageBatches, ImageOrder
    from training.token_cache import plan_cache
    from training.tokenizer_run import _samples

    made = stored(tmp_path)
    uri, shard = made.dataset.manifest_uri, made.dataset.manifest.shards[1]
    path = tmp_path / "datasets" / "small" / shard.path
    path.unlink() if damage == "gone" else path.write_bytes(path.read_bytes()[:-1])
    got = "nothing" if damage == "gone" else f"{shard.num_bytes - 1} bytes"
    readers: list[Callable[[], object]] = [
        lambda: load_whole(uri),
        lambda: plan_cache(uri, "s3://nobody/asked", 32, "center", None),
        lambda: ImageBatches(uri, ImageOrder(32, 2, 0)),
        lambda: next(_samples(uri, None, 0)),
    ]
    for read in readers:
        with pytest.raises(UserError, match=f"expected {shard.path} of .* got {got}"):
            read()


ODD = (
    "a b",
    "100%",
    "plus+sign",
    "amp&er=sand",
    "ünï",
    "quote'\"",
    "hash#tag",
    "q?x",
    "semi;colon",
)


def test_2500_objects_and_strays_are_listed_exactly(s3_server: S3Server, tmp_path: Path) -> None:
    """Put there behind the server's back; what was never finished is no object."""
    folder = s3_server.folder / "atelier" / tmp_path.name / "datasets" / "d"
    (folder / "shards").mkdir(parents=True)
    names = [f"shards/{number:032x}.tar" for number in range(2500)]
    names += [f"odd/{name}" for name in ODD]
    (folder / "odd").mkdir()
    for name in names:
        (folder / name).write_bytes(b"x")
    for name in (".atelier-tmp-0123", ".rclone_temp_0123", "shards/.atelier-tmp-4567"):
        (folder / name).write_bytes(b"unfinished")
    root = f"{s3_server.store_uri}/{tmp_path.name}/datasets/d"
    listed = [info.uri.removeprefix(f"{root}/") for info in storage.list_objects(root)]
    assert sorted(listed) == sorted(names)
    assert [unquote(name) for name in listed] == listed
    assert unlisted_files(root) == sorted(names[:2500])
    with ThreadPoolExecutor(4) as pool:
        read = pool.map(storage.read_bytes, [f"{root}/odd/{name}" for name in ODD])
    assert set(read) == {b"x"}
    assert storage.delete_prefix(root) >= len(names)
    assert list(storage.list_objects(root)) == []


class Room(Workspace):
    def __init__(self, folder: str) -> None:
        self.environment = {}
        self._folder = folder

    @property
    def folder(self) -> str:
        return self._folder


def test_what_a_task_met_is_forgotten_once_it_was_repeated_and_went_well(tmp_path: Path) -> None:
    room = Room((tmp_path / "work").as_uri())
    with one_line_errors(room):
        with pytest.raises(UserError), room.task("part-00000"):
            raise UserError("storage is away")
        assert room.failures() == ["storage is away"]
        with room.task("part-00000") as folder:
            assert folder.is_dir()
    assert list((tmp_path / "work").rglob("*.json")) == []


def test_a_disk_that_is_full_while_a_task_works_is_one_line(tmp_path: Path) -> None:
    """``/dev/full`` takes nothing. The line is left for the driver, the room is cleaned."""
    room = Room((tmp_path / "work").as_uri())
    rooms: list[Path] = []

    def work() -> None:
        with room.task("part-00000") as folder:
            rooms.append(folder)
            (folder / "images").symlink_to("/dev/full")
            with (folder / "images").open("wb") as file:
                file.write(b"x" * 100_000)

    with pytest.raises(UserError, match="the disk is full; free some space") as caught:
        work()
    assert room.failures() == [str(caught.value)]
    assert not rooms[0].exists()
