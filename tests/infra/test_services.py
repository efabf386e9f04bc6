"""The real services: rclone's S3 server and MLflow, in homes of their own."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from infra import storage
from infra.environment import applied
from infra.errors import UserError
from infra.local import processes, programs, services
from infra.local.backups import back_up
from infra.local.processes import ProcessId
from infra.local.services import down, find_services, services_status, up
from infra.tracking_server import TrackingServer


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """A home with a space and an umlaut in its name, emptied of services afterwards."""
    path = tmp_path / "ein Künstler"
    yield path
    down(path)


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second S3 server instead of MLflow, which starts in a tenth of a second."""
    from dataclasses import replace

    s3 = programs.PROGRAMS[0]
    monkeypatch.setattr(services, "PROGRAMS", (s3, replace(s3, name="mlflow")))
    for name in ("ATELIER_S3_PORT", "ATELIER_MLFLOW_PORT"):
        monkeypatch.delenv(name, raising=False)


def pids(home: Path) -> dict[str, int | None]:
    return {status.name: status.pid for status in services_status(home)}


def states(home: Path) -> list[str]:
    return [status.state for status in services_status(home)]


@pytest.mark.usefixtures("fast")
def test_up_is_idempotent_and_down_leaves_nothing(home: Path) -> None:
    assert states(home) == ["stopped", "stopped"]
    assert find_services(home) is None
    first = up(home)
    before = pids(home)
    assert states(home) == ["running", "running"]
    assert up(home) == first == find_services(home)
    assert pids(home) == before
    assert sorted(down(home)) == ["mlflow", "s3"]
    assert states(home) == ["stopped", "stopped"]
    assert down(home) == []
    again = up(home)
    assert (again.s3_port, again.mlflow_port) == (first.s3_port, first.mlflow_port)


@pytest.mark.usefixtures("fast")
def test_the_store_works_and_the_secret_stays_hidden(home: Path) -> None:
    running = up(home)
    with applied(running.environment()):
        storage.write_bytes(storage.join(running.store_uri, "x"), b"x")
        assert storage.read_bytes(storage.join(running.store_uri, "x")) == b"x"
        assert [info.uri for info in storage.list_objects(running.store_uri)] == ["s3://atelier/x"]
    shown = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    logs = "".join(path.read_text() for path in (home / "services").glob("*.log"))
    for text in (shown, logs, repr(running), str(services_status(home))):
        assert running.secret_access_key not in text
    for path in (home / "services").glob("*.json"):
        assert path.stat().st_mode & 0o077 == 0
    assert (home / "s3" / "atelier").stat().st_mode & 0o077 == 0


@pytest.mark.usefixtures("fast")
def test_what_was_stored_survives_a_restart(home: Path) -> None:
    running = up(home)
    with applied(running.environment()):
        storage.write_bytes("s3://atelier/kept", b"kept")
    down(home)
    with applied(up(home).environment()):
        assert storage.read_bytes("s3://atelier/kept") == b"kept"


@pytest.mark.usefixtures("fast")
def test_only_what_died_is_started_again(home: Path) -> None:
    first = up(home)
    before = pids(home)
    assert before["s3"] is not None
    os.kill(before["s3"], signal.SIGKILL)
    while states(home)[0] != "stopped":
        time.sleep(0.02)
    assert find_services(home) is None
    assert up(home).s3_port == first.s3_port
    after = pids(home)
    assert after["mlflow"] == before["mlflow"]
    assert after["s3"] != before["s3"]


@pytest.mark.usefixtures("fast")
def test_what_hangs_is_replaced_and_said(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "HEALTH_TIMEOUT_SECONDS", 0.3)
    monkeypatch.setattr(services, "STOP_GRACE_SECONDS", 1.0)
    up(home)
    keeper = pids(home)["s3"]
    (child,) = children_of(keeper)
    os.kill(child, signal.SIGSTOP)
    assert states(home) == ["unhealthy", "running"]
    said: list[str] = []
    up(home, said.append)
    assert states(home) == ["running", "running"]
    assert said == ["s3 ran but did not answer as wanted; starting it again"]
    assert pids(home)["s3"] != keeper


def children_of(pid: int | None) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.usefixtures("fast")
def test_a_port_taken_meanwhile_is_changed_and_said(home: Path) -> None:
    port = up(home).s3_port
    down(home)
    with socket.create_server(("127.0.0.1", port)):
        running = up(home)
        assert running.s3_port != port
        (note,) = running.notes
        assert note.startswith(f"port {port} of s3 is taken by another program now; using ")


@pytest.mark.usefixtures("fast")
def test_a_demanded_port_is_used_or_its_owner_named(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = processes.free_port()
    assert up(home, s3_port=port).s3_port == port
    other = processes.free_port()
    monkeypatch.setenv("ATELIER_S3_PORT", str(other))
    assert up(home).s3_port == other
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        taken = stranger.getsockname()[1]
        with pytest.raises(UserError) as caught:
            up(home, s3_port=taken)
    assert f"port {taken} for s3 is taken by" in str(caught.value)
    assert f"(pid {os.getpid()}); end it, or set ATELIER_S3_PORT" in str(caught.value)
    monkeypatch.setenv("ATELIER_S3_PORT", "many")
    with pytest.raises(UserError, match="ATELIER_S3_PORT between 1 and 65535"):
        up(home)


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("command", [up, down])
def test_a_service_that_is_not_on_record_is_found_and_stopped(
    home: Path, command: Callable[[Path], object]
) -> None:
    """An ``up`` killed between starting a service and noting it leaves one."""
    up(home)
    strays = [processes.identify(pid) for pid in pids(home).values() if pid is not None]
    (home / "services" / "state.json").unlink()
    command(home)
    assert not any(stray is not None and processes.is_alive(stray) for stray in strays)


@pytest.mark.usefixtures("fast")
def test_a_stale_state_file_never_kills_a_stranger(home: Path) -> None:
    up(home)
    state_file = home / "services" / "state.json"
    from infra.local.files import read_private_json, write_private_json

    state = read_private_json(state_file)
    real = ProcessId(**state["s3"]["process"])
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    state["s3"]["process"]["pid"] = stranger.pid
    write_private_json(state_file, state)
    assert down(home) == ["mlflow"]
    assert stranger.poll() is None
    assert not processes.is_alive(real)
    stranger.kill()
    stranger.wait()


@pytest.mark.usefixtures("fast")
def test_a_service_that_will_not_start_shows_its_last_words(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    broken = replace(
        programs.PROGRAMS[0],
        name="mlflow",
        command=lambda h, p: ["sh", "-c", "echo no luck; exit 3"],
    )
    monkeypatch.setattr(services, "PROGRAMS", (programs.PROGRAMS[0], broken))
    with pytest.raises(UserError, match="mlflow ended at once: no luck; the whole log is"):
        up(home)
    assert states(home)[1] == "stopped"


UP = """
import sys
from dataclasses import replace
from pathlib import Path
from infra.local import programs, services
s3 = programs.PROGRAMS[0]
services.PROGRAMS = (s3, replace(s3, name="mlflow"))
running = services.up(Path(sys.argv[1]))
print(running.s3_port, running.mlflow_port)
"""


@pytest.mark.usefixtures("fast")
def test_two_ups_at_once_start_one_set_that_survives_both(home: Path) -> None:
    command = [sys.executable, "-c", UP, str(home)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    ports = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert ports[0] == ports[1] != ""
    assert states(home) == ["running", "running"]


@pytest.mark.usefixtures("fast")
def test_an_up_killed_at_any_moment_is_mended_by_the_next(home: Path) -> None:
    for delay_seconds in (0.2, 0.3, 0.4, 0.5):
        broken_off = subprocess.Popen([sys.executable, "-c", UP, str(home)])
        time.sleep(delay_seconds)
        broken_off.kill()
        broken_off.wait()
        up(home)
        assert states(home) == ["running", "running"]
        down(home)


@pytest.mark.slow
def test_an_mlflow_server_killed_while_it_makes_its_tables_starts_again(home: Path) -> None:
    folder = home / "mlflow"
    command = [sys.executable, "-m", "infra.local.mlflow_server", "0", str(folder)]
    unfinished = folder / "mlflow.db.unfinished"
    for num_bytes in (1, 100_000, 300_000):
        unfinished.unlink(missing_ok=True)
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not unfinished.exists() or unfinished.stat().st_size < num_bytes:
            assert server.poll() is None
            assert not (folder / "mlflow.db").exists()
            time.sleep(0.001)
        server.kill()
        server.wait()
    up(home)
    assert states(home) == ["running", "running"]
    down(home)


@pytest.mark.slow
@pytest.mark.parametrize("kill", [signal.SIGTERM, signal.SIGKILL])
def test_models_and_points_outlive_mlflows_database(home: Path, kill: signal.Signals) -> None:
    """Deleted, or its pages torn; its server ended with a last copy, or killed after one."""
    server = TrackingServer(up(home).mlflow_uri)
    run = server.create_run(server.experiment_id("e"), "r", {})
    server.log_batch(run.run_id, metrics=[{"key": "loss", "value": 0.5, "timestamp": 1, "step": 3}])
    for name in ("a", "b"):
        server.call("POST", "mlflow/registered-models/create", {"name": name})
    database = home / "mlflow" / "mlflow.db"
    if kill == signal.SIGKILL:
        back_up(database)
        for child in children_of(pids(home)["mlflow"]):
            os.kill(child, kill)
    down(home)
    for damage in (Path.unlink, lambda path: path.write_bytes(b"\xff" * 5000)):
        damage(database)
        running = up(home)
        (line,) = running.notes
        assert "mlflow's database" in line
        assert line.endswith("is back")
        server = TrackingServer(running.mlflow_uri)
        found = server.call("GET", "mlflow/registered-models/search", query={"max_results": "9"})
        assert [model["name"] for model in found["registered_models"]] == ["a", "b"]
        (point,) = server.call("GET", "mlflow/runs/get", query={"run_id": run.run_id})["run"][
            "data"
        ]["metrics"]
        assert (point["key"], point["value"], point["step"]) == ("loss", 0.5, 3)
        down(home)


@pytest.mark.usefixtures("fast")
def test_everything_ends_when_the_home_is_removed(home: Path) -> None:
    up(home)
    keepers = [processes.identify(pid) for pid in pids(home).values() if pid is not None]
    shutil.rmtree(home)
    deadline = time.monotonic() + 5
    while any(keeper is not None and processes.is_alive(keeper) for keeper in keepers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.usefixtures("fast")
def test_leftovers_of_cut_uploads_are_swept_at_the_start(home: Path) -> None:
    folder = home / "s3" / "atelier" / "deep"
    folder.mkdir(parents=True)
    (folder / ".rclone_temp_put_1").write_bytes(b"half")
    (folder / "whole").write_bytes(b"whole")
    up(home)
    assert [path.name for path in folder.iterdir()] == ["whole"]


def test_proxies_do_not_see_loopback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv("NO_PROXY", "corp.example")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "of another account")
    environment = services.Services(tmp_path, 1, 2, "A" * 20, "B" * 40).environment()
    assert environment["NO_PROXY"] == "corp.example,127.0.0.1,localhost"
    assert environment["AWS_SESSION_TOKEN"] == ""


def get(url: str, host: str | None = None) -> int:
    request = urllib.request.Request(url, headers={} if host is None else {"Host": host})
    try:
        with urllib.request.urlopen(request, timeout=20) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


@pytest.mark.slow
def test_mlflow_serves_its_page_its_api_and_nobody_else(home: Path) -> None:
    running = up(home)
    assert get(running.mlflow_uri + "/") == 200
    api = "/api/2.0/mlflow/experiments/search?max_results=1"
    assert get(running.mlflow_uri + api) == 200
    assert get(running.mlflow_uri + api, host=f"localhost:{running.mlflow_port}") == 200
    assert get(running.mlflow_uri + api, host="evil.example") == 403
    assert get(running.mlflow_uri + "/ajax-api/3.0/jobs/1") >= 400
    keeper = pids(home)["mlflow"]
    assert len(children_of(keeper)) == 1
    (server,) = children_of(keeper)
    assert children_of(server) == []
    assert running.secret_access_key.encode() not in Path(f"/proc/{server}/environ").read_bytes()
    assert listeners_off_loopback(set(descendants(keeper))) == []
    assert listeners_off_loopback(set(descendants(pids(home)["s3"]))) == []


def descendants(pid: int | None) -> Iterator[int]:
    if pid is not None:
        yield pid
        for child in children_of(pid):
            yield from descendants(child)


def listeners_off_loopback(pids_wanted: set[int]) -> list[str]:
    import psutil

    found = []
    num_listening = 0
    for pid in pids_wanted:
        for connection in psutil.Process(pid).net_connections(kind="inet"):
            if connection.status == psutil.CONN_LISTEN:
                num_listening += 1
                if connection.laddr.ip not in ("127.0.0.1", "::1", "::ffff:127.0.0.1"):
                    found.append(f"{pid}: {connection.laddr}")
    assert num_listening > 0
    return found
