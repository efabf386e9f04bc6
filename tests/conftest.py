"""Shared by all tests: nothing leaves the machine, and a real S3 server when one is wanted."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "true")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

ROOT = Path(__file__).resolve().parent.parent
REGION = "us-east-1"
START_SECONDS = 30.0


@dataclass
class S3Server:
    """A running ``rclone serve s3`` on loopback; ``folder/<bucket>/<key>`` are its files."""

    folder: Path
    port: int
    access_key_id: str
    secret_access_key: str = field(repr=False)
    process: subprocess.Popen[bytes] | None = None

    @property
    def store_uri(self) -> str:
        """The bucket to store in."""
        return "s3://atelier"

    @property
    def endpoint(self) -> str:
        """The server's address."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """What a child process needs to reach this server."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key_id,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_REGION": REGION,
            "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
            "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
            "AWS_SECRET_ACCESS_KEY": self.secret_access_key,
        }

    def start(self, limit: Callable[[], None] | None = None) -> None:
        """Start, and return when it answers; ``limit`` runs in the child (resource limits)."""
        from infra.local.programs import PROGRAMS

        program = PROGRAMS[0]
        home = self.folder.parent
        program.prepare(home, print)
        command = program.command(home, self.port)
        keys = (self.access_key_id, self.secret_access_key)
        log_path = home / "s3.log"
        with open(log_path, "ab") as log:
            self.process = subprocess.Popen(
                command,
                env=program.environment(keys),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=limit,
            )
        deadline = time.monotonic() + START_SECONDS
        while not program.answers(self.port):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"rclone did not start: {log_path.read_text()[-500:]}")
            time.sleep(0.02)

    def kill(self) -> None:
        """SIGKILL, at once and without goodbye."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


def new_s3_server(home: Path) -> S3Server:
    """A server over ``home/s3`` with its own keys; call ``start`` and ``kill``."""
    from infra.local.processes import free_port

    keys = secrets.token_hex(10).upper(), secrets.token_hex(20)
    return S3Server(home / "s3", free_port(), *keys)


@pytest.fixture(scope="session")
def _session_s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    server = new_s3_server(tmp_path_factory.mktemp("s3-home"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def s3_server(_session_s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The session's S3 server, with the environment pointing at it. Use your own key prefix."""
    for name, value in _session_s3_server.environment.items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    return _session_s3_server


@pytest.fixture
def own_s3_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """A started S3 server of this test alone, to kill, starve and damage."""
    server = new_s3_server(tmp_path / "s3-home")
    server.start()
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_SESSION_TOKEN", raising=False)
    yield server
    server.kill()


@pytest.fixture(params=["file", "s3"])
def store_uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty store, once in a folder and once on the S3 server."""
    if request.param == "file":
        return (tmp_path / "store").as_uri()
    server: S3Server = request.getfixturevalue("s3_server")
    return f"{server.store_uri}/{secrets.token_hex(6)}"


@dataclass
class Home:
    """A home of some tests alone, and the command in it."""

    path: Path

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "ATELIER_HOME": str(self.path), "PYTHONDONTWRITEBYTECODE": ""}

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        """The command, running; its output is read through pipes."""
        return subprocess.Popen(
            [sys.executable, "-c", "from app.cli import main; main()", *arguments],
            cwd=ROOT,
            env={**self.environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def atelier(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """The command, run to its end."""
        with self.start(*arguments, **environment) as process:
            stdout, stderr = process.communicate(timeout=600)
        return subprocess.CompletedProcess(arguments, process.returncode, stdout, stderr)

    def refuses(self, arguments: Sequence[str], *expected: str, **environment: str) -> None:
        """The command fails with exit code 1 and one line, which holds every expected text."""
        done = self.atelier(*arguments, **environment)
        assert done.returncode == 1, done.stdout + done.stderr
        lines = [line for line in done.stderr.splitlines() if line.startswith("atelier: ")]
        assert len(lines) == 1, done.stderr
        assert "Traceback" not in done.stdout + done.stderr
        for text in expected:
            assert text in lines[0]

    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = json.loads(self.atelier("status", "--json").stdout)
        return status

    def steps(self) -> dict[str, dict[str, Any]]:
        return {step["name"]: step for step in self.status()["steps"]}

    def stored(self, pattern: str) -> Path:
        return next((self.path / "s3" / "atelier").glob(pattern))


@pytest.fixture(scope="session")
def new_home() -> Callable[[Path], Home]:
    """Makes a home at a path; who asks for one ends it with ``atelier down``."""
    return Home


def run_python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a fresh interpreter of this environment; output captured as text."""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
