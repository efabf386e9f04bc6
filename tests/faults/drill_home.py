"""The home that a drill disturbs: its commands, its services, and what may happen to them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent.parent
DEADLINE_SECONDS = 900.0


@dataclass
class DrillHome:
    """A home with its own services, and commands in it."""

    path: Path
    mlflow_away_seconds: float = 60.0
    driver: subprocess.Popen[bytes] | None = None

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "ATELIER_HOME": str(self.path), "PYTHONDONTWRITEBYTECODE": ""}

    @property
    def store(self) -> Path:
        """The bucket, as the folder that the server keeps it in."""
        return self.path / "s3" / "atelier"

    @property
    def log(self) -> Path:
        return self.path.with_suffix(".log")

    def atelier(self, *arguments: str) -> subprocess.Popen[bytes]:
        with open(self.log, "ab") as log:
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
            text = self.log.read_text()[-3000:]
            raise RuntimeError(f"atelier {' '.join(arguments)} ended with {code}: {text}")

    def drive(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Start the command that is to be disturbed."""
        self.driver = self.atelier(*arguments)
        return self.driver

    def processes(self, *words: str) -> list[psutil.Process]:
        """The driver's descendants whose command line holds one of these words."""
        if self.driver is None:
            return []
        try:
            found = psutil.Process(self.driver.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []
        return [each for each in found if any(word in title(each) for word in words)]

    def services(self, word: str) -> list[psutil.Process]:
        """The home's own processes of a service."""
        home = str(self.path)
        return [
            each
            for each in psutil.process_iter()
            if word in title(each) and home in title(each) and "keeper" not in title(each)
        ]


def title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline()) or str(process.name())
    except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
        return ""


class Clock:
    """Processor seconds that a home's commands used, with all their processes, also the dead.

    The work between two kills is then the same on a machine that others load as on an idle one.
    """

    def __init__(self, home: DrillHome) -> None:
        self.home = home
        self._used: dict[tuple[int, float], float] = {}

    def read(self) -> float:
        driver = self.home.driver
        if driver is not None:
            try:
                own = psutil.Process(driver.pid)
                processes = [own, *own.children(recursive=True)]
            except psutil.NoSuchProcess:
                processes = []
            for process in processes:
                try:
                    times = process.cpu_times()
                    key = process.pid, process.create_time()
                except psutil.NoSuchProcess:
                    continue
                self._used[key] = times.user + times.system
        return sum(self._used.values())


# --- what may happen to any job ------------------------------------------------------------------


def kill_all(found: list[psutil.Process]) -> bool:
    for process in found:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    return bool(found)


def kill_driver(home: DrillHome) -> bool:
    assert home.driver is not None
    is_alive = home.driver.poll() is None
    home.driver.kill()
    return is_alive


def kill_everything(home: DrillHome) -> bool:
    """The driver and all its processes at once, as when the power fails."""
    assert home.driver is not None
    is_alive, found = home.driver.poll() is None, home.processes("")
    home.driver.kill()
    kill_all(found)
    return is_alive


def terminate_driver(home: DrillHome) -> bool:
    assert home.driver is not None
    is_alive = home.driver.poll() is None
    home.driver.terminate()
    return is_alive


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
    "kill -9 of the driver": kill_driver,
    "kill -9 of everything at once": kill_everything,
    "SIGTERM to the driver": terminate_driver,
    "S3 server killed and started again": restart_s3,
    "MLflow killed, away for a while": lose_mlflow,
}
