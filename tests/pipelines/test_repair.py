"""Repairs: the same bytes again from what is left, or a new version that names what was lost."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
import pytest

from infra import storage
from infra.manifest import DatasetManifest, load_manifest, verify_dataset
from infra.progress import progress
from infra.sessions import ClusterConfig, spark_session, stop_spark
from pipelines.build import Build
from pipelines.clean import clean
from pipelines.curate import curate
from pipelines.plan import plan_curation
from pipelines.repair import CannotRepair, RepairResult, repair
from pipelines.salvage import salvaged
from pipelines.shards import read_shard
from tests.pipelines.conftest import EvilWeb, make_trap_world
from tests.pipelines.test_build import Crash, crash_after, run
from tests.pipelines.test_rejected import no_spark

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


class Published:
    """A curated trap world, and ways to damage it."""

    def __init__(self, world: Any, store_uri: str) -> None:
        self.world, self.store_uri = world, store_uri
        self.config = world.config()
        plan = plan_curation("traps", self.config, store_uri)
        self.build: Build = plan.build
        uri = plan.manifest_uri
        self.manifest: DatasetManifest = run(plan) if uri is None else load_manifest(uri)
        self.root = plan.build.dataset_root
        self.uri = storage.join(self.root, self.manifest.version, "manifest.json")
        self.shard = max(self.manifest.shards, key=lambda shard: shard.num_samples)
        self.shard_uri = storage.join(self.root, self.shard.path)
        self.data = storage.read_bytes(self.shard_uri)
        world.web.requests.clear()

    @property
    def samples(self) -> dict[str, dict[str, bytes]]:
        return dict(read_shard(self.data))

    def url_of(self, key: str) -> str:
        return str(json.loads(self.samples[key]["json"])["url"])

    def damage(self, data: bytes | None) -> None:
        if data is None:
            storage.delete(self.shard_uri)
        else:
            storage.write_bytes(self.shard_uri, data)
        assert verify_dataset(self.uri) != []

    def repair(self, spark: Callable[[], SparkSession] = no_spark) -> RepairResult:
        fetch = self.config.fetch
        return repair(self.uri, spark, progress, fetch=fetch)

    @property
    def fetched(self) -> set[str]:
        """The images asked for since the version was published."""
        paths = {head.split(" ")[1] for head in self.world.web.requests}
        return {path for path in paths if path.endswith(".jpg") or "/w/" in path}

    def is_whole(self, result: RepairResult) -> bool:
        return (
            result.version == self.manifest.version
            and (result.restored, result.lost) == ([self.shard.path], [])
            and storage.read_bytes(self.shard_uri) == self.data
            and verify_dataset(self.uri) == []
        )


@pytest.fixture(scope="module")
def curated_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Path]]:
    folder, web = tmp_path_factory.mktemp("curated"), EvilWeb()
    world = make_trap_world(folder / "world", web)
    Published(world, (folder / "store").as_uri())
    yield world, folder / "store"
    web.stop()


@pytest.fixture
def published(curated_once: tuple[Any, Path], tmp_path: Path) -> Published:
    world, store = curated_once
    shutil.copytree(store, tmp_path / "store")
    return Published(world, (tmp_path / "store").as_uri())


def place_of(data: bytes, name: str) -> tuple[int, int]:
    """Where a member's header and its bytes begin."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        member = tar.getmember(name)
        return member.offset, member.offset_data


def test_what_is_whole_is_left_alone(published: Published) -> None:
    result = published.repair()
    assert (result.version, result.restored, result.lost) == (published.manifest.version, [], [])
    assert published.fetched == set()


@pytest.mark.parametrize("keeps_work", [True, False])
@pytest.mark.parametrize("where", ["header", "image", "json", "txt", "padding"])
def test_a_flipped_bit_anywhere_is_mended(
    published: Published, where: str, keeps_work: bool
) -> None:
    if not keeps_work:
        clean(published.root, with_work=True)
    key = sorted(published.samples)[2]
    extension = "jpg" if where in ("image", "header") else "txt" if where == "padding" else where
    header, start = place_of(published.data, f"{key}.{extension}")
    length = len(published.samples[key][extension])
    at = {"header": header + 3, "padding": start + length + 1}.get(where, start + length // 2)
    flipped = bytearray(published.data)
    flipped[at] ^= 0x10
    published.damage(bytes(flipped))
    if where == "padding":  # the samples are all there: nothing needs to be asked for
        assert published.is_whole(published.repair())
        assert published.fetched == set()
    elif where in ("image", "header") or keeps_work:
        assert published.is_whole(published.repair())
        if where == "header" and keeps_work:
            assert len(published.fetched) == 1
        else:
            assert len(published.fetched) <= published.shard.num_samples


def test_of_a_cut_shard_only_what_is_missing_is_fetched(published: Published) -> None:
    keys = sorted(published.samples)
    cut, _ = place_of(published.data, f"{keys[4]}.txt")
    published.damage(published.data[:cut])
    assert published.is_whole(published.repair())
    assert len(published.fetched) == len(keys) - 4


def test_a_shard_that_is_gone_is_made_from_staged_rows_and_the_web(published: Published) -> None:
    published.damage(None)
    assert published.is_whole(published.repair())
    assert len(published.fetched) == published.shard.num_samples
    curated = curate("traps", published.config, published.store_uri, no_spark)
    assert (curated.decision, curated.version) == ("SKIP", published.manifest.version)


@pytest.mark.slow
def test_killed_anywhere_the_same_repair_ends_it(published: Published) -> None:
    published.damage(published.data[:3000])
    with pytest.MonkeyPatch.context() as patch:
        count = crash_after(patch, 10**9)
        assert published.is_whole(published.repair())
        num_writes = count()
    for number in range(1, num_writes):
        published.damage(published.data[:3000])
        for info in list(storage.list_objects(storage.join(published.root, "work"))):
            if "/repair-" in info.uri:
                storage.delete(info.uri)
        with pytest.MonkeyPatch.context() as patch:
            crash_after(patch, number)
            with pytest.raises(Crash):
                published.repair()
        result = published.repair()
        assert result.version == published.manifest.version
        assert verify_dataset(published.uri) == []


def test_a_damaged_ledger_is_told(published: Published) -> None:
    path = published.manifest.ledger[0].path
    storage.write_bytes(storage.join(published.root, path), b"no ledger")
    with pytest.raises(CannotRepair, match=f"{path} is damaged.*--repair"):
        published.repair()


def test_members_are_found_behind_damage(published: Published) -> None:
    whole = salvaged(published.data)
    assert whole == published.samples
    keys = sorted(whole)
    header, _ = place_of(published.data, f"{keys[1]}.jpg")
    torn = bytearray(published.data)
    torn[header : header + 512] = b"\xff" * 512
    found = salvaged(bytes(torn))
    assert found.pop(keys[1]) == {name: whole[keys[1]][name] for name in ("json", "txt")}
    assert found == {key: whole[key] for key in keys if key != keys[1]}
    assert salvaged(b"") == salvaged(b"x" * 5000) == {}


@pytest.fixture(scope="module")
def spark(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], SparkSession]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATELIER_HOME", str(tmp_path_factory.mktemp("home")))
        session = spark_session("repair", ClusterConfig(), {})
        yield lambda: session
        stop_spark(session)


@pytest.mark.slow
def test_what_does_not_come_back_is_named_in_a_new_version(
    published: Published,
    spark: Callable[[], SparkSession],
    http_response: Any,
    encode: Any,
    make_picture: Any,
) -> None:
    keys = sorted(published.samples)
    gone, changed, unproven = keys[1], keys[2], keys[3]
    paths = {key: published.url_of(key).partition(".example")[2] for key in keys}
    web = published.world.web
    web.route(paths[gone], http_response(b"", status="404 x"))
    web.route(paths[changed], http_response(encode(make_picture(99_999))))
    web.route(paths[unproven], http_response(b"", status="404 x"))
    torn = bytearray(published.data)
    for key in (gone, changed):
        _, start = place_of(published.data, f"{key}.jpg")
        torn[start : start + 200] = bytes(200)
    published.damage(bytes(torn))

    result = published.repair(spark)
    assert result.version != published.manifest.version
    assert (result.lost, result.unproven, result.restored) == ([gone, changed], 1, [])
    manifest = load_manifest(result.manifest_uri)
    assert verify_dataset(result.manifest_uri) == []
    assert manifest.rejected["lost"] == 2
    assert manifest.counts["committed"] == published.manifest.counts["committed"] - 2
    assert manifest.counts["rows_in"] == published.manifest.counts["rows_in"]
    step = manifest.attributes["derivations"][-1]
    assert (step["kind"], step["lost_samples"]) == ("repair", [gone, changed])
    assert manifest.parents == [{"dataset": "traps", "version": published.manifest.version}]
    rows = pl.concat(
        pl.read_parquet(storage.read_bytes(storage.join(published.root, entry.path)))
        for entry in manifest.ledger
    )
    assert sorted(rows.filter(pl.col("reason") == "lost")["sample_id"]) == [gone, changed]
    held = {
        key: members
        for shard in manifest.shards
        for key, members in read_shard(storage.read_bytes(storage.join(published.root, shard.path)))
    }
    for key in set(keys) - {gone, changed}:
        assert held[key] == published.samples[key]
    assert not {gone, changed} & held.keys()

    # The recipe's result is the new version from now on, and the old one can still be had.
    curated = curate("traps", published.config, published.store_uri, no_spark)
    assert (curated.decision, curated.version) == ("SKIP", result.version)
    assert published.repair(spark).version == result.version
    web.route(paths[gone], http_response(encode(make_picture(int(paths[gone][6:-4])))))
    web.route(paths[changed], http_response(encode(make_picture(int(paths[changed][6:-4])))))
    web.route(paths[unproven], http_response(encode(make_picture(int(paths[unproven][6:-4])))))
    assert published.is_whole(published.repair())


@pytest.mark.slow
def test_without_working_files_other_versions_help(
    published: Published, spark: Callable[[], SparkSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("UNITS_ON_DRIVER", "ROWS_ON_DRIVER"):
        monkeypatch.setattr(f"pipelines.repair.{name}", -1)
    from tests.pipelines.test_rejected import Drop, derived

    second = derived(Drop(published.root, published.manifest))
    clean(published.root, with_work=True)
    published.damage(None)
    result = published.repair(spark)
    kept = {
        key
        for shard in second.shards
        for key, _ in read_shard(storage.read_bytes(storage.join(published.root, shard.path)))
    } & published.samples.keys()
    assert kept
    assert set(result.lost) == published.samples.keys() - kept
    assert result.unproven == 0
    assert verify_dataset(result.manifest_uri) == []
