"""A run's checkpoints on storage: complete or not there, newest first, damage told and passed by.

``<run>/checkpoints/<generation>-<step>-<token>/`` holds one, its ``CHECKPOINT.json`` written last.
``generation`` counts how often the run went back to an earlier checkpoint, so that what was saved
before that never counts as newer; the random token keeps two writers out of one folder. There is
no pointer to move: a folder without its list is no checkpoint.
"""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from infra import storage
from infra.errors import UserError
from infra.storage import ObjectMissing
from training.node_copies import NodeCopies
from training.publish import LISTING_NAME, CheckpointFile, describe_folder

if TYPE_CHECKING:
    from training.checkpoint import Checkpoint
    from training.session import Session

CHECKPOINTS_FOLDER = "checkpoints"
RESULT_NAME = "result.json"  # only in a run's last checkpoint
_NAME = re.compile(r"(\d{3,})-(\d{8,})-[0-9a-f]{8}")

logger = logging.getLogger(__name__)


class CheckpointDamaged(UserError):
    """A checkpoint's bytes are not those that were written."""


@dataclass(frozen=True, order=True)
class StoredCheckpoint:
    """A complete checkpoint; the newest is the largest."""

    generation: int
    step: int
    uri: str


class CheckpointStore:
    """The checkpoints of one run below ``run_uri``."""

    def __init__(self, run_uri: str) -> None:
        self.uri = storage.join(run_uri, CHECKPOINTS_FOLDER)
        self._damaged: set[str] = set()
        self._copies = NodeCopies(self.uri)

    def complete(self) -> list[StoredCheckpoint]:
        """Every complete checkpoint, newest first; nothing is read of them."""
        found = []
        for info in storage.list_objects(self.uri):
            folder, _, name = info.uri.rpartition("/")
            match = _NAME.fullmatch(folder.rpartition("/")[2])
            if name == LISTING_NAME and match is not None:
                found.append(StoredCheckpoint(int(match[1]), int(match[2]), folder))
        return sorted(found, reverse=True)

    def put(self, folder: Path, generation: int, step: int) -> StoredCheckpoint:
        """Copy a sealed folder; it counts from its last write, that of the list, on."""
        uri = storage.join(self.uri, f"{generation:03}-{step:08}-{secrets.token_hex(4)}")
        for file in describe_folder(folder):
            if file.path != LISTING_NAME:
                _upload(folder, uri, file)
        storage.upload(folder / LISTING_NAME, storage.join(uri, LISTING_NAME))
        return StoredCheckpoint(generation, step, uri)

    def load(self, config_sha256: str, *, step: int | None = None) -> Loaded | None:
        """The newest checkpoint (of ``step``, when given) whose bytes are all right.

        Damaged ones are told and passed by. None when nothing was ever completed; raises
        ``CheckpointDamaged`` when nothing that was is right, ``UserError`` for another recipe's.
        """
        problems: list[str] = []
        self.let_go()
        newest_damaged: int | None = None
        for stored in self.complete():
            if step is not None and stored.step != step:
                continue
            try:
                loaded = self.load_one(stored, config_sha256)
            except (CheckpointDamaged, ObjectMissing) as error:
                self._damaged.add(stored.uri)
                newest_damaged = stored.step if newest_damaged is None else newest_damaged
                problems.append(f"step {stored.step}: {error}")
                logger.warning("passed by a damaged checkpoint, %s: %s", stored.uri, error)
                continue
            return replace(loaded, passed_by=tuple(problems), newest_damaged=newest_damaged)
        if problems:
            raise CheckpointDamaged(
                f"all {len(problems)} checkpoints under {self.uri} are damaged; {problems[0]}"
            )
        return None

    def load_one(self, stored: StoredCheckpoint, config_sha256: str) -> Loaded:
        """One checkpoint, every digest checked."""
        from training.checkpoint import load_checkpoint  # with torch, which a plan does without

        folder = self._folder_of(stored)
        is_finished = (folder / RESULT_NAME).is_file()
        return Loaded(stored, load_checkpoint(folder, config_sha256), is_finished)

    def result(self) -> tuple[str, dict[str, Any]] | None:
        """The address of the run's last checkpoint and what was measured; None before its end."""
        for stored in self.complete():
            try:
                found = storage.read_json(storage.join(stored.uri, RESULT_NAME))
            except ObjectMissing:
                return None
            return stored.uri, dict(found)
        return None

    def _folder_of(self, stored: StoredCheckpoint) -> Path:
        """The checkpoint as a local folder, not yet verified; in place where it lies here."""
        parts = urlsplit(stored.uri)
        if parts.scheme == "file":
            return Path(unquote(parts.path))
        return self._copies.folder(stored.uri)

    def let_go(self) -> None:
        """Remove what was fetched to this machine."""
        self._copies.let_go()

    def prune(self, num_kept: int, is_kept: Callable[[StoredCheckpoint], bool]) -> None:
        """Remove what ``num_kept`` newer checkpoints have replaced, unless ``is_kept``.

        Those found damaged count for nothing and go with the rest, and so do folders that were
        never completed; nothing goes before ``num_kept`` others are complete in full size.
        """
        sizes = {info.uri: info.num_bytes for info in storage.list_objects(self.uri)}
        good = [each for each in self.complete() if each.uri not in self._damaged]
        whole = [each for each in good if self._has_all_bytes(each, sizes)]
        if len(whole) < num_kept:
            return
        kept = {each.uri for each in whole[:num_kept]}
        kept |= {each.uri for each in good if is_kept(each)}
        folders = {uri[: len(self.uri)] + _first_part(uri[len(self.uri) :]) for uri in sizes}
        for folder in sorted(folders - kept):
            storage.delete(storage.join(folder, LISTING_NAME))
            storage.delete_prefix(folder)

    def discard_after(self, step: int) -> list[int]:
        """Remove what was saved after ``step``; returns the steps."""
        gone = [each for each in self.complete() if each.step > step]
        for stored in gone:
            storage.delete(storage.join(stored.uri, LISTING_NAME))
            storage.delete_prefix(stored.uri)
        return [each.step for each in gone]

    def _has_all_bytes(self, stored: StoredCheckpoint, sizes: dict[str, int]) -> bool:
        try:
            raw = storage.read_json(storage.join(stored.uri, LISTING_NAME))
            files = [CheckpointFile(**file) for file in raw["files"]]
        except (UserError, KeyError, TypeError):
            return False
        return all(sizes.get(storage.join(stored.uri, f.path)) == f.num_bytes for f in files)


@dataclass(frozen=True)
class Loaded:
    """A checkpoint that was read, whether it is the run's last, what was wrong with newer ones,
    a line each, and the step of the newest of these."""

    stored: StoredCheckpoint
    checkpoint: Checkpoint
    is_finished: bool = False
    passed_by: tuple[str, ...] = ()
    newest_damaged: int | None = None


def load_together(
    store: CheckpointStore, session: Session, config_sha256: str, *, step: int | None = None
) -> Loaded | None:
    """What ``CheckpointStore.load`` finds, the same one for every worker; all call it together.

    A machine fetches it once and reads it for all its workers; what they have in memory of it is
    theirs to drop.
    """
    store.let_go()  # of a start that was cut off
    session.barrier()
    found = store.load(config_sha256, step=step) if session.rank == 0 else None
    uri = session.from_first(None if found is None else found.stored.uri)
    if uri is None:
        return None
    if found is None:
        stored = next((each for each in store.complete() if each.uri == uri), None)
        if stored is None:
            raise CheckpointDamaged(f"the checkpoint {uri} is gone")
        found = store.load_one(stored, config_sha256)
    session.barrier()
    store.let_go()
    return found


def newest_step(run_uri: str) -> int | None:
    """The step of a run's newest complete checkpoint; None without one."""
    found = CheckpointStore(run_uri).complete()
    return found[0].step if found else None


def _upload(folder: Path, uri: str, file: CheckpointFile) -> None:
    stored = storage.upload(folder / file.path, storage.join(uri, file.path))
    if stored.sha256 != file.sha256:
        raise CheckpointDamaged(f"{file.path} changed while it was copied to {uri}")


def _first_part(path: str) -> str:
    return "/" + path.strip("/").split("/", 1)[0]
