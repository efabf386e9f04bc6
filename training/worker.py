"""What runs in each worker of a stage: build, go on from the last checkpoint, train, hand over.

The order of starts: the run's own checkpoint, else the parent's weights under the init policy,
else fresh ones.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from infra.errors import UserError
from infra.tracking import RestTracker
from model import ModelError
from training.checkpoint import (
    EXPORT_FOLDER,
    Checkpoint,
    TrainingState,
    load_checkpoint,
    save_checkpoint,
    seal_folder,
)
from training.fit import Measured, fit
from training.job import Job
from training.journal import Journal, ProgressFile, Tracker
from training.masked_run import MaskedRun
from training.session import RaySession, Session
from training.tokenizer_run import TokenizerRun

SAMPLES_NAME = "samples.png"


def train_worker(raw: dict[str, Any]) -> None:
    """Run a stage as a worker of Ray Train; ``raw`` is what ``Job.parse`` reads.

    A configuration or a model that does not fit, and a loss that is not finite, raise
    ``UserError``: trying again would end the same.
    """
    train(Job.parse(raw), RaySession())


def train(job: Job, session: Session, tracker: Tracker | None = None) -> None:
    """Run a stage to its end in this session and report its last checkpoint, with ``export/``."""
    use_threads(job.cpus)
    try:
        run = build_run(job, session)
        losses, is_done = restore(run, job, session)
        if is_done:
            return
        journal = _journal(job, run, session, tracker)
        journal.losses.extend(losses)
        keeper = Keeper(job, session, run, journal)
        try:
            if run.step < run.num_steps:
                fit(run, keeper, session.world_size, session.in_ray)
            keeper.finish()
        finally:
            journal.close()
    except ModelError as error:
        raise UserError(str(error)) from error


def use_threads(cpus: int | None) -> None:
    """As many threads as the worker was given; Ray says it by OMP_NUM_THREADS."""
    given = cpus if cpus is not None else int(os.environ.get("OMP_NUM_THREADS") or 0)
    if given > 0:
        torch.set_num_threads(given)


def build_run(job: Job, session: Session) -> MaskedRun | TokenizerRun:
    """The stage with its networks where they start."""
    if job.kind == "masked":
        return MaskedRun.build(job, session)
    if session.world_size > 1:
        raise UserError("the tokenizer stage trains on one worker; set its number of workers to 1")
    return TokenizerRun.build(job)


def restore(run: MaskedRun | TokenizerRun, job: Job, session: Session) -> tuple[list[float], bool]:
    """Go back to the run's own checkpoint, if there is one.

    Returns the last losses, and whether the run had already handed over its result.
    """
    with session.last_checkpoint() as folder:
        if folder is None:
            return [], False
        checkpoint = load_checkpoint(folder, job.stage_key)
        state = checkpoint.state
        is_done = state.step == run.num_steps and (folder / EXPORT_FOLDER).is_dir()
        run.restore(state.step, checkpoint.weights, checkpoint.optimizer)
        run.init_record = state.init
        return state.losses, is_done


def _journal(
    job: Job, run: MaskedRun | TokenizerRun, session: Session, tracker: Tracker | None
) -> Journal:
    interval = run.config.log_interval_steps
    if session.rank != 0:
        return Journal(run.num_steps, interval)
    if tracker is None and job.tracking_uri is not None and job.mlflow_run_id is not None:
        tracker = RestTracker(job.tracking_uri, job.mlflow_run_id)
    return Journal(run.num_steps, interval, tracker, ProgressFile(job.progress_uri, run.num_steps))


class Keeper:
    """Watches the steps, keeps the journal and saves by the clock."""

    def __init__(
        self, job: Job, session: Session, run: MaskedRun | TokenizerRun, journal: Journal
    ) -> None:
        self._job, self._session, self._run, self._journal = job, session, run, journal
        self._interval_seconds = run.config.checkpoint_interval_seconds
        self._started_at = self._saved_at = time.monotonic()
        self._saved_for_preemption = False

    def stepped(self, measured: Measured, seconds: float) -> None:
        """Put a finished step into the journal."""
        self._journal.stepped(
            self._run.step,
            measured.loss,
            measured.num_images,
            measured.num_tokens,
            seconds,
            measured.values,
        )

    def wants_checkpoint(self) -> bool:
        """Whether the interval since the last checkpoint is over."""
        return time.monotonic() - self._saved_at >= self._interval_seconds

    def is_preempted(self) -> bool:
        """True once, when a machine under the run is about to go."""
        if self._saved_for_preemption or not self._session.in_ray:
            return False
        self._saved_for_preemption = self._session.is_preempted()
        return self._saved_for_preemption

    def save(self) -> None:
        """Report a checkpoint to go on from."""
        with tempfile.TemporaryDirectory(dir=self._job.local_dir) as scratch:
            folder = Path(scratch)
            if self._session.rank == 0:
                self._write(folder)
                seal_folder(folder)
            self._report(folder, {})
        self._saved_at = time.monotonic()

    def finish(self) -> None:
        """Report the last checkpoint, with the exported model and all metrics."""
        with tempfile.TemporaryDirectory(dir=self._job.local_dir) as scratch:
            folder = Path(scratch)
            found: dict[str, float] = {}
            if self._session.rank == 0:
                self._write(folder)
                found = self._run.export(folder / EXPORT_FOLDER)
                seal_folder(folder)
                self._log_end(folder / EXPORT_FOLDER, found)
            self._report(folder, found)

    def _log_end(self, export: Path, found: Mapping[str, float]) -> None:
        tracker = self._journal.tracker
        if tracker is None:
            return
        if found:
            tracker.log_metrics(found, self._run.step)
        picture = self._run.sample_grid(export)
        if picture is not None:
            tracker.log_artifact(picture, SAMPLES_NAME)

    def _write(self, folder: Path) -> None:
        run = self._run
        state = TrainingState(
            step=run.step,
            config_sha256=self._job.stage_key,
            losses=list(self._journal.losses),
            init=run.init_record,
        )
        save_checkpoint(folder, Checkpoint(run.weights(), run.optimizer_state(), state))

    def _report(self, folder: Path, found: Mapping[str, float]) -> None:
        metrics = {
            "step": float(self._run.step),
            "images_per_second": self._journal.images_per_second,
            "train_seconds": time.monotonic() - self._started_at,
            **found,
        }
        if self._journal.final_loss is not None:
            metrics["final_loss"] = self._journal.final_loss
        self._session.report(metrics, folder if self._session.rank == 0 else None)
