"""Start, find and stop the local services of a home: ``up``, ``find_services``, ``down``.

``up`` may be called at any time by anyone: what runs and answers is kept, what is dead or deaf is
started again, on the port it had. Each service hangs on a keeper process, so it survives the
command that started it and ends with its home folder. Only processes whose pid *and* start time
are on record are ever signalled.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from infra.environment import applied
from infra.errors import UserError
from infra.local import processes
from infra.local.files import (
    CREDENTIALS_NAME,
    load_credentials,
    locked,
    read_private_json,
    services_folder,
    write_private_json,
)
from infra.local.processes import HOST, ProcessId
from infra.local.programs import BUCKET, PROGRAMS, Program

START_SECONDS = 120.0
KEEPER = Path(__file__).with_name("keeper.py")
STOP_GRACE_SECONDS = 7.0  # the keeper gives its service 5
POLL_SECONDS = 0.05
REGION = "us-east-1"
STORE_URI = f"s3://{BUCKET}"


@dataclass(frozen=True)
class Services:
    """The running services of a home, and the keys to them."""

    home: Path
    s3_port: int
    mlflow_port: int
    access_key_id: str
    secret_access_key: str = field(repr=False)
    notes: tuple[str, ...] = ()

    @property
    def store_uri(self) -> str:
        """The bucket in which datasets and models lie."""
        return STORE_URI

    @property
    def s3_endpoint(self) -> str:
        """The S3 server's address."""
        return f"http://{HOST}:{self.s3_port}"

    @property
    def mlflow_uri(self) -> str:
        """The MLflow server's address, for clients and for a browser."""
        return f"http://{HOST}:{self.mlflow_port}"

    def environment(self) -> dict[str, str]:
        """What a process needs in its environment to use these services. Holds the secret key."""
        present = os.environ.get("NO_PROXY") or os.environ.get("no_proxy") or ""
        no_proxy = ",".join(dict.fromkeys([*filter(None, present.split(",")), HOST, "localhost"]))
        environment = {
            "AWS_ACCESS_KEY_ID": self.access_key_id,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_ENDPOINT_URL_S3": self.s3_endpoint,
            "AWS_REGION": REGION,
            "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
            "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
            "AWS_SECRET_ACCESS_KEY": self.secret_access_key,
            "DO_NOT_TRACK": "true",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_TRACKING_URI": self.mlflow_uri,
            "NO_PROXY": no_proxy,
            "no_proxy": no_proxy,
        }
        if "AWS_SESSION_TOKEN" in os.environ:
            environment["AWS_SESSION_TOKEN"] = ""  # one of another account would be sent along
        return environment


@dataclass(frozen=True)
class ServiceStatus:
    """One service as it is now; ``state`` is ``running``, ``unhealthy`` or ``stopped``."""

    name: str
    state: str
    url: str | None
    pid: int | None
    log: str


@dataclass(frozen=True)
class _Record:
    """A started service as the state file has it."""

    process: ProcessId
    port: int


def up(
    home: Path,
    progress: Callable[[str], None] | None = None,
    *,
    s3_port: int | None = None,
    mlflow_port: int | None = None,
) -> Services:
    """Have both services running and answering; returns when they do.

    ``progress`` is told what happens, a line at a time. A port given here or in
    ``ATELIER_S3_PORT`` / ``ATELIER_MLFLOW_PORT`` is a demand, otherwise the one from last time is
    taken when free. Raises ``UserError`` when a demanded port is taken or a service will not start.
    """
    home = Path(home).absolute()
    notes: list[str] = []

    def say(line: str) -> None:
        notes.append(line)
        if progress is not None:
            progress(line)

    folder = services_folder(home)
    demanded = {
        "s3": _demanded_port("ATELIER_S3_PORT", s3_port),
        "mlflow": _demanded_port("ATELIER_MLFLOW_PORT", mlflow_port),
    }
    with locked(folder, say):
        keys = load_credentials(folder)
        records = _read_state(folder)
        starting = _start_missing(home, records, demanded, keys, say)
        ports = {name: record.port for name, record in records.items()}
        services = Services(home, ports["s3"], ports["mlflow"], *keys)
        probes = {"s3": lambda: _probe_store(services)}
        _await_answers(folder, records, starting, probes)
    return replace(services, notes=tuple(notes))


def _demanded_port(variable: str, given: int | None) -> int | None:
    if given is not None:
        return given
    text = os.environ.get(variable)
    if not text:
        return None
    if not text.isdigit() or not 0 < int(text) < 65536:
        raise UserError(expected=f"{variable} between 1 and 65535", got=repr(text))
    return int(text)


def _read_state(folder: Path) -> dict[str, _Record]:
    state = read_private_json(folder / "state.json") or {}
    return {
        name: _Record(ProcessId(**entry["process"]), entry["port"]) for name, entry in state.items()
    }


def _write_state(folder: Path, records: dict[str, _Record]) -> None:
    write_private_json(
        folder / "state.json", {name: asdict(record) for name, record in records.items()}
    )


def _start_missing(
    home: Path,
    records: dict[str, _Record],
    demanded: dict[str, int | None],
    keys: tuple[str, str],
    say: Callable[[str], None],
) -> list[Program]:
    """Start what does not run well, updating ``records``; returns what was started."""
    folder = home / "services"
    last_ports: dict[str, int] = read_private_json(folder / "ports.json") or {}
    starting = []
    are_strays_gone = False
    for program in PROGRAMS:
        record = records.get(program.name)
        port = demanded[program.name]
        if record is not None and port in (None, record.port) and _runs_well(program, record):
            continue
        if record is not None and processes.stop(record.process, STOP_GRACE_SECONDS):
            say(f"{program.name} ran but did not answer as wanted; starting it again")
        if not are_strays_gone:
            _stop_strays(home, records)
            are_strays_gone = True
        port = _choose_port(program.name, port, last_ports.get(program.name), say)
        last_ports[program.name] = port
        records[program.name] = _start(program, home, port, keys, say)
        _write_state(folder, records)
        starting.append(program)
    if starting:
        write_private_json(folder / "ports.json", last_ports)
    return starting


def _stop_strays(home: Path, records: dict[str, _Record]) -> None:
    """Stop this home's keepers that are not on record: an `up` was killed before it could."""
    import psutil

    known = {record.process.pid for record in records.values()}
    own = _keeper_command(home)
    for process in psutil.process_iter(["cmdline"]):
        arguments = process.info["cmdline"] or []
        if process.pid not in known and arguments[1 : len(own)] == own[1:]:
            stray = processes.identify(process.pid)
            if stray is not None:
                processes.stop(stray, STOP_GRACE_SECONDS)


def _runs_well(program: Program, record: _Record) -> bool:
    """Alive and answering; a busy service gets a second chance."""
    return processes.is_alive(record.process) and (
        program.answers(record.port) or program.answers(record.port)
    )


def _choose_port(
    name: str, demanded: int | None, last: int | None, say: Callable[[str], None]
) -> int:
    if demanded is not None:
        if not processes.is_port_free(demanded):
            raise UserError(
                f"port {demanded} for {name} is taken by {processes.who_listens(demanded)}; "
                f"end it, or set ATELIER_{name.upper()}_PORT to another port"
            )
        return demanded
    if last is not None and processes.is_port_free(last):
        return last
    port = processes.free_port()
    if last is not None:
        say(f"port {last} of {name} is taken by another program now; using {port}")
    return port


def _start(
    program: Program,
    home: Path,
    port: int,
    keys: tuple[str, str],
    say: Callable[[str], None],
) -> _Record:
    program.prepare(home, say)
    process = processes.start(
        [*_keeper_command(home), *program.command(home, port)],
        program.environment(keys),
        _log_path(home, program.name),
    )
    return _Record(process, port)


def _keeper_command(home: Path) -> list[str]:
    return [sys.executable, "-S", "-E", str(KEEPER), str(home), "--"]


def _log_path(home: Path, name: str) -> Path:
    return home / "services" / f"{name}.log"


def _await_answers(
    folder: Path,
    records: dict[str, _Record],
    starting: list[Program],
    probes: dict[str, Callable[[], None]],
) -> None:
    """Wait until every started service answers, probing each while the others still start.

    On failure the error has the log's last line, and the service is stopped.
    """
    waiting = list(starting)
    deadline = time.monotonic() + START_SECONDS
    while waiting:
        for program in list(waiting):
            record = records[program.name]
            alive = processes.is_alive(record.process)
            if alive and program.answers(record.port):
                waiting.remove(program)
                probes.get(program.name, _no_probe)()
            elif not alive or time.monotonic() > deadline:
                processes.stop(record.process, STOP_GRACE_SECONDS)
                records.pop(program.name)
                _write_state(folder, records)
                raise _did_not_start(program.name, folder / f"{program.name}.log", alive)
        time.sleep(POLL_SECONDS)


def _no_probe() -> None:
    """Answering is proof enough."""


def _did_not_start(name: str, log: Path, alive: bool) -> UserError:
    lines = log.read_text(errors="replace").split("\n") if log.exists() else []
    last = next((line.strip() for line in reversed(lines) if line.strip()), "it wrote nothing")
    how = f"did not answer within {START_SECONDS:.0f} s" if alive else "ended at once"
    return UserError(f"{name} {how}: {last[:300]}; the whole log is {log}")


def _probe_store(services: Services) -> None:
    """Put, read and delete one object: what a server that merely answers may still not do."""
    from infra import storage

    uri = storage.join(services.store_uri, f".atelier-probe-{os.getpid()}")
    with applied(services.environment()):
        storage.write_bytes(uri, b"probe")
        if storage.read_bytes(uri) != b"probe":
            raise UserError(f"{services.s3_endpoint} returns other bytes than it was given")
        storage.delete(uri)


def down(home: Path) -> list[str]:
    """Stop this home's services, and only those; returns the names of what was stopped."""
    home = Path(home).absolute()
    if not (home / "services").is_dir():
        return []
    folder = services_folder(home)
    with locked(folder, lambda line: None):
        records = _read_state(folder)
        stopped = [
            name
            for name, record in records.items()
            if processes.stop(record.process, STOP_GRACE_SECONDS)
        ]
        _stop_strays(home, {})
        (folder / "state.json").unlink(missing_ok=True)
    return stopped


def services_status(home: Path) -> list[ServiceStatus]:
    """How each service of this home is doing; starts and changes nothing."""
    home = Path(home).absolute()
    folder = home / "services"
    records = _read_state(folder) if folder.is_dir() else {}
    found = []
    for program in PROGRAMS:
        record = records.get(program.name)
        log = str(_log_path(home, program.name))
        if record is None or not processes.is_alive(record.process):
            found.append(ServiceStatus(program.name, "stopped", None, None, log))
            continue
        state = "running" if program.answers(record.port) else "unhealthy"
        url = f"http://{HOST}:{record.port}"
        found.append(ServiceStatus(program.name, state, url, record.process.pid, log))
    return found


def access_key_id(home: Path) -> str | None:
    """The public half of this home's S3 keys; None before its first ``up``."""
    found = read_private_json(Path(home).absolute() / "services" / CREDENTIALS_NAME)
    return None if found is None else str(found["access_key_id"])


def find_services(home: Path) -> Services | None:
    """The services of this home when both are running, without starting any."""
    home = Path(home).absolute()
    status = services_status(home)
    if any(service.state != "running" for service in status):
        return None
    records = _read_state(home / "services")
    keys = load_credentials(home / "services")
    return Services(home, records["s3"].port, records["mlflow"].port, *keys)
