"""What to do about a bad step: pass its batch by, go back, or give up; the same after a restart.

A step whose loss or gradient is not finite is never taken: its batch is passed by, and the weights
are those of the step before. When that happens ``max_bad_in_a_row`` times, or the loss jumps above
``max_loss_ratio`` times the median of the last ``window_steps``, training goes back to an earlier
checkpoint and passes by everything up to the bad batch (Chowdhery et al. 2022, "PaLM", section
5.1). Where it goes back to depends on the step alone, never on the clock, so that a run that was
interrupted comes to the same weights as one that was not.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from training.config import GuardConfig

Verdict = Literal["good", "pass by", "go back", "give up"]
NAMED_SAMPLES = 8


class WentBack(Exception):
    """Training must go on from the checkpoint of ``to_step``, at global batch ``to_batch``."""

    def __init__(self, to_step: int, to_batch: int) -> None:
        super().__init__(f"back to step {to_step}")
        self.to_step = to_step
        self.to_batch = to_batch


@dataclass(frozen=True)
class Event:
    """One bad step. ``batch`` is its global batch, ``samples`` the first of this worker's."""

    kind: str
    step: int
    batch: int
    loss: str
    grad_norm: str
    samples: tuple[str, ...]
    back_to: int | None = None


class Guard:
    """Judges every step before it is taken."""

    def __init__(self, config: GuardConfig) -> None:
        self._config = config
        self._losses: deque[float] = deque(maxlen=config.window_steps)
        self._bad_in_a_row = 0
        self.num_passed_by = 0
        self.num_went_back = 0
        self.events: list[dict[str, Any]] = []

    def judge(
        self, step: int, batch: int, loss: float, grad_norm: float, samples: list[str]
    ) -> Verdict:
        """What to do about optimizer step ``step`` (0, 1, …) on global batch ``batch``."""
        config = self._config
        is_finite = math.isfinite(loss) and math.isfinite(grad_norm)
        if is_finite and not self._is_spike(loss):
            self._bad_in_a_row = 0
            self._losses.append(loss)
            return "good"
        kind = "spike" if is_finite else "not finite"
        event = Event(kind, step, batch, str(loss), str(grad_norm), tuple(samples[:NAMED_SAMPLES]))
        self._bad_in_a_row += 1
        goes_back = is_finite or self._bad_in_a_row >= config.max_bad_in_a_row
        if not goes_back and self.num_passed_by < config.max_bad_batches:
            self.num_passed_by += 1
            self.events.append({**vars(event), "samples": list(event.samples)})
            return "pass by"
        back_to = self.back_to(step)
        if back_to is None or self.num_went_back >= config.max_times_back:
            return "give up"
        self.num_went_back += 1
        self._bad_in_a_row = 0
        found = {**vars(event), "samples": list(event.samples), "back_to": back_to}
        self.events.append(found)
        return "go back"

    def _is_spike(self, loss: float) -> bool:
        ratio = self._config.max_loss_ratio
        if ratio is None or len(self._losses) < self._config.window_steps:
            return False
        return loss > ratio * statistics.median(self._losses)

    def back_to(self, step: int) -> int | None:
        """The step to go back to from ``step``: a multiple of ``rewind_steps``, at least half of
        it ago where that is possible; None when there is no going back."""
        interval = self._config.rewind_steps
        if interval is None:
            return None
        return max(0, (step - interval // 2) // interval * interval)

    def is_anchor(self, step: int) -> bool:
        """Whether a checkpoint of this step must be there to go back to."""
        interval = self._config.rewind_steps
        return interval is not None and step % interval == 0

    def is_kept(self, anchor_step: int, step: int) -> bool:
        """Whether a run that has come to ``step`` may still go back to ``anchor_step``."""
        interval = self._config.rewind_steps
        return interval is not None and self.is_anchor(anchor_step) and (
            anchor_step >= step - 2 * interval
        )  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "losses": list(self._losses),
            "bad_in_a_row": self._bad_in_a_row,
            "num_passed_by": self.num_passed_by,
            "num_went_back": self.num_went_back,
            "events": self.events,
        }

    def restore(self, raw: Mapping[str, Any]) -> None:
        """Go back to what a checkpoint kept."""
        self._losses.clear()
        self._losses.extend(raw.get("losses", ()))
        self._bad_in_a_row = int(raw.get("bad_in_a_row", 0))
        self.num_passed_by = int(raw.get("num_passed_by", 0))
        self.num_went_back = int(raw.get("num_went_back", 0))
        self.events = list(raw.get("events", ()))

    def rewound(self, raw: Mapping[str, Any]) -> None:
        """Take the losses of the checkpoint that training went back to, and keep the account."""
        self._losses.clear()
        self._losses.extend(raw.get("losses", ()))
