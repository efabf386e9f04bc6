"""The whole curation with Spark over the painted world and its misbehaving web."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
import pytest

import demo.web
from demo.metadata import EXPECTED, HOSTS, build_world
from demo.web import PaintedServer
from demo.world import WorldConfig
from infra import storage
from infra.errors import UserError
from infra.manifest import load_manifest, verify_dataset
from infra.sessions import ClusterConfig, spark_session, stop_spark
from pipelines.columns import sample_id
from pipelines.config import CurationConfig
from pipelines.curate import curate, plan_curation
from pipelines.estimate import estimate_curation
from pipelines.shards import read_shard

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

pytestmark = pytest.mark.slow

NUM_ROWS = 500


@dataclass
class PaintedWorld:
    folder: Path
    server: PaintedServer

    def config(self, **changes: Any) -> CurationConfig:
        port = self.server.server_address[1]
        known: dict[str, Any] = {
            "metadata": [str(self.folder / "metadata" / "*.parquet")],
            "source": "painted",
            "filters": {
                "min_width_px": 96, "min_height_px": 96, "max_aspect_ratio": 2.0,
                "min_aesthetic_score": 4.5, "max_watermark_prob": 0.5, "max_unsafe_prob": 0.5,
                "min_caption_words": 2, "unknown": {"watermark_prob": "keep"},
            },
            "fetch": {
                "connect_to": {f"{host}:80": f"127.0.0.1:{port}" for host in HOSTS},
                "total_deadline_seconds": 5.0, "backoff_seconds": 0.05, "retries": 1,
            },
            "resize": {"image_size_px": 128},
        }  # fmt: skip
        return CurationConfig.model_validate(known | changes)


@contextmanager
def painted(folder: Path, world: Mapping[str, Any]) -> Iterator[PaintedWorld]:
    build_world(WorldConfig.model_validate(world), folder)
    server = PaintedServer(folder)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield PaintedWorld(folder, server)
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def painted_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PaintedWorld]:
    folder = tmp_path_factory.mktemp("painted")
    with painted(folder, {"num_rows": NUM_ROWS, "trap_ratio": 0.4}) as world:
        yield world


@pytest.fixture(scope="module")
def spark(
    tmp_path_factory: pytest.TempPathFactory, _session_s3_server: Any
) -> Iterator[Callable[[], SparkSession]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATELIER_HOME", str(tmp_path_factory.mktemp("home")))
        session = spark_session("curation", ClusterConfig(), _session_s3_server.environment)
        yield lambda: session
        stop_spark(session)


def no_spark() -> SparkSession:
    raise AssertionError("Spark was asked for")


def test_the_painted_world_is_curated_and_every_trap_holds(
    painted_world: PaintedWorld, spark: Callable[[], SparkSession], s3_server: Any
) -> None:
    config = painted_world.config()
    reported: list[tuple[int, int]] = []
    result = curate(
        "painted", config, s3_server.store_uri, spark, s3_server.environment,
        lambda done, total: reported.append((done, total)),
    )  # fmt: skip
    assert result.decision == "RUN"
    assert reported[-1] == (NUM_ROWS, NUM_ROWS)
    assert [done for done, _ in reported] == sorted(done for done, _ in reported)
    assert verify_dataset(result.manifest_uri) == []

    manifest = load_manifest(result.manifest_uri, result.version)
    root = result.manifest_uri.rsplit("/", 2)[0]
    ledger = pl.concat(
        pl.read_parquet(storage.read_bytes(storage.join(root, entry.path)))
        for entry in manifest.ledger
    )
    truth = pl.read_parquet(painted_world.folder / "truth" / "rows.parquet")
    assert ledger.height == truth.height == NUM_ROWS
    ended = {
        row["sample_id"]: (row["disposition"], row["reason"])
        for row in ledger.sort("disposition", descending=True).iter_rows(named=True)
    }
    for row in truth.iter_rows(named=True):
        disposition, reason = ended[sample_id(row["url"], row["text"])]
        expected = row["expected"]
        if reason in ("duplicate_image", "duplicate_url", "duplicate_row"):
            continue  # another row with the same URL or picture stayed; counted below
        assert expected in (disposition, "either"), (row["trap"], disposition, reason)
    reasons = Counter(ledger["reason"])
    traps = Counter(truth["trap"])
    assert reasons["duplicate_image"] > 0
    assert reasons["optout"] == traps["opted_out"]
    assert reasons["redirect"] == traps["redirect_loop"] + traps["redirect_internal"]
    assert reasons["http_404"] == traps["dead_404"]
    assert reasons["unknown_aesthetic_score"] == traps["null_aesthetic"]
    assert manifest.attributes["unknown"] == {"keep": {"watermark_prob": traps["null_watermark"]}}
    assert set(EXPECTED) <= set(traps)
    requested = painted_world.server.requests
    assert not [path for path in requested if "canary" in path or "meta-data" in path]

    samples = {
        key: members
        for shard in manifest.shards
        for key, members in read_shard(storage.read_bytes(storage.join(root, shard.path)))
    }
    assert len(samples) == result.counts["committed"] > NUM_ROWS / 3
    digests = Counter(json.loads(members["json"])["sha256"] for members in samples.values())
    assert max(digests.values()) == 1

    started_at = time.monotonic()
    again = curate("painted", config, s3_server.store_uri, no_spark, s3_server.environment)
    assert (again.decision, again.version) == ("SKIP", result.version)
    assert time.monotonic() - started_at < 2.0


def test_a_file_and_its_copy_are_both_accounted_for(
    painted_world: PaintedWorld,
    spark: Callable[[], SparkSession],
    s3_server: Any,
    tmp_path: Path,
) -> None:
    plain = painted_world.config()
    original = min((painted_world.folder / "metadata").glob("*.parquet"))
    copy = tmp_path / "copy.parquet"
    copy.write_bytes(original.read_bytes())
    num_copied = pl.read_parquet(copy).height
    config = painted_world.config(metadata=[*plain.metadata, str(copy)])
    once = curate("once", plain, s3_server.store_uri, spark, s3_server.environment)
    twice = curate("twice", config, s3_server.store_uri, spark, s3_server.environment)
    assert twice.counts["rows_in"] == NUM_ROWS + num_copied
    assert twice.counts["committed"] == once.counts["committed"]
    assert verify_dataset(twice.manifest_uri) == []


def test_an_earlier_version_foresees_the_next(
    painted_world: PaintedWorld, spark: Callable[[], SparkSession], tmp_path: Path
) -> None:
    """Link rot and copies as the first parts of the metadata had them, told for the other parts."""
    parts = sorted((painted_world.folder / "metadata").glob("*.parquet"))
    half = len(parts) // 2
    first = painted_world.config(metadata=[str(path) for path in parts[:half]])
    curate("painted", first, tmp_path.as_uri(), spark)
    rest = painted_world.config(metadata=[str(path) for path in parts[half:]])
    foreseen = estimate_curation(rest, storage.join(tmp_path.as_uri(), "datasets", "painted"))
    assert foreseen.known_from.startswith("version ")
    result = curate("painted", rest, tmp_path.as_uri(), spark)
    committed = result.counts["committed"]
    assert abs(foreseen.samples - committed) <= 0.1 * committed
    taken = {name: share.rows for name, share in foreseen.funnel.items()}
    assert taken == {name: number for name, number in result.funnel.items() if name in taken}
    assert foreseen.stored_bytes == pytest.approx(
        sum(s.num_bytes for s in load_manifest(result.manifest_uri).shards), rel=0.15
    )


def test_an_eighth_foresees_how_copies_grow(
    spark: Callable[[], SparkSession], tmp_path: Path
) -> None:
    """In a world of few scenes a third of all rows are copies, and of an eighth hardly any."""
    world = {
        "num_rows": 4000, "num_parts": 8, "trap_ratio": 0.4, "native_sizes_px": [64],
        "colors": ["red", "green", "blue"], "shapes": ["circle", "square"], "max_objects": 2,
    }  # fmt: skip
    with painted(tmp_path / "world", world) as few_scenes:
        parts = sorted((few_scenes.folder / "metadata").glob("*.parquet"))
        changes = {"filters": {"min_aesthetic_score": 4.5}, "resize": {"image_size_px": 64}}
        pilot = few_scenes.config(metadata=[str(parts[0])], **changes)
        tried = curate("painted", pilot, tmp_path.as_uri(), spark)
        whole = few_scenes.config(**changes)
        root = storage.join(tmp_path.as_uri(), "datasets", "painted")
        foreseen = estimate_curation(whole, root)
        assert foreseen.known_from == f"version {tried.version[:12]}"
        result = curate("painted", whole, tmp_path.as_uri(), spark)
    committed, copies = result.counts["committed"], result.funnel["duplicate_image"]
    assert copies > committed / 3
    assert abs(foreseen.samples - committed) <= 0.1 * committed
    assert abs(foreseen.web["duplicate_image"] - copies) <= 0.2 * copies
    assert 8 * tried.counts["committed"] > 1.2 * committed


def test_long_captions_are_joined_and_asked_for_their_length(
    painted_world: PaintedWorld, spark: Callable[[], SparkSession], tmp_path: Path
) -> None:
    filters = painted_world.config().filters.model_dump() | {"min_caption_words": 50}
    config = painted_world.config(
        captions={"files": [str(painted_world.folder / "captions" / "long.parquet")]},
        filters=filters,
        partitions=2,
    )
    result = curate("painted", config, tmp_path.as_uri(), spark)
    root = result.manifest_uri.rsplit("/", 2)[0]
    manifest = load_manifest(result.manifest_uri)
    assert result.counts["committed"] > NUM_ROWS / 3
    for shard in manifest.shards:
        for _, members in read_shard(storage.read_bytes(storage.join(root, shard.path))):
            captions = json.loads(members["json"])["captions"]
            assert captions[-1]["origin"] == "synthetic"
            assert members["txt"].decode() == captions[-1]["text"]
            assert len(members["txt"].split()) >= 50


def test_stock_webdataset_reads_the_shards(
    painted_world: PaintedWorld, spark: Callable[[], SparkSession], tmp_path: Path
) -> None:
    result = curate("painted", painted_world.config(partitions=1), tmp_path.as_uri(), spark)
    shard = load_manifest(result.manifest_uri).shards[0]
    path = tmp_path / "datasets" / "painted" / shard.path
    code = (
        "import sys, json, webdataset as wds\n"
        "data = wds.WebDataset(sys.argv[1], shardshuffle=False).decode('pil')\n"
        "found = [(s['__key__'], s['jpg'].size, s['txt'], s['json']['caption']) for s in data]\n"
        "print(json.dumps(found))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(path)],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    found = json.loads(done.stdout)
    assert len(found) == shard.num_samples
    assert len({key for key, *_ in found}) == len(found)
    for _, size, text, caption in found:
        assert size == [128, 128]
        assert text == caption
    listed = subprocess.run(["tar", "tf", str(path)], capture_output=True, text=True, check=True)
    assert len(listed.stdout.split()) == 3 * shard.num_samples


def test_a_damaged_page_is_one_line_naming_the_file(
    painted_world: PaintedWorld, spark: Callable[[], SparkSession], tmp_path: Path
) -> None:
    source = next((painted_world.folder / "metadata").glob("*.parquet"))
    body = bytearray(source.read_bytes())
    body[200:2000] = bytes(1800)
    damaged = tmp_path / "damaged.parquet"
    damaged.write_bytes(body)
    config = painted_world.config(metadata=[str(damaged)])
    with pytest.raises(UserError, match=r"expected a whole parquet file at file://.*damaged"):
        curate("painted", config, tmp_path.as_uri(), spark)
    assert plan_curation("painted", config, tmp_path.as_uri()).decision == "RUN"


def test_a_retry_adds_what_has_come_back(
    painted_world: PaintedWorld,
    spark: Callable[[], SparkSession],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What broke off in the middle comes whole now; nothing else is asked for again."""
    config, store_uri = painted_world.config(partitions=3), tmp_path.as_uri()
    first = curate("painted", config, store_uri, spark)
    assert load_manifest(first.manifest_uri).failed["short_body"] > 0
    picture = next(iter(painted_world.server.world.images))
    monkeypatch.setitem(
        demo.web.FAULTS,
        "short-body",
        lambda handler: handler._send(
            200, painted_world.server.world.encoded(picture) + handler.path.encode(), "image/png"
        ),
    )
    painted_world.server.requests.clear()
    second = curate("painted", config, store_uri, spark, retry_failed=True)
    assert verify_dataset(second.manifest_uri) == []
    assert second.version != first.version
    assert second.counts["rows_in"] == NUM_ROWS
    assert second.counts["committed"] > first.counts["committed"]
    assert not [path for path in painted_world.server.requests if path.startswith("/images/")]
    before, after = load_manifest(first.manifest_uri), load_manifest(second.manifest_uri)
    assert {shard.path for shard in before.shards} < {shard.path for shard in after.shards}
    assert "short_body" not in after.failed
    assert curate("painted", config, store_uri, no_spark).version == second.version
