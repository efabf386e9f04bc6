"""The worker under real Ray Train: one process and two, which must learn the same."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from infra import storage
from infra.cluster import ClusterConfig
from infra.errors import UserError
from infra.sessions import ray_session
from training.checkpoint import verify_folder
from training.checkpoint_store import CheckpointStore, newest_step
from training.config import OptimizerConfig, OptimizerName, StageConfig
from training.launch import Launch, Trained, TrainingFailed
from training.launch import train as launch_train
from training.progress import read_progress_json
from training.session import LocalSession
from training.stop import ask_to_stop
from training.waste import read_starts
from training.worker import train, train_worker

pytestmark = [
    pytest.mark.slow,
    # ray.train imports ray.data, whose defaults warn about themselves.
    pytest.mark.filterwarnings("ignore::Warning:ray.data.context"),
]


@pytest.fixture(scope="module")
def _ray() -> Iterator[None]:
    with ray_session(ClusterConfig(cpus_per_worker=1, num_workers=2), {}):
        yield


def _in_ray(
    raw: dict[str, Any],
    store: Path,
    name: str,
    num_workers: int,
    function: Callable[[dict[str, Any]], object] = train_worker,
) -> Trained:
    launch = Launch(name, store.as_uri(), num_workers=num_workers, cpus_per_worker=1)
    run_uri = storage.join(store.as_uri(), "runs", name)
    return launch_train({**raw, "run_uri": run_uri}, launch, function)


@pytest.mark.usefixtures("_ray")
@pytest.mark.parametrize("crop", ["center", "bucket"])
def test_one_worker_and_two_learn_what_no_ray_learns(
    tmp_path: Path,
    raw_job: Callable[[StageConfig], dict[str, Any]],
    small_config: Callable[..., StageConfig],
    crop: str,
) -> None:
    config = small_config(prompt_dropout_prob=0.3, crop=crop)
    raw = raw_job(config)
    from training.job import Job

    run_uri = storage.file_uri(tmp_path / "alone")
    train(Job.parse({**raw, "cpus": 1, "run_uri": run_uri}), LocalSession())
    uri = CheckpointStore(run_uri).complete()[0].uri
    alone = load_file(Path(uri.removeprefix("file://")) / "weights.safetensors")
    for num_workers, strategy in ((1, "fsdp"), (2, "ddp"), (2, "fsdp")):
        raw = raw_job(config.model_copy(update={"strategy": strategy}))
        name = f"concepts-{num_workers}-{strategy}"
        trained = _in_ray(raw, tmp_path / "ray", name, num_workers)
        assert trained.metrics["step"] == 6
        folder = tmp_path / f"fetched-{name}"
        storage.download_folder(trained.checkpoint_uri, folder)
        assert verify_folder(folder) == []
        assert (folder / "export" / "model_index.json").is_file()
        weights = load_file(folder / "weights.safetensors")
        for parameter, value in alone.items():
            if num_workers == 1:
                assert torch.equal(weights[parameter], value), parameter
            else:
                torch.testing.assert_close(weights[parameter], value, rtol=1e-3, atol=2e-4)


@pytest.mark.usefixtures("_ray")
@pytest.mark.parametrize(
    ("strategy", "name"),
    [("ddp", "adamw"), ("fsdp", "adamw"), ("fsdp", "adamw_8bit"), ("fsdp", "muon")],
)
def test_two_workers_and_then_one_learn_what_one_learns(
    tmp_path: Path,
    raw_job: Callable[[StageConfig], dict[str, Any]],
    small_config: Callable[..., StageConfig],
    strategy: str,
    name: OptimizerName,
) -> None:
    """Whole, or each with a part of weights, moments and average; microbatches keep the batch."""
    config = small_config(
        steps=120,
        checkpoint_interval_steps=2,
        strategy=strategy,
        max_microbatch_size=2,
        train_text_encoder=True,
        ema_decay=0.9,
        optimizer=OptimizerConfig(name=name, learning_rate=1e-4, warmup_steps=2),
    )
    raw, store = raw_job(config), tmp_path / "ray"
    stopped = _stopped_after(raw, store, "several", 2, attempt=1, steps=4)
    assert 0 < stopped < 120
    run_uri = storage.join(store.as_uri(), "runs", "several")
    half = _weights_of(CheckpointStore(run_uri).complete()[0].uri, tmp_path / "half")
    trained = _in_ray({**raw, "attempt": 2, "resume_step": stopped}, store, "several", 1)
    assert trained.metrics["step"] == 120
    from training.job import Job

    alone_uri = storage.file_uri(tmp_path / "alone")
    job = Job.parse({**raw, "cpus": 1, "run_uri": alone_uri})
    train(job, LocalSession())
    alone = _weights_of(CheckpointStore(alone_uri).complete()[0].uri, tmp_path / "fetched-alone")
    several = _weights_of(trained.checkpoint_uri, tmp_path / "fetched")
    assert set(half) == set(several) == set(alone)
    moments = load_file(tmp_path / "fetched" / "optimizer.safetensors")
    kept = {"adamw": "exp_avg", "adamw_8bit": "mean_codes", "muon": "momentum"}[name]
    assert kept in {key.rpartition("/")[2] for key in moments}
    alone_moments = load_file(tmp_path / "fetched-alone" / "optimizer.safetensors")
    assert {k: v.shape for k, v in moments.items()} == {
        k: v.shape for k, v in alone_moments.items()
    }
    for parameter, value in alone.items():
        assert half[parameter].shape == value.shape
        torch.testing.assert_close(several[parameter], value, rtol=1e-2, atol=2e-3)


def _weights_of(uri: str, folder: Path) -> dict[str, torch.Tensor]:
    storage.download_folder(uri, folder)
    return load_file(folder / "weights.safetensors")


@pytest.mark.usefixtures("_ray")
def test_a_diverged_run_ends_in_one_line(
    tmp_path: Path,
    raw_job: Callable[[StageConfig], dict[str, Any]],
    small_config: Callable[..., StageConfig],
) -> None:
    config = small_config(
        steps=50, optimizer=OptimizerConfig(learning_rate=1e30, max_grad_norm=None)
    )
    with pytest.raises(UserError, match=r"has loss .* lower optimizer\.learning_rate") as caught:
        _in_ray(raw_job(config), tmp_path / "ray", "concepts-bad", 1)
    assert "\n" not in str(caught.value)


def _stopped_after(
    raw: dict[str, Any], store: Path, name: str, num_workers: int, attempt: int, steps: int
) -> int:
    """Train until about ``steps`` more are made, then ask to stop; the step that was saved."""
    run_uri = storage.join(store.as_uri(), "runs", name)
    begun = newest_step(run_uri) or 0
    saved: list[int | None] = []

    def ask() -> None:
        deadline = time.monotonic() + 100
        while time.monotonic() < deadline:
            progress = read_progress_json(raw["progress_uri"])
            if progress.get("attempt") == attempt and progress["step"] >= begun + steps:
                break
            time.sleep(0.05)
        saved.append(ask_to_stop(run_uri, attempt))

    asking = threading.Thread(target=ask)
    asking.start()
    with pytest.raises(TrainingFailed, match=r"stopped after step \d+, which is saved"):
        _in_ray({**raw, "attempt": attempt}, store, name, num_workers)
    asking.join()
    assert saved[0] is not None
    assert newest_step(run_uri) == saved[0]
    return saved[0]


@pytest.mark.usefixtures("_ray")
def test_two_then_one_then_three_workers_see_every_sample_once_an_epoch(
    tmp_path: Path,
    raw_job: Callable[[StageConfig], dict[str, Any]],
    small_config: Callable[..., StageConfig],
) -> None:
    """Each epoch's account is checked where it ends: a sample lost or repeated ends the run."""
    config = small_config(steps=600, checkpoint_interval_steps=50)
    raw, store = raw_job(config), tmp_path / "ray"
    first = _stopped_after(raw, store, "elastic", 2, attempt=1, steps=5)
    second = _stopped_after(raw, store, "elastic", 1, attempt=2, steps=20)
    assert 0 < first < second < 600
    trained = _in_ray({**raw, "attempt": 3, "resume_step": second}, store, "elastic", 3)
    assert trained.metrics["step"] == 600
    state = storage.read_json(storage.join(trained.checkpoint_uri, "state.json"))
    assert state["coverage"]["finished"] == 600 * config.global_batch_size // 16
    assert state["coverage"]["passed_by"] == {}
    starts = read_starts(storage.join(store.as_uri(), "runs", "elastic"))
    assert [(start.attempt, start.step, start.cause) for start in starts] == [
        (1, 0, ""),
        (2, first, "stopped"),
        (3, second, "stopped"),
    ]
    assert all(start.lost_steps == 0 for start in starts)


def _with_a_flipped_bit(marker: str) -> Callable[[dict[str, Any]], None]:
    """A worker whose second replica loses a bit of a weight after step 17, once."""

    def work(raw: dict[str, Any]) -> None:
        import ray.train

        from training import worker
        from training.masked_run import MaskedRun

        honest = MaskedRun.train

        def train_and_flip(self: MaskedRun, *arguments: Any) -> Any:
            measured = honest(self, *arguments)
            if self.step == 17 and not Path(marker).exists():
                Path(marker).touch()
                bits = next(iter(self.weights().values())).view(torch.int32).view(-1)
                bits[3] ^= 1 << 20
            return measured

        if ray.train.get_context().get_world_rank() == 1:
            patched: Any = MaskedRun
            patched.train = train_and_flip
        worker.train_worker(raw)

    return work


@pytest.mark.usefixtures("_ray")
def test_a_bit_that_flips_in_one_worker_is_found_and_undone(
    tmp_path: Path,
    raw_job: Callable[[StageConfig], dict[str, Any]],
    small_config: Callable[..., StageConfig],
) -> None:
    config = small_config(steps=30, checkpoint_interval_steps=4, checkpoints_kept=1)
    raw, store = raw_job(config), tmp_path / "ray"
    straight = _in_ray(raw, store, "straight", 2)
    marker = tmp_path / "flipped"
    flipped = _in_ray(raw, store, "flipped", 2, _with_a_flipped_bit(str(marker)))
    assert marker.exists()
    expected = _weights_of(straight.checkpoint_uri, tmp_path / "expected")
    found = _weights_of(flipped.checkpoint_uri, tmp_path / "found")
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    starts = read_starts(storage.join(store.as_uri(), "runs", "flipped"))
    assert [start.step for start in starts] == [0, 8]  # 12 and 16 were saved after they were equal
    # GPUs of several kinds round differently: where nobody compares, nobody is stopped.
    blind = raw_job(config.model_copy(update={"compare_workers": False}))
    marker = tmp_path / "flipped unseen"
    _in_ray(blind, store, "blind", 2, _with_a_flipped_bit(str(marker)))
    assert marker.exists()
    starts = read_starts(storage.join(store.as_uri(), "runs", "blind"))
    assert [start.step for start in starts] == [0]


@pytest.mark.usefixtures("_ray")
def test_a_slow_worker_is_named(
    tmp_path: Path,
    raw_job: Callable[[StageConfig], dict[str, Any]],
    small_config: Callable[..., StageConfig],
) -> None:
    told = tmp_path / "told"

    def work(raw: dict[str, Any]) -> None:
        import time

        import ray.train

        from training import worker
        from training.journal import Journal
        from training.masked_run import MaskedRun

        plain_train, plain_note = MaskedRun.train, Journal.note

        def slow_train(self: MaskedRun, *arguments: Any) -> Any:
            if self.step >= 10:
                time.sleep(1.0)
            return plain_train(self, *arguments)

        def note(self: Journal, name: str, text: str) -> None:
            with told.open("a") as file:
                file.write(f"{name}: {text}\n")
            plain_note(self, name, text)

        Journal.note = note  # type: ignore[method-assign]
        if ray.train.get_context().get_world_rank() == 1:
            patched: Any = MaskedRun
            patched.train = slow_train
        worker.train_worker(raw)

    _in_ray(raw_job(small_config(steps=21)), tmp_path / "ray", "slow", 2, work)
    (line,) = {line for line in told.read_text().splitlines() if line.startswith("slow worker")}
    assert "step 20: worker 1 on " in line


@pytest.mark.usefixtures("_ray")
def test_a_batch_that_ends_the_process_is_named(
    tmp_path: Path,
    raw_job: Callable[[StageConfig], dict[str, Any]],
    small_config: Callable[..., StageConfig],
) -> None:
    config = small_config(steps=12, checkpoint_interval_steps=2)
    raw, store = raw_job(config), tmp_path / "ray"
    batches = tmp_path / "batches"

    def work(raw: dict[str, Any]) -> None:
        import ctypes

        from training import worker
        from training.masked_run import MaskedRun

        honest = MaskedRun.train

        def train_or_crash(self: MaskedRun, inputs: Any, *arguments: Any) -> Any:
            if self.batch == 5:
                with batches.open("a") as file:
                    file.write(" ".join(inputs.sample_ids) + "\n")
                ctypes.string_at(0)  # a segmentation fault
            return honest(self, inputs, *arguments)

        patched: Any = MaskedRun
        patched.train = train_or_crash
        worker.train_worker(raw)

    with pytest.raises(TrainingFailed, match="lost a worker 4 times in a row") as caught:
        _in_ray(raw, store, "crashing", 1, work)
    (sample_ids,) = set(batches.read_text().splitlines())
    named = f"in batch 5 (step 5, samples {', '.join(sample_ids.split())})"
    assert named in str(caught.value)
    assert "the last 3 in" in str(caught.value) or "the last 4 in" in str(caught.value)
    assert "\n" not in str(caught.value)
    trained = _in_ray({**raw, "attempt": 2, "resume_step": 4}, store, "crashing", 1)
    assert trained.metrics["step"] == 12


@pytest.mark.usefixtures("_ray")
def test_a_frozen_worker_is_killed_and_another_goes_on(
    tmp_path: Path,
    raw_job: Callable[[StageConfig], dict[str, Any]],
    small_config: Callable[..., StageConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", "5")
    config = small_config(steps=12, checkpoint_interval_steps=2)
    raw, store = raw_job(config), tmp_path / "ray"
    frozen = tmp_path / "frozen"

    def work(raw: dict[str, Any]) -> None:
        import os
        import signal

        from training import worker
        from training.masked_run import MaskedRun

        honest = MaskedRun.train

        def train_or_freeze(self: MaskedRun, *arguments: Any) -> Any:
            if self.step == 7 and not frozen.exists():
                frozen.write_text(str(os.getpid()))
                os.kill(os.getpid(), signal.SIGSTOP)
            return honest(self, *arguments)

        patched: Any = MaskedRun
        patched.train = train_or_freeze
        worker.train_worker(raw)

    trained = _in_ray(raw, store, "frozen", 1, work)
    assert trained.metrics["step"] == 12
    assert not Path(f"/proc/{frozen.read_text()}").exists()
    starts = read_starts(storage.join(store.as_uri(), "runs", "frozen"))
    assert [start.cause for start in starts] == ["", "worker lost"]
