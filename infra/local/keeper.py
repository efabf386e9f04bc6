"""Keeps one service alive no longer than its home: ``python keeper.py HOME -- COMMAND…``.

A small stdlib-only parent (10 MB, ``python -S -E``). It passes SIGTERM on, kills the service when
the home folder is removed or replaced, and the kernel kills the service when the keeper dies.
Exits with the service's exit code. Does not restart it: ``atelier up`` does, and says so.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
import time

POLL_SECONDS = 1.0
GRACE_SECONDS = 5.0
PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> int:
    """Run the command after ``--`` and watch over it; returns the exit code to leave with."""
    home, separator, *command = arguments
    if separator != "--" or not command:
        raise SystemExit("usage: keeper.py HOME -- COMMAND...")
    os.setsid()
    os.umask(0o077)
    os.chdir(home)
    identity = _identity(home)
    wakeup = _wake_on_signals()
    stopping: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stopping.append(number))
    signal.signal(signal.SIGINT, lambda number, _: stopping.append(number))
    signal.signal(signal.SIGCHLD, lambda *_: None)
    child = _start(command)
    while True:
        exit_code = _exit_code(child)
        if exit_code is not None:
            _signal_group(child, signal.SIGKILL)
            return exit_code
        if stopping or _identity(home) != identity:
            return _stop(child)
        select.select([wakeup], [], [], POLL_SECONDS)
        _drain(wakeup)


def _identity(home: str) -> tuple[int, int] | None:
    try:
        found = os.stat(home)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _wake_on_signals() -> int:
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    return reader


def _drain(descriptor: int) -> None:
    try:
        os.read(descriptor, 1024)
    except BlockingIOError:
        return


def _start(command: list[str]) -> int:
    keeper = os.getpid()
    library = ctypes.CDLL(None)
    child = os.fork()
    if child:
        return child
    try:
        os.setpgid(0, 0)
        if hasattr(library, "prctl"):
            library.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == keeper:
            os.execvp(command[0], command)
    except OSError as error:
        print(f"cannot start {command[0]}: {error}", file=sys.stderr, flush=True)
    os._exit(127)


def _exit_code(child: int) -> int | None:
    pid, status = os.waitpid(child, os.WNOHANG)
    return None if pid == 0 else abs(os.waitstatus_to_exitcode(status))


def _signal_group(child: int, number: signal.Signals) -> None:
    try:
        os.killpg(child, number)
    except (ProcessLookupError, PermissionError):
        return


def _stop(child: int) -> int:
    _signal_group(child, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_SECONDS
    while time.monotonic() < deadline:
        exit_code = _exit_code(child)
        if exit_code is not None:
            _signal_group(child, signal.SIGKILL)
            return exit_code
        time.sleep(0.05)
    _signal_group(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return 128 + signal.SIGKILL


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
