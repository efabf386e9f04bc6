"""Metrics, tags and small files of a running job, sent to MLflow from a thread.

``RestTracker`` never makes training wait: what is logged goes into a buffer, a thread sends it in
batches, and while the server is away the buffer grows and is replayed afterwards with the times
at which it was logged. MLflow keeps an equal point once, so a replay leaves no duplicate.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from infra.tracking_server import (
    TrackedRun,
    TrackingRefused,
    TrackingServer,
    TrackingUnavailable,
    json_number,
    now_ms,
)

__all__ = ["RestTracker", "TrackingRefused", "TrackingServer", "TrackingUnavailable"]

logger = logging.getLogger(__name__)

BATCH_METRICS = 500  # MLflow takes 1000 metrics a call
BATCH_PAIRS = 50  # and 100 tags and 100 params
MAX_WAITING_POINTS = 200_000  # about 40 MB of points while the server is away
MAX_WAITING_BYTES = 64 << 20  # of artifacts
SEND_INTERVAL_SECONDS = 1.0
FIRST_RETRY_SECONDS = 0.5
LONGEST_RETRY_SECONDS = 5.0
MAX_VALUE_CHARACTERS = 5000


@dataclass
class _Entry:
    """One thing to send: a metric point, a tag, a param or an artifact."""

    kind: str
    key: str
    value: Any
    at_ms: int = 0
    step: int = 0


@dataclass
class _Batch:
    """The next entries as one call to the server."""

    num_entries: int = 0
    metrics: list[dict[str, Any]] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)
    params: dict[str, str] = field(default_factory=dict)
    artifact: _Entry | None = None


class RestTracker:
    """Logs to one MLflow run from a worker; safe to call from several threads.

    A run that is resumed sends its last steps again. With ``skip_logged_steps`` a metric's points
    up to the step that MLflow already has are left out, so that a resumed run shows no step twice.
    Use it as a context manager, or call ``close()``.
    """

    def __init__(self, tracking_uri: str, run_id: str, *, skip_logged_steps: bool = True) -> None:
        self._server = TrackingServer(tracking_uri, patience_seconds=0)
        self._run_id = run_id
        self._skip_logged_steps = skip_logged_steps
        self._run: TrackedRun | None = None
        self._entries: deque[_Entry] = deque()
        self._waiting_bytes = 0
        self._wake = threading.Condition()
        self._flush_wanted = False
        self._closing = False
        self.num_refused = 0
        self.num_dropped = 0
        self._thread = threading.Thread(target=self._send_loop, name="tracker", daemon=True)
        self._thread.start()

    # --- logging ---------------------------------------------------------------------------------

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Points at a step; ``float()`` is applied, so 0-d tensors and numpy scalars do."""
        at_ms = now_ms()
        self._put([_Entry("metric", k, float(v), at_ms, int(step)) for k, v in metrics.items()])

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Tags of the run; the last value stays."""
        self._put([_Entry("tag", k, str(v)[:MAX_VALUE_CHARACTERS]) for k, v in tags.items()])

    def set_tag(self, key: str, value: str) -> None:
        """One tag."""
        self.set_tags({key: value})

    def log_params(self, params: Mapping[str, object]) -> None:
        """Params of the run; one that was logged with another value is refused and kept."""
        self._put([_Entry("param", k, str(v)[:MAX_VALUE_CHARACTERS]) for k, v in params.items()])

    def log_param(self, key: str, value: object) -> None:
        """One param."""
        self.log_params({key: value})

    def log_artifact(self, data: bytes, path: str) -> None:
        """A small file (a sample grid, a report); never a checkpoint."""
        self._put([_Entry("artifact", path, bytes(data))])

    def flush(self, timeout_seconds: float = 5.0) -> bool:
        """Wait until everything logged so far is sent; False when the time ran out first."""
        give_up_at = time.monotonic() + timeout_seconds
        with self._wake:
            self._flush_wanted = True
            self._wake.notify_all()
            while self._entries and self._thread.is_alive():
                left_seconds = give_up_at - time.monotonic()
                if left_seconds <= 0:
                    return False
                self._wake.wait(left_seconds)
            return not self._entries

    def close(self, timeout_seconds: float = 30.0) -> int:
        """Send what is left and stop; returns how many entries could not be sent in time."""
        self.flush(timeout_seconds)
        with self._wake:
            self._closing = True
            self._wake.notify_all()
        self._thread.join(timeout=5.0)
        num_left = len(self._entries)
        if num_left:
            logger.warning("%d entries were not sent to MLflow before the job ended", num_left)
        return num_left

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # --- sending ---------------------------------------------------------------------------------

    def _put(self, entries: list[_Entry]) -> None:
        with self._wake:
            if self._closing:
                raise RuntimeError("this tracker is closed")
            for entry in entries:
                self._entries.append(entry)
                if entry.kind == "artifact":
                    self._waiting_bytes += len(entry.value)
            self._drop_oldest()
            if len(self._entries) >= BATCH_METRICS:
                self._wake.notify_all()

    def _drop_oldest(self) -> None:
        """Keep the buffer within its bounds; the newest entries are worth most."""
        while len(self._entries) > MAX_WAITING_POINTS or (
            self._waiting_bytes > MAX_WAITING_BYTES and len(self._entries) > 1
        ):
            self._remove_first()
            self.num_dropped += 1
            if self.num_dropped == 1:
                logger.warning("MLflow is away for too long: dropping the oldest points")

    def _remove_first(self) -> None:
        entry = self._entries.popleft()
        if entry.kind == "artifact":
            self._waiting_bytes -= len(entry.value)

    def _send_loop(self) -> None:
        retry_seconds = 0.0
        while True:
            with self._wake:
                if self._closing:
                    return
                if not (self._flush_wanted and self._entries and not retry_seconds):
                    self._wake.wait(retry_seconds or SEND_INTERVAL_SECONDS)
            try:
                self._send_waiting()
            except TrackingUnavailable as error:
                if not retry_seconds:
                    logger.warning("%s; metrics wait here and follow later", error)
                retry_seconds = min(2 * retry_seconds or FIRST_RETRY_SECONDS, LONGEST_RETRY_SECONDS)
            else:
                retry_seconds = 0.0

    def _send_waiting(self) -> None:
        while True:
            with self._wake:
                first = self._entries[0] if self._entries else None
                if first is None:
                    self._flush_wanted = False
                    self._wake.notify_all()
                    return
            already = self._logged_steps()
            with self._wake:
                batch = self._next_batch(already)
                last = self._entries[batch.num_entries - 1]
            try:
                self._send(batch)
            except TrackingRefused as error:
                self._refused(batch, error)
            with self._wake:
                self._remove_through(last)
                self._wake.notify_all()

    def _logged_steps(self) -> Mapping[str, int]:
        """Each metric's last step in MLflow when this tracker first reached the server."""
        if self._run is None:
            try:
                self._run = self._server.get_run(self._run_id)
            except TrackingRefused as error:
                raise TrackingUnavailable(str(error)) from error
        return self._run.metric_steps if self._skip_logged_steps else {}

    def _next_batch(self, already: Mapping[str, int]) -> _Batch:
        batch = _Batch()
        for entry in self._entries:
            num_pairs = max(len(batch.tags), len(batch.params))
            if batch.artifact or len(batch.metrics) >= BATCH_METRICS or num_pairs >= BATCH_PAIRS:
                break
            if entry.kind == "artifact":
                if batch.num_entries:
                    break
                batch.artifact = entry
            elif entry.kind == "tag":
                batch.tags[entry.key] = entry.value
            elif entry.kind == "param":
                batch.params.setdefault(entry.key, entry.value)
            elif entry.step > already.get(entry.key, -1):
                point = {"key": entry.key, "timestamp": entry.at_ms, "step": entry.step}
                batch.metrics.append({**point, "value": json_number(entry.value)})
            batch.num_entries += 1
        return batch

    def _remove_through(self, last: _Entry) -> None:
        """Drop what was sent; the bound may have dropped some of it meanwhile."""
        if not any(entry is last for entry in self._entries):
            return
        while True:
            done = self._entries[0] is last
            self._remove_first()
            if done:
                return

    def _send(self, batch: _Batch) -> None:
        if batch.artifact is not None and self._run is not None:
            self._server.put_artifact(self._run, batch.artifact.key, batch.artifact.value)
        elif batch.metrics or batch.tags or batch.params:
            self._server.log_batch(
                self._run_id, metrics=batch.metrics, params=batch.params, tags=batch.tags
            )

    def _refused(self, batch: _Batch, error: TrackingRefused) -> None:
        """A batch is refused for one bad entry: send each alone and leave out the bad ones."""
        parts = [_Batch(1, metrics=[point]) for point in batch.metrics]
        parts += [_Batch(1, tags={key: value}) for key, value in batch.tags.items()]
        parts += [_Batch(1, params={key: value}) for key, value in batch.params.items()]
        if len(parts) <= 1:
            self.num_refused += 1
            logger.warning("not logged: %s", error)
            return
        for part in parts:
            try:
                self._send(part)
            except TrackingRefused as alone:
                self.num_refused += 1
                logger.warning("not logged: %s", alone)
