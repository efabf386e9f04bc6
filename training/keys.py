"""The stage key: one digest over everything that decides what a training stage produces.

Ray's run name, the MLflow run and the registered version all carry it. What is not in it (number
of workers, paths, log levels) may change without training anything again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

from infra.digests import canonical_json, code_digest, sha256_bytes
from infra.errors import UserError

KEY_SCHEMA = 1
VERSIONED_LIBRARIES = ("torch", "lightning", "ray")
NAMED_BY_KEY_DIGITS = 12
_STAGE = re.compile(r"[a-z][a-z0-9_]{0,31}")
_RECIPE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")

# The code whose change makes other weights: the network, and what runs in a training worker.
# Planning, launching and publishing decide where a result goes, not what it is.
DRIVER_MODULES = frozenset(
    {
        "checkpoint_store",
        "driver",
        "expected",
        "gate",
        "handoff",
        "image_data",
        "keys",
        "launch",
        "lineage",
        "parts",
        "plan",
        "progress",
        "publish",
        "registry",
        "replicas",
        "room",
        "saver",
        "stages",
        "stall",
        "stop",
        "utilisation",
        "versions",
        "waste",
    }
)


def result_code_digest() -> str:
    """The digest of the code that decides the weights: ``model`` and the worker's modules."""
    return code_digest("model", *_worker_modules())


def _worker_modules() -> list[str]:
    from importlib.util import find_spec
    from pathlib import Path

    spec = find_spec("training")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("no code found for package 'training'; run inside the environment")
    names = {
        path.relative_to(folder).with_suffix("").as_posix().replace("/", ".")
        for folder in map(Path, spec.submodule_search_locations)
        for path in folder.rglob("*.py")
    }
    kept = sorted(name for name in names if name.split(".")[0] not in DRIVER_MODULES)
    return [f"training.{name}" for name in kept if name != "__init__"]


def library_versions() -> dict[str, str]:
    """``major.minor`` of the libraries whose numerics are part of a result."""
    versions = {}
    for name in VERSIONED_LIBRARIES:
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError as error:
            raise UserError(
                expected=f"{name} to be installed",
                got="nothing",
                remedy="install the requirements of the training role",
            ) from error
        versions[name] = ".".join(found.split("+")[0].split(".")[:2])
    return versions


def key_parts(
    *,
    stage: str,
    semantic: Mapping[str, Any],
    dataset_sha256s: Sequence[str],
    parent_sha256: str | None,
    tokenizer_sha256: str | None,
    init_policy: str,
    code_sha256: str | None = None,
    versions: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Everything a stage's result depends on, as JSON; ``stage_key`` is its digest.

    ``semantic`` is the stage's configuration without operational fields (``semantic_part``).
    ``code_sha256`` and ``versions`` default to this environment's.
    """
    check_names(stage=stage)
    return {
        "schema": KEY_SCHEMA,
        "stage": stage,
        "code_sha256": result_code_digest() if code_sha256 is None else code_sha256,
        "versions": library_versions() if versions is None else dict(versions),
        "config": dict(semantic),
        "dataset_sha256s": list(dataset_sha256s),
        "parent_sha256": parent_sha256,
        "tokenizer_sha256": tokenizer_sha256,
        "init_policy": init_policy,
    }


def stage_key(parts: Mapping[str, Any]) -> str:
    """The sha256 (64 hex digits) of ``key_parts``."""
    return sha256_bytes(canonical_json(dict(parts)))


def run_name(stage: str, key: str) -> str:
    """The name of Ray's run: the same name continues the same training, so it carries the key."""
    return f"{stage}-{key[:NAMED_BY_KEY_DIGITS]}"


def model_name(recipe: str, stage: str) -> str:
    """The registered model's name: ``<recipe>-<stage>``."""
    check_names(recipe=recipe, stage=stage)
    return f"{recipe}-{stage}"


def changed_parts(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The dotted names in which two ``key_parts`` differ, to say why a stage runs again."""
    names: list[str] = []
    for name in sorted(set(before) | set(now)):
        old, new = before.get(name), now.get(name)
        if old == new:
            continue
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            names += changed_parts(old, new, f"{prefix}{name}.")
        else:
            names.append(prefix + name)
    return names


def check_names(*, recipe: str = "x", stage: str = "x") -> None:
    """Refuse names that MLflow, Ray or storage would refuse or confuse."""
    if not _STAGE.fullmatch(stage):
        raise UserError(
            expected="a stage name of lower-case letters, digits and _", got=repr(stage)
        )
    if not _RECIPE.fullmatch(recipe):
        raise UserError(
            expected="a recipe name of letters, digits, '.', '_' and '-'", got=repr(recipe)
        )
