from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from infra.errors import UserError
from infra.local import processes
from infra.local.files import (
    load_credentials,
    locked,
    read_private_json,
    services_folder,
    write_private_json,
)
from infra.local.processes import ProcessId


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_credentials_are_made_once_and_are_private(tmp_path: Path) -> None:
    folder = services_folder(tmp_path / "home")
    keys = load_credentials(folder)
    assert load_credentials(folder) == keys
    assert (len(keys[0]), len(keys[1])) == (20, 40)
    assert mode(folder) == 0o700
    assert mode(folder / "credentials.json") == 0o600
    assert load_credentials(services_folder(tmp_path / "other")) != keys


@pytest.mark.parametrize("exposed", ["folder", "file"])
def test_what_others_can_read_is_refused(tmp_path: Path, exposed: str) -> None:
    folder = services_folder(tmp_path)
    load_credentials(folder)
    path = folder if exposed == "folder" else folder / "credentials.json"
    path.chmod(0o755 if exposed == "folder" else 0o640)
    with pytest.raises(UserError, match=f"private to you; got mode .* run chmod .* {path}"):
        load_credentials(folder)


def test_a_broken_state_file_is_named(tmp_path: Path) -> None:
    folder = services_folder(tmp_path)
    write_private_json(folder / "state.json", {"a": 1})
    assert read_private_json(folder / "state.json") == {"a": 1}
    (folder / "state.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        read_private_json(folder / "state.json")


def test_a_home_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="set ATELIER_HOME"):
        services_folder(tmp_path / "file" / "home")


def test_a_second_holder_of_the_lock_waits_and_is_told(tmp_path: Path) -> None:
    order: list[str] = []

    def second() -> None:
        with locked(tmp_path, order.append):
            order.append("second in")

    with locked(tmp_path, order.append):
        waiting = threading.Thread(target=second)
        waiting.start()
        while not order:
            time.sleep(0.01)
        order.append("first out")
    waiting.join()
    assert order == [
        "another `atelier up` or `down` is at work here; waiting for it",
        "first out",
        "second in",
    ]


def test_the_lock_of_a_killed_holder_is_free(tmp_path: Path) -> None:
    code = """
import sys, time, pathlib
from infra.local.files import locked
with locked(pathlib.Path(sys.argv[1]), print):
    print("held", flush=True)
    time.sleep(60)
"""
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    holder.kill()
    holder.communicate()
    with locked(tmp_path, lambda line: pytest.fail(line)):
        pass


def test_a_process_is_known_by_its_start_time_too() -> None:
    own = processes.identify(os.getpid())
    assert own is not None
    assert processes.is_alive(own)
    impostor = ProcessId(own.pid, "long ago")
    assert not processes.is_alive(impostor)
    assert not processes.stop(impostor, grace_seconds=0.1)


def test_an_ended_child_is_not_alive(tmp_path: Path) -> None:
    process = processes.start([sys.executable, "-c", "print('bye')"], os.environ, tmp_path / "log")
    while processes.is_alive(process):
        time.sleep(0.01)
    assert processes.identify(process.pid) is None
    assert (tmp_path / "log").read_text() == "bye\n"
    assert mode(tmp_path / "log") == 0o600


def test_a_process_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    code = "import signal, time; signal.signal(15, signal.SIG_IGN); print('on', flush=True); "
    command = [sys.executable, "-c", code + "time.sleep(60)"]
    process = processes.start(command, os.environ, tmp_path / "log")
    while not (tmp_path / "log").read_text():
        time.sleep(0.01)
    assert processes.stop(process, grace_seconds=0.2)
    assert not processes.is_alive(process)


def test_ports_are_found_and_their_owner_is_named() -> None:
    import socket

    port = processes.free_port()
    assert processes.is_port_free(port)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        assert not processes.is_port_free(port)
        assert f"(pid {os.getpid()})" in processes.who_listens(port)
