"""Processes that outlive the command which started them, known by pid *and* start time."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

HOST = "127.0.0.1"
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class ProcessId:
    """A pid can be given to another process; a pid with its start time cannot."""

    pid: int
    started_at: str


def identify(pid: int) -> ProcessId | None:
    """The identity of a running process; None for one that ended, reaped or not."""
    found = _look_up(pid)
    return None if found is None or found[1] else found[0]


def is_alive(process: ProcessId) -> bool:
    """Whether exactly this process still runs; reaps it when it was our child and ended."""
    found = _look_up(process.pid)
    if found is None or found[0] != process:
        return False
    has_ended = found[1]
    if has_ended:
        _reap(process.pid)
    return not has_ended


def _look_up(pid: int) -> tuple[ProcessId, bool] | None:
    """(identity, whether it ended and waits for its parent), None when there is no such pid."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except FileNotFoundError:
        return None if BOOT_ID.exists() else _look_up_without_proc(pid)
    except ProcessLookupError:
        return None
    started_at = f"{BOOT_ID.read_text().strip()}:{fields[19].decode()}"
    return ProcessId(pid, started_at), fields[0] in (b"Z", b"X")


def _look_up_without_proc(pid: int) -> tuple[ProcessId, bool] | None:
    import psutil

    try:
        process = psutil.Process(pid)
        has_ended = process.status() == psutil.STATUS_ZOMBIE
        return ProcessId(pid, f"{process.create_time():.2f}"), has_ended
    except psutil.NoSuchProcess:
        return None


def _reap(pid: int) -> None:
    try:
        os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        return


def start(command: Sequence[str], environment: Mapping[str, str], log: Path) -> ProcessId:
    """Start a process that reads nothing and appends its output to ``log`` (mode 600)."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    pid = os.posix_spawn(
        command[0],
        list(command),
        dict(environment),
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, str(log), flags, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
    )
    process = identify(pid)
    return process if process is not None else ProcessId(pid, "ended")


def stop(process: ProcessId, grace_seconds: float) -> bool:
    """SIGTERM, then SIGKILL after ``grace_seconds``; False when it did not run any more."""
    if not is_alive(process):
        return False
    os.kill(process.pid, signal.SIGTERM)
    deadline = time.monotonic() + grace_seconds
    while is_alive(process):
        if time.monotonic() > deadline:
            os.kill(process.pid, signal.SIGKILL)
            deadline = float("inf")
        time.sleep(0.02)
    return True


def is_port_free(port: int) -> bool:
    """Whether a server could listen on this loopback port now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def free_port() -> int:
    """A loopback port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def who_listens(port: int) -> str:
    """The program on a port, for a message: ``python (pid 12)``, or ``another program``."""
    import psutil

    for process in psutil.process_iter(["pid", "name"]):
        try:
            connections = process.net_connections(kind="tcp")
        except (psutil.AccessDenied, psutil.NoSuchProcess):
            continue
        if any(c.status == psutil.CONN_LISTEN and c.laddr.port == port for c in connections):
            return f"{process.info['name']} (pid {process.info['pid']})"
    return "another program"
