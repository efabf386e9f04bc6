from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from infra import storage
from training.journal import Journal, ProgressFile
from training.progress import StageProgress, read_progress
from training.utilisation import HostUse


class Notes:
    """A tracker that remembers."""

    def __init__(self) -> None:
        self.points: dict[int, dict[str, float]] = {}
        self.is_closed = False

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        self.points[step] = dict(metrics)

    def set_tag(self, key: str, value: str) -> None:
        self.tags = {key: value}

    def log_artifact(self, data: bytes, path: str) -> None:
        raise AssertionError("no artifact here")

    def flush(self, timeout_seconds: float = 5.0) -> bool:
        return True

    def close(self, timeout_seconds: float = 30.0) -> int:
        self.is_closed = True
        return 0


def _run(journal: Journal, first: int, last: int) -> None:
    for step in range(first, last + 1):
        journal.stepped(step, float(step), 4, 64, 10.0 if step == first else 0.5, {"grad_norm": 2})


def test_points_are_means_over_the_interval_and_the_last_step_is_logged() -> None:
    notes = Notes()
    journal = Journal(7, 3, notes)
    _run(journal, 1, 7)
    assert sorted(notes.points) == [3, 6, 7]
    own = {name: v for name, v in notes.points[6].items() if not name.startswith("host/")}
    assert {"host/cores", "host/memory_mb"} <= set(notes.points[6])
    assert own == {
        "loss": 5.0,
        "step_seconds": 0.5,
        "images_per_second": 8.0,
        "tokens_per_second": 128.0,
        "grad_norm": 2,
    }
    journal.close()
    assert notes.is_closed


def test_the_progress_says_what_the_machine_does(tmp_path: Path) -> None:
    uri = storage.file_uri(tmp_path / "progress.json")
    journal = Journal(4, 2, progress=ProgressFile(uri, 4, attempt=3), flops_per_image=1e9)
    journal.peak_teraflops = 1.0
    _run(journal, 1, 4)
    journal.close()
    found = read_progress(uri)
    assert found is not None
    assert (found.step, found.steps, found.eta_seconds) == (4, 4, 0.0)
    assert dict(found.use)["mfu"] == pytest.approx(8.0 * 1e9 / 1e12)
    assert 0.0 <= dict(found.use)["host/cpu_share"] <= 1.0


def test_the_rate_leaves_out_the_first_step() -> None:
    journal = Journal(5, 2)
    assert journal.images_per_second == 0.0
    assert journal.final_loss is None
    _run(journal, 1, 5)
    assert journal.images_per_second == pytest.approx(8.0)


def test_the_final_loss_is_the_mean_of_the_last_fifty() -> None:
    journal = Journal(120, 10)
    journal.losses.extend([100.0] * 10)
    _run(journal, 1, 120)
    assert journal.final_loss == pytest.approx(sum(range(71, 121)) / 50)


def test_a_resumed_run_logs_at_the_same_steps() -> None:
    notes = Notes()
    _run(Journal(9, 4, notes), 6, 9)
    assert sorted(notes.points) == [8, 9]


def test_a_gpu_whose_library_refuses_ends_no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """NVML says of a part of a GPU, and in many a container, that it may not tell."""

    def refuse() -> int:
        raise type("NVMLError_NotSupported", (Exception,), {})("Not Supported")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2**21)
    monkeypatch.setattr(torch.cuda, "utilization", refuse)
    found = HostUse().measure()
    assert found["host/gpu_memory_mb"] == 2.0
    assert "host/gpu_share" not in found


def test_the_progress_says_what_happened(tmp_path: Path) -> None:
    uri = storage.file_uri(tmp_path / "progress.json")
    journal = Journal(4, 2, progress=ProgressFile(uri, 4))
    journal.note("started", "attempt 2: RESUME")
    journal.note("slow worker", "step 2: worker 1")
    journal.stepped(1, 2.0, 3, 4, 0.5, {})
    journal.note("slow worker", "step 3: worker 1")
    journal.close()
    found = read_progress(uri)
    assert found is not None
    assert dict(found.notes) == {"started": "attempt 2: RESUME", "slow worker": "step 3: worker 1"}
    storage.write_json(uri, {"step": 1, "notes": ["odd"]})
    assert read_progress(uri) == StageProgress(1, 0)
