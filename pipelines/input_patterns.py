"""The files behind addresses, paths, folders and globs of a recipe."""

from __future__ import annotations

import fnmatch
import glob
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote

from infra import storage
from infra.errors import UserError

_GLOB = frozenset("*?[")


def uris_behind(patterns: Sequence[str]) -> list[str]:
    """The URIs behind URIs, paths, folders and globs, each once."""
    uris: dict[str, None] = {}
    for pattern in patterns:
        matches = _matches(pattern)
        if not matches:
            raise UserError(
                expected=f"at least one parquet file at {pattern}",
                got="none",
                remedy="check the path; a folder stands for the *.parquet files in it, others are "
                "named: *.jsonl, *.tar",
            )
        uris.update(dict.fromkeys(matches))
    return list(uris)


def _matches(pattern: str) -> list[str]:
    if pattern.startswith("s3://"):
        return _matches_on_s3(pattern)
    if "://" in pattern and not pattern.startswith("file:///"):
        raise UserError(
            expected="s3://bucket/key, file:///path or a path", got=pattern, remedy="mind the //"
        )
    path = unquote(pattern[len("file://") :]) if pattern.startswith("file://") else pattern
    if Path(path).is_dir():
        path = str(Path(path) / "*.parquet")
    if not _GLOB & set(path) or Path(path).exists():
        return [storage.file_uri(path)] if Path(path).exists() else []
    return [storage.file_uri(match) for match in sorted(glob.glob(path, recursive=True))]


def _matches_on_s3(pattern: str) -> list[str]:
    if not _GLOB & set(pattern):
        if storage.exists(pattern):
            return [pattern]
        pattern = pattern.rstrip("/") + "/*.parquet"
    folder = pattern[: min(pattern.index(sign) for sign in _GLOB if sign in pattern)]
    folder = folder.rpartition("/")[0]
    listed = (info.uri for info in storage.list_objects(folder))
    return [uri for uri in listed if fnmatch.fnmatchcase(uri, pattern)]
