"""Bad steps: passed by, gone back from, given up on; the same with and without restarts."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from infra import storage
from training import masked_run, masked_stage
from training.checkpoint_store import CheckpointStore
from training.config import GuardConfig, StageConfig
from training.data import in_memory
from training.guard import Guard
from training.job import Job
from training.keeper import Keeper
from training.masked_run import MaskedRun
from training.masked_stage import TrainingDiverged
from training.session import LocalSession
from training.worker import train

STEPS = 24


def test_a_spike_needs_a_full_window_and_goes_back_by_the_step_alone() -> None:
    guard = Guard(GuardConfig(max_loss_ratio=2.0, rewind_steps=10, window_steps=3))
    assert guard.judge(0, 0, 50.0, 1.0, []) == "good"  # nothing is usual yet
    for step in range(1, 14):
        assert guard.judge(step, step, 5.0, 1.0, []) == "good"
    assert guard.judge(14, 14, 10.1, 1.0, ["x"]) == "go back"
    assert guard.events[-1]["back_to"] == 0  # 10 is too near
    assert [guard.back_to(step) for step in (3, 14, 15, 24, 25, 39)] == [0, 0, 10, 10, 20, 30]
    assert [step for step in range(0, 40, 5) if guard.is_kept(step, 39)] == [20, 30]


def test_how_often() -> None:
    config = GuardConfig(max_bad_batches=2, max_bad_in_a_row=2, rewind_steps=5, max_times_back=1)
    guard = Guard(config)
    verdicts = [guard.judge(7, number, math.nan, 1.0, []) for number in range(4)]
    assert verdicts == ["pass by", "go back", "pass by", "give up"]
    other = Guard(config)
    other.restore(guard.to_json())
    assert other.judge(7, 9, 1.0, math.inf, []) == "give up"
    assert len(guard.events) == 3


def test_a_spike_without_somewhere_to_go_back_to_is_refused() -> None:
    with pytest.raises(ValidationError, match="max_loss_ratio needs rewind_steps"):
        GuardConfig(max_loss_ratio=3.0)


# --- in a run ------------------------------------------------------------------------------------


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> dict[int, float]:
    """Global batch -> what its loss is multiplied with."""
    factors: dict[int, float] = {}
    real = masked_stage.backward

    def backward(stage: Any, inputs: Any, *arguments: Any) -> torch.Tensor:
        factor = factors.get(inputs.number, 1.0)
        loss = real(stage, inputs, *arguments)
        return loss * factor

    monkeypatch.setattr(masked_run, "backward", backward)
    return factors


@pytest.fixture
def run_stage(
    tmp_path: Path,
    small_config: Callable[..., StageConfig],
    token_shard: Callable[..., Any],
    new_stage: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., dict[str, Any]]:
    """``run_stage(name, guard, **fields)``: what the run's last checkpoint holds."""

    class Networks:
        def __init__(self, stage: Any) -> None:
            self.transformer, self.text_encoder = stage.transformer, stage.text_encoder
            self.tokenizer, self.vq = stage.tokenizer, SimpleNamespace(downsample_factor=4)

        def record(self) -> dict[str, Any]:
            return {"source": "fresh"}

    def build(config: StageConfig) -> MaskedRun:
        dataset = in_memory([token_shard(40), token_shard(30, 1)], config)
        networks: Any = Networks(new_stage(config))
        run = MaskedRun(config, networks, dataset, LocalSession())
        monkeypatch.setattr(run, "export", lambda folder: {})
        return run

    def start(name: str, guard: GuardConfig, **fields: Any) -> dict[str, Any]:
        config = small_config(steps=STEPS, guard=guard, ema_decay=0.9, **fields)
        monkeypatch.setattr("training.worker.build_run", lambda *told: build(config))
        uri = storage.file_uri(tmp_path / name)
        train(Job("masked", "s", "k" * 64, {}, run_uri=uri), LocalSession())
        stored = CheckpointStore(uri).complete()[0]
        folder = Path(stored.uri.removeprefix("file://"))
        state = storage.read_json(storage.join(stored.uri, "state.json"))
        return {**state, "weights": load_file(folder / "weights.safetensors"), "stored": stored}

    return start


RunStage = Callable[..., dict[str, Any]]


def test_a_batch_that_is_not_finite_is_passed_by(
    run_stage: RunStage, poisoned: dict[int, float]
) -> None:
    poisoned |= {5: math.nan, 9: math.inf}
    state = run_stage("a", GuardConfig())
    assert (state["step"], state["batch"]) == (STEPS, STEPS + 2)
    assert [(e["kind"], e["step"], e["batch"]) for e in state["guard"]["events"]] == [
        ("not finite", 5, 5),
        ("not finite", 8, 9),
    ]
    assert len(state["guard"]["events"][0]["samples"]) == 6
    assert sum(state["coverage"]["passed_by"].values()) == 12
    assert state["coverage"]["finished"] == (STEPS + 2) * 6 // 70
    assert all(bool(value.isfinite().all()) for value in state["weights"].values())


def test_without_leave_to_pass_by_it_ends(run_stage: RunStage, poisoned: dict[int, float]) -> None:
    poisoned[5] = math.nan
    with pytest.raises(TrainingDiverged, match="step 5 has loss nan"):
        run_stage("a", GuardConfig(max_bad_batches=0))


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    names = set(one["weights"]) == set(other["weights"])
    return names and all(torch.equal(v, other["weights"][k]) for k, v in one["weights"].items())


def test_a_spike_goes_back_and_a_killed_run_comes_to_the_same(
    run_stage: RunStage,
    poisoned: dict[int, float],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    poisoned[13] = 5.0
    caplog.set_level(logging.INFO, "training")
    guard = GuardConfig(max_loss_ratio=2.0, rewind_steps=4, window_steps=4)
    straight = run_stage("straight", guard)
    assert (straight["step"], straight["stored"].generation) == (STEPS, 1)
    (event,) = straight["guard"]["events"]
    assert (event["kind"], event["step"], event["back_to"]) == ("spike", 13, 8)
    assert straight["batch"] == 14 + STEPS - 8
    assert sum(straight["coverage"]["passed_by"].values()) == 6 * 6  # batches 8 to 13
    assert "back to step 8, 5 steps lost, on from batch 14" in caplog.text
    assert not same(straight, run_stage("calm", GuardConfig()))

    for name, stops in (("before", {6}), ("around", {12, 9, 13}), ("after", {20})):
        left = set(stops)
        between_steps = Keeper.between_steps

        def die(keeper: Keeper, left: set[int] = left, real: Any = between_steps) -> None:
            real(keeper)
            if keeper._run.step in left:
                left.discard(keeper._run.step)
                raise RuntimeError("killed")

        with monkeypatch.context() as patch:
            patch.setattr(Keeper, "between_steps", die)
            for _ in stops:
                with pytest.raises(RuntimeError, match="killed"):
                    run_stage(name, guard, checkpoint_interval_steps=3)
        resumed = run_stage(name, guard, checkpoint_interval_steps=3)
        assert same(straight, resumed)
        for part in ("guard", "coverage", "batch", "step", "losses"):
            assert resumed[part] == straight[part], part


def test_the_visit_is_what_is_trained(run_stage: RunStage) -> None:
    state = run_stage("a", GuardConfig())
    assert state["coverage"]["seen"] == {"2": [STEPS * 6 - 140, state["coverage"]["seen"]["2"][1]]}
    assert state["coverage"]["finished"] == 2
