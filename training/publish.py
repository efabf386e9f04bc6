"""Publishing a checkpoint: an immutable folder named by its content, complete or not there.

``<store>/models/<stage>/<sha>/`` holds the exported model, ``provenance.json`` and, written last,
``CHECKPOINT.json``, which lists every file with size and sha256. ``<sha>`` is the sha256 of the
canonical ``{path: sha256}`` of the exported files, so equal weights share a folder whoever made
them. Readers trust only what ``CHECKPOINT.json`` lists, and check digests.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from infra import storage
from infra.config import atelier_home
from infra.digests import canonical_json, sha256_bytes, sha256_file
from infra.errors import UserError
from infra.storage import DigestMismatch, ObjectMissing

LISTING_NAME = "CHECKPOINT.json"
PROVENANCE_NAME = "provenance.json"
LISTING_SCHEMA = 1
EXPORT_PREFIX = "export/"  # where a run's last checkpoint holds the exported model
VERIFY_THREADS = 4
READ_BYTES = 1 << 20


@dataclass(frozen=True)
class CheckpointFile:
    """A file of a published checkpoint; ``path`` is relative to its folder."""

    path: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class PublishedCheckpoint:
    """A complete checkpoint folder on storage; ``sha256`` is its content's and its folder's."""

    uri: str
    sha256: str
    files: tuple[CheckpointFile, ...]

    @property
    def num_bytes(self) -> int:
        """The size of all files."""
        return sum(file.num_bytes for file in self.files)


def describe_folder(folder: Path) -> tuple[CheckpointFile, ...]:
    """Every file below ``folder`` with size and digest, by path; refuses an empty folder."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    if not paths:
        raise UserError(expected=f"an exported model in {folder}", got="no files")
    return tuple(
        CheckpointFile(path.relative_to(folder).as_posix(), path.stat().st_size, sha256_file(path))
        for path in paths
    )


def content_sha256(files: Iterable[CheckpointFile]) -> str:
    """The name of a checkpoint: provenance and the listing itself do not count."""
    digests = {
        file.path: file.sha256 for file in files if file.path not in (PROVENANCE_NAME, LISTING_NAME)
    }
    return sha256_bytes(canonical_json(digests))


def checkpoint_uri(store_uri: str, stage: str, sha256: str) -> str:
    """``<store>/models/<stage>/<sha>``."""
    return storage.join(store_uri, "models", stage, sha256)


def publish_folder(
    folder: Path,
    store_uri: str,
    stage: str,
    provenance: Mapping[str, Any],
    *,
    before_listing: Callable[[], None] | None = None,
) -> PublishedCheckpoint:
    """Upload an exported model and make it visible by writing ``CHECKPOINT.json`` last.

    Repeating it after a crash completes the same folder; one that is complete is checked and left
    as it is. ``before_listing`` runs just before the last write and may raise to stop it.
    """
    exported = describe_folder(folder)
    reserved = {PROVENANCE_NAME, LISTING_NAME} & {file.path for file in exported}
    if reserved:
        raise ValueError(f"{folder} already holds {sorted(reserved)}")
    sha256 = content_sha256(exported)
    uri = checkpoint_uri(store_uri, stage, sha256)
    if storage.exists(storage.join(uri, LISTING_NAME)):
        problems = verify_checkpoint(uri)
        if problems:
            raise UserError(f"{damage_message(uri, problems)}")
        return read_listing(uri)
    for name, stored in storage.upload_folder(folder, uri).items():
        expected = next(file for file in exported if file.path == name)
        if stored.sha256 != expected.sha256:
            raise UserError(f"{folder / name} changed while it was uploaded; run it again")
    provenance_bytes = canonical_json(dict(provenance))
    storage.write_bytes(storage.join(uri, PROVENANCE_NAME), provenance_bytes)
    proof = CheckpointFile(PROVENANCE_NAME, len(provenance_bytes), sha256_bytes(provenance_bytes))
    files = tuple(sorted((*exported, proof), key=lambda file: file.path))
    if before_listing is not None:
        before_listing()
    listing = {
        "schema_version": LISTING_SCHEMA,
        "sha256": sha256,
        "files": [asdict(file) for file in files],
    }
    storage.write_json(storage.join(uri, LISTING_NAME), listing)
    return PublishedCheckpoint(uri, sha256, files)


def read_listing(uri: str) -> PublishedCheckpoint:
    """A checkpoint's listing, checked against itself and against the folder's name.

    Raises ``ObjectMissing`` when the checkpoint is not there (or was never completed) and
    ``UserError`` when its listing is damaged.
    """
    raw = storage.read_json(storage.join(uri, LISTING_NAME))
    try:
        if raw["schema_version"] != LISTING_SCHEMA:
            raise UserError(
                expected=f"checkpoint schema {LISTING_SCHEMA} at {uri}",
                got=repr(raw["schema_version"]),
                remedy="use the version of atelier that wrote it",
            )
        files = tuple(CheckpointFile(**file) for file in raw["files"])
        sha256 = str(raw["sha256"])
        names_ok = all(_is_inside(file.path) for file in files)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            expected=f"a checkpoint's listing at {storage.join(uri, LISTING_NAME)}",
            got="something else",
            remedy="restore it, or delete the folder to train the stage again",
        ) from error
    folder = uri.rstrip("/").rsplit("/", 1)[-1]
    if not names_ok or not files or content_sha256(files) != sha256 or folder != sha256:
        raise UserError(
            expected=f"{storage.join(uri, LISTING_NAME)} to list the files of {folder}",
            got=f"a list that adds up to {content_sha256(files)}",
            remedy="restore it, or delete the folder to train the stage again",
        )
    return PublishedCheckpoint(uri.rstrip("/"), sha256, files)


def _is_inside(path: str) -> bool:
    pure = PurePosixPath(path)
    return bool(path) and not pure.is_absolute() and ".." not in pure.parts and "\0" not in path


def read_provenance(uri: str) -> dict[str, Any]:
    """Where a published checkpoint comes from, checked against the listing."""
    listing = read_listing(uri)
    expected = next((file for file in listing.files if file.path == PROVENANCE_NAME), None)
    address = storage.join(uri, PROVENANCE_NAME)
    if expected is None:
        raise ObjectMissing(address)
    data = storage.read_bytes(address)
    if sha256_bytes(data) != expected.sha256:
        raise DigestMismatch(
            address, expected_sha256=expected.sha256, got_sha256=sha256_bytes(data)
        )
    raw = storage.read_json(address)
    return dict(raw)


def verify_checkpoint(uri: str) -> list[str]:
    """What is wrong with a published checkpoint, a line per file; empty when all bytes are right.

    Reads everything. Raises ``ObjectMissing`` when there is no listing at all.
    """
    try:
        listing = read_listing(uri)
    except ObjectMissing:
        raise
    except UserError as error:
        return [str(error)]
    with ThreadPoolExecutor(VERIFY_THREADS) as pool:
        found = pool.map(lambda file: _file_problem(uri, file), listing.files)
        return [problem for problem in found if problem is not None]


def _file_problem(uri: str, file: CheckpointFile) -> str | None:
    digest = hashlib.sha256()
    num_bytes = 0
    try:
        with storage.open_stream(storage.join(uri, file.path)) as stream:
            while chunk := stream.read(READ_BYTES):
                digest.update(chunk)
                num_bytes += len(chunk)
    except ObjectMissing:
        return f"{file.path}: missing"
    if num_bytes != file.num_bytes:
        return f"{file.path}: expected {file.num_bytes} bytes, got {num_bytes}"
    if digest.hexdigest() != file.sha256:
        return f"{file.path}: expected sha256 {file.sha256}, got {digest.hexdigest()}"
    return None


def damage_message(uri: str, problems: list[str]) -> str:
    """One line for a damaged checkpoint: the first file, how many more, and the remedy."""
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return (
        f"checkpoint {uri} is damaged: {problems[0]}{more}; "
        "restore it, or delete the folder to train the stage again"
    )


def fetch_checkpoint(uri: str, cache_dir: Path | None = None) -> Path:
    """A local copy of a published checkpoint, every digest checked; fetched once per content.

    Lies in ``<cache_dir>/<sha>`` (``<atelier home>/cache/models`` when ``None``). What is already
    there and right is kept, what is damaged is fetched again. Raises ``DigestMismatch`` when
    storage itself holds other bytes.
    """
    listing = read_listing(uri)
    root = cache_dir if cache_dir is not None else atelier_home() / "cache" / "models"
    folder = root / listing.sha256
    marker = folder / LISTING_NAME

    def fetch(file: CheckpointFile) -> None:
        target = folder / file.path
        if not (target.is_file() and sha256_file(target) == file.sha256):
            storage.download(storage.join(uri, file.path), target, sha256=file.sha256)

    with ThreadPoolExecutor(VERIFY_THREADS) as pool:
        list(pool.map(fetch, listing.files))
    storage.download(storage.join(uri, LISTING_NAME), marker)
    return folder


def fetch_export(checkpoint_uri: str, scratch: Path) -> Path:
    """The exported model inside a run's last checkpoint, copied to ``scratch`` and verified.

    A run's checkpoint lists its own files in ``CHECKPOINT.json``; only those below ``export/``
    are fetched. Raises ``UserError`` when there is none, ``DigestMismatch`` when it is damaged.
    """
    raw = storage.read_json(storage.join(checkpoint_uri, LISTING_NAME))
    try:
        files = [CheckpointFile(**file) for file in raw["files"]]
    except (KeyError, TypeError) as error:
        raise UserError(
            expected=f"a checkpoint's listing at {storage.join(checkpoint_uri, LISTING_NAME)}",
            got="something else",
            remedy="delete the run's folder to train the stage again",
        ) from error
    exported = [file for file in files if file.path.startswith(EXPORT_PREFIX)]
    if not exported or not all(_is_inside(file.path) for file in exported):
        raise UserError(f"{checkpoint_uri} holds no exported model: the training did not finish")

    def fetch(file: CheckpointFile) -> None:
        target = scratch / file.path.removeprefix(EXPORT_PREFIX)
        storage.download(storage.join(checkpoint_uri, file.path), target, sha256=file.sha256)

    with ThreadPoolExecutor(VERIFY_THREADS) as pool:
        list(pool.map(fetch, exported))
    return scratch
