"""What the kill drill of training disturbs: four stages on Ray, handed over by MLflow."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable

from tests.faults.drill import Job
from tests.faults.drill_home import KINDS, DrillHome, kill_all

RECIPE = "tests/recipes/tiny.yaml"
STEPS = 60
STAGES = ("concepts", "alignment", "compression", "aesthetics")
FASTER = ("tokenizer.checkpoint_interval_steps=2",)
LONGER = tuple(
    f"stages.{stage}.{field}"
    for stage in STAGES
    for field in (f"steps={STEPS}", "checkpoint_interval_steps=3", "ema_decay=0.9")
)


def kill_worker(home: DrillHome) -> bool:
    return kill_all(home.processes("RayTrainWorker"))


def kill_controller(home: DrillHome) -> bool:
    return kill_all(home.processes("TrainController"))


def kill_node(home: DrillHome) -> bool:
    return kill_all(home.processes("raylet/raylet"))


class TrainingJob(Job):
    """``atelier train`` of a curated recipe."""

    result_words = "checkpoints of all stages"
    lost_words = "steps lost"

    def kinds(self) -> dict[str, Callable[[DrillHome], bool]]:
        return {
            "kill -9 of the training worker": kill_worker,
            "kill -9 of Ray's controller": kill_controller,
            "kill -9 of the Ray node (raylet)": kill_node,
            **KINDS,
        }

    def prepare(self, home: DrillHome) -> None:
        home.do("curate", RECIPE)

    def start(self, home: DrillHome) -> subprocess.Popen[bytes]:
        changes = [word for change in (*FASTER, *LONGER) for word in ("--set", change)]
        return home.drive("train", RECIPE, *changes)

    def result(self, home: DrillHome) -> dict[str, str]:
        """Stage -> the digest of its published checkpoint."""
        status = json.loads((home.path / "runs" / "latest" / "status.json").read_text())
        return {
            step["name"]: step["checkpoint_sha256"]
            for step in status["steps"]
            if step["checkpoint_sha256"] is not None
        }

    def place(self, home: DrillHome) -> tuple[str, int, int]:
        """The stage at work, its step, and the steps since its newest whole checkpoint."""
        progress = list((home.store / "runs").glob("*/progress.json"))
        if not progress:
            return "start", 0, 0
        newest = max(progress, key=lambda path: path.stat().st_mtime)
        step = int(json.loads(newest.read_text())["step"])
        listings = newest.parent.glob("checkpoints/*/CHECKPOINT.json")
        saved = [int(path.parent.name.split("-")[1]) for path in listings]
        stage = newest.parent.name.rpartition("-")[0]
        return stage, step, max(0, step - max(saved, default=0))
