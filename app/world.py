"""A run's painted world: made once per configuration, verified, served while curation works."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from app.status import write_whole
from demo.world import WorldConfig
from infra.config import PROJECT_ROOT
from infra.digests import canonical_json, code_digest, sha256_bytes, sha256_file
from infra.errors import UserError

CODE = ("demo.captions", "demo.metadata", "demo.world")
LISTING = "files.json"  # path -> sha256, written last
HTTP_PORT = 80
START_SECONDS = 60.0


@dataclass(frozen=True)
class WorldPlan:
    """Where a world lies and whether it is there. ``damaged`` names files with other bytes."""

    folder: Path
    key: str
    decision: str
    reason: str
    damaged: tuple[str, ...] = ()


def plan_world(config: WorldConfig, home: Path) -> WorldPlan:
    """SKIP when every file is as it was written, else RUN."""
    identity = {"config": config.model_dump(mode="json"), "code": code_digest(*CODE)}
    key = sha256_bytes(canonical_json(identity))
    folder = home / "worlds" / key[:12]
    try:
        listed: dict[str, str] = json.loads((folder / LISTING).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return WorldPlan(folder, key, "RUN", "no world of this configuration is there yet")
    missing = [name for name in listed if not (folder / name).is_file()]
    if missing:
        return WorldPlan(folder, key, "RUN", f"{missing[0]} is missing")
    damaged = tuple(name for name in listed if sha256_file(folder / name) != listed[name])
    if damaged:
        reason = f"{damaged[0]} holds other bytes than were written"
        return WorldPlan(folder, key, "RUN", reason, damaged)
    return WorldPlan(folder, key, "SKIP", f"{len(listed)} files are there and were verified")


def make_world(config: WorldConfig, plan: WorldPlan) -> None:
    """Write the world from its start; a crash leaves a folder without listing, made again."""
    from demo.metadata import build_world

    for name in (LISTING, "world.json"):  # world.json too: else what is there counts as finished
        (plan.folder / name).unlink(missing_ok=True)
    build_world(config, plan.folder)
    files = sorted(path for path in plan.folder.rglob("*") if path.is_file())
    digests = {path.relative_to(plan.folder).as_posix(): sha256_file(path) for path in files}
    write_whole(plan.folder / LISTING, json.dumps(digests, indent=1))


@contextmanager
def serving(folder: Path) -> Iterator[dict[str, str]]:
    """The world's web server while the block runs; yields ``fetch.connect_to`` for its hosts."""
    from demo.metadata import HOSTS

    with tempfile.TemporaryDirectory(prefix="atelier-world-") as scratch:
        port_file = Path(scratch) / "port"
        command = [sys.executable, "-m", "demo.web", "--world", str(folder)]
        server = subprocess.Popen(
            [*command, "--port", "0", "--port-file", str(port_file)],
            cwd=PROJECT_ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C reaches us first; we end it, and it ends with us
        )
        try:
            port = _port_of(server, port_file)
            yield {f"{host}:{HTTP_PORT}": f"127.0.0.1:{port}" for host in HOSTS}
        finally:
            server.terminate()
            server.wait()


def _port_of(server: subprocess.Popen[bytes], port_file: Path) -> int:
    deadline = time.monotonic() + START_SECONDS
    while not port_file.exists():
        if server.poll() is not None or time.monotonic() > deadline:
            raise UserError("the painted world's web server did not start; try again")
        time.sleep(0.05)
    return int(port_file.read_text(encoding="utf-8"))
