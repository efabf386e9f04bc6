"""Curations that are killed: drivers, Spark workers, storage. What comes out stays equal."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from demo.metadata import HOSTS, build_world
from demo.world import WorldConfig
from infra.config import PROJECT_ROOT
from infra.manifest import load_manifest, verify_dataset

pytestmark = pytest.mark.slow

NUM_ROWS = 300
CURATE = """
import json, sys
from infra.errors import UserError
from infra.sessions import ClusterConfig, spark_session, stop_spark
from pipelines.config import CurationConfig
from pipelines.curate import curate

config, store_uri = json.loads(sys.argv[1]), sys.argv[2]
sessions = []

def spark():
    if not sessions:
        sessions.append(spark_session("curation", ClusterConfig(), {}))
    return sessions[0]

try:
    result = curate("painted", CurationConfig.model_validate(config), store_uri, spark)
    print(json.dumps([result.decision, result.version, result.manifest_uri]))
except UserError as error:
    print(error, file=sys.stderr)
    sys.exit(1)
finally:
    for session in sessions:
        stop_spark(session)
"""


@dataclass
class World:
    folder: Path
    web: subprocess.Popen[bytes]
    config: dict[str, Any]

    def requests(self) -> int:
        import urllib.request

        port = self.config["fetch"]["connect_to"][f"{HOSTS[0]}:80"].rpartition(":")[2]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/__stats") as answer:
            counts = json.loads(answer.read())
        return sum(number for path, number in counts.items() if path != "/__stats")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("painted")
    build_world(WorldConfig.model_validate({"num_rows": NUM_ROWS, "trap_ratio": 0.3}), folder)
    port_file = folder / "port"
    command = [sys.executable, "-m", "demo.web", "--world", str(folder), "--port-file"]
    web = subprocess.Popen([*command, str(port_file)], cwd=PROJECT_ROOT, stdout=subprocess.DEVNULL)
    while not port_file.exists():
        time.sleep(0.02)
    config = {
        "metadata": [str(folder / "metadata")],
        "filters": {"min_width_px": 96, "min_aesthetic_score": 4.5, "max_watermark_prob": 0.5},
        "fetch": {
            "connect_to": {f"{host}:80": f"127.0.0.1:{port_file.read_text()}" for host in HOSTS},
            "total_deadline_seconds": 10, "retries": 1, "backoff_seconds": 0.05,
        },
        "resize": {"image_size_px": 64},
        "partitions": 6,
    }  # fmt: skip
    yield World(folder, web, config)
    web.terminate()
    web.wait()


def start(world: World, store_uri: str, home: Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CURATE, json.dumps(world.config), store_uri],
        cwd=PROJECT_ROOT,
        env={
            **os.environ,
            "ATELIER_HOME": str(home),
            "PYTHONPATH": str(PROJECT_ROOT),
            **environment,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[str, str, str]:
    output, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors[-2000:]
    decision, version, manifest_uri = json.loads(output.splitlines()[-1])
    return decision, version, manifest_uri


def wait_for(process: subprocess.Popen[str], there: Callable[[], bool]) -> None:
    while not there():
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)


def markers(store: Path, kind: str) -> Callable[[int], Callable[[], bool]]:
    def at_least(count: int) -> Callable[[], bool]:
        return lambda: len(list(store.glob(f"datasets/painted/work/*/{kind}-*.json"))) >= count

    return at_least


@pytest.fixture(scope="module")
def expected(world: World, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The version that an undisturbed run gives."""
    folder = tmp_path_factory.mktemp("undisturbed")
    _, version, manifest_uri = finish(start(world, (folder / "store").as_uri(), folder))
    assert verify_dataset(manifest_uri) == []
    return version


@pytest.mark.parametrize(("kind", "count"), [("staged", 2), ("part", 3)])
def test_a_killed_driver_resumes_to_the_same_version(
    world: World, expected: str, tmp_path: Path, kind: str, count: int
) -> None:
    store = tmp_path / "store"
    process = start(world, store.as_uri(), tmp_path)
    wait_for(process, markers(store, kind)(count))
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not list(store.glob("datasets/painted/*/manifest.json"))
    num_staged = len(list(store.glob("datasets/painted/work/*/staged-*.json")))
    before = world.requests()
    decision, version, manifest_uri = finish(start(world, store.as_uri(), tmp_path))
    assert decision == ("RESUME" if num_staged else "RUN")
    assert version == expected
    assert verify_dataset(manifest_uri) == []
    if kind == "part":
        assert world.requests() == before
    elif num_staged:
        assert world.requests() - before < NUM_ROWS
    decision, version, _ = finish(start(world, store.as_uri(), tmp_path))
    assert (decision, version) == ("SKIP", expected)


def workers_of(pid: int) -> list[psutil.Process]:
    """Spark's Python workers under a driver, without the daemon that forks them."""
    found = []
    for child in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            parent = child.parent()
            is_forked = parent is not None and "pyspark.worker" in " ".join(parent.cmdline())
            if is_forked and "pyspark.worker" in " ".join(child.cmdline()):
                found.append(child)
    return found


def test_a_killed_worker_costs_a_retry(world: World, expected: str, tmp_path: Path) -> None:
    """Spark runs the task again; counts are exact, for they come from files."""
    store = tmp_path / "store"
    process = start(world, store.as_uri(), tmp_path)
    found: list[psutil.Process] = []

    def is_at_work() -> bool:
        found[:] = workers_of(process.pid)
        return bool(found)

    wait_for(process, is_at_work)
    found[0].kill()
    _, version, manifest_uri = finish(process)
    assert version == expected
    assert load_manifest(manifest_uri).counts["rows_in"] == NUM_ROWS


def test_storage_that_goes_away_is_one_line_and_the_rest_is_done_later(
    world: World, expected: str, tmp_path: Path, own_s3_server: Any
) -> None:
    server = own_s3_server
    files = server.folder / "atelier"
    process = start(world, server.store_uri, tmp_path)
    wait_for(process, markers(files, "staged")(1))
    server.kill()
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 1
    lines = [line for line in errors.splitlines() if line.strip()]
    assert len(lines) == 1, errors[-2000:]
    assert server.secret_access_key not in errors
    server.start()
    decision, version, _ = finish(start(world, server.store_uri, tmp_path))
    assert decision == "RESUME"
    assert version == expected


def test_two_drivers_do_not_work_on_one_build(world: World, expected: str, tmp_path: Path) -> None:
    store = tmp_path / "store"
    first = start(world, store.as_uri(), tmp_path)
    wait_for(first, markers(store, "read")(1))
    second = start(world, store.as_uri(), tmp_path)
    _, errors = second.communicate(timeout=100)
    assert second.returncode == 1
    assert "curation of painted" in errors
    assert len(errors.strip().splitlines()) == 1
    assert finish(first)[1] == expected
