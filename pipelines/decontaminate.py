"""Captions that repeat a prompt of an evaluation set: found exactly, and nearly, in linear time.

Texts are compared by their words alone (Unicode compatibility forms, no case, no punctuation). A
caption or one of its sentences repeats a prompt when the words are the same, when the prompt's
words (five or more) stand in it in one piece, or when the two share enough trigrams of letters:
weighted Jaccard, where a trigram weighs the logarithm of how rare it is among the prompts, so that
a set's common phrases ("a photo of") say little.
"""

from __future__ import annotations

import functools
import json
import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import polars as pl

from infra import storage
from infra.digests import canonical_json, sha256_bytes
from infra.errors import UserError
from pipelines.clip_model import as_uri
from pipelines.duplicate_config import DecontaminationConfig

CONTAMINATED = "contaminated"
PROMPT_FIELDS = ("prompt", "Prompt", "caption", "text", "TEXT")
MIN_CONTAINED_WORDS = 5
# Shorter prompts are asked for exactly only: half the captions of the web hold "a dog".
MIN_NEAR_WORDS = 4
_WORD = re.compile(r"\w+")
_SENTENCE = re.compile(r"[.!?;|\n\u3002\uff01\uff1f]+|\s[-\u2013\u2014]\s")


def words_of(text: str) -> list[str]:
    """The words that are compared."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def trigrams_of(words: Sequence[str]) -> frozenset[str]:
    """All trigrams of letters, word beginnings and ends marked by a space."""
    padded = (f" {word} " for word in words)
    return frozenset(text[at : at + 3] for text in padded for at in range(len(text) - 2))


class PromptIndex:
    """The prompts of an evaluation set. A look-up costs what the caption's letters do.

    A caption can be like a prompt only if it has one of the prompt's rarest trigrams (those that
    weigh more than the threshold leaves free), so only these are looked up: none is missed.
    """

    def __init__(self, prompts: Iterable[str], min_likeness: float | None) -> None:
        known = sorted({tuple(words_of(prompt)) for prompt in prompts} - {()})
        self._exact = {" ".join(words) for words in known}
        self._beginnings: dict[tuple[str, ...], list[str]] = defaultdict(list)
        for words in known:
            if len(words) >= MIN_CONTAINED_WORDS:
                self._beginnings[words[:MIN_CONTAINED_WORDS]].append(" ".join(words) + " ")
        self._min_likeness = min_likeness
        self._grams = [trigrams_of(words) for words in known if len(words) >= MIN_NEAR_WORDS]
        counts = Counter(gram for grams in self._grams for gram in grams)
        total = len(self._grams)
        self._weights = {gram: math.log1p(total / count) for gram, count in counts.items()}
        self._unseen = math.log1p(total + 1)
        self._sums = [self._weight(grams) for grams in self._grams]
        self._rare: dict[str, list[int]] = defaultdict(list)
        if min_likeness is not None:
            for number, grams in enumerate(self._grams):
                free = self._sums[number] * (1 - min_likeness) + 1e-9
                for gram in sorted(grams, key=lambda each: (-self._weights[each], each)):
                    self._rare[gram].append(number)
                    free -= self._weights[gram]
                    if free < 0:
                        break

    def _weight(self, grams: Iterable[str]) -> float:
        return math.fsum(self._weights.get(gram, self._unseen) for gram in grams)

    def holds(self, caption: str) -> bool:
        """Whether the caption, or a sentence of it, repeats a prompt."""
        words = words_of(caption)
        if " ".join(words) in self._exact or self._contains(words) or self._is_near(words):
            return True
        parts = [part for part in map(words_of, _SENTENCE.split(caption)) if part]
        return len(parts) > 1 and any(
            " ".join(part) in self._exact or self._is_near(part) for part in parts
        )

    def _contains(self, words: list[str]) -> bool:
        if not self._beginnings:
            return False
        for at in range(len(words) - MIN_CONTAINED_WORDS + 1):
            found = self._beginnings.get(tuple(words[at : at + MIN_CONTAINED_WORDS]))
            if found:
                rest = " ".join(words[at:]) + " "
                if any(rest.startswith(prompt) for prompt in found):
                    return True
        return False

    def _is_near(self, words: list[str]) -> bool:
        if self._min_likeness is None or len(words) < MIN_NEAR_WORDS:
            return False
        grams = trigrams_of(words)
        asked = {number for gram in grams for number in self._rare.get(gram, ())}
        if not asked:
            return False
        weight = self._weight(grams)
        return any(self._likeness(grams, weight, number) >= self._min_likeness for number in asked)

    def _likeness(self, grams: frozenset[str], weight: float, number: int) -> float:
        shared = self._weight(grams & self._grams[number])
        return shared / max(weight + self._sums[number] - shared, 1e-9)


def contaminated(rows: pl.DataFrame, config: DecontaminationConfig) -> pl.Series:
    """Per row whether a caption (``caption``, or one of ``captions``) repeats a prompt."""
    if not config.prompts:
        return pl.repeat(False, rows.height, eager=True)
    index = prompt_index(tuple(config.prompts), config.min_prompt_likeness)
    others = pl.col("captions").list.eval(pl.element().struct["text"])
    every = rows.select(pl.concat_list(pl.col("caption").fill_null(""), others).alias("texts"))
    found = [any(index.holds(text) for text in set(texts)) for texts in every["texts"].to_list()]
    return pl.Series("contaminated", found, dtype=pl.Boolean)


def repeats_a_prompt(text: str, config: DecontaminationConfig) -> bool:
    """Whether one caption does."""
    if not config.prompts:
        return False
    return prompt_index(tuple(config.prompts), config.min_prompt_likeness).holds(text)


@functools.lru_cache(maxsize=2)
def prompt_index(files: tuple[str, ...], min_likeness: float | None) -> PromptIndex:
    """The index over the prompts of ``files``; a process keeps the last."""
    return PromptIndex((p for file in files for p in read_prompts(file)), min_likeness)


def read_prompts(file: str) -> list[str]:
    """The prompts of a file: a line each, or a field ``prompt``, ``caption`` or ``text``.

    ``.jsonl`` and ``.parquet`` have the fields; any other file is lines. ``UserError`` for a file
    without prompts.
    """
    data = storage.read_bytes(as_uri(file))
    try:
        if file.endswith(".parquet"):
            frame = pl.read_parquet(data)
            name = next(name for name in PROMPT_FIELDS if name in frame.columns)
            found: list[Any] = frame[name].drop_nulls().to_list()
        elif file.endswith(".jsonl"):
            rows = [json.loads(line) for line in data.decode().splitlines() if line.strip()]
            found = [next(row[name] for name in PROMPT_FIELDS if name in row) for row in rows]
        else:
            found = data.decode().splitlines()
    except (ValueError, StopIteration, TypeError, pl.exceptions.PolarsError) as error:
        raise UserError(
            expected=f"prompts in {file}: a line each, or a field {', '.join(PROMPT_FIELDS)}",
            got=str(error).partition("\n")[0][:100] or "no such field",
        ) from error
    prompts = [text for text in found if isinstance(text, str) and text.strip()]
    if not prompts:
        raise UserError(f"expected prompts in {file}, got none")
    return prompts


def decontamination_part(config: DecontaminationConfig) -> dict[str, dict[str, str]]:
    """What a dataset's key and its manifest say of its evaluation sets; empty without any."""
    if not config.prompts:
        return {}
    return {"decontaminated": {"prompts_sha256": prompts_sha256(config)}}


def prompts_sha256(config: DecontaminationConfig) -> str:
    """What the prompts are known by, whatever files they lie in."""
    every = sorted({prompt for file in config.prompts for prompt in read_prompts(file)})
    return sha256_bytes(canonical_json(every))
