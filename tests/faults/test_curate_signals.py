"""B34: `atelier curate` told to stop in the middle of a fetch: its exit code, and the same version.

Killed at random times is in ``test_random_kills.py``.
"""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.conftest import Home

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

CURATE = [
    "curate", "tests/recipes/tiny.yaml", "--dataset", "concepts",
    "--set", "datasets.concepts.partitions=12",
]  # fmt: skip


@pytest.fixture
def home(new_home: Callable[[Path], Home], tmp_path: Path) -> Iterator[Home]:
    home = new_home(tmp_path / "home")
    yield home
    home.atelier("down")


def versions(home: Home) -> list[str]:
    root = home.path / "s3" / "atelier" / "datasets"
    return sorted(path.parent.name for path in root.glob("concepts/*/manifest.json"))


def num_staged(home: Home) -> int:
    root = home.path / "s3" / "atelier" / "datasets"
    return len(list(root.glob("concepts/work/*/staged-*.json")))


def test_told_to_stop_it_says_so_keeps_what_it_has_and_goes_on(home: Home) -> None:
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)):
        before = num_staged(home)
        running = home.start(*CURATE)
        while num_staged(home) <= before:
            assert running.poll() is None, running.communicate()
            time.sleep(0.02)
        running.send_signal(number)
        _, errors = running.communicate(timeout=300)
        assert running.returncode == code, errors
        assert "Traceback" not in errors
        if code > 0:
            assert "the same command goes on" in errors
        assert versions(home) == []
        assert num_staged(home) > before
    assert home.atelier(*CURATE).returncode == 0
    (version,) = versions(home)
    assert home.atelier("verify").returncode == 0
    assert home.atelier("down").returncode == 0  # a server at work remembers what it had listed
    shutil.rmtree(home.path / "s3" / "atelier" / "datasets" / "concepts")
    done = home.atelier(*CURATE)
    assert done.returncode == 0, done.stderr
    assert versions(home) == [version]
