"""Published parts that a recipe names by their folder: known by their bytes, wherever they lie.

A folder's digest takes its path's place in a stage's key, so that other bytes at the same place are
another result, and the same bytes at another place are none. What was read once is remembered
below the home folder for as long as the file has not been written again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra import storage
from infra.config import atelier_home
from infra.digests import canonical_json, sha256_bytes
from infra.errors import UserError

FOLDER_FIELDS = ("pretrained", "pretrained_bpe")  # of the tokenizer, the text encoder, and `init`
READ_SUFFIXES = (".json", ".safetensors", ".txt")  # what models are read from
THREADS = 4
READ_BYTES = 1 << 20


@dataclass(frozen=True)
class PublishedPart:
    """A folder that a recipe names: dotted ``field``, path or URI as written, digest."""

    field: str
    address: str
    sha256: str

    @property
    def whole_address(self) -> str:
        """The address as a worker finds it, wherever it stands."""
        return whole_address(self.address)


def whole_address(address: str) -> str:
    """A path without the folder that we stand in; a URI as it is."""
    return address if "://" in address else str(Path(address).expanduser().absolute())


def find_parts(configs: Mapping[str, Any]) -> tuple[PublishedPart, ...]:
    """The parts that a stage's configurations name, each read for its digest.

    Raises ``UserError`` when there is no model at such a place.
    """
    return tuple(
        PublishedPart(field, address, folder_digest(address, field))
        for field, address in _addresses(configs)
    )


def _addresses(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    found = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            found += _addresses(value, f"{prefix}{name}.")
        elif name in FOLDER_FIELDS and isinstance(value, str):
            found.append((prefix + name, value))
    return found


def with_digests(values: Mapping[str, Any], parts: tuple[PublishedPart, ...]) -> dict[str, Any]:
    """Configurations for a key: digests in the places of addresses."""
    return _replaced(values, {part.address: part.sha256 for part in parts})


def with_whole_paths(values: Mapping[str, Any]) -> dict[str, Any]:
    """Configurations for a worker: Ray puts each into a folder of its own."""
    return _replaced(values, {each: whole_address(each) for _, each in _addresses(values)})


def _replaced(values: Mapping[str, Any], by: Mapping[str, str]) -> dict[str, Any]:
    def replace(name: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return _replaced(value, by)
        return by[value] if name in FOLDER_FIELDS and isinstance(value, str) else value

    return {name: replace(name, value) for name, value in values.items()}


def check_part(address: str, sha256: str) -> None:
    """Raise ``UserError`` unless a folder still is what the plan saw."""
    got = folder_digest(address)
    if got != sha256:
        raise UserError(
            expected=f"{address} with digest {sha256[:12]}, as it was planned",
            got=got[:12],
            remedy="something wrote to it meanwhile: run the same command again",
        )


def folder_digest(address: str, field: str = "") -> str:
    """One sha256 over names and bytes of what models are read from in a folder, not below it."""
    uri = address if "://" in address else storage.file_uri(whole_address(address))
    uris = _files(uri)
    if not uris:
        raise UserError(
            expected=f"a published model in {address}" + (f" ({field})" if field else ""),
            got="no folder with one",
            remedy="correct the path; on a cluster name a folder or address that all machines read",
        )
    with ThreadPoolExecutor(THREADS) as pool:
        digests = list(pool.map(_file_digest, uris))
    names = [each.rpartition("/")[2] for each in uris]
    return sha256_bytes(canonical_json(dict(zip(names, digests, strict=True))))


def _files(uri: str) -> list[str]:
    depth = uri.rstrip("/").count("/") + 1
    return [
        info.uri
        for info in storage.list_objects(uri)
        if info.uri.count("/") == depth and info.uri.endswith(READ_SUFFIXES)
    ]


def _file_digest(uri: str) -> str:
    """The sha256 of a file, from memory while it is the one that was read."""
    note = atelier_home() / "cache" / "parts" / f"{sha256_bytes(uri.encode())[:32]}.json"
    known = storage.fingerprint(uri)
    with suppress(UserError, KeyError, TypeError):
        noted = storage.read_json(storage.file_uri(note))
        if known is not None and (noted["uri"], noted["fingerprint"]) == (uri, known):
            return str(noted["sha256"])
    digest = hashlib.sha256()
    with storage.open_stream(uri) as stream:
        while chunk := stream.read(READ_BYTES):
            digest.update(chunk)
    sha256 = digest.hexdigest()
    if known is not None and storage.fingerprint(uri) == known:
        with suppress(UserError):  # a home that cannot be written to: slower, no more
            noted = {"uri": uri, "fingerprint": known, "sha256": sha256}
            storage.write_json(storage.file_uri(note), noted)
    return sha256
