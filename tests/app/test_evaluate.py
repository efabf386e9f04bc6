"""Scores by judges of prompts of one's own, without a painted world."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from app.evaluate import evaluate_stage, paint, painter_of, prompts_of
from app.recipe import EvaluationConfig, JudgeConfig, load_recipe
from app.sheet import sheet_prompts
from app.steps import evaluation_key
from infra.cluster import ClusterConfig
from infra.errors import UserError
from infra.ray_task import call_in_ray
from infra.sessions import ray_session
from model import CLIPTokenizer
from pipelines.judges import cosines_of
from pipelines.scoring_config import ClipConfig
from tests.model.conftest import CAPTIONS, small_painter
from tests.pipelines.scoring.conftest import brute_force, make_clip, picture
from training.publish import publish_folder

ROOT = Path(__file__).resolve().parent.parent.parent
MEISSONIC = ROOT / "recipes" / "meissonic.yaml"
PROMPTS = [f"a picture of thing number {number}" for number in range(9)]


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATELIER_HOME", str(tmp_path / "home"))


@pytest.fixture
def published(tmp_path: Path) -> str:
    small_painter(CLIPTokenizer.train(CAPTIONS, 560)).save_pretrained(tmp_path / "export")
    store_uri = (tmp_path / "store").as_uri()
    return publish_folder(tmp_path / "export", store_uri, "last", {"stage": "last"}).uri


def evaluation(tmp_path: Path, **judges: Path) -> EvaluationConfig:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return EvaluationConfig(
        prompts=str(path), num_prompts=7, steps=2, precision="fp32", batch_size=3,
        judges={
            name: JudgeConfig(clip=ClipConfig(folder=str(folder), batch_size=4), scale=50.0)
            for name, folder in judges.items()
        },
    )  # fmt: skip


def test_a_judges_cosines_are_open_clips_own(tmp_path: Path) -> None:
    folder = make_clip(tmp_path / "clip")
    bodies = [picture(number) for number in range(9)]
    (tmp_path / "images").mkdir()
    images = []
    for number, body in enumerate(bodies):
        path = tmp_path / "images" / f"{number}.png"
        path.write_bytes(body)
        images.append(Image.open(path).convert("RGB"))
    found = cosines_of(images, PROMPTS, ClipConfig(folder=str(folder), batch_size=4))
    shown, told = brute_force(folder, bodies, PROMPTS)
    np.testing.assert_allclose(found, (shown * told).sum(axis=1), atol=1e-5)
    assert len(set(np.round(found, 5))) == 9
    assert cosines_of([], [], ClipConfig(folder=str(folder))).shape == (0,)


def test_scores_are_means_over_the_prompts(tmp_path: Path, published: str) -> None:
    folders = {name: make_clip(tmp_path / name, seed=n) for n, name in enumerate(("clip", "hps"))}
    config = evaluation(tmp_path, **folders)
    scores = evaluate_stage("last", published, None, config)
    assert scores == evaluate_stage("last", published, None, config)
    images = paint(
        painter_of(Path(published.removeprefix("file://"))), PROMPTS[:7], config, config.seed, "x"
    )
    for name, folder in folders.items():
        cosines = cosines_of(images, PROMPTS[:7], ClipConfig(folder=str(folder)))
        assert scores[name] == pytest.approx(50.0 * cosines.mean(), abs=1e-4)
    assert scores["clip"] != pytest.approx(scores["hps"], abs=0.01)
    assert prompts_of(config) == PROMPTS[:7]
    assert sheet_prompts(None, config) == PROMPTS[:7]


def test_other_prompts_or_another_judge_are_another_evaluation(tmp_path: Path) -> None:
    plain = load_recipe(MEISSONIC)
    first, second = make_clip(tmp_path / "a"), make_clip(tmp_path / "b", seed=1)

    def key(folder: Path, **changes: object) -> str:
        config = evaluation(tmp_path, hps=folder).model_copy(update=changes)
        return evaluation_key(plain.model_copy(update={"evaluation": config}))

    before = key(first)
    assert key(first, min_scores={"hps": 20.0}) == before == key(first, batch_size=1)
    assert len({before, key(second), key(first, num_prompts=6), key(first, seed=1)}) == 4
    moved = tmp_path / "moved"
    first.rename(moved)
    assert key(moved) == before
    PROMPTS.append(PROMPTS.pop(0))
    try:
        assert key(moved) != before
    finally:
        PROMPTS.insert(0, PROMPTS.pop())


def test_who_asks_needs_prompts_and_who_looks(tmp_path: Path) -> None:
    for given, expected in (
        ("evaluation={}", "name prompts and judges of your own"),
        ("evaluation={prompts: some.txt}", "nobody looks at the images"),
    ):
        with pytest.raises(UserError, match=expected):
            load_recipe(MEISSONIC, [given])
    judge = "{clip: {folder: models/HPS-v2}}"
    load_recipe(MEISSONIC, [f"evaluation={{prompts: some.txt, judges: {{hps: {judge}}}}}"])


@pytest.mark.slow
def test_a_call_elsewhere_has_its_environment_and_its_errors_in_one_line() -> None:
    def task(name: str) -> str:
        import os

        from infra.errors import UserError

        if name not in os.environ:
            raise UserError(expected=name, got="nothing")
        return os.environ[name]

    with ray_session(ClusterConfig(cpus_per_worker=1), {}):
        environment = {"ATELIER_CANARY": "seen"}
        assert call_in_ray(task, "ATELIER_CANARY", environment=environment, num_gpus=0) == "seen"
        with pytest.raises(UserError, match="expected NOWHERE; got nothing"):
            call_in_ray(task, "NOWHERE", environment={}, num_gpus=0)
        with pytest.raises(UserError, match="expected a Ray with 1 GPU; got 0"):
            call_in_ray(task, "NOWHERE", environment={}, num_gpus=1)
