"""Watches a run's steps: keeps the journal, saves by step and by clock, ends it when asked to."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed

from infra import storage
from training.checkpoint import EXPORT_FOLDER, Checkpoint, TrainingState
from training.checkpoint_store import (
    RESULT_NAME,
    CheckpointDamaged,
    CheckpointStore,
    Loaded,
    StoredCheckpoint,
    load_together,
)
from training.fit import Measured, Stopped
from training.guard import WentBack
from training.job import Job
from training.journal import Journal
from training.masked_run import MaskedRun
from training.previews import log_pictures, tile
from training.replicas import (
    CHECK_STEPS,
    SLOW_RATIO,
    ReplicasDiffer,
    compare,
    digest_of,
    names_of_machines,
)
from training.saver import Saver, snapshot
from training.session import Session
from training.sharding import whole_on_cpu
from training.stall import StallWatch
from training.stop import StopWatch
from training.suspects import SuspectWatch
from training.tokenizer_run import TokenizerRun

if TYPE_CHECKING:
    from PIL.Image import Image

SAMPLES_NAME = "samples.png"
COORDINATION_STEPS = 10  # steps between the workers' talks with Ray about a machine's end

Run = MaskedRun | TokenizerRun


class Keeper:
    """What a worker does besides its steps; only the first one saves."""

    def __init__(
        self,
        job: Job,
        session: Session,
        run: Run,
        journal: Journal,
        store: CheckpointStore,
        stall: StallWatch,
        suspects: SuspectWatch,
    ) -> None:
        self.stop = threading.Event()
        self.generation = 0
        self._job, self._session, self._run, self._journal = job, session, run, journal
        self._store = store
        self._stall = stall
        self._suspects = suspects
        self._started_at = self._saved_at = time.monotonic()
        self._saved_for_preemption = False
        self._own_seconds = 0.0
        self._machines: list[str] = []
        self._equal_at = self._last_saved = self._trusted = self._painted_at = run.step
        self._is_first = session.rank == 0
        self._saver = Saver(
            store,
            num_kept=run.config.checkpoints_kept,
            patience_seconds=run.config.checkpoint_patience_seconds,
            local_dir=job.local_dir,
            is_kept=self._is_needed,
        )
        self._stop_watch = (
            StopWatch(job.run_uri, job.attempt, self.stop)
            if self._is_first and session.in_ray
            else None
        )

    def close(self) -> None:
        """End the threads."""
        self._stall.close()
        self._saver.close()
        if self._stop_watch is not None:
            self._stop_watch.close()

    # --- while training --------------------------------------------------------------------------

    def begins(self, inputs: Any) -> None:
        """Note what a worker that may be lost again is about to train on."""
        sample_ids = getattr(inputs, "sample_ids", ())  # a batch of crops has none
        self._suspects.begin(self._run.step, self._run.batch, sample_ids)

    def stepped(
        self, measured: Measured, seconds: float, data_seconds: float, own_seconds: float
    ) -> None:
        """Put a finished step into the journal."""
        self._stall.stepped()
        self._own_seconds += own_seconds
        self._journal.waited("data_seconds", data_seconds)
        self._journal.stepped(
            self._run.step,
            measured.loss,
            measured.num_images,
            measured.num_tokens,
            seconds,
            measured.values,
        )

    def between_steps(self) -> None:
        """Save when it is time to; raises ``Stopped`` when asked to end, and what kept an earlier
        checkpoint from being written."""
        run, began_at = self._run, time.monotonic()
        self._saver.check()
        if self._session.world_size > 1 and run.step % CHECK_STEPS == 0:
            self._compare_workers()
        if self._all(self._is_first and self.stop.is_set()):
            self.save()
            if self._is_first:
                self._saver.wait()
                if self._stop_watch is not None:
                    self._stop_watch.answer(run.step)
            if run.is_sharded:
                self._session.barrier()  # the first to raise ends all
            raise Stopped(f"stopped after step {run.step}, which is saved")
        if run.step < run.num_steps:
            if self._is_preempted():
                self.save()
                self._saver.wait()
            elif self._all(self._is_due()):
                self.save()
        self._journal.waited("checkpoint_seconds", time.monotonic() - began_at)
        self._paint()

    def _paint(self) -> None:
        """Show what has been learned, when it is time to."""
        run, began_at = self._run, time.monotonic()
        if not isinstance(run, MaskedRun) or run.step in (run.num_steps, self._painted_at):
            return
        self._painted_at = run.step
        pictures = run.samples_now()
        if pictures:
            self._log_pictures(pictures)
            self._journal.waited("sample_seconds", time.monotonic() - began_at)
            self._stall.pause()  # the next step has all of its time
            self._stall.stepped()

    def _log_pictures(self, pictures: Sequence[Image]) -> None:
        run, tracker = self._run, self._journal.tracker
        if tracker is not None and isinstance(run, MaskedRun):
            log_pictures(tracker, run.config.sample_grid.prompts, pictures, run.step)

    def _compare_workers(self) -> None:
        """Tell which worker holds up the others; raises ``ReplicasDiffer`` when one's weights are
        not the others', after what was saved since they were equal is gone."""
        run, size = self._run, self._session.world_size
        digest = None
        if run.config.compare_workers and not run.is_sharded:
            digest = digest_of({**run.weights(), **run.optimizer_state()})
        found = compare(digest, self._own_seconds / CHECK_STEPS, size)
        self._own_seconds = 0.0
        is_warm = bool(self._machines)  # the first steps are not like the others
        if not is_warm:
            self._machines = names_of_machines(socket.gethostname(), size)
        if found.odd_ones:
            self._discard_unequal()
            who = ", ".join(f"worker {rank} on {self._machines[rank]}" for rank in found.odd_ones)
            raise ReplicasDiffer(
                f"weights are no longer equal on all workers at step {run.step} ({who}); they were "
                f"at step {self._equal_at}, and what was saved since is gone; where GPUs are of "
                "several kinds, set compare_workers: false"
            )
        self._equal_at, self._trusted = run.step, self._last_saved
        rank, ratio = found.slowest
        self._journal.compared(run.step, ratio)
        if is_warm and ratio > SLOW_RATIO:
            self._journal.note(
                "slow worker",
                f"step {run.step}: worker {rank} on {self._machines[rank]} takes "
                f"{found.seconds[rank]:.3f} s a step, {ratio:.1f} times as long as the others",
            )

    def _discard_unequal(self) -> None:
        if self._is_first:
            self._saver.wait()
            self._store.discard_after(self._equal_at)
        self._session.barrier()  # the first to raise ends all

    def _all(self, answer: bool) -> bool:
        """The first worker's answer, where a save is everybody's work."""
        if not self._run.is_sharded:
            return answer
        told = torch.tensor([answer], dtype=torch.uint8, device=self._run.device)
        torch.distributed.broadcast(told, src=0)
        return bool(told.item())

    def _is_due(self) -> bool:
        run = self._run
        if isinstance(run, MaskedRun) and run.guard.is_anchor(run.step):
            return True
        if self._saver.is_busy:
            return False
        interval_steps = run.config.checkpoint_interval_steps
        if interval_steps is not None and run.step % interval_steps == 0:
            return True
        return time.monotonic() - self._saved_at >= run.config.checkpoint_interval_seconds

    def _is_preempted(self) -> bool:
        """True once, when a machine under the run is about to go; all workers ask together."""
        if self._saved_for_preemption or not self._session.in_ray:
            return False
        if self._run.step % COORDINATION_STEPS:
            return False
        self._saved_for_preemption = self._session.is_preempted()
        return self._saved_for_preemption

    def _is_needed(self, stored: StoredCheckpoint) -> bool:
        run = self._run
        if self._session.world_size > 1 and stored.step == self._trusted:
            return True  # the newest that was saved before all workers were seen to be equal
        return isinstance(run, MaskedRun) and run.guard.is_kept(stored.step, run.step)

    # --- saving ----------------------------------------------------------------------------------

    def save(self) -> None:
        """Have a checkpoint of this step written, beside the next steps."""
        checkpoint = self._checkpoint()
        if checkpoint is not None:
            self._saver.save(checkpoint, self.generation, self._flush_log)
        self._saved_at, self._last_saved = time.monotonic(), self._run.step
        self._suspects.saving()

    def _flush_log(self, folder: Path) -> None:
        """What a checkpoint covers is never logged again: send it first, if MLflow answers."""
        self._journal.flush()

    def _checkpoint(self) -> Checkpoint | None:
        """What the first worker saves; networks in parts are put together by all."""
        run = self._run
        if run.is_sharded:
            weights = whole_on_cpu(run.weights(), self._is_first)
            optimizer = whole_on_cpu(run.optimizer_state(), self._is_first)
        elif self._is_first:
            weights, optimizer = snapshot(run.weights()), snapshot(run.optimizer_state())
        if not self._is_first:
            return None
        state = TrainingState(
            step=run.step,
            config_sha256=self._job.stage_key,
            losses=list(self._journal.losses),
            init=run.init_record,
            **run.state(),
        )
        return Checkpoint(weights, optimizer, state)

    def start(self) -> None:
        """Have the checkpoint to go back to that the guard may ask for before any other."""
        run = self._run
        if run.step == 0 and isinstance(run, MaskedRun) and run.guard.is_anchor(0):
            self.save()

    def go_back(self, why: WentBack) -> None:
        """Load the checkpoint that the guard goes back to; all workers call it together."""
        run = self._run
        if not isinstance(run, MaskedRun):
            raise TypeError("only masked stages go back")
        self._stall.pause()
        self._saver.wait()
        self._session.barrier()
        found = load_together(self._store, self._session, self._job.stage_key, step=why.to_step)
        if found is None:
            raise CheckpointDamaged(f"there is no checkpoint of step {why.to_step} to go back to")
        event = run.guard.events[-1]
        lost_steps = run.step - why.to_step
        run.go_back(found.checkpoint, why.to_batch)
        self.generation = run.guard.num_went_back
        self._equal_at = self._last_saved = self._trusted = why.to_step
        self._journal.losses.clear()
        self._journal.losses.extend(found.checkpoint.state.losses)
        self._journal.note(
            "went back",
            f"step {event['step']} has loss {event['loss']} ({event['kind']}): back to step "
            f"{why.to_step}, {lost_steps} steps lost, on from batch {why.to_batch}",
        )
        self._session.barrier()

    def finish(self) -> None:
        """Save the last checkpoint, with the exported model and all metrics."""
        self._stall.pause()
        checkpoint = self._checkpoint()
        self._run.put_together(self._is_first)
        if checkpoint is not None:
            self._saver.save(checkpoint, self.generation, self._export)
            self._saver.wait()
        self._session.barrier()

    def _export(self, folder: Path) -> None:
        found = self._run.export(folder / EXPORT_FOLDER)
        result = {**self._result(), **found}
        storage.write_json(storage.file_uri(folder / RESULT_NAME), result)
        tracker = self._journal.tracker
        if tracker is None:
            return
        if found:
            tracker.log_metrics(found, self._run.step)
        pictures = self._run.samples(folder / EXPORT_FOLDER)
        if pictures:
            tracker.log_artifact(tile(pictures), SAMPLES_NAME)
            self._log_pictures(pictures)

    def _result(self) -> Mapping[str, float]:
        result: dict[str, Any] = {
            "step": float(self._run.step),
            "images_per_second": self._journal.images_per_second,
            "num_workers": float(self._session.world_size),
            "train_seconds": time.monotonic() - self._started_at,
        }
        if self._journal.final_loss is not None:
            result["final_loss"] = self._journal.final_loss
        if isinstance(self._run, MaskedRun):
            result["batches_passed_by"] = float(self._run.guard.num_passed_by)
            result["times_gone_back"] = float(self._run.guard.num_went_back)
        return result

    def restored(self, found: Loaded) -> None:
        """Go on from a checkpoint: its losses, and what is worth telling."""
        self.generation = found.stored.generation
        self._journal.losses.extend(found.checkpoint.state.losses)
        if found.passed_by:
            self._journal.note("checkpoint passed by", "; ".join(found.passed_by))
