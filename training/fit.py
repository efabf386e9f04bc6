"""Running a stage's steps under Lightning, on one worker or several.

A ``StageRun`` knows its networks and what a step does; ``fit`` gives it gradient
averaging over workers, a thread that prepares the next step, and somebody who watches. Steps are
counted by the run itself, so that going on from a checkpoint is the same as never having stopped.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from infra.errors import UserError
from training.lean_imports import import_lightning

if TYPE_CHECKING:
    import lightning.pytorch as pl
else:
    pl = import_lightning()

# What Lightning says of torch's newer pytrees, a loader that is no DataLoader, a frozen encoder.
UNHELPFUL_WARNINGS = (
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    r"The '\w+' does not have many workers",
    r"Found \d+ module\(s\) in eval mode",
)


@dataclass(frozen=True)
class Measured:
    """What one step measured on this worker. ``loss`` and ``values`` are plain floats."""

    loss: float
    num_images: int
    num_tokens: int
    values: dict[str, float]


class StageRun(Protocol):
    """A stage in training."""

    @property
    def num_steps(self) -> int:
        """Steps in all."""

    @property
    def step(self) -> int:
        """Finished steps."""

    @property
    def batch(self) -> int:
        """The number of the next global batch: finished steps, and batches passed by."""

    @property
    def is_sharded(self) -> bool:
        """Whether each worker holds a part of the networks."""

    @property
    def max_passed_by(self) -> int:
        """Batches that may yet be passed by."""

    @property
    def network(self) -> nn.Module:
        """What Lightning, with several workers, keeps equal. It lies where it is trained."""

    def prepare(self, number: int) -> Any:
        """Global batch ``number``, made on another thread from what no step changes."""

    def train(
        self,
        inputs: Any,
        run_backward: Callable[[Tensor], None],
        without_sync: Callable[[], AbstractContextManager[object]],
    ) -> Measured | None:
        """One optimizer step; None when its batch was passed by instead."""


class Watcher(Protocol):
    """Sees every finished step, saves, and may end the training."""

    stop: threading.Event

    def begins(self, inputs: Any) -> None:
        """A step with these inputs is about to begin."""

    def stepped(
        self, measured: Measured, seconds: float, data_seconds: float, own_seconds: float
    ) -> None:
        """A step took ``seconds``, of which it waited ``data_seconds`` for its inputs; with that
        wait it took ``own_seconds`` until other workers had to be waited for."""

    def between_steps(self) -> None:
        """No step is going on: the time to save, and to raise ``Stopped`` if ``stop`` is set."""


class Stopped(UserError):
    """The process was told to end; a checkpoint of the last finished step is saved."""


class StageModule(pl.LightningModule):
    """Lightning's view of a run: it owns the workers, the run its step, its optimizer and where
    all of it lies (``training.devices``)."""

    automatic_optimization: bool = False

    def __init__(self, run: StageRun, watcher: Watcher) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.network = run.network
        self._run = run
        self._watcher = watcher
        self._stepped_at = self._begun_at = 0.0
        self._stopwatch = _Stopwatch()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """None that Lightning sees: it would move moments, without the count of steps."""
        return []

    def cpu(self) -> StageModule:
        """Lightning's last word to a module; this one stays, for its checkpoint is yet to come."""
        return self

    def on_fit_start(self) -> None:
        self._stepped_at = time.monotonic()

    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Any:
        return batch.to(device)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self._begun_at = time.monotonic()
        self._watcher.begins(batch)
        self._stopwatch.start()

    def training_step(self, batch: Any, batch_idx: int) -> None:
        measured = self._run.train(batch, self._run_backward, self._without_sync)
        if measured is not None:
            seconds = time.monotonic() - self._stepped_at
            data_seconds = self._begun_at - self._stepped_at
            own_seconds = data_seconds + self._stopwatch.seconds()
            self._watcher.stepped(measured, seconds, data_seconds, own_seconds)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._watcher.between_steps()
        self._stepped_at = time.monotonic()

    def _run_backward(self, loss: Tensor) -> None:
        """The last of a step waits for other workers' gradients: until it begins, time is ours."""
        self._stopwatch.mark()
        self.manual_backward(loss)

    def _without_sync(self) -> AbstractContextManager[object]:
        wrapped: Any = self.trainer.strategy.model
        return wrapped.no_sync() if hasattr(wrapped, "no_sync") else nullcontext()


class _Stopwatch:
    """The time from ``start`` to the last ``mark``, of the GPU's work where there is one."""

    def __init__(self) -> None:
        cuda: Any = torch.cuda
        self._on_gpu = bool(cuda.is_available())
        self._events = [cuda.Event(enable_timing=True) for _ in range(2 * self._on_gpu)]
        self._started_at = self._marked_at = 0.0

    def start(self) -> None:
        self._started_at = self._marked_at = time.monotonic()
        if self._on_gpu:
            self._events[0].record()

    def mark(self) -> None:
        self._marked_at = time.monotonic()
        if self._on_gpu:
            self._events[1].record()

    def seconds(self) -> float:
        """Call it when the step's work is done, as it is once its loss is a number."""
        if self._on_gpu and self._events[1].query():
            return float(self._events[0].elapsed_time(self._events[1])) / 1e3
        return self._marked_at - self._started_at


class _Steps:
    """The inputs of the steps that are left, one prepared ahead on a thread."""

    def __init__(self, run: StageRun) -> None:
        self._run = run

    def __len__(self) -> int:
        """At most so many."""
        return self._run.num_steps - self._run.step + self._run.max_passed_by

    def __iter__(self) -> Iterator[Any]:
        run, number = self._run, self._run.batch
        with ThreadPoolExecutor(1, "prepare", initializer=_use_one_thread) as pool:
            upcoming = None
            while run.step < run.num_steps:
                inputs = (upcoming or pool.submit(run.prepare, number)).result()
                number += 1
                is_last = run.step + 1 == run.num_steps
                upcoming = None if is_last else pool.submit(run.prepare, number)
                yield inputs


def _use_one_thread() -> None:
    """Keep this thread's torch operations to itself.

    Each thread that uses OpenMP has a team of its own, whose members wait by spinning: a team
    beside the training's took half of two cores (87 ms a step became 178).
    """
    torch.set_num_threads(1)


def fit(run: StageRun, watcher: Watcher, world_size: int = 1, in_ray: bool = False) -> None:
    """Train until ``run.num_steps``. Raises ``Stopped`` after SIGTERM, with a checkpoint saved."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    module = StageModule(run, watcher)
    with _on_sigterm(watcher.stop), warnings.catch_warnings():
        for message in UNHELPFUL_WARNINGS:
            warnings.filterwarnings("ignore", message=message)
        _trainer(world_size, in_ray, run.is_sharded).fit(module, train_dataloaders=_Steps(run))


def _trainer(world_size: int, in_ray: bool, is_sharded: bool) -> pl.Trainer:
    options: dict[str, Any] = {}
    if in_ray:
        import ray.train.lightning

        for_ray: Any = ray.train.lightning
        options["plugins"] = [for_ray.RayLightningEnvironment()]
        if world_size > 1:
            import ray.train.torch  # the strategy asks it for the device

            options["strategy"] = _strategy(for_ray, is_sharded)
    return pl.Trainer(
        accelerator="gpu" if torch.cuda.is_available() else "cpu",
        devices="auto" if world_size > 1 else 1,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        **options,
    )


def _strategy(for_ray: Any, is_sharded: bool) -> Any:
    """Lightning's part in several workers: equal gradients, or nothing for networks in parts, which
    see to their gradients themselves."""
    if not is_sharded:
        return for_ray.RayDDPStrategy(gradient_as_bucket_view=True)

    class RayShardedStrategy(for_ray.RayDDPStrategy):  # type: ignore[misc]
        def configure_ddp(self) -> None:
            """Leave the model as it is."""

    return RayShardedStrategy()


@contextmanager
def _on_sigterm(stop: threading.Event) -> Iterator[None]:
    """Set ``stop`` on SIGTERM. Only a main thread can; Ray runs workers on another one, and tells
    of the machine's end by ``get_preemption_info``, the driver of its own by ``training.stop``."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: stop.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
