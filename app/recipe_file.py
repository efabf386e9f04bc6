"""A recipe's YAML as plain values, with the line of every key, and ``--set`` overrides on top.

Only plain YAML is taken: a repeated key, a tag, or a second document is an error with its line.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from infra.errors import UserError

MAX_RECIPE_BYTES = 1_000_000
KeyPath = tuple[str | int, ...]
NAMED_ENTRIES: tuple[KeyPath, ...] = (("stages",), ("datasets",))  # made in the file, not by --set


@dataclass(frozen=True)
class RecipeSource:
    """What was written: ``values`` as YAML gave them, and where each key stands (1-based lines)."""

    name: str
    values: dict[str, Any]
    lines: dict[KeyPath, int] = field(default_factory=dict)
    overridden: frozenset[KeyPath] = frozenset()

    def where(self, path: KeyPath) -> str:
        """The place to point at for ``path``: ``recipes/demo.yaml:12``, or ``--set``."""
        if path in self.overridden:
            return "--set"
        for length in range(len(path), 0, -1):
            if path[:length] in self.lines:
                return f"{self.name}:{self.lines[path[:length]]}"
        return self.name


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> RecipeSource:
    """The file's values with ``overrides`` (``a.b=c``, c in YAML) applied; not validated yet."""
    path = Path(path)
    try:
        if path.stat().st_size > MAX_RECIPE_BYTES:
            raise UserError(f"{path} is larger than {MAX_RECIPE_BYTES} bytes: not a recipe")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(_not_there(path)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the recipe {path}: {error}") from error
    return parse_recipe(text, str(path), overrides)


def _not_there(path: Path) -> str:
    near = sorted(path.parent.glob("*.yaml")) if path.parent.is_dir() else []
    match = difflib.get_close_matches(path.name, [found.name for found in near], 1, 0.5)
    hint = f"did you mean {path.parent / match[0]}?" if match else "give the path of a YAML file"
    return f"no recipe at {path}; {hint}"


def parse_recipe(text: str, name: str, overrides: Sequence[str] = ()) -> RecipeSource:
    """Parse ``text``; ``name`` is what messages call it."""
    try:
        _refuse_tags(text, name)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        lines: dict[KeyPath, int] = {}
        if node is not None:
            _walk(node, (), lines, name)
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(_yaml_problem(error, name)) from error
    if not isinstance(values, dict):
        got = "nothing" if values is None else type(values).__name__
        raise UserError(f"{name}: expected keys such as `name:` and `stages:`; got {got}")
    source = RecipeSource(name, values, lines)
    return _override(source, overrides) if overrides else source


def _refuse_tags(text: str, name: str) -> None:
    for token in yaml.scan(text):
        if isinstance(token, yaml.TagToken):
            raise UserError(
                f"{name}:{token.start_mark.line + 1}: expected a plain value; got a YAML tag "
                f"({''.join(filter(None, token.value))}); remove it"
            )


def _walk(node: yaml.Node, path: KeyPath, lines: dict[KeyPath, int], name: str) -> None:
    """Note each key's line and refuse repeated keys, which YAML would silently overwrite."""
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.value in seen:
                raise UserError(
                    f"{name}:{line}: {_dotted((*path, key.value))} is given twice, first on line "
                    f"{seen[key.value]}; keep one"
                )
            seen[key.value] = line
            child = (*path, key.value)
            lines.setdefault(child, line)
            _walk(value, path if key.value == "<<" else child, lines, name)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            lines.setdefault((*path, index), value.start_mark.line + 1)
            _walk(value, (*path, index), lines, name)


def _yaml_problem(error: yaml.YAMLError, name: str) -> str:
    mark = getattr(error, "problem_mark", None)
    what = getattr(error, "problem", None) or str(error)
    where = name if mark is None else f"{name}:{mark.line + 1}"
    return f"{where}: not YAML: {what}; check indentation, quotes and colons there"


def _override(source: RecipeSource, overrides: Sequence[str]) -> RecipeSource:
    values = _copied(source.values)
    paths: set[KeyPath] = set()
    for override in overrides:
        dotted, equals, text = override.partition("=")
        if not equals or not all(dotted.split(".")):
            raise UserError(
                expected="--set section.key=value",
                got=repr(override),
                remedy="for example --set stages.concepts.steps=100",
            )
        try:
            _refuse_tags(text, f"--set {dotted}")
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(f"--set {dotted}: {text!r} is not a YAML value; quote it") from error
        path = _put(values, dotted, value)
        paths |= {path, *_below(path, value)}
    return RecipeSource(source.name, values, source.lines, frozenset(paths))


def _put(values: dict[str, Any], dotted: str, value: Any) -> KeyPath:
    """Set ``values[a][b][c]``, making sections that the file leaves to their defaults."""
    *parents, last = dotted.split(".")
    path: KeyPath = ()
    at: Any = values
    for name in parents:
        key = _key(at, name, dotted)
        if isinstance(at, dict) and at.get(key) is None:
            if path in NAMED_ENTRIES:
                raise UserError(_no_entry(dotted, path, name, at))
            at[key] = {}
        path = (*path, key)
        at = at[key]
    key = _key(at, last, dotted)
    at[key] = value
    return (*path, key)


def _no_entry(dotted: str, path: KeyPath, name: str, known: dict[str, Any]) -> str:
    match = difflib.get_close_matches(name, list(known), 1, 0.5)
    hint = f"did you mean {match[0]}?" if match else f"there are {', '.join(known)}"
    return f"--set {dotted}: nothing is called {name!r} under {path[0]!r}; {hint}"


def _key(at: Any, name: str, dotted: str) -> str | int:
    if isinstance(at, dict):
        return name
    if isinstance(at, list) and name.isdigit() and int(name) < len(at):
        return int(name)
    if isinstance(at, list):
        raise UserError(f"--set {dotted}: expected an index below {len(at)}; got {name!r}")
    raise UserError(f"--set {dotted}: {name!r} lies inside a value, which has no keys")


def _below(path: KeyPath, value: Any) -> list[KeyPath]:
    children: list[tuple[str | int, Any]] = []
    if isinstance(value, dict):
        children = list(value.items())
    elif isinstance(value, list):
        children = list(enumerate(value))
    found: list[KeyPath] = []
    for key, child in children:
        found += [(*path, key), *_below((*path, key), child)]
    return found


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copied(child) for key, child in value.items()}
    if isinstance(value, list):
        return [_copied(child) for child in value]
    return value


def _dotted(path: KeyPath) -> str:
    return ".".join(map(str, path))
