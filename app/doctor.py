"""`atelier doctor`: each thing a run needs, found or not, and what to do when not."""

from __future__ import annotations

import os
import re
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from infra.config import PROJECT_ROOT, atelier_home
from infra.errors import UserError

MIN_PYTHON, MAX_PYTHON = (3, 11), (3, 13)
MIN_MEMORY_BYTES = 7 << 30
MIN_FREE_BYTES = 4 << 30
LOCK_FILE = PROJECT_ROOT / "requirements" / "laptop.txt"
MAX_NAMED_PACKAGES = 5


@dataclass(frozen=True)
class Check:
    """One thing looked at; ``remedy`` is set when it is not ok."""

    name: str
    ok: bool
    found: str
    remedy: str | None = None

    def line(self) -> str:
        """For a person."""
        head = f"{'ok     ' if self.ok else 'PROBLEM'}  {self.name:<12} {self.found}"
        return head if self.remedy is None else f"{head}; {self.remedy}"

    def to_json(self) -> dict[str, Any]:
        """For a program."""
        return asdict(self)


def examine() -> list[Check]:
    """Look at everything; nothing is started and nothing is changed."""
    home = atelier_home()
    return [
        _python(),
        _java(),
        _environment(),
        _processors(),
        _memory(),
        _disk(home),
        _answer("rclone", _rclone),
        *_private_files(home),
        *_services(home),
    ]


def exit_code_of(checks: list[Check]) -> int:
    """0 when all are ok, else 1."""
    return 0 if all(check.ok for check in checks) else 1


def _python() -> Check:
    found = f"{sys.version.split()[0]} at {sys.executable}"
    if MIN_PYTHON <= sys.version_info[:2] <= MAX_PYTHON:
        return Check("python", True, found)
    return Check("python", False, found, "run `make setup` with Python 3.11, 3.12 or 3.13")


def _java() -> Check:
    from infra.java import find_java

    return _answer("java", lambda: (lambda java: f"{java.version} at {java.home}")(find_java()))


def _answer(name: str, ask: Callable[[], str]) -> Check:
    try:
        return Check(name, True, ask())
    except UserError as error:
        return Check(name, False, str(error))


def _environment() -> Check:
    """Whether the installed packages are the locked ones that apply to this machine."""
    wanted = dict(re.findall(r"^([a-z0-9._-]+)==(\S+) \\$", LOCK_FILE.read_text(), re.M))
    installed = {
        re.sub(r"[-_.]+", "-", found.name).lower(): found.version
        for found in metadata.distributions()
    }
    wrong = [
        f"{name} {installed.get(name, 'is missing')} (locked {version})"
        for name, version in wanted.items()
        if installed.get(name, "").split("+")[0] != version
    ]
    if not wrong:
        return Check("packages", True, f"{len(wanted)} packages as {LOCK_FILE.name} has them")
    shown = ", ".join(wrong[:MAX_NAMED_PACKAGES])
    more = f" and {len(wrong) - MAX_NAMED_PACKAGES} more" if len(wrong) > MAX_NAMED_PACKAGES else ""
    return Check("packages", False, shown + more, "run `make setup`")


def _processors() -> Check:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return Check("processors", True, f"{usable} cores")


def _memory() -> Check:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found = f"{total / 2**30:.1f} GiB"
    if total >= MIN_MEMORY_BYTES:
        return Check("memory", True, found)
    return Check("memory", False, found, "the demo peaks below 8 GiB: close other programs")


def _disk(home: Path) -> Check:
    free = free_bytes(home)
    found = f"{free / 2**30:.1f} GiB free for {home}"
    if free >= MIN_FREE_BYTES:
        return Check("disk", True, found)
    return Check(
        "disk", False, found, f"free {MIN_FREE_BYTES >> 30} GiB, or set ATELIER_HOME elsewhere"
    )


def free_bytes(folder: Path) -> int:
    """Free space of the disk on which ``folder`` lies, or would lie."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _services(home: Path) -> Iterator[Check]:
    from infra.local.services import services_status

    try:
        found = services_status(home)
    except UserError as error:
        yield Check("services", False, str(error))
        return
    for service in found:
        where = "" if service.url is None else f" at {service.url}"
        remedy = f"`atelier up` starts it again; its log is {service.log}"
        ok = service.state != "unhealthy"
        yield Check(service.name, ok, f"{service.state}{where}", None if ok else remedy)
    yield from _ports({str(service.url).rpartition(":")[2] for service in found})


def _rclone() -> str:
    from infra.local.programs import find_rclone

    return find_rclone()


def _private_files(home: Path) -> Iterator[Check]:
    """Keys are readable by their owner alone."""
    folder = home / "services"
    for path, wanted in (
        (folder, 0o700), (folder / "credentials.json", 0o600), (folder / "state.json", 0o600),
    ):  # fmt: skip
        if not path.exists():
            continue
        mode = stat.S_IMODE(path.stat().st_mode)
        ok = not mode & 0o077
        remedy = None if ok else f"run chmod {wanted:o} {path}"
        yield Check(f"{path.name} mode", ok, f"{mode:o}", remedy)


def _ports(own: set[str]) -> Iterator[Check]:
    """Ports demanded by the environment; the others are chosen among the free ones."""
    from infra.local.processes import is_port_free, who_listens

    for variable in ("ATELIER_S3_PORT", "ATELIER_MLFLOW_PORT"):
        text = os.environ.get(variable)
        if not text:
            continue
        if not text.isdigit() or not 0 < int(text) < 65536:
            yield Check(variable, False, repr(text), "give a port between 1 and 65535")
        elif text in own or is_port_free(int(text)):
            yield Check(variable, True, text)
        else:
            taken = f"{text} is taken by {who_listens(int(text))}"
            yield Check(variable, False, taken, "end it, or choose another port")
