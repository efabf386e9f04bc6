"""Running a stage's steps under Lightning, on one worker or several.

A ``StageRun`` knows its networks and what a step does; ``fit`` gives it devices, gradient
averaging over workers, a thread that prepares the next step, checkpoints by the clock, and a
log. Steps are counted by the run itself, so that going on from a checkpoint is the same as never
having stopped.
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

from training.lean_imports import import_lightning

if TYPE_CHECKING:
    import lightning.pytorch as pl
else:
    pl = import_lightning()

COORDINATION_STEPS = 10  # steps between talks of several workers, or with Ray, about saving

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
    def network(self) -> nn.Module:
        """What Lightning moves to a device and, with several workers, keeps equal."""

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer that steps are made with."""

    def prepare(self, step: int) -> Any:
        """A step's inputs, made on another thread from what no step changes; has ``.to``."""

    def to(self, device: torch.device) -> None:
        """Move what is not in ``network``."""

    def train(
        self,
        inputs: Any,
        run_backward: Callable[[Tensor], None],
        without_sync: Callable[[], AbstractContextManager[object]],
    ) -> Measured:
        """One optimizer step."""


class Watcher(Protocol):
    """Sees every finished step; says whether to save now, and saves."""

    def stepped(self, measured: Measured, seconds: float) -> None:
        """A step took ``seconds``."""

    def wants_checkpoint(self) -> bool:
        """Whether this worker finds it is time; the first worker's answer holds."""

    def is_preempted(self) -> bool:
        """Whether a machine is about to go; all workers ask together and get the same answer."""

    def save(self) -> None:
        """Save a checkpoint; all workers call it together."""


class Stopped(Exception):
    """The process was told to end; a checkpoint of the last finished step is saved."""


class StageModule(pl.LightningModule):
    """Lightning's view of a run: it owns devices and workers, the run owns the step."""

    automatic_optimization: bool = False

    def __init__(self, run: StageRun, watcher: Watcher, stop: threading.Event) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.network = run.network
        self._run = run
        self._watcher = watcher
        self._stop = stop
        self._stepped_at = 0.0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self._run.optimizer

    def on_fit_start(self) -> None:
        self._run.to(self.device)
        self._stepped_at = time.monotonic()

    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Any:
        return batch.to(device)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        measured = self._run.train(batch, self.manual_backward, self._without_sync)
        now = time.monotonic()
        self._watcher.stepped(measured, now - self._stepped_at)
        self._stepped_at = now

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._run.step < self._run.num_steps and self._must_save():
            self._watcher.save()
            self._stepped_at = time.monotonic()
        if self._stop.is_set():
            raise Stopped(f"stopped after step {self._run.step}")

    def _must_save(self) -> bool:
        """All workers come to the same answer."""
        is_meeting = self._run.step % COORDINATION_STEPS == 0
        mine = self._stop.is_set() or self._watcher.wants_checkpoint()
        if self.trainer.world_size > 1:
            mine = is_meeting and bool(self.trainer.strategy.broadcast(mine, src=0))
        return mine or (is_meeting and self._watcher.is_preempted())

    def _without_sync(self) -> AbstractContextManager[object]:
        wrapped: Any = self.trainer.strategy.model
        return wrapped.no_sync() if hasattr(wrapped, "no_sync") else nullcontext()


class _Steps:
    """The inputs of the steps that are left, one prepared ahead on a thread."""

    def __init__(self, run: StageRun) -> None:
        self._run = run

    def __len__(self) -> int:
        return self._run.num_steps - self._run.step

    def __iter__(self) -> Iterator[Any]:
        first, last = self._run.step, self._run.num_steps
        with ThreadPoolExecutor(1, "prepare", initializer=_use_one_thread) as pool:
            upcoming = pool.submit(self._run.prepare, first) if first < last else None
            for step in range(first, last):
                if upcoming is None:
                    return
                inputs = upcoming.result()
                upcoming = pool.submit(self._run.prepare, step + 1) if step + 1 < last else None
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
    stop = threading.Event()
    module = StageModule(run, watcher, stop)
    with _on_sigterm(stop), warnings.catch_warnings():
        for message in UNHELPFUL_WARNINGS:
            warnings.filterwarnings("ignore", message=message)
        _trainer(world_size, in_ray).fit(module, train_dataloaders=_Steps(run))


def _trainer(world_size: int, in_ray: bool) -> pl.Trainer:
    options: dict[str, Any] = {}
    if in_ray:
        import ray.train.lightning

        for_ray: Any = ray.train.lightning
        options["plugins"] = [for_ray.RayLightningEnvironment()]
        if world_size > 1:
            import ray.train.torch  # the strategy asks it for the device

            options["strategy"] = for_ray.RayDDPStrategy(gradient_as_bucket_view=True)
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


@contextmanager
def _on_sigterm(stop: threading.Event) -> Iterator[None]:
    """Set ``stop`` on SIGTERM. Only a main thread can; Ray runs workers on another one, and tells
    of the machine's end by ``get_preemption_info``."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: stop.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
