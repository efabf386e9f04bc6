from __future__ import annotations

from pathlib import Path

import pytest

from infra import java as module
from infra.errors import UserError
from infra.java import find_java


def fake_java(home: Path, version: str, modules: str, release: bool = True) -> Path:
    (home / "bin").mkdir(parents=True)
    program = home / "bin" / "java"
    listed = "\n".join(f"{name}@{version}" for name in modules.split())
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{listed}\nEND\n")
    program.chmod(0o755)
    if release:
        (home / "release").write_text(f'JAVA_VERSION="{version}"\nMODULES="{modules}"\n')
    return home


FULL = "java.base jdk.incubator.vector"


@pytest.fixture(autouse=True)
def _bare_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr(module, "PROJECT_ROOT", tmp_path)


def test_no_java_says_how_to_get_one() -> None:
    with pytest.raises(UserError, match=r"Java 17 or newer .*; got no java; run `make setup`"):
        find_java()


def test_the_projects_own_java_is_found(tmp_path: Path) -> None:
    home = fake_java(tmp_path / ".tools" / "java" / "jdk-21.0.1", "21.0.1", FULL)
    assert find_java().home == home
    assert find_java().program.exists()


def test_an_unfit_java_home_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit = fake_java(tmp_path / ".tools" / "java", "17.0.15", FULL)
    old = fake_java(tmp_path / "old", "1.8.0_392", FULL)
    monkeypatch.setenv("JAVA_HOME", str(old))
    assert find_java().home == fit


@pytest.mark.parametrize("release", [True, False])
def test_what_a_java_lacks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, release: bool
) -> None:
    bare = fake_java(tmp_path / "bare", "21.0.2", "java.base", release)
    old = fake_java(tmp_path / ".tools" / "java" / "old", "11.0.2", FULL, release)
    monkeypatch.setenv("JAVA_HOME", str(bare))
    monkeypatch.setenv("PATH", "/bin:/usr/bin" if not release else "/nonexistent")
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(UserError) as caught:
        find_java()
    assert f"{bare} lacks the module jdk.incubator.vector, {old} is Java 11.0.2" in str(
        caught.value
    )


def test_a_java_home_without_java_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "none"))
    with pytest.raises(UserError, match="none does not run"):
        find_java()
