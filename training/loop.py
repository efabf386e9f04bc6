"""The training loop: a thin LightningModule over a job, and the callback that reports and saves.

Checkpoints go through ``ray.train.report``, by time and at the end, never by step: a report costs
a second. What is logged goes to MLflow by a thread, progress to a small JSON object.
"""

from __future__ import annotations

import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from infra import storage
from infra.errors import UserError
from infra.tracking import RestTracker
from training.checkpoint import (
    EXPORT_FOLDER,
    Checkpoint,
    TrainingState,
    optimizer_tensors,
    save_checkpoint,
    seal_folder,
)
from training.jobs import Job, StepMetrics, png_bytes
from training.lean_imports import import_lightning

lightning = import_lightning()

PROGRESS_SECONDS = 1.0
FINAL_LOSS_STEPS = 50

Report = Callable[[dict[str, float], Path], None]


class Steps:
    """The steps that are left, as Lightning's batches."""

    def __init__(self, job: Job) -> None:
        self._job = job

    def __iter__(self) -> Iterator[int]:
        yield from range(self._job.step, self._job.steps)

    def __len__(self) -> int:
        return self._job.steps - self._job.step


class StepModule(lightning.LightningModule):  # type: ignore[misc]  # imported at run time
    """One batch is one optimizer step, which the job makes."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.job = job
        self.parts = nn.ModuleDict(job.networks)
        self.last: StepMetrics | None = None

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The job's own."""
        return self.job.optimizer

    def training_step(self, batch: int, batch_idx: int) -> None:
        """Step number ``batch``."""
        self.last = self.job.run_step(self.device)


class Reporter(lightning.Callback):  # type: ignore[misc]  # imported at run time
    """Metrics to MLflow, progress to storage, checkpoints to Ray."""

    def __init__(
        self,
        job: Job,
        *,
        config_sha256: str,
        tracker: RestTracker | None,
        progress_uri: str | None,
        report: Report,
        agree: Callable[[bool], bool],
        losses: list[float],
        init: dict[str, Any],
    ) -> None:
        self._job, self._tracker, self._progress_uri = job, tracker, progress_uri
        self._config_sha256, self._report, self._agree = config_sha256, report, agree
        self.losses, self._init = losses, init
        self._sums: dict[str, float] = {}
        self._num_summed = self._num_images = 0
        self._since = self._saved_at = self._told_at = time.monotonic()
        self._rate: float | None = None
        self._stopping = threading.Event()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Start the clocks, and let SIGTERM save before it stops the worker."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, lambda *_: self._stopping.set())
        self._since = self._saved_at = time.monotonic()
        self._tell(force=True)

    def on_train_batch_end(
        self, trainer: Any, pl_module: StepModule, outputs: Any, batch: int, batch_idx: int
    ) -> None:
        """Account for the step; save when it is time."""
        metrics = pl_module.last
        if metrics is None:
            return
        self.losses.append(metrics.loss)
        del self.losses[:-FINAL_LOSS_STEPS]
        for name, value in metrics.values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._num_summed += 1
        self._num_images += metrics.num_images
        if self._num_summed >= self._job.log_interval_steps:
            self._log()
        self._tell()
        waited = time.monotonic() - self._saved_at
        is_due = waited > self._job.checkpoint_interval_seconds or self._stopping.is_set()
        if self._job.step < self._job.steps and self._agree(is_due):
            self.save()
            if self._stopping.is_set():
                raise SystemExit(143)

    def _log(self) -> None:
        seconds = time.monotonic() - self._since
        self._rate = self._num_images / max(seconds, 1e-9)
        values = {name: total / self._num_summed for name, total in self._sums.items()}
        values |= {
            "images_per_second": self._rate,
            "step_seconds": seconds / self._num_summed,
        }
        if self._tracker is not None:
            self._tracker.log_metrics(values, self._job.step)
        self._sums, self._num_summed, self._num_images = {}, 0, 0
        self._since = time.monotonic()

    def _tell(self, force: bool = False) -> None:
        now = time.monotonic()
        if self._progress_uri is None or (now - self._told_at < PROGRESS_SECONDS and not force):
            return
        self._told_at = now
        left = self._job.steps - self._job.step
        pace = (now - self._since) / self._num_summed if self._num_summed else None
        progress = {
            "step": self._job.step,
            "steps": self._job.steps,
            "images_per_second": self._rate,
            "loss": self.losses[-1] if self.losses else None,
            "eta_seconds": None if pace is None else left * pace,
        }
        try:
            storage.write_json(self._progress_uri, progress)
        except UserError:
            return  # storage that is away for a moment only means no news

    def save(self) -> None:
        """A checkpoint that training can go on from."""
        with tempfile.TemporaryDirectory(prefix="atelier-checkpoint-") as scratch:
            folder = Path(scratch)
            self._write_state(folder)
            seal_folder(folder)
            self._report({"step": float(self._job.step)}, folder)
        self._saved_at = time.monotonic()

    def finish(self) -> None:
        """The last checkpoint: state, exported model, picture, and the final metrics."""
        if self._num_summed:
            self._log()
        with tempfile.TemporaryDirectory(prefix="atelier-checkpoint-") as scratch:
            folder = Path(scratch)
            self._write_state(folder)
            metrics = {"step": float(self._job.step), **self._job.export(folder / EXPORT_FOLDER)}
            if self.losses:
                metrics["final_loss"] = sum(self.losses) / len(self.losses)
            if self._rate is not None:
                metrics["images_per_second"] = self._rate
            if self._tracker is not None:
                picture = self._job.picture()
                if picture is not None:
                    name = f"samples/step-{self._job.step:07d}.png"
                    self._tracker.log_artifact(png_bytes(picture), name)
            seal_folder(folder)
            self._tell(force=True)
            self._report(metrics, folder)

    def _write_state(self, folder: Path) -> None:
        is_trained = self._job.steps > 0
        tensors: dict[str, Tensor] = self._job.weights() if is_trained else {}
        moments = optimizer_tensors(self._job.optimizer) if is_trained else {}
        state = TrainingState(
            self._job.step, self._config_sha256, list(self.losses), {}, self._init
        )
        save_checkpoint(folder, Checkpoint(tensors, moments, state))


def run(job: Job, reporter: Reporter) -> None:
    """Train what is left, then finish."""
    if job.step < job.steps:
        trainer = lightning.Trainer(
            accelerator="cuda" if torch.cuda.is_available() else "cpu",
            devices=1,
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[reporter],
        )
        trainer.fit(StepModule(job), train_dataloaders=Steps(job))
    reporter.finish()
