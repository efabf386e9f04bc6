"""What a site's owner wrote about machines: robots.txt (RFC 9309) and TDM reservations (TDMRep).

Only text goes in and only verdicts come out; fetching it is ``pipelines.consent``'s part.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass

from pipelines.spelling import one_path

MAX_RULES = 20_000
_TOKEN = re.compile(r"[a-z_-]+|\*")
_LINE_END = re.compile(r"\r\n|\r|\n")


@dataclass(frozen=True)
class PathRule:
    """What holds for paths like ``pattern``: ``*`` is any characters, a last ``$`` the end."""

    pattern: str
    is_allowed: bool


@dataclass(frozen=True)
class PathRules:
    """The longest pattern that matches decides; between equals, ``tie`` does; else allowed."""

    rules: tuple[PathRule, ...] = ()
    tie: bool = True

    @property
    def num_chars(self) -> int:
        """What keeping them costs, roughly, in characters."""
        return sum(len(rule.pattern) + 100 for rule in self.rules)

    def allow(self, request_path: str) -> bool:
        """Whether ``request_path`` (path and query, as sent) may be asked for."""
        path = one_path(request_path)
        longest, verdict = -1, True
        for rule in self.rules:
            length = len(rule.pattern)
            decides = length > longest or (length == longest and rule.is_allowed == self.tie)
            if decides and _matches(rule.pattern, path):
                longest, verdict = length, rule.is_allowed
        return verdict


def parse_robots(text: bytes, token: str) -> PathRules:
    """The rules for ``token``: of all groups that name it, else of those for ``*``.

    Lines that are not understood are passed over, as RFC 9309 wants; a rule without a group, and
    an empty path, say nothing.
    """
    token = token.lower()
    groups: dict[str, list[PathRule]] = {}
    agents: set[str] = set()
    is_naming = False
    for key, value in _records(text.decode("utf-8-sig", "replace")):
        if key == "user-agent":
            found = _TOKEN.match(value.lower())
            agents = agents if is_naming else set()
            is_naming = True
            if found is not None:
                agents.add(found.group())
                groups.setdefault(found.group(), [])
        elif key in ("allow", "disallow"):
            is_naming = False
            if not value:
                continue
            rule = PathRule(_pattern(value), key == "allow")
            for agent in agents & {token, "*"}:
                if len(groups[agent]) < MAX_RULES:
                    groups[agent].append(rule)
    return PathRules(tuple(dict.fromkeys(groups.get(token, groups.get("*", [])))))


def parse_tdmrep(text: bytes) -> PathRules:
    """The reservations of a ``/.well-known/tdmrep.json``; what is not one says nothing.

    Of several locations that match, the longest decides, as in robots.txt, whose syntax they
    borrow; between equals the reservation does.
    """
    try:
        listed = json.loads(text)
    except (ValueError, RecursionError):
        return PathRules()
    rules = []
    for entry in listed[:MAX_RULES] if isinstance(listed, list) else []:
        if not isinstance(entry, dict):
            continue
        location, reservation = entry.get("location"), entry.get("tdm-reservation")
        if isinstance(location, str) and location and reservation in (0, 1, "0", "1"):
            rules.append(PathRule(_pattern(location), int(reservation) == 0))
    return PathRules(tuple(dict.fromkeys(rules)), tie=False)


def _records(text: str) -> Iterable[tuple[str, str]]:
    for line in _LINE_END.split(text):
        key, colon, value = line.partition("#")[0].partition(":")
        if colon:
            yield key.strip().lower(), value.strip()


def _pattern(value: str) -> str:
    """Every owner who forgets the first slash means it."""
    return one_path(value if value.startswith(("/", "*")) else "/" + value)


def _matches(pattern: str, path: str) -> bool:
    """A match from the start of ``path``, in time that no pattern can make explode."""
    is_anchored = pattern.endswith("$")
    first, *others = pattern.removesuffix("$").split("*")
    if not path.startswith(first):
        return False
    position = len(first)
    if not others:
        return not is_anchored or position == len(path)
    *middle, last = others
    for part in middle:
        position = path.find(part, position)
        if position < 0:
            return False
        position += len(part)
    if is_anchored:
        return len(path) - len(last) >= position and path.endswith(last)
    return path.find(last, position) >= 0
