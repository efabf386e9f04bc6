"""Embedding with Spark, killed and resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from infra import storage
from infra.config import PROJECT_ROOT
from infra.errors import UserError
from pipelines.embeddings import embed_dataset
from pipelines.scoring_config import ClipConfig

pytestmark = pytest.mark.slow

EMBED = """
import sys
from infra.sessions import ClusterConfig, spark_session, stop_spark
from pipelines.embeddings import embed_dataset
from pipelines.scoring_config import ClipConfig

sessions = []

def spark():
    sessions.append(spark_session("embedding", ClusterConfig(), {}))
    return sessions[0]

result = embed_dataset(sys.argv[1], ClipConfig(folder=sys.argv[2], batch_size=8), spark)
print(result.num_made, result.manifest.sha256)
stop_spark(sessions[0])
"""


def no_spark() -> Any:
    raise AssertionError("Spark was asked for")


def test_spark_embeds_on_s3_and_a_finished_one_costs_no_spark(
    new_dataset: Callable[..., Any], clip_folder: Path, spark: Any, s3_server: Any
) -> None:
    dataset = new_dataset(f"{s3_server.store_uri}/spark", num_samples=40)
    config = ClipConfig(folder=str(clip_folder), batch_size=8)
    reported: list[tuple[int, int]] = []
    result = embed_dataset(
        dataset.manifest_uri, config, spark, s3_server.environment,
        lambda done, total: reported.append((done, total)),
    )  # fmt: skip
    assert result.num_made == len(dataset.manifest.shards)
    assert result.manifest.counts == {"samples": 40, "embedded": 40, "failed": 0}
    assert reported[-1] == (40, 40)
    again = embed_dataset(dataset.manifest_uri, config, no_spark, s3_server.environment)
    assert (again.num_made, again.manifest) == (0, result.manifest)
    assert storage.exists(result.manifest_uri)


def test_a_workers_user_error_is_one_line(
    new_dataset: Callable[..., Any], clip_folder: Path, spark: Any, tmp_path: Path
) -> None:
    dataset = new_dataset(tmp_path.as_uri(), num_samples=6)
    shard = dataset.manifest.shards[0]
    path = tmp_path / "datasets" / "small" / shard.path
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=shard.path):
        embed_dataset(dataset.manifest_uri, ClipConfig(folder=str(clip_folder)), spark)


def test_a_killed_embedding_resumes_to_the_same_manifest(
    new_dataset: Callable[..., Any], clip_folder: Path, tmp_path: Path
) -> None:
    stores = [tmp_path / "undisturbed", tmp_path / "killed"]
    datasets = [new_dataset(store.as_uri(), num_samples=60, per_shard=5) for store in stores]

    def start(uri: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", EMBED, uri, str(clip_folder)],
            cwd=PROJECT_ROOT,
            env={**os.environ, "ATELIER_HOME": str(tmp_path / "home"),
                 "PYTHONPATH": str(PROJECT_ROOT)},
            stdout=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip

    num_shards = len(datasets[0].manifest.shards)
    output, _ = start(datasets[0].manifest_uri).communicate(timeout=300)
    num_made, expected = output.split()
    assert int(num_made) == num_shards

    process = start(datasets[1].manifest_uri)
    units = stores[1] / "datasets" / "small" / "embeddings"
    while len(list(units.glob("*/units/*.json"))) < 2:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    kept = {path: path.read_bytes() for path in units.glob("*/units/*.json")}
    assert not list(units.glob("*/*/manifest.json"))
    output, _ = start(datasets[1].manifest_uri).communicate(timeout=300)
    num_made, got = output.split()
    assert got == expected
    assert 0 < int(num_made) <= num_shards - len(kept)
    assert all(json.loads(path.read_bytes()) == json.loads(data) for path, data in kept.items())
