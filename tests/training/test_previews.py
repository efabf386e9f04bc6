"""Pictures painted while a stage trains: what they show, and that training does not notice."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from infra import storage
from tests.training.notes import Notes
from training.checkpoint_store import CheckpointStore
from training.config import AdaptersConfig, OptimizerConfig, SampleGridConfig, StageConfig
from training.job import Job
from training.previews import log_pictures
from training.session import LocalSession
from training.worker import train

PROMPTS = ("a red circle", 'what "it" is: 50/50?', "a rectangle")
# MLflow's page reads such names (`parseImageFile`): key, step, time, id.
SERIES = re.compile(
    r"images/samples~(\d\d)([\w\-. ]*)\+step\+(\d+)\+timestamp\+\d+\+[0-9a-f-]{36}(\+compressed)?"
    r"\.(png|webp)"
)


class Pictures(Notes):
    """What was logged, images decoded."""

    def pictures(self) -> dict[tuple[int, int], Any]:
        """(step, number) -> pixels, of the images of full size."""
        found = {}
        for path, data in self.artifacts.items():
            match = SERIES.fullmatch(path)
            if match and match[5] == "png":
                found[int(match[3]), int(match[1])] = np.asarray(Image.open(io.BytesIO(data)))
        return found


@pytest.fixture
def trained(
    tmp_path: Path, raw_job: Callable[[StageConfig], dict[str, Any]]
) -> Callable[[str, StageConfig], tuple[dict[str, torch.Tensor], Pictures]]:
    def run(name: str, config: StageConfig) -> tuple[dict[str, torch.Tensor], Pictures]:
        run_uri, notes = storage.file_uri(tmp_path / name), Pictures()
        job = Job.parse({**raw_job(config), "cpus": 1, "run_uri": run_uri})
        train(job, LocalSession(), notes)
        folder = CheckpointStore(run_uri).complete()[0].uri.removeprefix("file://")
        return load_file(Path(folder) / "weights.safetensors"), notes

    return run


def grid(interval_steps: int | None) -> SampleGridConfig:
    return SampleGridConfig(prompts=PROMPTS, steps=3, interval_steps=interval_steps)


@pytest.mark.parametrize(
    "changes",
    [
        {"ema_decay": 0.5, "train_text_encoder": True},
        {"lora": AdaptersConfig(rank=2, dropout=0.5), "ema_decay": 0.5},
        {"gradient_checkpointing": True},
    ],
    ids=["average", "adapters", "plain"],
)
def test_training_does_not_notice(
    trained: Any, small_config: Callable[..., StageConfig], changes: dict[str, Any]
) -> None:
    without, quiet = trained("without", small_config(**changes))
    watched, notes = trained("with", small_config(**changes, sample_grid=grid(2)))
    assert all(torch.equal(without[name], watched[name]) for name in without)
    assert not any("sample_seconds" in point for _, point in quiet.points)
    assert not quiet.artifacts
    pictures = notes.pictures()
    assert set(pictures) == {(step, number) for step in (2, 4, 6) for number in range(3)}
    assert notes.tags["mlflow.loggedImages"] == "True"
    assert len(notes.artifacts) == 1 + 2 * len(pictures)  # the tiled one, and thumbnails
    assert all(SERIES.fullmatch(path) or path == "samples.png" for path in notes.artifacts)
    assert any("sample_seconds" in point for _, point in notes.points)


def test_they_are_by_the_model_that_would_come_out_there(
    trained: Any, small_config: Callable[..., StageConfig]
) -> None:
    optimizer = OptimizerConfig(learning_rate=1e-3, warmup_steps=0, schedule="constant")
    changes = {"ema_decay": 0.5, "optimizer": optimizer, "sample_grid": grid(2)}
    _, longer = trained("longer", small_config(**changes))
    _, shorter = trained("shorter", small_config(**changes, steps=2))
    for number in range(3):
        early, exported = (each.pictures()[2, number] for each in (longer, shorter))
        np.testing.assert_array_equal(early, exported)
        assert early.shape == (16, 16, 3)
    assert any((longer.pictures()[2, n] != longer.pictures()[6, n]).any() for n in range(3))


def test_a_step_painted_again_replaces_its_pictures() -> None:
    notes, other = Pictures(), Pictures()
    images = [Image.new("RGB", (600, 300), color) for color in ("red", "green", "blue")]
    for _ in range(2):
        log_pictures(notes, PROMPTS, images, 7)
    log_pictures(other, PROMPTS, images, 8)
    assert len(notes.artifacts) == 6
    assert not set(notes.artifacts) & set(other.artifacts)
    small = [data for path, data in notes.artifacts.items() if path.endswith(".webp")]
    assert [Image.open(io.BytesIO(data)).size for data in small] == [(256, 128)] * 3


def test_memory_that_does_not_suffice_ends_no_training(
    trained: Any, small_config: Callable[..., StageConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError

    without, _ = trained("without", small_config(ema_decay=0.5))
    monkeypatch.setattr("training.previews.paint_grid", no_room)
    watched, notes = trained("with", small_config(ema_decay=0.5, sample_grid=grid(2)))
    assert all(torch.equal(without[name], watched[name]) for name in without)
    assert not notes.pictures()[4, 0].any()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::Warning:ray.data.context")
def test_several_workers_paint_what_one_paints_and_do_not_notice_either(
    tmp_path: Path,
    raw_job: Callable[[StageConfig], dict[str, Any]],
    small_config: Callable[..., StageConfig],
) -> None:
    from infra.cluster import ClusterConfig
    from infra.sessions import ray_session
    from training.launch import Launch
    from training.launch import train as launch_train

    store = tmp_path / "ray"

    def painted_apart(raw: dict[str, Any]) -> None:
        """A worker that keeps its pictures in files."""
        from pathlib import Path

        from training.keeper import Keeper
        from training.worker import train_worker

        def keep(self: Keeper, pictures: Any) -> None:
            if self._is_first:
                folder = Path(raw["run_uri"].removeprefix("file://")) / "pictures"
                folder.mkdir(parents=True, exist_ok=True)
                for number, picture in enumerate(pictures):
                    picture.save(folder / f"{self._run.step}-{number}.png")

        Keeper._log_pictures = keep  # type: ignore[method-assign]
        train_worker(raw)

    def run(name: str, num_workers: int, **changes: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        raw = raw_job(small_config(ema_decay=0.5, **changes))
        run_uri = storage.join(store.as_uri(), "runs", name)
        launch = Launch(name, store.as_uri(), num_workers=num_workers, cpus_per_worker=1)
        done = launch_train({**raw, "run_uri": run_uri}, launch, painted_apart)
        storage.download_folder(done.checkpoint_uri, tmp_path / name)
        files = (store / "runs" / name / "pictures").glob("*.png")
        pictures = {path.name: np.asarray(Image.open(path)) for path in files}
        return load_file(tmp_path / name / "weights.safetensors"), pictures

    with ray_session(ClusterConfig(cpus_per_worker=1, num_workers=2), {}):
        _, alone = run("alone", 1, sample_grid=grid(2))
        assert set(alone) == {f"{step}-{number}.png" for step in (2, 4) for number in range(3)}
        for strategy in ("ddp", "fsdp"):
            plain, none = run(f"{strategy}-without", 2, strategy=strategy)
            weights, pictures = run(strategy, 2, strategy=strategy, sample_grid=grid(2))
            assert not none
            assert all(torch.equal(plain[name], weights[name]) for name in plain)
            assert set(pictures) == set(alone)
            for name, picture in alone.items():
                np.testing.assert_array_equal(pictures[name], picture)


def test_the_interval_changes_no_result(small_config: Callable[..., StageConfig]) -> None:
    from infra.config import semantic_part

    plain, watched = small_config(), small_config(sample_grid=grid(2))
    assert semantic_part(plain) == semantic_part(watched)
