"""Takedowns with real Spark: gone from bytes, ledger and working files, and for good."""

from __future__ import annotations

import io
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import polars as pl
import pytest

import pipelines.takedown
from demo.metadata import HOSTS, build_world
from demo.web import PaintedServer
from demo.world import WorldConfig
from infra import storage
from infra.errors import UserError
from infra.manifest import load_manifest, verify_dataset
from infra.progress import progress
from infra.sessions import ClusterConfig, spark_session, stop_spark
from pipelines.config import CurationConfig
from pipelines.curate import curate, plan_curation
from pipelines.shards import read_shard
from pipelines.takedown import Takedown, look_for, take_down
from pipelines.tombstones import Tombstones

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def spark(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], SparkSession]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATELIER_HOME", str(tmp_path_factory.mktemp("home")))
        session = spark_session("takedown", ClusterConfig(), {})
        yield lambda: session
        stop_spark(session)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, PaintedServer]]:
    folder = tmp_path_factory.mktemp("painted")
    build_world(WorldConfig.model_validate({"num_rows": 120, "trap_ratio": 0.2}), folder)
    server = PaintedServer(folder)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield folder, server
    server.shutdown()
    server.server_close()
    thread.join()


def config_of(world: tuple[Path, PaintedServer], **changes: Any) -> CurationConfig:
    folder, server = world
    port = server.server_address[1]
    known: dict[str, Any] = {
        "metadata": [str(folder / "metadata" / "*.parquet")],
        "filters": {"min_aesthetic_score": 4.0},
        "fetch": {
            "connect_to": {f"{host}:80": f"127.0.0.1:{port}" for host in HOSTS},
            "total_deadline_seconds": 5.0, "backoff_seconds": 0.05, "retries": 0,
        },
        "resize": {"image_size_px": 64},
        "shards": {"max_samples": 12},
        "partitions": 2,
    }  # fmt: skip
    return CurationConfig.model_validate(known | changes)


def texts_in(root: str) -> str:
    """Everything legible in a store's folder: names, JSON, pages, tables, tars."""
    found = []
    for info in storage.list_objects(root):
        data = storage.read_bytes(info.uri)
        found.append(info.uri.removeprefix(root))
        if data[:4] == b"PAR1":
            found.append(str(pl.read_parquet(io.BytesIO(data)).to_dicts()))
        else:
            found.append(data.decode("latin-1"))
    return "\n".join(found)


def ledger_of(root: str, version: str) -> pl.DataFrame:
    manifest = load_manifest(f"{root}/{version}/manifest.json")
    return pl.concat(
        pl.read_parquet(storage.read_bytes(f"{root}/{entry.path}")) for entry in manifest.ledger
    )


def test_what_is_taken_down_is_gone_and_stays_out(
    world: tuple[Path, PaintedServer], spark: Callable[[], SparkSession], tmp_path: Path
) -> None:
    store = tmp_path.as_uri()
    first = curate("d", config_of(world), store, spark)
    root = f"{store}/datasets/d"
    rows = ledger_of(root, first.version)
    committed = rows.filter(pl.col("disposition") == "committed").sort("sample_id")
    by_url, by_bytes, by_id = (
        committed.row(0, named=True),
        committed.row(1, named=True),
        committed.row(2, named=True),
    )
    rejected = rows.filter(pl.col("reason") == "low_aesthetic_score").row(0, named=True)
    wanted = Tombstones.of(
        [by_url["url"], rejected["url"]], [], [by_bytes["sha256"]], [by_id["sample_id"]]
    )
    assert by_url["url"] in texts_in(root)

    before = texts_in(root)
    (foreseen,) = look_for(Takedown((root,), wanted), spark, progress)[root]
    assert (foreseen.version, foreseen.num_samples) == (first.version, 3)
    assert foreseen.num_rows >= 4
    assert load_manifest(first.manifest_uri).version == first.version
    assert "tombstones" not in before

    (done,), _ = take_down(Takedown((root,), wanted), spark, progress)
    assert list(done.versions) == [first.version]
    (version,) = done.versions.values()
    uri = f"{root}/{version}/manifest.json"
    manifest = load_manifest(uri)
    assert verify_dataset(uri) == []
    assert manifest.counts["committed"] == first.counts["committed"] - 3
    assert manifest.counts["rows_in"] == first.counts["rows_in"]
    assert manifest.rejected["takedown"] == done.num_rows == foreseen.num_rows
    after = texts_in(root)
    for row in (by_url, by_bytes, by_id, rejected):
        assert row["url"] not in after
    held = {
        key
        for shard in manifest.shards
        for key, _ in read_shard(storage.read_bytes(f"{root}/{shard.path}"))
    }
    assert held == set(committed["sample_id"][3:])
    with pytest.raises(UserError, match=rf"was withdrawn.*{version}"):
        load_manifest(first.manifest_uri)

    # Untouched shards are the same files, and a second time changes nothing.
    (again,), _ = take_down(Takedown((root,), wanted), spark, progress)
    assert (again.versions, again.num_samples) == ({}, 0)

    # The same recipe takes the new version; another one never asks for what was taken down.
    plan = plan_curation("d", config_of(world), store)
    assert (plan.decision, plan.version) == ("SKIP", version)
    server = world[1]
    asked = Counter(server.requests)
    other = curate("d", config_of(world, resize={"image_size_px": 48}), store, spark)
    rows = ledger_of(root, other.version)
    assert rows.filter(pl.col("reason") == "takedown").height >= 4
    paths = set(Counter(server.requests) - asked)
    assert paths
    for row in (by_url, by_id, rejected):
        parts = urlsplit(row["url"])
        assert not [path for path in paths if path.endswith(parts.path)]
    assert by_url["url"] not in texts_in(root)


@pytest.mark.parametrize(
    "killed_in", ["publish_tombstones", "derive", "withdraw", "_point_builds", "purge"]
)
def test_killed_anywhere_the_same_command_ends_it(
    killed_in: str,
    world: tuple[Path, PaintedServer],
    spark: Callable[[], SparkSession],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    roots, versions = [], []
    for name in ("whole", "killed"):
        store = (tmp_path / name).as_uri()
        result = curate("d", config_of(world), store, spark)
        roots.append(f"{store}/datasets/d")
        versions.append(result.version)
    assert versions[0] == versions[1]
    rows = ledger_of(roots[0], versions[0]).filter(pl.col("disposition") == "committed")
    wanted = Tombstones.of([rows.sort("sample_id")["url"][0]])
    stores = [root.removesuffix("/datasets/d") for root in roots]
    orders = [Takedown((roots[n],), wanted, stores[n]) for n in range(2)]
    take_down(orders[0], spark, progress)

    real = getattr(pipelines.takedown, killed_in)

    def killed(*arguments: Any) -> Any:
        real(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipelines.takedown, killed_in, killed)
        with pytest.raises(KeyboardInterrupt):
            take_down(orders[1], spark, progress)
    take_down(orders[1], spark, progress)
    names = [
        sorted(info.uri.removeprefix(store) for info in storage.list_objects(store)
               if "lease" not in info.uri and "/inputs/" not in info.uri)
        for store in stores
    ]  # fmt: skip
    assert names[0] == names[1]
