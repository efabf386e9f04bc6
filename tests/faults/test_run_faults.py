"""What is missing, broken or full: one line with the remedy, and after the repair it goes on."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

if TYPE_CHECKING:
    from tests.conftest import Home

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

RECIPE = "tests/recipes/tiny.yaml"
CURATE = ["curate", RECIPE]


@pytest.fixture
def home(new_home: Callable[[Path], Home], tmp_path: Path) -> Iterator[Home]:
    home = new_home(tmp_path / "home")
    yield home
    home.atelier("down")


def assert_curated(home: Home) -> None:
    done = home.atelier(*CURATE)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert home.atelier("verify").returncode == 0


def manifests(home: Home) -> list[Path]:
    return sorted((home.path / "s3" / "atelier" / "datasets").glob("*/*/manifest.json"))


def test_a_truncated_parquet_file(home: Home, tmp_path: Path) -> None:
    assert_curated(home)
    whole = next(home.path.glob("worlds/*/metadata/*.parquet"))
    cut = tmp_path / "cut.parquet"
    cut.write_bytes(whole.read_bytes()[:-100])
    before = manifests(home)
    override = [
        "--set",
        f"datasets.concepts.metadata={json.dumps(['{world}/metadata/*.parquet', str(cut)])}",
    ]
    home.refuses([*CURATE, *override], str(cut), "Parquet")
    assert manifests(home) == before
    shutil.copy(whole, cut)
    assert home.atelier(*CURATE, *override).returncode == 0


def s3_processes(home: Home) -> list[psutil.Process]:
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if (line := process.info["cmdline"] or [])
        and "rclone" in line[0]
        and any(str(home.path) in word for word in line)
    ]


def start_curation(home: Home) -> subprocess.Popen[str]:
    """A curation of which something is stored already."""
    running = home.start(*CURATE)
    work = home.path / "s3" / "atelier" / "datasets"
    while not any(work.glob("*/work/*/*")):
        assert running.poll() is None, running.communicate()
        time.sleep(0.05)
    return running


def ends_with_one_line(running: subprocess.Popen[str], expected: str) -> None:
    stdout, stderr = running.communicate(timeout=300)
    assert running.returncode == 1, stdout + stderr
    lines = [line for line in stderr.splitlines() if line.startswith("atelier: ")]
    assert len(lines) == 1, stderr
    assert "Traceback" not in stdout + stderr
    assert expected in lines[0]


def test_an_s3_server_that_dies_meanwhile(home: Home) -> None:
    assert home.atelier("up").returncode == 0
    running = start_curation(home)
    killed = s3_processes(home)
    assert killed
    for process in killed:
        process.kill()
    ends_with_one_line(running, "atelier up")
    assert not manifests(home)
    assert_curated(home)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, a little larger than what a start asks for."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2500m", "atelier-test", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a file system needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(path: Path) -> None:
    """Take what the disk has, whoever else takes some of it meanwhile."""
    with path.open("wb") as file:
        for size in (16 << 20, 4096):
            with suppress(OSError):
                while True:
                    os.posix_fallocate(file.fileno(), file.seek(0, os.SEEK_END), size)


def test_a_disk_that_fills_up_meanwhile(new_home: Callable[[Path], Home], small_disk: Path) -> None:
    home = new_home(small_disk / "home")
    filler = small_disk / "filler"
    try:
        assert home.atelier("up").returncode == 0
        running = start_curation(home)
        fill(filler)
        ends_with_one_line(running, "disk")
        assert not manifests(home)
        home.refuses(CURATE, "disk")
        filler.unlink()
        assert_curated(home)
    finally:
        home.atelier("down")
