"""What the kill drill of curation disturbs: filter, fetch, shard, score, derive and caption.

Every published manifest must have the undisturbed run's sha256, and the store must hold the same
objects: none lost, none left over, none twice.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import yaml

from tests.app.test_scoring import make_models
from tests.faults.drill import KINDS, DrillHome, Job, kill_all
from tests.pipelines.captions.conftest import KEY, CaptionServer

NUM_ROWS = 300
PARTITIONS = 6
KEY_VARIABLE = "CAPTION_KEY"
NEEDS_NO_MLFLOW = "MLflow killed, away for a while"
# What a resumed run needs and a reader never sees: notes of finished work, unfinished attempts.
WORKING_FOLDER = "work"


def kill_worker(home: DrillHome) -> bool:
    """One of Spark's Python workers, whatever it is doing."""
    return kill_all([each for each in _python_workers(home) if not each.children()][:1])


def kill_worker_daemon(home: DrillHome) -> bool:
    """Where Spark forks its Python workers from, and with it all of them."""
    return kill_all([each for each in _python_workers(home) if each.children()])


def kill_jvm(home: DrillHome) -> bool:
    return kill_all(home.processes("org.apache.spark.deploy.SparkSubmit"))


def _python_workers(home: DrillHome) -> list[psutil.Process]:
    return home.processes("pyspark.daemon")


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
            **common,
        }

    def prepare(self, home: DrillHome) -> None:
        models = self.folder / "models"
        models_section = make_models(models)
        self.recipe.write_text(yaml.safe_dump(self._recipe(models_section)))
        home.do("up")

    def _recipe(self, scoring: dict[str, Any]) -> dict[str, Any]:
        return {
            "name": "drill",
            "world": {"num_rows": NUM_ROWS, "num_parts": 3, "trap_ratio": 0.2},
            "datasets": {
                "painted": {
                    "metadata": ["{world}/metadata/*.parquet"],
                    "filters": {"min_aesthetic_score": 4.5},
                    "fetch": {"total_deadline_seconds": 3, "retries": 1, "backoff_seconds": 0.05},
                    "resize": {"image_size_px": 64},
                    "captions": {"token_budget": 24},
                    "partitions": PARTITIONS,
                    "shards": {"max_samples": 24},
                }
            },
            "scoring": scoring,
            "derived": {
                "best": {"dataset": "painted", "keep": {"min_aesthetic_score": 5}},
                "told": {"dataset": "painted", "caption": True},
            },
            "captioning": {
                "endpoint": {
                    "url": self.server.url,
                    "model": "captioner",
                    "api_key_env": KEY_VARIABLE,
                }
            },
        }

    def start(self, home: DrillHome) -> subprocess.Popen[bytes]:
        return home.drive("run", str(self.recipe))

    def result(self, home: DrillHome) -> dict[str, str]:
        """Each step's version, and the digest of every object outside the working folders."""
        status = json.loads((home.path / "runs" / "latest" / "status.json").read_text())
        steps = {step["name"]: str(step["dataset_version"]) for step in status["steps"]}
        return steps | {
            str(path): hashlib.sha256((home.store / path).read_bytes()).hexdigest()
            for path in _objects(home)
            if WORKING_FOLDER not in path.parts
        }

    def place(self, home: DrillHome) -> tuple[str, int, int]:
        """Whose note of finished work is the newest, and how many notes there are."""
        notes = [path for path in _objects(home) if path.suffix == ".json"]
        if not notes:
            return "start", 0, 0
        newest = max(notes, key=lambda path: (home.store / path).stat().st_mtime)
        return _phase(newest), len(notes), 0


def _objects(home: DrillHome) -> list[Path]:
    """What is stored of datasets, by key; leases say who works, which is no result."""
    found = [path for path in (home.store / "datasets").rglob("*") if path.is_file()]
    return [path.relative_to(home.store) for path in found if path.name != "lease.json"]


def _phase(note: Path) -> str:
    """datasets/<name>/work/<build key>/staged-000001.json is a note of ``fetch``, and so on."""
    of_builds = {"read": "read", "staged": "fetch", "part": "write shards"}
    for part in note.parts[2:]:
        name = part.partition("-")[0]
        if name in {"embeddings", "scores", "captions", "caption", "refilter"}:
            return name
        if name in of_builds:
            return of_builds[name]
    return "publish"
