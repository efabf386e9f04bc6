"""Personal data in captions: found by its form, and proved by its checksum where it has one.

A regular expression of Polars picks the captions that could hold any (a few in a hundred); only
these are read by Python, detector by detector, each blind to what an earlier one has found. What is
known to look alike (dates, coordinates, ISBNs, prices, product numbers) is hidden from the last and
widest detector, that of phone numbers. Found values are returned to nobody, only their kinds.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import compress

import polars as pl

from pipelines.caption_detectors import DETECTORS, HIDDEN, Detector

KINDS = tuple(detector.kind for detector in DETECTORS)
COULD_HOLD_ANY = "|".join(detector.quick for detector in DETECTORS)
_MAX_ROUNDS = 4


@dataclass(frozen=True)
class Found:
    """Characters ``start`` to ``end`` of a text are of ``kind``."""

    start: int
    end: int
    kind: str


def find_personal_data(text: str, detectors: Sequence[Detector] = DETECTORS) -> list[Found]:
    """What ``text`` holds, in order, without overlaps."""
    found: list[Found] = []
    for detector in detectors:
        spans = _joined(span for span in detector.spans(text) if HIDDEN not in text[slice(*span)])
        found += [Found(start, end, detector.kind) for start, end in spans]
        text = _replaced(text, spans, lambda start, end: HIDDEN * (end - start))
    return sorted(found, key=lambda each: each.start)


def _joined(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The spans in order; those that overlap are one."""
    joined: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if joined and start < joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((start, end))
    return joined


def _replaced(text: str, spans: Sequence[tuple[int, int]], by: Callable[[int, int], str]) -> str:
    if not spans:
        return text
    pieces, position = [], 0
    for start, end in spans:
        pieces += [text[position:start], by(start, end)]
        position = end
    return "".join([*pieces, text[position:]])


def redact(text: str, word: str = "") -> tuple[str, frozenset[str]]:
    """``text`` with ``word`` in place of each finding, and the kinds found."""
    kinds: set[str] = set()
    for _ in range(_MAX_ROUNDS):  # what is left may join to something new
        found = find_personal_data(text)
        if not found:
            return text, frozenset(kinds)
        kinds.update(each.kind for each in found)
        spans = [(each.start, each.end) for each in found]
        text = _tidy(_replaced(text, spans, lambda *_: f" {word} "))
    return word, frozenset(kinds)


_EMPTY_BRACKETS = re.compile(r"\(\s*\)|\[\s*\]|<\s*>|\{\s*\}")
_ENDS = re.compile(r"^[\s,;:|/·\u2013\u2014-]+|[\s,;:|/·\u2013\u2014(\[-]+$")


def _tidy(text: str) -> str:
    text = _EMPTY_BRACKETS.sub(" ", text)
    text = re.sub(r"\s+([,.;!?)\]])", r"\1", re.sub(r"\s+", " ", text))
    return _ENDS.sub("", text)


def without_personal_data(texts: pl.Series, word: str = "") -> pl.DataFrame:
    """``text``, and per kind whether it was found; as many rows, in the order of ``texts``."""
    could = texts.str.contains(COULD_HOLD_ANY).fill_null(False)
    some = texts.filter(could)
    asked = pl.DataFrame([some.str.contains(each.quick).alias(each.kind) for each in DETECTORS])
    flags = {kind: [False] * len(texts) for kind in KINDS}
    changed: dict[int, str] = {}
    for position, text, asks in zip(could.arg_true(), some, asked.iter_rows(), strict=True):
        if find_personal_data(text, list(compress(DETECTORS, asks))):
            changed[position], kinds = redact(text, word)
            for kind in kinds:
                flags[kind][position] = True
    if changed:
        texts = texts.clone().scatter(list(changed), list(changed.values()))
    columns = [pl.Series(kind, flags[kind], dtype=pl.Boolean) for kind in KINDS]
    return pl.DataFrame([texts.alias("text"), *columns])
