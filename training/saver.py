"""Saving beside training: a snapshot at a step's end, written and copied by a thread.

One write at a time. Storage that is away is tried again while training goes on; anything else, or
storage that stays away, is raised at the end of the next step. What was saved before stays.
"""

from __future__ import annotations

import errno
import logging
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from urllib.parse import unquote, urlsplit

import torch
from safetensors import SafetensorError
from torch import Tensor

from infra.errors import UserError
from infra.storage import StorageUnavailable
from infra.storage_errors import DISK_FULL_ERRNOS
from training.checkpoint import Checkpoint, save_checkpoint, seal_folder
from training.checkpoint_store import CheckpointStore, StoredCheckpoint

RETRY_SECONDS = 2.0
ROOM_FACTOR = 1.05  # what a checkpoint takes beyond its tensors

logger = logging.getLogger(__name__)
AddFiles = Callable[[Path], None]


class CheckpointNotSaved(UserError):
    """A checkpoint could not be written; the one before it is kept."""


class Saver:
    """Writes a run's checkpoints, keeping ``num_kept`` and whatever ``is_kept`` says.

    ``patience_seconds`` is how long storage may refuse before a save counts as failed.
    ``seconds`` adds up what training waited for saves.
    """

    def __init__(
        self,
        store: CheckpointStore,
        *,
        num_kept: int,
        patience_seconds: float,
        local_dir: str | None = None,
        is_kept: Callable[[StoredCheckpoint], bool] = lambda stored: False,
    ) -> None:
        self.store = store
        self.last_saved: StoredCheckpoint | None = None
        self._num_kept = num_kept
        self._patience_seconds = patience_seconds
        self._local_dir = local_dir
        self._is_kept = is_kept
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None

    @property
    def is_busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._writing is not None and not self._writing.done()

    def check(self) -> None:
        """Raise what kept the last checkpoint from being written, once."""
        if self._writing is not None and self._writing.done():
            writing, self._writing = self._writing, None
            writing.result()

    def save(
        self, checkpoint: Checkpoint, generation: int, add_files: AddFiles | None = None
    ) -> None:
        """Write a checkpoint whose tensors nobody changes any more; waits for the one before."""
        self.wait()
        self._writing = self._pool.submit(self._write, checkpoint, generation, add_files)

    def wait(self) -> None:
        """Return when everything is written, or raise as ``check``."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def close(self) -> None:
        """End the thread after the write that is going on."""
        self._pool.shutdown(wait=True)

    def _write(self, checkpoint: Checkpoint, generation: int, add_files: AddFiles | None) -> None:
        step = checkpoint.state.step
        try:
            self._check_room(checkpoint)
            with tempfile.TemporaryDirectory(dir=self._local_dir) as scratch:
                folder = Path(scratch)
                save_checkpoint(folder, checkpoint)
                if add_files is not None:
                    add_files(folder)
                seal_folder(folder)
                self.last_saved = self._put(folder, generation, step)
        except (OSError, SafetensorError) as error:
            raise self._not_saved(step, _cause(error)) from error
        try:
            self.store.prune(self._num_kept, self._is_kept)
        except StorageUnavailable as error:
            logger.warning("old checkpoints stay for now: %s", error)

    def _put(self, folder: Path, generation: int, step: int) -> StoredCheckpoint:
        give_up_at = time.monotonic() + self._patience_seconds
        while True:
            try:
                return self.store.put(folder, generation, step)
            except StorageUnavailable as error:
                if time.monotonic() + RETRY_SECONDS > give_up_at:
                    raise self._not_saved(step, str(error)) from error
                logger.warning("the checkpoint of step %d waits: %s", step, error)
                time.sleep(RETRY_SECONDS)

    def _check_room(self, checkpoint: Checkpoint) -> None:
        tensors = [*checkpoint.weights.values(), *checkpoint.optimizer.values()]
        needed = int(sum(each.nbytes for each in tensors) * ROOM_FACTOR)
        places = [self._local_dir or tempfile.gettempdir()]
        if self.store.uri.startswith("file://"):
            places.append(unquote(urlsplit(self.store.uri).path))
        for place in places:
            free = shutil.disk_usage(_existing(Path(place))).free
            if free < needed:
                cause = f"it needs {needed / 1e9:.2f} GB in {place}, {free / 1e9:.2f} are free"
                raise self._not_saved(checkpoint.state.step, f"the disk is full: {cause}")

    def _not_saved(self, step: int, cause: str) -> CheckpointNotSaved:
        before = self.last_saved
        kept = "" if before is None else f"; that of step {before.step} is kept"
        return CheckpointNotSaved(
            f"the checkpoint of step {step} was not saved: {cause}{kept}; mend that, and run the "
            "same command again"
        )


def snapshot(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU that no later step changes."""
    copies = {
        name: tensor.detach().to("cpu", copy=True, non_blocking=tensor.is_cuda)
        for name, tensor in tensors.items()
    }
    if any(tensor.is_cuda for tensor in tensors.values()):
        torch.cuda.synchronize()
    return copies


def _cause(error: OSError | SafetensorError) -> str:
    full = isinstance(error, OSError) and error.errno in DISK_FULL_ERRNOS
    if full or any(f"code: {number}" in str(error) for number in (errno.ENOSPC, errno.EFBIG)):
        return "the disk is full"
    return str(error)


def _existing(path: Path) -> Path:
    return next(each for each in (path, *path.parents) if each.exists())
