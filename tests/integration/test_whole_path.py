"""A tiny recipe through the whole path with real parts; then again; then damaged and repaired."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from PIL import Image

from tests.pipelines.scoring.conftest import make_clip

if TYPE_CHECKING:
    from tests.conftest import Home

ROOT = Path(__file__).resolve().parent.parent.parent
RECIPE = "tests/recipes/tiny.yaml"
STAGES = ["concepts", "alignment", "compression", "aesthetics"]
GENEVAL = {"single_object", "two_object", "counting", "colors", "position", "color_attr"}
AGAIN_SECONDS = 30.0
HEAVY = ("torch", "ray", "pyspark", "mlflow", "lightning")
ENTRY = f"""
import os, sys
from app.cli import main
try:
    main()
finally:
    heavy = [name for name in {HEAVY} if name in sys.modules]
    open(os.environ["MODULES_FILE"], "w").write(str(heavy))
"""

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def home(
    new_home: Callable[[Path], Home], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Home]:
    home = new_home(tmp_path_factory.mktemp("home"))
    done = home.atelier("run", RECIPE)
    try:
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        (home.path / "first.txt").write_text(done.stdout, encoding="utf-8")
        yield home
    finally:
        home.atelier("down")


def flip(path: Path) -> bytes:
    """Change one bit in the middle of a file; returns what was there."""
    before = path.read_bytes()
    data = bytearray(before)
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return before


def test_everything_is_made_and_recorded(home: Home) -> None:
    status = home.status()
    assert status["state"] == "done"
    assert set(status["funnel"]) == {"concepts", "captioned"}
    for funnel in status["funnel"].values():
        taken = sum(n for name, n in funnel.items() if name not in ("rows_in", "committed"))
        assert funnel["rows_in"] == 240 == taken + funnel["committed"]
        assert funnel["committed"] > 50
    assert list(status["scores"]) == STAGES
    for scores in status["scores"].values():
        assert set(scores) >= GENEVAL | {"background", "one_color", "one_color_shape"}
        assert all(0 <= value <= 1 for value in scores.values())
    for step in status["steps"]:
        assert step["decision"] in ("RUN", "INIT")
        assert step["seconds"] > 0
        assert len(step["key"]) == 64
        assert step["reason"]
    for name in ["tokenizer", *STAGES]:
        step = home.steps()[name]
        assert (Path(step["checkpoint_path"]) / "CHECKPOINT.json").is_file()
        assert step["model_version"] == f"tiny-{name}/1"
        assert step["mlflow_run_id"]
    assert status["mlflow_uri"].startswith("http://127.0.0.1:")


def test_mlflow_has_the_pictures_of_a_stage_from_its_first_steps_on(home: Home) -> None:
    import mlflow

    client = mlflow.MlflowClient(home.status()["mlflow_uri"])
    run_id = home.steps()["alignment"]["mlflow_run_id"]
    paths = [file.path for file in client.list_artifacts(run_id, "images")]
    shown = sorted(re.findall(r"~(0\d [a-z ]+)\+step\+(\d)\+.*\.png", "\n".join(paths)))
    prompts = ("00 a red circle", "01 a blue square")
    assert shown == [(prompt, step) for prompt in prompts for step in "246"]
    assert client.get_run(run_id).data.tags["mlflow.loggedImages"] == "True"
    path = next(path for path in paths if path.endswith(".png"))
    with Image.open(client.download_artifacts(run_id, path, str(home.path))) as image:
        assert image.size == (32, 32)


def test_the_end_shows_what_a_newcomer_wants_to_see(home: Home) -> None:
    page = (home.path / "first.txt").read_text(encoding="utf-8")
    for expected in ("Contact sheet", "MLflow", "committed", "background", "What to try next"):
        assert expected in page
    with Image.open(home.status()["contact_sheet"]) as sheet:
        assert min(sheet.size) > 500
        assert sheet.info["recipe"] == "tiny"


def test_the_compression_layers_were_put_into_the_parents_weights(home: Home) -> None:
    steps = home.steps()
    plain = Path(steps["alignment"]["checkpoint_path"]) / "transformer" / "config.json"
    compressed = Path(steps["compression"]["checkpoint_path"]) / "transformer" / "config.json"
    assert json.loads(plain.read_text())["downsample"] is False
    assert json.loads(compressed.read_text())["downsample"] is True


def test_again_everything_is_skipped_in_seconds_and_without_engines(home: Home) -> None:
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", ENTRY, "run", RECIPE, "--json"],
        cwd=ROOT,
        env={**home.environment, "MODULES_FILE": str(home.path / "modules")},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    seconds = time.monotonic() - started
    assert done.returncode == 0, done.stderr
    status = json.loads(done.stdout)
    assert {step["decision"] for step in status["steps"]} == {"SKIP"}
    assert list(status["scores"]) == STAGES
    assert (home.path / "modules").read_text() == "[]"
    assert seconds < AGAIN_SECONDS


def test_the_plan_says_the_same(home: Home) -> None:
    steps = json.loads(home.atelier("plan", RECIPE, "--json").stdout)["steps"]
    assert {step["decision"] for step in steps} == {"SKIP"}
    options = ("--set", "stages.compression.steps=7", "--json")
    steps = json.loads(home.atelier("plan", RECIPE, *options).stdout)["steps"]
    changed = {step["name"]: step["decision"] for step in steps if step["decision"] != "SKIP"}
    assert changed == {"compression": "INIT", "aesthetics": "INIT", "contact sheet": "RUN"}
    reason = next(step["reason"] for step in steps if step["name"] == "compression")
    assert "steps" in reason


def test_a_flipped_byte_in_a_shard_is_told_and_repaired(home: Home) -> None:
    version = home.steps()["curate:captioned"]["dataset_version"]
    before = flip(home.stored("datasets/captioned/shards/*.tar"))
    home.refuses(["run", RECIPE], "dataset captioned is damaged: shards/", "--repair")
    verified = home.atelier("verify", "--json")
    assert verified.returncode == 1
    assert json.loads(verified.stdout)["ok"] is False
    done = home.atelier("run", RECIPE, "--repair")
    assert done.returncode == 0, done.stderr
    steps = home.steps()
    assert steps["curate:captioned"]["dataset_version"] == version
    assert steps["aesthetics"]["decision"] == "SKIP"
    assert home.atelier("verify").returncode == 0
    assert before in [path.read_bytes() for path in
                      (home.path / "s3/atelier/datasets/captioned/shards").iterdir()]  # fmt: skip


def test_a_flipped_byte_in_a_checkpoint_is_told_and_restored(home: Home) -> None:
    path = home.stored("models/alignment/*/transformer/*.safetensors")
    before = flip(path)
    home.refuses(["run", RECIPE], "/models/alignment/", "is damaged", "transformer/", "restore it")
    path.write_bytes(before)
    done = home.atelier("run", RECIPE)
    assert done.returncode == 0, done.stderr
    assert {step["decision"] for step in home.status()["steps"]} == {"SKIP"}


def test_a_stage_paints_and_the_image_knows_where_it_comes_from(home: Home) -> None:
    out = home.path / "fox.png"
    done = home.atelier("sample", "a red circle", "--stage", "alignment", "--out", str(out))
    assert done.returncode == 0, done.stderr
    step = home.steps()["alignment"]
    with Image.open(out) as image:
        assert image.size == (32, 32)
        assert image.info["prompt"] == "a red circle"
        checkpoints = json.loads(image.info["checkpoints"])
        datasets = json.loads(image.info["datasets"])
    assert checkpoints["alignment"] == step["checkpoint_sha256"]
    assert list(checkpoints) == ["tokenizer", "concepts", "alignment"]
    assert datasets["captioned"] == home.steps()["curate:captioned"]["dataset_version"]


def test_lineage_walks_from_the_pixel_to_the_metadata(home: Home) -> None:
    out = home.path / "fox.png"
    assert home.atelier("sample", "a star", "--out", str(out)).returncode == 0
    found = json.loads(home.atelier("lineage", str(out), "--verify", "--json").stdout)
    stages = [stage["stage"] for stage in found["stages"]]
    assert stages == [*reversed(STAGES), "tokenizer"]
    assert found["problems"] == []
    init = {stage["stage"]: stage["init"] for stage in found["stages"]}
    assert init["concepts"]["source"] == "fresh"
    assert all(n.startswith(("down_", "up_")) for n in init["compression"]["new_keys"])
    files = found["stages"][0]["dataset"]["files"]
    assert {file["kind"] for file in files} == {"metadata", "captions"}
    assert all(len(file["sha256"]) == 64 for file in files)
    before = flip(home.stored("models/concepts/*/transformer/*.safetensors"))
    done = home.atelier("lineage", str(out), "--verify")
    home.stored("models/concepts/*/transformer/*.safetensors").write_bytes(before)
    assert done.returncode == 1
    assert "problem: s3://atelier/models/concepts/" in done.stdout


def test_promote_shows_the_history_and_rollback_needs_one(home: Home) -> None:
    shown = json.loads(home.atelier("promote", "concepts", "--json").stdout)
    assert shown["ready"] == 1
    assert [(m["alias"], m["new"]) for m in shown["history"]][:2] == [
        ("candidate", 1),
        ("ready", 1),
    ]
    assert "is ready already" in home.atelier("promote", "concepts", "1").stdout
    home.refuses(["promote", "concepts", "9"], "got version 9; there are 1")
    home.refuses(["rollback", "concepts"], "expected an earlier ready version of tiny-concepts")
    home.refuses(["promote", "nothing"], "'nothing'", "trained here: tokenizer, concepts")


def test_judges_look_at_prompts_of_ones_own_without_training_anew(home: Home) -> None:
    """Last, for scores of another evaluation take the place of the ones there were."""
    folder = make_clip(home.path / "clip")
    prompts = home.path / "prompts.txt"
    prompts.write_text("\n".join(f"a red circle and {n} blue squares" for n in range(6)))
    judge = f"{{clip: {{folder: {folder}}}, scale: 50}}"
    asked = f"{{prompts: {prompts}, judges: {{clip: {judge}}}, steps: 2, sheet_columns: 2}}"
    before = {name: step["checkpoint_sha256"] for name, step in home.steps().items()}
    done = home.atelier("run", RECIPE, "--set", f"evaluation={asked}")
    assert done.returncode == 0, done.stderr
    steps = home.steps()
    assert {name: step["checkpoint_sha256"] for name, step in steps.items()} == before
    for name in STAGES:
        assert steps[name]["decision"] == "RESUME"
        assert "its scores are of another evaluation" in steps[name]["reason"]
        assert list(steps[name]["scores"]) == ["clip"]
        assert -50 < steps[name]["scores"]["clip"] < 50
    assert "\nScores\n" in done.stdout
    with Image.open(home.status()["contact_sheet"]) as sheet:
        assert json.loads(sheet.info["prompts"]) == prompts.read_text().splitlines()[:2]
