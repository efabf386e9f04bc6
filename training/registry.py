"""Aliases of registered models: which version is `ready`, moved with care and a history.

An alias in MLflow is last-writer-wins and remembers nothing. Here it is moved under a lease,
against the version its mover saw, re-read afterwards, and written down in
``<store>/models/<stage>/alias_log.json``, from which ``rollback`` takes the version before.
"""

from __future__ import annotations

import getpass
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from datetime import UTC, datetime
from typing import Any, Literal

from infra import storage
from infra.errors import UserError
from infra.lease import Lease
from infra.storage import ObjectMissing
from infra.tracking_server import TrackingRefused, TrackingServer
from training.publish import damage_message, verify_checkpoint
from training.versions import (
    PASSED,
    TAG_GATE,
    TAG_STAGE,
    TAG_STAGE_KEY,
    RegisteredVersion,
    get_version,
    version_from_json,
)

READY = "ready"
CANDIDATE = "candidate"
SETTLE_SECONDS = 0.2

Kind = Literal["promote", "rollback"]


@dataclass(frozen=True)
class AliasMove:
    """One line of the history; ``at`` is ISO time in UTC, ``old`` None at first. An
    identity, ``<stage key>/<sha256>``, says what was moved also when MLflow was made again and
    counts versions anew; a history older than they are has none."""

    model: str
    alias: str
    old: int | None
    new: int
    kind: Kind
    who: str
    why: str
    at: str
    old_identity: str = ""
    new_identity: str = ""


def version_by_alias(
    server: TrackingServer, name: str, alias: str = READY
) -> RegisteredVersion | None:
    """The version an alias points to now, or None. Resolve once in a plan, then pin it."""
    query = {"name": name, "alias": alias}
    try:
        answer = server.call("GET", "mlflow/registered-models/alias", query=query)
    except TrackingRefused as error:
        if error.code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise
    return version_from_json(answer["model_version"])


def promote(
    server: TrackingServer,
    store_uri: str,
    version: RegisteredVersion,
    alias: str = READY,
    *,
    why: str,
    expected: int | Literal["any"] | None = "any",
    kind: Kind = "promote",
    who: str | None = None,
) -> AliasMove | None:
    """Point ``alias`` to ``version`` and write it down; None when both is so already.

    ``expected`` is the version number the alias must have now (None: no alias yet). Raises
    ``UserError`` when it has another, when somebody else is moving it, or when a version that
    did not pass its gate is to be ready.
    """
    if alias == READY and version.tags.get(TAG_GATE) != PASSED:
        raise UserError(
            expected=f"{version.name} version {version.version} to have passed its gate",
            got=version.tags.get(TAG_GATE, "no gate result"),
            remedy="promote a version that did",
        )
    stage = version.tags.get(TAG_STAGE, "")
    owner = who or _who()
    lease_uri = storage.join(store_uri, "models", stage, "alias_lease.json")
    with Lease(lease_uri, owner, settle_seconds=SETTLE_SECONDS) as lease:
        current = version_by_alias(server, version.name, alias)
        old = None if current is None else current.version
        if expected != "any" and old != expected:
            raise UserError(
                expected=f"{version.name}@{alias} to be version {expected}",
                got=f"version {old}",
                remedy="somebody moved it: look at its history and decide again",
            )
        lease.check()
        if old != version.version:
            _set_alias(server, version, alias)
        log_uri = _log_uri(store_uri, stage)
        moves = _read_log(log_uri)
        last = _latest([move for move in moves if move.model == version.name], alias)
        if last is not None and last.new == version.version:
            return None
        before, was = old, "" if current is None else _identity(current)
        if old == version.version:  # moved by one who was killed before writing it down
            before, was = (None, "") if last is None else (last.new, last.new_identity)
        move = AliasMove(
            version.name, alias, before, version.version, kind, owner, why, _now(),
            was, _identity(version),
        )  # fmt: skip
        storage.write_json(log_uri, [asdict(each) for each in (*moves, move)])
        return move


def promote_verified(
    server: TrackingServer, store_uri: str, version: RegisteredVersion, *, why: str
) -> AliasMove | None:
    """``promote`` to ready, of a version that lies in this store and whose every byte is right."""
    check_place(store_uri, version)
    problems = verify_checkpoint(version.uri)
    if problems:
        raise UserError(damage_message(version.uri, problems))
    return promote(server, store_uri, version, READY, why=why)


def check_place(store_uri: str, version: RegisteredVersion) -> None:
    """Raise ``UserError`` unless a version's files lie where this store puts them.

    Whoever can write to MLflow can name any address as a version's source. The address has one
    right spelling, so that nothing (``..``, ``%2e``, a link's name) leads out of the store.
    """
    stage = version.tags.get(TAG_STAGE, "")
    expected = storage.join(store_uri, "models", stage, version.sha256)
    if not (stage and version.sha256) or version.uri.rstrip("/") != expected:
        raise UserError(
            expected=f"version {version.version} of {version.name} to lie at {expected}",
            got=version.uri,
            remedy="name the store it was made in (services.store_uri), or train it again here",
        )


def _set_alias(server: TrackingServer, version: RegisteredVersion, alias: str) -> None:
    body = {"name": version.name, "alias": alias, "version": str(version.version)}
    server.call("POST", "mlflow/registered-models/alias", body)
    after = version_by_alias(server, version.name, alias)
    if after is None or after.version != version.version:
        raise UserError(
            expected=f"{version.name}@{alias} to be version {version.version}",
            got="no version" if after is None else f"version {after.version}",
            remedy="somebody else moves it too; run the command again",
        )


def rollback(
    server: TrackingServer, store_uri: str, name: str, stage: str, *, why: str = "rollback"
) -> AliasMove:
    """Point ``ready`` back to the version that was ready before; doing it twice goes back twice.

    Its files are verified first. Raises ``UserError`` when there is none, or it is damaged.
    """
    current = version_by_alias(server, name, READY)
    before = _ready_before(history(store_uri, stage, name), current)
    if current is None or before is None:
        raise UserError(
            expected=f"an earlier ready version of {name}",
            got="none in its history",
            remedy="choose one and promote it",
        )
    target = get_version(server, name, before)
    check_place(store_uri, target)
    problems = verify_checkpoint(target.uri)
    if problems:
        raise UserError(damage_message(target.uri, problems))
    move = promote(
        server, store_uri, target, READY, why=why, expected=current.version, kind="rollback"
    )
    if move is None:
        raise UserError(f"{name}@{READY} is version {before} already")
    return move


def _ready_before(moves: Iterable[AliasMove], current: RegisteredVersion | None) -> int | None:
    """The history as a stack: a promotion puts a version on it, a rollback takes one off."""
    stack: list[int] = []
    for move in moves:
        if move.alias != READY:
            continue
        if move.kind == "rollback" and move.new in stack:
            while stack[-1] != move.new:
                stack.pop()
        else:
            stack.append(move.new)
    if current is not None and stack and stack[-1] == current.version:
        stack.pop()
    return stack[-1] if stack else None


def withdrawn(moves: Iterable[AliasMove], version: RegisteredVersion) -> AliasMove | None:
    """The rollback that took ``ready`` from this version; None when there was none, or it was
    promoted since."""
    found = None

    def is_meant(number: int | None, identity: str) -> bool:
        return identity == _identity(version) if identity else number == version.version

    for move in moves:
        if move.alias == READY and is_meant(move.new, move.new_identity):
            found = None
        elif move.alias == READY and move.kind == "rollback":
            found = move if is_meant(move.old, move.old_identity) else found
    return found


def newest_in_use(
    store_uri: str, versions: Sequence[RegisteredVersion]
) -> RegisteredVersion | None:
    """The newest of the versions of a key that no rollback took back; None when there are none.

    Raises ``UserError`` when all were: such a version counts for nothing until it is promoted.
    """
    if not versions:
        return None
    newest = versions[-1]
    name, stage = newest.name, newest.tags.get(TAG_STAGE, "")
    moves = history(store_uri, stage, name)
    for version in reversed(versions):
        if withdrawn(moves, version) is None:
            return version
    move = withdrawn(moves, newest)
    told = "" if move is None else f" by {move.who}: {_one_line(move.why)}"
    raise UserError(
        f"stage {stage}: version {newest.version} of {name}, which has this key, was rolled "
        f"back{told}; promote it (`atelier promote {name} {newest.version}`), or change the recipe"
    )


def ready_elsewhere(
    server: TrackingServer, store_uri: str, version: RegisteredVersion
) -> str | None:
    """In words which other version of the model is `ready`, and why; None when this one is."""
    ready = version_by_alias(server, version.name)
    if ready is not None and ready.version == version.version:
        return None
    if ready is None:
        return "no version is ready"
    last = _latest(history(store_uri, version.tags.get(TAG_STAGE, ""), version.name), READY)
    why = "moved in MLflow itself"
    if last is not None and last.new == ready.version:
        why = f"{last.kind} by {last.who}: {_one_line(last.why)}"
    return f"ready is version {ready.version} ({why})"


def history(store_uri: str, stage: str, model: str | None = None) -> list[AliasMove]:
    """Every move of the aliases of a stage, oldest first; of one registered model when given."""
    moves = _read_log(_log_uri(store_uri, stage))
    return [move for move in moves if model is None or move.model == model]


def _latest(moves: Iterable[AliasMove], alias: str) -> AliasMove | None:
    of_alias = [move for move in moves if move.alias == alias]
    return of_alias[-1] if of_alias else None


def _identity(version: RegisteredVersion) -> str:
    return f"{version.tags.get(TAG_STAGE_KEY, '')}/{version.sha256}"


def _one_line(why: str) -> str:
    return " ".join(why.split())


def _log_uri(store_uri: str, stage: str) -> str:
    return storage.join(store_uri, "models", stage, "alias_log.json")


def _read_log(uri: str) -> list[AliasMove]:
    try:
        raw: Any = storage.read_json(uri)
    except ObjectMissing:
        return []
    names = {one.name for one in fields(AliasMove)}
    needed = {one.name for one in fields(AliasMove) if one.default is MISSING}
    if not isinstance(raw, list) or any(not needed <= set(move) <= names for move in raw):
        raise UserError(
            expected=f"an alias history at {uri}", got="something else", remedy="restore it"
        )
    return [AliasMove(**move) for move in raw]


def _who() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
