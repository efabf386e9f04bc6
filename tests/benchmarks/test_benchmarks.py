"""Figures of this machine, printed by `make bench`; each has the bound that it must keep."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.bench

ROOT = Path(__file__).resolve().parent.parent.parent
HELP_SECONDS = 0.5


def median_seconds(run: Callable[[], object], times: int) -> float:
    run()  # the first time fills caches
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        run()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def say(name: str, value: str) -> None:
    print(f"\nbench  {name:<44} {value}")


def test_help_answers_at_once() -> None:
    atelier = Path(sys.executable).with_name("atelier")
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}
    seconds = median_seconds(
        lambda: subprocess.run(
            [str(atelier), "--help"], env=environment, check=True, stdout=subprocess.DEVNULL
        ),
        5,
    )
    say("atelier --help", f"{seconds:.2f} s")
    assert seconds <= HELP_SECONDS


def test_a_recipe_is_checked_in_a_moment() -> None:
    from app.recipe import load_recipe

    seconds = median_seconds(lambda: load_recipe(ROOT / "recipes" / "demo.yaml"), 5)
    say("reading and checking recipes/demo.yaml", f"{1000 * seconds:.0f} ms")
    assert seconds < 1.0


def test_the_world_is_painted_and_read_back_quickly() -> None:
    import numpy as np

    from demo.oracle import read_scene
    from demo.world import WorldConfig, render, sample_scene

    config = WorldConfig()
    rng = np.random.default_rng(0)
    scenes = [sample_scene(rng, config) for _ in range(100)]
    paint = median_seconds(lambda: [render(scene, 128, config) for scene in scenes], 3)
    images = [render(scene, 128, config) for scene in scenes]
    read = median_seconds(lambda: [read_scene(image, config) for image in images], 3)
    say("painting 128 px images", f"{len(scenes) / paint:.0f} images/s")
    say("the oracle reading them back", f"{len(scenes) / read:.0f} images/s")
    assert len(scenes) / read > 20


def test_objects_move_fast(own_s3_server: object) -> None:
    from infra import storage

    del own_s3_server
    data = os.urandom(64 << 20)
    uri = "s3://atelier/bench/object"
    write = median_seconds(lambda: storage.write_bytes(uri, data), 3)
    read = median_seconds(lambda: storage.read_bytes(uri), 3)
    say("S3 on loopback, 64 MiB object, up", f"{64 / write:.0f} MiB/s")
    say("S3 on loopback, 64 MiB object, down", f"{64 / read:.0f} MiB/s")
    assert min(64 / write, 64 / read) > 10
