"""One driver at a time: a lease object on storage, with an attempt number as a fence.

Storage without conditional writes cannot decide a race, so a taker writes a unique token, waits,
and reads again: the last writer holds the lease and the other one is told. No clock is compared
between machines. Whether the holder lives is decided by its process when it runs on this machine,
and otherwise by watching whether its heartbeat counter moves.

A holder that was frozen and replaced finds another token in the lease: ``check()`` before every
step that others can see.
"""

from __future__ import annotations

import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from types import TracebackType
from typing import Any, Self

from infra import storage
from infra.errors import UserError
from infra.local.processes import identify
from infra.storage import ObjectMissing, StorageUnavailable

HEARTBEAT_SECONDS = 3.0
STALE_SECONDS = 20.0
SETTLE_SECONDS = 0.3
POLL_SECONDS = 0.5

_TOKENS_HELD_HERE: set[str] = set()


class LeaseHeld(UserError):
    """Somebody else holds the lease and is alive."""


class LeaseLost(UserError):
    """This holder was replaced; it must publish nothing more."""


@dataclass(frozen=True)
class LeaseRecord:
    """What lies on storage. ``attempt`` grows by one with every holder, ``beat`` with every
    heartbeat; ``machine``, ``pid`` and ``process_started`` identify the holding process."""

    owner: str
    token: str
    attempt: int
    beat: int
    machine: str
    pid: int
    process_started: str
    held: bool


class Lease:
    """``with Lease(uri, owner) as lease: … lease.check() …``; ``lease.attempt`` numbers the try.

    ``owner`` is shown to whoever is refused (a user, a host, a command).
    """

    def __init__(
        self,
        uri: str,
        owner: str,
        *,
        heartbeat_seconds: float = HEARTBEAT_SECONDS,
        stale_seconds: float = STALE_SECONDS,
        settle_seconds: float = SETTLE_SECONDS,
        on_lost: Callable[[], None] | None = None,
    ) -> None:
        self.uri = uri
        self._owner = owner
        self._heartbeat_seconds = heartbeat_seconds
        self._stale_seconds = stale_seconds
        self._settle_seconds = settle_seconds
        self._on_lost = on_lost
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._record: LeaseRecord | None = None
        self._lost = False

    @property
    def attempt(self) -> int:
        """The number of this try, from 1; 0 before ``acquire``."""
        return 0 if self._record is None else self._record.attempt

    def acquire(self) -> int:
        """Take the lease and keep it alive from a thread; returns the attempt number.

        Raises ``LeaseHeld`` when its holder lives. On another machine, finding out takes up to
        ``stale_seconds`` (20 s).
        """
        found = _read(self.uri)
        if found is not None and found.held:
            self._refuse_if_alive(found)
        mine = LeaseRecord(
            owner=self._owner,
            token=secrets.token_hex(16),
            attempt=1 if found is None else found.attempt + 1,
            beat=0,
            machine=_machine(),
            pid=os.getpid(),
            process_started=_started_at(os.getpid()),
            held=True,
        )
        storage.write_json(self.uri, asdict(mine))
        time.sleep(self._settle_seconds)
        winner = _read(self.uri)
        if winner is None or winner.token != mine.token:
            raise LeaseHeld(_held_message(self.uri, winner or mine))
        self._record = mine
        _TOKENS_HELD_HERE.add(mine.token)
        self._lost = False
        self._stop.clear()
        self._thread = threading.Thread(target=self._beat_loop, name="lease", daemon=True)
        self._thread.start()
        return mine.attempt

    def check(self) -> None:
        """Read the lease again; raises ``LeaseLost`` when it is not this holder's any more."""
        if self._record is None:
            raise RuntimeError("the lease was not acquired")
        found = _read(self.uri)
        if self._lost or found is None or found.token != self._record.token or not found.held:
            self._lost = True
            if found is None:  # the embedded server was killed as it took a heartbeat, for one
                raise LeaseLost(
                    f"{self.uri} is gone, so attempt {self._record.attempt} publishes nothing; "
                    "run the same command again"
                )
            raise LeaseLost(
                f"attempt {self._record.attempt} lost {self.uri} to {found.owner} (attempt "
                f"{found.attempt}) and publishes nothing; wait for that one, or run the same "
                "command again"
            )

    def release(self) -> None:
        """Give the lease back, keeping its attempt number; a lost one is left alone."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        record, self._record = self._record, None
        if record is None:
            return
        _TOKENS_HELD_HERE.discard(record.token)
        if self._lost:
            return
        found = _read(self.uri)
        if found is not None and found.token == record.token:
            storage.write_json(self.uri, asdict(replace(found, held=False)))

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.release()
        except UserError:
            if error is None:
                raise

    def _refuse_if_alive(self, found: LeaseRecord) -> None:
        if found.machine == _machine():
            if _is_alive(found):
                raise LeaseHeld(_held_message(self.uri, found))
            return
        give_up_at = time.monotonic() + self._stale_seconds
        while time.monotonic() < give_up_at:
            time.sleep(min(POLL_SECONDS, self._heartbeat_seconds / 2))
            now = _read(self.uri)
            if now is None or not now.held:
                return
            if (now.token, now.beat) != (found.token, found.beat):
                raise LeaseHeld(_held_message(self.uri, now))

    def _beat_loop(self) -> None:
        while not self._stop.wait(self._heartbeat_seconds):
            record = self._record
            if record is None or self._lost:
                return
            try:
                found = _read(self.uri)
                if found is None or found.token != record.token:
                    self._lost = True
                    if self._on_lost is not None:
                        self._on_lost()
                    return
                if not self._stop.is_set():
                    storage.write_json(self.uri, asdict(replace(found, beat=found.beat + 1)))
            except StorageUnavailable:
                continue  # storage is away: the next beat tries again, check() will tell


def refuse_if_held(uri: str, *, also_by_this_process: bool = True) -> bool:
    """Raise ``LeaseHeld`` when the lease's holder is alive; takes nothing.

    Returns whether the lease is marked as held by somebody who is not alive any more.
    """
    found = _read(uri)
    if found is None or not found.held:
        return False
    if found.token in _TOKENS_HELD_HERE and not also_by_this_process:
        return False
    Lease(uri, "")._refuse_if_alive(found)
    return True


def _read(uri: str) -> LeaseRecord | None:
    try:
        raw = storage.read_json(uri)
    except ObjectMissing:
        return None
    names = {field.name for field in fields(LeaseRecord)}
    if not isinstance(raw, dict) or set(raw) != names:
        raise UserError(
            expected=f"a lease at {uri}", got="something else", remedy="remove it when nobody runs"
        )
    return LeaseRecord(**_typed(raw))


def _typed(raw: dict[str, Any]) -> dict[str, Any]:
    numbers = ("attempt", "beat", "pid")
    return {name: int(value) if name in numbers else value for name, value in raw.items()}


def _held_message(uri: str, holder: LeaseRecord) -> str:
    return (
        f"{holder.owner} (process {holder.pid}, attempt {holder.attempt}) is already working "
        f"on this; wait for it or stop it, then run the same command again; the lease is {uri}"
    )


def _is_alive(holder: LeaseRecord) -> bool:
    """Whether a holder on this machine still works; in this process, whether it gave up."""
    if holder.pid == os.getpid():
        return holder.token in _TOKENS_HELD_HERE
    return _started_at(holder.pid) == holder.process_started


def _started_at(pid: int) -> str:
    found = identify(pid)
    return "ended" if found is None else found.started_at


def _machine() -> str:
    """This host and process namespace: where a pid means something."""
    try:
        return f"{socket.gethostname()}|{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()
