"""How far the encoding before a stage's first step is, for ``atelier status`` and MLflow."""

from __future__ import annotations

import time

from infra.tracking import RestTracker
from training.job import Job
from training.journal import ProgressFile, Tracker
from training.progress import read_progress_json

LOG_SECONDS = 10.0
METRIC = "tokens/shards_encoded"


class EncodingNews:
    """What the first worker tells of shards; it begins with the first word and waits for nobody.

    What an earlier start wrote of its steps stays in the progress file: the account of what was
    lost is made of it later. ``tracker`` is one to use in place of the job's MLflow run.
    """

    def __init__(self, job: Job, steps: int, tracker: Tracker | None = None) -> None:
        self._job, self._steps = job, steps
        self._given = tracker
        self._tracker: Tracker | None = None
        self._file: ProgressFile | None = None
        self._logged_at = 0.0

    def tell(self, done: int, total: int) -> None:
        """``done`` of ``total`` shards have tokens."""
        if self._file is None:
            self._begin()
        if self._file is not None:
            self._file.update(shards_encoded=done, shards=total)
        is_due = done == total or time.monotonic() - self._logged_at >= LOG_SECONDS
        if self._tracker is not None and is_due:
            self._logged_at = time.monotonic()
            self._tracker.log_metrics({METRIC: done}, done)

    def _begin(self) -> None:
        job = self._job
        before = read_progress_json(job.progress_uri) if job.progress_uri is not None else {}
        self._file = ProgressFile(job.progress_uri, self._steps, job.attempt, before)
        self._tracker = self._given
        if self._given is None and job.tracking_uri is not None and job.mlflow_run_id is not None:
            self._tracker = RestTracker(job.tracking_uri, job.mlflow_run_id)

    def close(self) -> None:
        """Write and send what is left."""
        if self._file is not None:
            self._file.close()
        if self._tracker is not None and self._tracker is not self._given:
            self._tracker.close()
