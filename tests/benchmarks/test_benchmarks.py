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


def test_muon_moves_a_small_network_faster_than_torchs() -> None:
    """One step of the demo's transformer; torch's Muon takes its matrices, AdamW nothing."""
    import torch

    from app.recipe import load_recipe
    from model import CLIPTokenizer
    from training.config import OptimizerConfig
    from training.networks import new_transformer, text_config, transformer_config
    from training.optim import build_optimizer, decayed_names

    recipe = load_recipe(ROOT / "recipes" / "demo.yaml")
    text = text_config(recipe.text_encoder, CLIPTokenizer.train(["a red square"], 520))
    network = new_transformer(transformer_config(recipe.network, text, 512, True), 0)
    names = decayed_names(network)
    parameters = dict(network.named_parameters())
    matrices = [parameters[name] for name in sorted(names) if parameters[name].ndim == 2]
    group = {
        "params": matrices,
        "names": [str(i) for i in range(len(matrices))],
        "is_matrices": True,
        "weight_decay": 0.0,
    }
    ours = build_optimizer([group], OptimizerConfig(name="muon"))
    theirs = torch.optim.Muon(matrices, lr=1e-4, adjust_lr_fn="match_rms_adamw")

    def step(optimizer: torch.optim.Optimizer) -> None:
        for matrix in matrices:
            matrix.grad = matrix.detach()
        optimizer.step()

    mine = median_seconds(lambda: step(ours), 10)
    other = median_seconds(lambda: step(theirs), 10)
    say("Muon's step, demo network", f"{1000 * mine:.0f} ms, torch's {1000 * other:.0f} ms")
    say("torch's / ours", f"{other / mine:.2f}")
