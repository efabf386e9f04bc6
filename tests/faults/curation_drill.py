"""What the kill drill of curation disturbs: filter, fetch, shard, score, derive and caption.

Every published manifest must have the undisturbed run's sha256, and the store must hold the same
objects: none lost, none left over, none twice. Of every version, each sample of the ledger is in
one shard, once, and every row of the metadata is in the ledger.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import polars as pl
import psutil
import yaml

from infra.local.programs import LEFTOVERS
from tests.app.test_scoring import make_models
from tests.faults.drill import Job
from tests.faults.drill_home import KINDS, DrillHome, kill_all
from tests.pipelines.captions.conftest import KEY, CaptionServer

NUM_ROWS = 80
PARTITIONS = 3
KEY_VARIABLE = "CAPTION_KEY"
NEEDS_NO_MLFLOW = "MLflow killed, away for a while"
PUT_SECONDS = 3.0  # how long an upload under way is waited for
STARTING, PLANNING, WORLD = "starting", "planning and verifying", "painting the world"
# Whose lease is alive says what is at work: the key's third part -> stage.
OF_LEASES = {
    "embeddings": "embedding",
    "scores": "scoring",
    "work/refilter": "refiltering",
    "captions": "captioning",
    "work/caption": "rewriting captions",
}
FETCH, WRITE, PUBLISH = "reading and fetching", "writing shards", "publishing"
# What a resumed run needs and a reader never sees: notes of finished work, unfinished attempts.
WORKING_FOLDER = "work"


def kill_worker(home: DrillHome) -> bool:
    """One of Spark's Python workers, whatever it is doing."""
    return kill_all([each for each in _python_workers(home) if not _has_children(each)][:1])


def kill_worker_daemon(home: DrillHome) -> bool:
    """Where Spark forks its Python workers from, and with it all of them."""
    return kill_all([each for each in _python_workers(home) if _has_children(each)])


def kill_jvm(home: DrillHome) -> bool:
    return kill_all(home.processes("org.apache.spark.deploy.SparkSubmit"))


def kill_s3_in_a_put(home: DrillHome) -> bool:
    """The S3 server while it takes an upload; False when none came, or it was done before."""
    servers = home.services("rclone")
    until = time.monotonic() + PUT_SECONDS
    while servers and time.monotonic() < until:
        if _uploads(home):
            kill_all(servers)
            psutil.wait_procs(servers)
            was_cut = bool(_uploads(home))
            home.do("up")
            return was_cut
        time.sleep(0.001)
    return False


def _uploads(home: DrillHome) -> list[Path]:
    return [path for path in _files(home) if any(map(path.match, LEFTOVERS))]


def _python_workers(home: DrillHome) -> list[psutil.Process]:
    return home.processes("pyspark.worker")


def _has_children(process: psutil.Process) -> bool:
    try:
        return bool(process.children())
    except psutil.NoSuchProcess:
        return False


class CurationJob(Job):
    """``atelier run`` of a recipe that ends with derived datasets."""

    result_words = "manifests, and every object beside them,"
    lost_words = None

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.recipe = folder / "recipe.yaml"
        self.server = CaptionServer()
        os.environ[KEY_VARIABLE] = KEY

    def kinds(self) -> dict[str, Callable[[DrillHome], bool]]:
        common = {name: do for name, do in KINDS.items() if name != NEEDS_NO_MLFLOW}
        return {
            "kill -9 of a Spark Python worker": kill_worker,
            "kill -9 of all Python workers and their parent": kill_worker_daemon,
            "kill -9 of Spark's JVM": kill_jvm,
            "S3 server killed in the middle of a PUT": kill_s3_in_a_put,
            **common,
        }

    def prepare(self, home: DrillHome) -> None:
        models = self.folder / "models"
        scoring = make_models(models)
        scoring["clip"] |= {"batch_size": 4, "checkpoint_seconds": 0.0}  # parts of every shard
        self.recipe.write_text(yaml.safe_dump(self._recipe(scoring)))
        home.do("up")

    def _recipe(self, scoring: dict[str, Any]) -> dict[str, Any]:
        return {
            "name": "drill",
            "world": {"num_rows": NUM_ROWS, "num_parts": 2, "trap_ratio": 0.2},
            "datasets": {
                "painted": {
                    "metadata": ["{world}/metadata/*.parquet"],
                    "filters": {"min_aesthetic_score": 4.5},
                    "fetch": {"total_deadline_seconds": 15, "backoff_seconds": 0.05},
                    "resize": {"image_size_px": 64},
                    "captions": {"token_budget": 24},
                    "partitions": PARTITIONS,
                    "shards": {"max_samples": 12},
                }
            },
            "scoring": scoring,
            "derived": {
                "best": {"dataset": "painted", "keep": {"min_aesthetic_score": 5}},
                "told": {"dataset": "painted", "caption": True},
            },
            "captioning": {
                "checkpoint_samples": 4,
                "endpoint": {
                    "url": self.server.url,
                    "model": "captioner",
                    "api_key_env": KEY_VARIABLE,
                },
            },
        }

    def start(self, home: DrillHome) -> subprocess.Popen[bytes]:
        return home.drive("run", str(self.recipe))

    def result(self, home: DrillHome) -> dict[str, str]:
        """Each step's version and samples, and the digest of every object outside the working
        folders."""
        status = _status(home)
        made = {step["name"]: str(step["dataset_version"]) for step in status["steps"]}
        made |= {
            f"samples of {step['name']}": _samples_of(home, step["manifest_uri"])
            for step in status["steps"]
            if step["manifest_uri"]
        }
        return made | {
            str(path): hashlib.sha256((home.store / path).read_bytes()).hexdigest()
            for path in _objects(home)
            if WORKING_FOLDER not in path.parts
        }

    def stages(self) -> tuple[str, ...]:
        """All that a kill may hit."""
        return (STARTING, PLANNING, FETCH, WRITE, PUBLISH, *OF_LEASES.values())

    def place(self, home: DrillHome) -> tuple[str, int, int]:
        """What is at work, and how many notes of finished work there are."""
        notes = [path for path in _objects(home) if path.suffix == ".json"]
        return _stage(home, notes), len(notes), 0


def _status(home: DrillHome) -> dict[str, Any]:
    path = home.path / "runs" / "latest" / "status.json"
    status: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"pid": None}
    return status


def _objects(home: DrillHome) -> list[Path]:
    """What is stored of datasets, by key; leases say who works, which is no result."""
    return [path.relative_to(home.store) for path in _files(home) if path.name != "lease.json"]


def _files(home: DrillHome) -> list[Path]:
    """All files of datasets; what vanishes meanwhile is left out."""
    return [
        Path(folder, name)
        for folder, _, names in os.walk(home.store / "datasets")
        for name in names
    ]


def _samples_of(home: DrillHome, manifest_uri: str) -> str:
    """The digest of a version's sample ids; raises when a row or a sample is lost, or is twice."""
    bucket = home.store.parent
    manifest_path = bucket / manifest_uri.removeprefix("s3://")
    manifest = json.loads(manifest_path.read_text())
    root = manifest_path.parent.parent
    ledger = pl.concat(
        [pl.read_parquet(root / each["path"]) for each in manifest["ledger"]], how="diagonal"
    )
    committed = ledger.filter(pl.col("disposition") == "committed")
    listed = Counter(zip(committed["sample_id"], committed["shard"], strict=True))
    stored = Counter(
        (sample_id, each["path"])
        for each in manifest["shards"]
        for sample_id in _sample_ids(root / each["path"])
    )
    if ledger.height != NUM_ROWS or listed != stored or set(stored.values()) != {1}:
        raise AssertionError(
            f"{manifest_uri}: {ledger.height} rows of {NUM_ROWS} in the ledger; not in both "
            f"ledger and shards, or twice: {(listed - stored) + (stored - listed)}"
        )
    return hashlib.sha256("".join(sorted(committed["sample_id"])).encode()).hexdigest()


def _sample_ids(shard: Path) -> Iterator[str]:
    with tarfile.open(shard) as tar:
        names = [name.partition(".") for name in tar.getnames()]
    return (key for key, _, extension in names if extension == "json")


def _stage(home: DrillHome, notes: list[Path]) -> str:
    """From the run's record, the lease that was renewed last, and the notes of the build."""
    status = _status(home)
    if home.driver is None or status["pid"] != home.driver.pid:
        return STARTING
    running = next((s["name"] for s in status["steps"] if s["state"] == "running"), None)
    if running is None:
        return STARTING
    if running == "world":
        return WORLD
    leases = (path for path in _files(home) if path.name == "lease.json")
    held = [path for path in leases if _is_held(path, home)]
    if not held:
        return PLANNING
    lease = held[0].relative_to(home.store).as_posix()
    for name, stage in OF_LEASES.items():
        if f"/{name}" in lease:
            return stage
    done = Counter(
        path.name.partition("-")[0] for path in notes if path.parent.parent.name == "work"
    )
    if done["part"] == PARTITIONS:
        return PUBLISH
    return WRITE if done["staged"] == PARTITIONS else FETCH


def _is_held(lease: Path, home: DrillHome) -> bool:
    """Whether the driver at work holds it: those of the dead stay as they were."""
    assert home.driver is not None
    try:
        record = json.loads(lease.read_text())
    except (ValueError, FileNotFoundError):  # it is being written
        return False
    return bool(record["held"]) and int(record["pid"]) == home.driver.pid
