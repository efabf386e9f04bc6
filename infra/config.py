"""Strict configuration: every field says its unit, and whether it changes the result.

A *semantic* field changes what is produced, and so the key it is stored under; an *operational*
field (workers, retries, paths, log level) does not. ``semantic_part`` keeps the first kind.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import PydanticUndefined

PROJECT_ROOT = Path(__file__).resolve().parent.parent


class StrictModel(BaseModel):
    """A frozen pydantic model that refuses unknown keys, NaN and infinity, and checks its defaults
    too: every number has a JSON form, and so a place in keys and records."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False
    )


def semantic(default: Any = PydanticUndefined, description: str = "", **constraints: Any) -> Any:
    """A field that changes the result. Leave ``default`` out to make it required."""
    return _field(default, description, False, constraints)


def operational(default: Any = PydanticUndefined, description: str = "", **constraints: Any) -> Any:
    """A field that changes how the work is done and never what comes out."""
    return _field(default, description, True, constraints)


def _field(
    default: Any, description: str, is_operational: bool, constraints: dict[str, Any]
) -> Any:
    if "default_factory" not in constraints:
        constraints["default"] = default
    return Field(
        description=description, json_schema_extra={"operational": is_operational}, **constraints
    )


def is_operational(model: type[BaseModel], name: str) -> bool:
    """Whether field ``name`` was declared ``operational``; undeclared fields are semantic."""
    extra = model.model_fields[name].json_schema_extra
    return isinstance(extra, dict) and extra.get("operational") is True


def semantic_part(model: BaseModel) -> dict[str, Any]:
    """The JSON-ready values of ``model`` without its operational fields, at every depth."""
    return {
        name: _semantic_value(getattr(model, name), dumped)
        for name, dumped in model.model_dump(mode="json").items()
        if name not in type(model).model_fields or not is_operational(type(model), name)
    }


def _semantic_value(value: object, dumped: Any) -> Any:
    """``dumped`` is ``value`` as JSON; prune it wherever ``value`` holds a model."""
    if isinstance(value, BaseModel):
        return semantic_part(value)
    if isinstance(value, Mapping) and isinstance(dumped, dict):
        return {
            key: _semantic_value(child, dumped_child)
            for child, (key, dumped_child) in zip(value.values(), dumped.items(), strict=True)
        }
    if isinstance(value, (list, tuple)) and isinstance(dumped, list):
        pairs = zip(value, dumped, strict=True)
        return [_semantic_value(child, dumped_child) for child, dumped_child in pairs]
    return dumped


def atelier_home() -> Path:
    """Where everything this machine makes lies: ``$ATELIER_HOME`` or ``<project>/.atelier``."""
    configured = os.environ.get("ATELIER_HOME")
    home = Path(configured).expanduser() if configured else PROJECT_ROOT / ".atelier"
    return home.absolute()
