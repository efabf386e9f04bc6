"""The keeper's own promises, with a stand-in for the service it keeps."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.local import processes
from infra.local.processes import ProcessId
from infra.local.services import KEEPER

SERVICE = """
import os, sys, time
with open(sys.argv[1], "w") as file:
    file.write(str(os.getpid()))
time.sleep(60)
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


@pytest.fixture
def kept(home: Path, tmp_path: Path) -> Iterator[tuple[ProcessId, ProcessId]]:
    """(keeper, service), both running."""
    pid_file = tmp_path / "pid"
    service = [sys.executable, "-c", SERVICE, str(pid_file)]
    keeper = processes.start(keep(home, *service), os.environ, tmp_path / "log")
    while not pid_file.exists() or not pid_file.read_text():
        assert processes.is_alive(keeper), (tmp_path / "log").read_text()
        time.sleep(0.01)
    child = processes.identify(int(pid_file.read_text()))
    assert child is not None
    yield keeper, child
    processes.stop(keeper, grace_seconds=1)
    processes.stop(child, grace_seconds=1)


def keep(home: Path, *command: str) -> list[str]:
    return [sys.executable, "-S", "-E", str(KEEPER), str(home), "--", *command]


def ended_within(process: ProcessId, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while processes.is_alive(process):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def test_both_end_when_the_home_is_removed(home: Path, kept: tuple[ProcessId, ProcessId]) -> None:
    shutil.rmtree(home)
    assert all(ended_within(process, 5) for process in kept)


def test_both_end_when_the_home_is_replaced(home: Path, kept: tuple[ProcessId, ProcessId]) -> None:
    home.rename(home.with_name("old"))
    home.mkdir()
    assert all(ended_within(process, 5) for process in kept)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_service_ends_with_its_keeper(
    kept: tuple[ProcessId, ProcessId], number: signal.Signals
) -> None:
    keeper, service = kept
    os.kill(keeper.pid, number)
    assert ended_within(service, 5)
    assert ended_within(keeper, 5)


def test_the_keeper_ends_with_its_service(kept: tuple[ProcessId, ProcessId]) -> None:
    keeper, service = kept
    os.kill(service.pid, signal.SIGKILL)
    assert ended_within(keeper, 5)


def test_the_keeper_is_small_and_holds_its_own_session(kept: tuple[ProcessId, ProcessId]) -> None:
    keeper, service = kept
    assert os.getsid(keeper.pid) == keeper.pid != os.getsid(0)
    assert os.getpgid(service.pid) == service.pid
    pages = int(Path(f"/proc/{keeper.pid}/statm").read_text().split()[1])
    assert pages * os.sysconf("SC_PAGESIZE") < 16 << 20


@pytest.mark.parametrize(("command", "exit_code"), [(["sh", "-c", "exit 7"], 7), (["/none"], 127)])
def test_the_exit_code_is_passed_on(home: Path, command: list[str], exit_code: int) -> None:
    done = subprocess.run(keep(home, *command), capture_output=True, text=True, check=False)
    assert done.returncode == exit_code
    assert ("cannot start" in done.stderr) == (exit_code == 127)
