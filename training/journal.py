"""What a run tells while it trains: points for MLflow, a progress file, the last losses.

Nothing here makes a step wait: points are sent, and progress is written, by threads.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from infra import storage
from infra.errors import UserError
from training.utilisation import HostUse

FINAL_LOSSES = 50
PROGRESS_SECONDS = 1.0
RECENT_STEPS = 50
FLUSH_SECONDS = 5.0

logger = logging.getLogger(__name__)


class Tracker(Protocol):
    """The part of ``infra.tracking.RestTracker`` that a run needs."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Points at a step."""

    def set_tag(self, key: str, value: str) -> None:
        """A fact about the run."""

    def log_artifact(self, data: bytes, path: str) -> None:
        """A small file."""

    def flush(self, timeout_seconds: float = 5.0) -> bool:
        """Send what is left, for so long."""

    def close(self, timeout_seconds: float = 30.0) -> int:
        """Send what is left."""


class ProgressFile:
    """Writes the latest progress about once a second, from a thread."""

    def __init__(
        self,
        uri: str | None,
        steps: int,
        attempt: int = 1,
        before: Mapping[str, Any] | None = None,
    ) -> None:
        """``before`` is what an earlier start wrote, if that is to stay."""
        self._uri = uri
        fresh = {"step": 0, "steps": steps, "attempt": attempt}
        self._latest: dict[str, Any] = dict(before or fresh)
        self._written: dict[str, Any] | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="progress-file", daemon=True)
        if uri is not None:
            self._thread.start()

    def update(self, **values: float | int | None) -> None:
        """What the file should say; None is "not known yet"."""
        self._latest = {**self._latest, **values}

    def note(self, name: str, text: str) -> None:
        """Something worth knowing; of each name the newest is kept."""
        self._latest = {**self._latest, "notes": {**self._latest.get("notes", {}), name: text}}

    def close(self) -> None:
        """Write the last state and stop."""
        self._closing.set()
        if self._uri is not None:
            self._thread.join(timeout=10.0)

    def _loop(self) -> None:
        while True:
            is_last = self._closing.wait(PROGRESS_SECONDS)
            latest = self._latest
            if latest != self._written:
                self._write(latest)
            if is_last:
                return

    def _write(self, latest: dict[str, Any]) -> None:
        try:
            storage.write_json(str(self._uri), latest)
            self._written = latest
        except UserError as error:
            logger.warning("progress was not written: %s", error)


@dataclass
class Journal:
    """The log of one worker; those after the first have no tracker and no progress file.

    ``flops_per_image`` is the model's own work for an image, ``peak_teraflops`` what all workers'
    devices together could do (None: not known); they give ``mfu``.
    """

    num_steps: int
    log_interval_steps: int
    tracker: Tracker | None = None
    progress: ProgressFile | None = None
    flops_per_image: float = 0.0
    peak_teraflops: float | None = None
    losses: deque[float] = field(default_factory=lambda: deque(maxlen=FINAL_LOSSES))
    _window: list[tuple[float, float, int, int]] = field(default_factory=list)
    _recent: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=RECENT_STEPS))
    _waits: dict[str, float] = field(default_factory=dict)
    _host: HostUse = field(default_factory=HostUse)
    _images: int = 0
    _seconds: float = 0.0
    _num_timed: int = 0

    def stepped(
        self,
        step: int,
        loss: float,
        num_images: int,
        num_tokens: int,
        seconds: float,
        values: Mapping[str, float],
    ) -> None:
        """Step number ``step`` (1, 2, …) ended after ``seconds``, on all workers together."""
        self.losses.append(loss)
        self._recent.append((seconds, num_images))
        self._num_timed += 1
        if self._num_timed > 1:  # the first step also warms up
            self._images += num_images
            self._seconds += seconds
        self._window.append((loss, seconds, num_images, num_tokens))
        if step % self.log_interval_steps == 0 or step == self.num_steps:
            self._log(step, values)
        if self.progress is not None:
            left = self.num_steps - step
            per_step = sum(seconds for seconds, _ in self._recent) / len(self._recent)
            self.progress.update(
                step=step,
                loss=loss,
                images_per_second=self.recent_images_per_second,
                eta_seconds=left * per_step,
                step_seconds=per_step,
                at=time.time(),
            )

    def waited(self, name: str, seconds: float) -> None:
        """Training waited ``seconds`` between steps, for ``name``."""
        self._waits[name] = self._waits.get(name, 0.0) + seconds

    def compared(self, step: int, slowest_ratio: float) -> None:
        """The slowest worker took so many times the others' median."""
        if self.tracker is not None:
            self.tracker.log_metrics({"workers/slowest_ratio": slowest_ratio}, step)

    def note(self, name: str, text: str) -> None:
        """Something worth knowing happened, once or several times."""
        logger.info("%s: %s", name, text)
        if self.progress is not None:
            self.progress.note(name, text)
        if self.tracker is not None:
            self.tracker.set_tag(name.replace(" ", "_"), text)

    def _log(self, step: int, values: Mapping[str, float]) -> None:
        losses, seconds, images, tokens = (
            sum(column) for column in zip(*self._window, strict=True)
        )
        num_steps = len(self._window)
        self._window.clear()
        use = self._use(images / max(seconds, 1e-9))
        if self.progress is not None:
            self.progress.update(**use)
        if self.tracker is None:
            return
        points = {
            "loss": losses / num_steps,
            "step_seconds": seconds / num_steps,
            "images_per_second": images / max(seconds, 1e-9),
            "tokens_per_second": tokens / max(seconds, 1e-9),
            **use,
            **values,
            **{name: waited / num_steps for name, waited in self._waits.items()},
        }
        self._waits.clear()
        self.tracker.log_metrics(points, step)

    def _use(self, images_per_second: float) -> dict[str, float]:
        """What the machine does. Utilisation is of all workers' devices together."""
        found = self._host.measure()
        if self.flops_per_image:
            found["model_teraflops"] = images_per_second * self.flops_per_image / 1e12
            if self.peak_teraflops:
                found["mfu"] = found["model_teraflops"] / self.peak_teraflops
        return found

    @property
    def recent_images_per_second(self) -> float:
        """Over the last steps."""
        seconds = sum(seconds for seconds, _ in self._recent)
        return sum(images for _, images in self._recent) / max(seconds, 1e-9)

    @property
    def images_per_second(self) -> float:
        """Over all steps of this attempt but its first; 0 when there were none."""
        return self._images / self._seconds if self._seconds else 0.0

    @property
    def final_loss(self) -> float | None:
        """The mean of the last 50 losses; None before the first."""
        return sum(self.losses) / len(self.losses) if self.losses else None

    def flush(self) -> None:
        """Wait a moment for everything to be sent."""
        if self.tracker is not None:
            self.tracker.flush(FLUSH_SECONDS)

    def close(self) -> None:
        """Send and write what is left."""
        if self.progress is not None:
            self.progress.close()
        if self.tracker is not None:
            self.tracker.close()
