"""Kill drills: a command whose processes are killed at random, again and again.

A job is prepared once and run once undisturbed; then copies of that home are run while this kills,
and whoever ended is started again with the same command. What comes out must be what came out of
the undisturbed run, to the byte.
"""

from __future__ import annotations

import os
import random
import shutil
import statistics
import subprocess
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from tests.faults.drill_home import DEADLINE_SECONDS, Clock, DrillHome, kill_everything

MAX_FAILURES = 5  # of the command in a row, while nothing disturbs it
LOOK_SECONDS = 0.2
IDLE_FACTOR = 20  # a pause takes at most so many seconds for each second of processor time


@dataclass(frozen=True)
class Kill:
    """One disturbance, and where the job was. ``lost`` is work that was done and not saved;
    ``restarts`` says whether the command had to be given again."""

    kind: str
    stage: str
    step: int
    lost: int
    restarts: bool
    exit_code: int | None


class Job(ABC):
    """What is disturbed: a command, what comes out of it, and what its processes are called."""

    result_words: str  # what is compared, in the page's last line
    lost_words: str | None  # the heading of what a kill cost; None when that is not known

    @abstractmethod
    def kinds(self) -> dict[str, Callable[[DrillHome], bool]]:
        """Name -> do it; False when there was nothing of that kind to kill."""

    @abstractmethod
    def prepare(self, home: DrillHome) -> None:
        """What every run starts from; services are stopped after it."""

    @abstractmethod
    def start(self, home: DrillHome) -> subprocess.Popen[bytes]:
        """Start the command."""

    @abstractmethod
    def result(self, home: DrillHome) -> dict[str, str]:
        """Name -> digest of what came out."""

    @abstractmethod
    def place(self, home: DrillHome) -> tuple[str, int, int]:
        """The stage at work, its step, and what a kill now would cost."""

    def stages(self) -> tuple[str, ...]:
        """The stages that every other kill looks for; none: all kills come by the clock."""
        return ()


def say_line(line: str) -> None:
    print(line, flush=True)


@dataclass
class Drill:
    """A prepared home, its undisturbed result, and copies of it that are disturbed.

    Between two kills lie up to ``max_pause_seconds`` of the command's processor time; 0: a quarter
    of the undisturbed run's. Every other kill waits, for as long at most, until the stage that was
    hit least is at work. ``record`` is a file for the page, written after every round.
    """

    job: Job
    folder: Path
    num_kills: int
    seed: int = 0
    max_pause_seconds: float = 0.0
    mlflow_away_seconds: float = 60.0
    say: Callable[[str], None] = say_line
    record: Path | None = None
    kills: list[Kill] = field(default_factory=list)
    rounds: int = 0
    rounds_equal: int = 0
    seconds: float = 0.0  # all rounds
    undisturbed_seconds: float = 0.0  # of processor time
    num_results: int = 0

    def run(self) -> bool:
        """Whether every round came to what the undisturbed run came to."""
        rng = random.Random(self.seed)
        base, straight = DrillHome(self.folder / "base"), DrillHome(self.folder / "straight")
        base.path.mkdir(parents=True)
        self.job.prepare(base)
        base.do("down")
        self._copy(base, "straight")
        self._run_undisturbed(straight)
        self.max_pause_seconds = self.max_pause_seconds or self.undisturbed_seconds / 4
        expected = self.job.result(straight)
        self.num_results = len(expected)
        self.say(f"results to compare: {self.num_results}")
        while len(self.kills) < self.num_kills:
            home = self._copy(base, f"round-{self.rounds}")
            began = time.monotonic()
            home.mlflow_away_seconds = self.mlflow_away_seconds
            try:
                self._disturb(home, rng)
                found = self.job.result(home)
            except (RuntimeError, AssertionError) as error:  # a round that failed is told as one
                found = {"error": str(error)}
            finally:
                kill_everything(home)
                home.do("down")
            is_equal = found == expected
            self.rounds += 1
            self.rounds_equal += is_equal
            self.seconds += time.monotonic() - began
            self.say(f"round {self.rounds}: {len(self.kills)} kills, equal: {is_equal}")
            if self.record is not None:
                self.record.write_text(self.page() + "\n")
            if is_equal:
                shutil.rmtree(home.path)
            else:
                self.say(f"differs: {sorted(set(found.items()) ^ set(expected.items()))[:10]}")
        return self.rounds == self.rounds_equal

    def _run_undisturbed(self, home: DrillHome) -> None:
        began, clock = time.monotonic(), Clock(home)
        driver = self.job.start(home)
        while (code := _ended(driver, LOOK_SECONDS)) is None:
            self.undisturbed_seconds = clock.read()
        if code:
            raise RuntimeError(home.log.read_text()[-3000:])
        wall_seconds = time.monotonic() - began
        home.do("down")
        used = f"{self.undisturbed_seconds:.0f} s of processor time"
        self.say(f"undisturbed: {used} in {wall_seconds:.0f} s")

    def _copy(self, base: DrillHome, name: str) -> DrillHome:
        home = DrillHome(self.folder / name)
        shutil.copytree(base.path, home.path, symlinks=True)
        return home

    def _disturb(self, home: DrillHome, rng: random.Random) -> None:
        """Kill, and start again whoever ended, until the command is done."""
        kinds = self.job.kinds()
        driver = self.job.start(home)
        failures, clock = 0, Clock(home)
        while True:
            wants_kill = len(self.kills) < self.num_kills
            code = self._let_work(clock, driver, rng) if wants_kill else _ended(driver)
            if code == 0:
                return
            failures += 1
            if failures > MAX_FAILURES or (code is None and not wants_kill):
                raise RuntimeError(f"the run does not end: {home.log.read_text()[-3000:]}")
            if code is not None:
                if self.kills:
                    self.kills[-1] = replace(self.kills[-1], restarts=True, exit_code=code)
                driver = self.job.start(home)  # what failed is given again, as its message says
                continue
            stage, step, lost = self.job.place(home)
            shuffled = rng.sample(sorted(kinds), len(kinds))  # the first that there is to kill
            kind = next((each for each in shuffled if kinds[each](home)), None)
            if kind is None:
                continue
            failures = 0
            code = _ended(driver, 45.0 if "driver" in kind or "everything" in kind else 1.0)
            self.kills.append(Kill(kind, stage, step, lost, code is not None, code))
            self.say(f"{len(self.kills)}: {self.kills[-1]}")
            if code is not None and code != 0:
                driver = self.job.start(home)

    def _let_work(
        self, clock: Clock, driver: subprocess.Popen[bytes], rng: random.Random
    ) -> int | None:
        """Wait until a random moment; the exit code of a command that ended before."""
        pause, wanted = rng.uniform(0.5, self.max_pause_seconds), None
        if (stages := self.job.stages()) and rng.random() < 0.5:
            hits = Counter(kill.stage for kill in self.kills)
            wanted = min(stages, key=lambda stage: (hits[stage], rng.random()))
            pause = self.max_pause_seconds
        began, until = clock.read(), time.monotonic() + IDLE_FACTOR * pause
        while clock.read() - began < pause and time.monotonic() < until:
            code = _ended(driver, LOOK_SECONDS)
            if code is not None:
                return code
            if wanted is not None and self.job.place(clock.home)[0] == wanted:
                return _ended(driver, rng.uniform(0.0, 1.0))
        return None

    def page(self) -> str:
        """What happened so far, as tables."""
        cost = self.job.lost_words
        lines = ["| killed | times | command given again |", "|---|---|---|"]
        if cost is not None:
            lines = [f"{lines[0]} {cost}, median (most) |", f"{lines[1]}---|"]
        for kind in self.job.kinds():
            of_kind = [each for each in self.kills if each.kind == kind]
            if not of_kind:
                continue
            lost = [each.lost for each in of_kind]
            again = sum(each.restarts for each in of_kind)
            row = f"| {kind} | {len(of_kind)} | {again} |"
            if cost is not None:
                row += f" {statistics.median(lost):g} ({max(lost)}) |"
            lines.append(row)
        hits = Counter(each.stage for each in self.kills)
        lines += ["", "| at work | kills |", "|---|---|"]
        lines += [f"| {stage} | {count} |" for stage, count in hits.most_common()]
        lines += [
            "",
            f"{len(self.kills)} kills in {self.rounds} runs of the recipe and "
            f"{self.seconds / 60:.0f} minutes (undisturbed, a run takes "
            f"{self.undisturbed_seconds:.0f} s of processor time); {self.job.result_words} equal "
            f"to the undisturbed run's ({self.num_results}) in {self.rounds_equal} of "
            f"{self.rounds}.",
        ]
        return "\n".join(lines)


def _ended(process: subprocess.Popen[bytes], seconds: float = DEADLINE_SECONDS) -> int | None:
    try:
        return process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return None


def kills_wanted(default: int) -> int:
    """How many kills a drill makes: ``ATELIER_KILLS``, for the record; a few in the tests."""
    return int(os.environ.get("ATELIER_KILLS", str(default)))


def drill(job: Job, folder: Path, num_kills: int) -> Drill:
    """Kill as often, print what came of it, and return the finished drill.

    ``ATELIER_PAUSE`` is the longest time between two kills, in seconds of the command's processor
    time, ``ATELIER_SEED`` says where they fall, and ``ATELIER_RECORD`` names a file for the page,
    which grows with every round.
    """
    record = os.environ.get("ATELIER_RECORD")
    drill = Drill(
        job,
        folder,
        num_kills,
        seed=int(os.environ.get("ATELIER_SEED", "7")),
        max_pause_seconds=float(os.environ.get("ATELIER_PAUSE", "0")),
        mlflow_away_seconds=5.0,
        record=Path(record) if record else None,
    )
    try:
        drill.run()
    finally:
        drill.say("\n" + drill.page())
    assert len(drill.kills) == num_kills
    assert 1 <= drill.rounds == drill.rounds_equal
    return drill
