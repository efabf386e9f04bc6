"""What pydantic found, as lines for a person: key, expected, got, and what to do."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from app.recipe_file import KeyPath

MAX_SHOWN_CHARACTERS = 60
MAX_KEYS_SHOWN = 12


@dataclass(frozen=True)
class Problem:
    """One mistake at one key; ``line`` names the key."""

    path: KeyPath
    line: str


def problem(path: KeyPath, text: str) -> Problem:
    """A problem whose line begins with its key."""
    return Problem(path, f"{dotted(path)}: {text}" if path else text)


def dotted(path: KeyPath) -> str:
    """``stages.concepts.steps``."""
    return ".".join(map(str, path))


def did_you_mean(got: str, known: Iterable[str]) -> str:
    """A hint: the nearest known name, or the known ones."""
    names = sorted(known)
    near = difflib.get_close_matches(got, names, 1, 0.6)
    if near:
        return f"did you mean {near[0]}?"
    shown = ", ".join(names[:MAX_KEYS_SHOWN])
    return f"known are {shown}{', …' if len(names) > MAX_KEYS_SHOWN else ''}"


def problems_of(error: ValidationError, model: type[BaseModel]) -> list[Problem]:
    """One problem per mistake, in the order of the tree."""
    return [_explain(details, model) for details in error.errors(include_url=False)]


def _explain(details: ErrorDetails, root: type[BaseModel]) -> Problem:
    path = tuple(part for part in details["loc"] if part != "[key]")
    parent, field = _locate(root, path)
    if details["type"] == "extra_forbidden" and parent is not None:
        hint = did_you_mean(str(path[-1]), parent.model_fields)
        return problem(path, f"unknown key; {hint}")
    described = "" if field is None or not field.description else f" ({field.description})"
    if details["type"] == "missing":
        return problem(path, f"missing; expected a value{described}; add it")
    if details["type"] == "value_error":
        message = str(details.get("ctx", {}).get("error", details["msg"]))
        return problem(path, " ".join(message.split()))
    expected = details["msg"].removeprefix("Input should be ")
    if expected.startswith(("greater", "less")):
        expected = f"a value {expected}"
    text = f"expected {expected[:1].lower()}{expected[1:]}{described}; got {_shown(details)}"
    return problem(path, f"{text}; {_remedy(field)}")


def _remedy(field: Any) -> str:
    if field is None or field.is_required():
        return "change it"
    default = field.get_default(call_default_factory=True)
    if isinstance(default, BaseModel):
        return "change it, or leave the section out"
    return f"change it, or leave it out for {default!r}"


def _shown(details: ErrorDetails) -> str:
    text = " ".join(repr(details["input"]).split())
    return text if len(text) <= MAX_SHOWN_CHARACTERS else f"{text[:MAX_SHOWN_CHARACTERS]}…"


def _locate(root: type[BaseModel], path: KeyPath) -> tuple[type[BaseModel] | None, Any]:
    """The model that holds the last key of ``path``, and that key's field if it is one."""
    annotation: Any = root
    parent: type[BaseModel] | None = None
    field: Any = None
    for part in path:
        annotation = _without_none(annotation)
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            parent, field = annotation, annotation.model_fields.get(str(part))
            annotation = None if field is None else field.annotation
        else:
            arguments = get_args(annotation)
            annotation = arguments[-1] if arguments else None
    return parent, field


def _without_none(annotation: Any) -> Any:
    if get_origin(annotation) in (Union, types.UnionType):
        kinds = [kind for kind in get_args(annotation) if kind is not type(None)]
        return kinds[0] if len(kinds) == 1 else annotation
    return annotation
