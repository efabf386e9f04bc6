"""The kill drill: a four-stage recipe whose processes are killed at random, again and again.

``ATELIER_KILLS=100 .venv/bin/python tests/faults/training_drill.py`` prints a page with what was
killed and what came of it. ``ATELIER_PAUSE`` is the longest time between two kills, in seconds, and
``ATELIER_DRILL`` a folder in which an earlier drill's undisturbed run is taken over.

The recipe is curated once and trained once undisturbed; then copies of that home are trained while
this kills, and whoever ended is started again with the same command. Every stage's checkpoint must
be the undisturbed one to the bit.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent.parent
RECIPE = "tests/recipes/tiny.yaml"
STEPS = 60
STAGES = ("concepts", "alignment", "compression", "aesthetics")
FASTER = ("tokenizer.checkpoint_interval_steps=2",)
LONGER = tuple(
    f"stages.{stage}.{field}"
    for stage in STAGES
    for field in (f"steps={STEPS}", "checkpoint_interval_steps=3", "ema_decay=0.9")
)
DEADLINE_SECONDS = 900.0
IN_TRAINING_SHARE = 0.8  # of the kills; the others may meet a start, or the end of a stage


@dataclass(frozen=True)
class Kill:
    """One disturbance. ``lost_steps`` were trained and not saved; ``restarts`` says whether the
    command had to be given again."""

    kind: str
    stage: str
    step: int
    lost_steps: int
    restarts: bool
    exit_code: int | None


@dataclass
class DrillHome:
    """A home with its own services, and the recipe's command in it."""

    path: Path
    mlflow_away_seconds: float = 60.0
    driver: subprocess.Popen[bytes] | None = None
    drivers_started: int = 0

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "ATELIER_HOME": str(self.path), "PYTHONDONTWRITEBYTECODE": ""}

    def atelier(self, *arguments: str) -> subprocess.Popen[bytes]:
        with open(self.path.with_suffix(".log"), "ab") as log:
            return subprocess.Popen(
                [sys.executable, "-c", "from app.cli import main; main()", *arguments],
                cwd=ROOT,
                env=self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def do(self, *arguments: str) -> None:
        code = self.atelier(*arguments).wait(timeout=DEADLINE_SECONDS)
        if code:
            log = self.path.with_suffix(".log").read_text()[-3000:]
            raise RuntimeError(f"atelier {' '.join(arguments)} ended with {code}: {log}")

    def train(self) -> subprocess.Popen[bytes]:
        changes = [word for change in (*FASTER, *LONGER) for word in ("--set", change)]
        self.driver = self.atelier("train", RECIPE, *changes)
        self.drivers_started += 1
        return self.driver

    def checkpoints(self) -> dict[str, str]:
        """Stage -> the digest of its published checkpoint."""
        status = json.loads((self.path / "runs" / "latest" / "status.json").read_text())
        return {
            step["name"]: step["checkpoint_sha256"]
            for step in status["steps"]
            if step["checkpoint_sha256"] is not None
        }

    def place(self) -> tuple[str, int, int]:
        """The stage at work, its step, and the steps since its newest whole checkpoint."""
        progress = list((self.path / "s3" / "atelier" / "runs").glob("*/progress.json"))
        if not progress:
            return "start", 0, 0
        newest = max(progress, key=lambda path: path.stat().st_mtime)
        step = int(json.loads(newest.read_text())["step"])
        listings = newest.parent.glob("checkpoints/*/CHECKPOINT.json")
        saved = [int(path.parent.name.split("-")[1]) for path in listings]
        stage = newest.parent.name.rpartition("-")[0]
        return stage, step, max(0, step - max(saved, default=0))

    def processes(self, *words: str) -> list[psutil.Process]:
        """The driver's descendants whose command line holds one of these words."""
        if self.driver is None:
            return []
        try:
            found = psutil.Process(self.driver.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []
        return [each for each in found if any(word in _title(each) for word in words)]

    def services(self, word: str) -> list[psutil.Process]:
        """The home's own processes of a service."""
        home = str(self.path)
        return [
            each
            for each in psutil.process_iter()
            if word in _title(each) and home in _title(each) and "keeper" not in _title(each)
        ]


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline()) or str(process.name())
    except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
        return ""


# --- the kinds -----------------------------------------------------------------------------------


def kill_all(found: list[psutil.Process]) -> bool:
    for process in found:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    return bool(found)


def kill_worker(home: DrillHome) -> bool:
    return kill_all(home.processes("RayTrainWorker"))


def kill_controller(home: DrillHome) -> bool:
    return kill_all(home.processes("TrainController"))


def kill_node(home: DrillHome) -> bool:
    return kill_all(home.processes("raylet/raylet"))


def kill_driver(home: DrillHome) -> bool:
    assert home.driver is not None
    home.driver.kill()
    return True


def kill_everything(home: DrillHome) -> bool:
    """The driver and all its processes at once, as when the power fails."""
    assert home.driver is not None
    found = home.processes("")
    home.driver.kill()
    kill_all(found)
    return True


def terminate_driver(home: DrillHome) -> bool:
    assert home.driver is not None
    home.driver.terminate()
    return True


def restart_s3(home: DrillHome) -> bool:
    found = kill_all(home.services("rclone"))
    home.do("up")
    return found


def lose_mlflow(home: DrillHome) -> bool:
    found = kill_all(home.services("mlflow"))
    time.sleep(home.mlflow_away_seconds)
    home.do("up")
    return found


KINDS: dict[str, Callable[[DrillHome], bool]] = {
    "kill -9 of the training worker": kill_worker,
    "kill -9 of Ray's controller": kill_controller,
    "kill -9 of the Ray node (raylet)": kill_node,
    "kill -9 of the driver": kill_driver,
    "kill -9 of everything at once": kill_everything,
    "SIGTERM to the driver": terminate_driver,
    "S3 server killed and started again": restart_s3,
    "MLflow killed, away for a while": lose_mlflow,
}


def _say(line: str) -> None:
    print(line, flush=True)


# --- the drill -----------------------------------------------------------------------------------


@dataclass
class Drill:
    """A curated home, its undisturbed result, and copies of it that are disturbed."""

    folder: Path
    num_kills: int
    seed: int = 0
    max_pause_seconds: float = 12.0
    mlflow_away_seconds: float = 60.0
    kinds: tuple[str, ...] = tuple(KINDS)
    say: Callable[[str], None] = _say
    kills: list[Kill] = field(default_factory=list)
    rounds: int = 0
    rounds_equal: int = 0
    _upcoming: list[str] = field(default_factory=list)

    def run(self) -> bool:
        """Whether every round came to the undisturbed checkpoints."""
        rng = random.Random(self.seed)
        base, straight = DrillHome(self.folder / "base"), DrillHome(self.folder / "straight")
        if not straight.path.exists():
            base.path.mkdir(parents=True)
            base.do("curate", RECIPE)
            base.do("down")
            self._copy(base, "straight")
            began = time.monotonic()
            if straight.train().wait(timeout=DEADLINE_SECONDS):
                raise RuntimeError(straight.path.with_suffix(".log").read_text()[-3000:])
            straight.do("down")
            self.say(f"undisturbed: {time.monotonic() - began:.0f} s")
        expected = straight.checkpoints()
        self.say(f"expected: {expected}")
        while len(self.kills) < self.num_kills:
            home = self._copy(base, f"round-{self.rounds}")
            home.mlflow_away_seconds = self.mlflow_away_seconds
            try:
                self._disturb(home, rng)
                is_equal = home.checkpoints() == expected
            finally:
                kill_everything(home)
                home.do("down")
            self.rounds += 1
            self.rounds_equal += is_equal
            self.say(f"round {self.rounds}: {len(self.kills)} kills, equal: {is_equal}")
            if is_equal:
                shutil.rmtree(home.path)
        return self.rounds == self.rounds_equal

    def _copy(self, base: DrillHome, name: str) -> DrillHome:
        home = DrillHome(self.folder / name)
        shutil.copytree(base.path, home.path, symlinks=True)
        return home

    def _disturb(self, home: DrillHome, rng: random.Random) -> None:
        """Kill, and start again whoever ended, until the recipe is done."""
        driver = home.train()
        while True:
            wants_kill = len(self.kills) < self.num_kills
            if wants_kill and rng.random() < IN_TRAINING_SHARE:
                self._await_steps(home, driver)
            pause = rng.uniform(0.5, self.max_pause_seconds) if wants_kill else DEADLINE_SECONDS
            code = _ended(driver, pause)
            if code == 0:
                return
            if code is not None:
                if self.kills:
                    self.kills[-1] = replace(self.kills[-1], restarts=True, exit_code=code)
                driver = home.train()  # what failed is given again, as its message says
                continue
            if not wants_kill:
                raise RuntimeError(f"the run in {home.path} does not end")
            kind = self._next_kind(rng)
            stage, step, lost = home.place()
            if not KINDS[kind](home):
                self._upcoming.insert(0, kind)
                continue  # there was nothing of that kind to kill now
            code = _ended(driver, 45.0 if "driver" in kind or "everything" in kind else 1.0)
            self.kills.append(Kill(kind, stage, step, lost, code is not None, code))
            self.say(f"{len(self.kills)}: {self.kills[-1]}")
            if code is not None and code != 0:
                driver = home.train()

    def _await_steps(self, home: DrillHome, driver: subprocess.Popen[bytes]) -> None:
        """Until training is seen to advance, so that most kills meet it, however slow the start."""
        before = home.place()
        deadline = time.monotonic() + DEADLINE_SECONDS
        while _ended(driver, 0.2) is None and time.monotonic() < deadline:
            now = home.place()
            if now[:2] != before[:2] and now[1] > 0:
                return

    def _next_kind(self, rng: random.Random) -> str:
        """Every kind once, in a random order, then again."""
        if not self._upcoming:
            self._upcoming = rng.sample(self.kinds, len(self.kinds))
        return self._upcoming.pop()

    def page(self) -> str:
        """What happened, as a table."""
        lines = [
            "| killed | times | command given again | steps lost, median (most) |",
            "|---|---|---|---|",
        ]
        for kind in self.kinds:
            of_kind = [each for each in self.kills if each.kind == kind]
            if not of_kind:
                continue
            lost = [each.lost_steps for each in of_kind]
            again = sum(each.restarts for each in of_kind)
            lines.append(
                f"| {kind} | {len(of_kind)} | {again} | {statistics.median(lost):g} ({max(lost)}) |"
            )
        stages = Counter(each.stage for each in self.kills)
        lines += ["", f"Stages hit: {', '.join(f'{n} {c}' for n, c in stages.most_common())}."]
        lines.append(
            f"{len(self.kills)} kills in {self.rounds} runs of the recipe; checkpoints of all "
            f"stages equal to the undisturbed run's in {self.rounds_equal} of {self.rounds}."
        )
        return "\n".join(lines)


def _ended(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    try:
        return process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return None


def main() -> None:
    """Run the drill and print its page; exit code 1 when a run came to other bytes."""
    num_kills = int(os.environ.get("ATELIER_KILLS", "8"))
    folder = Path(os.environ.get("ATELIER_DRILL") or tempfile.mkdtemp(prefix="drill-"))
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))
    seed, pause = os.environ.get("ATELIER_SEED", "0"), os.environ.get("ATELIER_PAUSE", "12")
    drill = Drill(folder, num_kills, seed=int(seed), max_pause_seconds=float(pause))
    is_equal = False
    try:
        is_equal = drill.run()
    finally:
        print(drill.page(), flush=True)
    if is_equal:
        shutil.rmtree(folder)
    sys.exit(not is_equal)


if __name__ == "__main__":
    main()
