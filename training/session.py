"""What a training function has around it: its rank, its last checkpoint, and where to report."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol


class Session(Protocol):
    """Ray Train's worker, or a folder when there is none."""

    rank: int
    world_size: int
    in_ray: bool

    def last_checkpoint(self) -> AbstractContextManager[Path | None]:
        """The run's last checkpoint as a local folder, while the context lasts."""

    def report(self, metrics: Mapping[str, float], folder: Path | None) -> None:
        """Hand over a checkpoint with its metrics; all workers call it together, the first one
        with a folder. Takes a second or two."""

    def barrier(self) -> None:
        """Wait for all workers."""

    def is_preempted(self) -> bool:
        """Whether a machine under this run is about to go; all workers ask together."""


class RaySession:
    """This process is a worker of Ray Train."""

    in_ray = True

    def __init__(self) -> None:
        import ray.train

        context = ray.train.get_context()
        self.rank = int(context.get_world_rank())
        self.world_size = int(context.get_world_size())
        self._watches = os.environ.get("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "1") != "0"

    @contextmanager
    def last_checkpoint(self) -> Iterator[Path | None]:
        import ray.train

        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            yield None
            return
        with checkpoint.as_directory() as folder:
            yield Path(folder)

    def report(self, metrics: Mapping[str, float], folder: Path | None) -> None:
        import ray.train

        checkpoint = None
        if folder is not None:
            checkpoint = ray.train.Checkpoint.from_directory(str(folder))
        ray.train.report(dict(metrics), checkpoint=checkpoint)

    def barrier(self) -> None:
        import ray.train.collective

        if self.world_size > 1:
            ray.train.collective.barrier()

    def is_preempted(self) -> bool:
        import ray.train

        return self._watches and ray.train.get_preemption_info() is not None


class FolderSession:
    """A single worker without Ray; each checkpoint replaces the one before it in ``folder``."""

    in_ray = False
    rank = 0
    world_size = 1

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.reported: list[dict[str, float]] = []

    @contextmanager
    def last_checkpoint(self) -> Iterator[Path | None]:
        yield self._folder if self._folder.is_dir() else None

    def report(self, metrics: Mapping[str, float], folder: Path | None) -> None:
        self.reported.append(dict(metrics))
        if folder is not None:
            if self._folder.is_dir():
                shutil.rmtree(self._folder)
            shutil.copytree(folder, self._folder)

    def barrier(self) -> None:
        return

    def is_preempted(self) -> bool:
        return False
