"""The Java that Spark 4 needs: 17 or newer, with the module ``jdk.incubator.vector``."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from infra.config import PROJECT_ROOT
from infra.errors import UserError

MIN_JAVA = 17
VECTOR_MODULE = "jdk.incubator.vector"
LIST_SECONDS = 30
REMEDY = "run `make setup`, which brings one, or set JAVA_HOME"


@dataclass(frozen=True)
class Java:
    """A Java that Spark can run on."""

    home: Path
    version: str

    @property
    def program(self) -> Path:
        """The ``java`` executable."""
        return self.home / "bin" / "java"


def find_java() -> Java:
    """The first suitable Java of JAVA_HOME, ``<project>/.tools/java`` and the PATH.

    Raises ``UserError`` saying what each candidate lacks.
    """
    refused = []
    for home in dict.fromkeys(_candidates()):
        version, modules = _describe(home)
        if version is None:
            refused.append(f"{home} does not run")
        elif _major(version) < MIN_JAVA:
            refused.append(f"{home} is Java {version}")
        elif VECTOR_MODULE not in modules:
            refused.append(f"{home} lacks the module {VECTOR_MODULE}")
        else:
            return Java(home, version)
    raise UserError(
        expected=f"Java {MIN_JAVA} or newer with {VECTOR_MODULE} for Spark",
        got=", ".join(refused) or "no java",
        remedy=REMEDY,
    )


def _candidates() -> Iterator[Path]:
    if os.environ.get("JAVA_HOME"):
        yield Path(os.environ["JAVA_HOME"])
    tools = PROJECT_ROOT / ".tools" / "java"
    for home in (tools, *sorted(tools.glob("*"))):
        if (home / "bin" / "java").exists():
            yield home
    on_path = shutil.which("java")
    if on_path is not None:
        yield Path(on_path).resolve().parent.parent


def _describe(home: Path) -> tuple[str | None, set[str]]:
    """(version, modules) from the ``release`` file, which costs nothing, else from Java itself."""
    program = home / "bin" / "java"
    if not os.access(program, os.X_OK):
        return None, set()
    release = home / "release"
    if release.exists():
        entries = dict(re.findall(r'^(\w+)="(.*)"$', release.read_text(errors="replace"), re.M))
        if "JAVA_VERSION" in entries and "MODULES" in entries:
            return entries["JAVA_VERSION"], set(entries["MODULES"].split())
    return _ask(program)


def _ask(program: Path) -> tuple[str | None, set[str]]:
    try:
        listed = subprocess.run(
            [str(program), "--list-modules"],
            capture_output=True,
            text=True,
            timeout=LIST_SECONDS,
            check=False,
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None, set()
    modules = dict(line.strip().partition("@")[::2] for line in listed.splitlines() if "@" in line)
    return modules.get("java.base"), set(modules)


def _major(version: str) -> int:
    """17 for ``17.0.15``, 8 for ``1.8.0_392``."""
    numbers = [int(number) for number in re.findall(r"\d+", version)] or [0]
    return numbers[1] if numbers[0] == 1 and len(numbers) > 1 else numbers[0]
