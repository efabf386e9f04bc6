"""One way to turn things into bytes and bytes into a name."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import os
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from infra.config import atelier_home
from infra.errors import UserError

READ_CHUNK_BYTES = 1 << 20


def canonical_json(obj: Any) -> bytes:
    """``obj`` as UTF-8 JSON with sorted keys and no spaces: equal values give equal bytes.

    Raises ``ValueError`` for NaN and infinities and ``TypeError`` for what JSON cannot hold,
    also for keys that are not strings (JSON would turn 1 and "1" into the same key).
    """
    _refuse_other_keys(obj)
    text = json.dumps(
        obj, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return text.encode("utf-8")


def _refuse_other_keys(obj: Any) -> None:
    if isinstance(obj, dict):
        for key, value in obj.items():
            if not isinstance(key, str):
                raise TypeError(f"canonical JSON takes string keys, got {key!r}")
            _refuse_other_keys(value)
    elif isinstance(obj, (list, tuple)):
        for value in obj:
            _refuse_other_keys(value)


def sha256_bytes(data: bytes) -> str:
    """The sha256 of ``data`` as 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: str | Path) -> str:
    """The sha256 of a file's bytes as 64 hex digits, read in chunks of 1 MiB."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(READ_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def folder_sha256(folder: Path, *patterns: str) -> str:
    """The digest of a folder: the names below it of its files and their digests.

    With ``patterns`` (``*.json``, ``part/*``) of these files alone.
    """
    found = {path for pattern in patterns or ("**/*",) for path in folder.glob(pattern)}
    files = sorted(path for path in found if path.is_file())
    return sha256_bytes(
        canonical_json({path.relative_to(folder).as_posix(): sha256_file(path) for path in files})
    )


def code_digest(*packages: str) -> str:
    """The sha256 over the code of the named packages or modules, as 64 hex digits.

    Every ``.py`` file under a package counts by its dotted name and its syntax tree without
    docstrings, so comments, formatting and prose do not change the digest and code does.
    The packages are located, not imported.
    """
    found: dict[str, Path] = {}
    for package in packages:
        found.update(_source_files(package))
    sources = {name: found[name].read_bytes() for name in sorted(found)}
    return _remembered(_bytes_digest(sources), lambda: _syntax_digest(sources))


def _bytes_digest(sources: Mapping[str, bytes]) -> str:
    """Of the very bytes, and of the Python that would read them."""
    digest = hashlib.sha256(sys.version.encode())
    for name, source in sources.items():
        digest.update(f"\0{name}\0{len(source)}\0".encode() + source)
    return digest.hexdigest()


def _syntax_digest(sources: Mapping[str, bytes]) -> str:
    digest = hashlib.sha256()
    for name, source in sources.items():
        tree = ast.parse(source, filename=name)
        _strip_docstrings(tree)
        digest.update(f"{name}\0{ast.dump(tree)}\0".encode())
    return digest.hexdigest()


def _remembered(key: str, make: Callable[[], str]) -> str:
    """What ``make`` returns; the second time for a ``key``, from a file in the cache.

    Syntax trees of all our code take more than a second. A damaged file is made again.
    """
    path = atelier_home() / "cache" / "code" / key
    with suppress(OSError, ValueError):
        digest, check = path.read_text(encoding="ascii").split()
        if check == sha256_bytes(f"{key} {digest}".encode()):
            return digest
    digest = make()
    check = sha256_bytes(f"{key} {digest}".encode())
    unfinished = path.with_name(f"{key}.{os.getpid()}.{threading.get_ident()}")
    with suppress(OSError):  # a home that cannot be written to: slower, no more
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(f"{digest} {check}\n", encoding="ascii")
        os.replace(unfinished, path)
    return digest


def _source_files(package: str) -> dict[str, Path]:
    try:
        spec = importlib.util.find_spec(package)
    except ModuleNotFoundError:
        spec = None
    if spec is None:
        raise UserError(f"no code found for package {package!r}; run inside the environment")
    if not spec.submodule_search_locations:
        return {package: Path(str(spec.origin))}
    files: dict[str, Path] = {}
    for folder in map(Path, spec.submodule_search_locations):
        for path in folder.rglob("*.py"):
            files[f"{package}/{path.relative_to(folder).as_posix()}"] = path
    return files


def _strip_docstrings(tree: ast.Module) -> None:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        first = node.body[0] if node.body else None
        if (
            isinstance(first, ast.Expr)
            and isinstance(first.value, ast.Constant)
            and isinstance(first.value.value, str)
        ):
            node.body = node.body[1:]
