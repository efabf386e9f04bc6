"""One way to turn things into bytes and bytes into a name."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any

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


def code_digest(*packages: str) -> str:
    """The sha256 over the code of the named packages or modules, as 64 hex digits.

    Every ``.py`` file under a package counts by its dotted name and its syntax tree without
    docstrings, so comments, formatting and prose do not change the digest and code does.
    The packages are located, not imported.
    """
    sources: dict[str, Path] = {}
    for package in packages:
        sources.update(_source_files(package))
    digest = hashlib.sha256()
    for name in sorted(sources):
        tree = ast.parse(sources[name].read_bytes(), filename=str(sources[name]))
        _strip_docstrings(tree)
        digest.update(f"{name}\0{ast.dump(tree)}\0".encode())
    return digest.hexdigest()


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
