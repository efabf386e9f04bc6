"""Captions that fit a text encoder: counted in its own tokens, cut where a reader would stop.

Whole sentences stay as long as they fit. When the first one alone is too long it is cut after a
clause, else after a word; only writing without spaces is cut between characters.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import importlib.util
import json
import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from infra import storage
from infra.errors import UserError
from pipelines.clip_model import as_uri

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from pipelines.config import CurationConfig

CUTS = ("sentence", "clause", "word", "character")
MIN_CLAUSE_RATIO = 1 / 3  # of the tokens that fit; less than that is not worth a whole clause
_CLIP_MERGES = "bpe_simple_vocab_16e6.txt.gz"
_CLIP_VOCABULARY_SIZE = 49_408
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_WORD_END = "</w>"
_BATCH = 1_000
_MAX_TOKEN_CHARS = 64  # of a text, no more characters per token of the budget are looked at


class CaptionTokenizer:
    """A text encoder's tokens. ``num_special``: begin, end and their like, added to every text."""

    def __init__(self, engine: Tokenizer, num_special: int) -> None:
        engine.no_truncation()
        engine.no_padding()
        self._engine = engine
        self.num_special = num_special

    def starts(self, texts: Sequence[str]) -> Iterator[list[int]]:
        """Per text, the character at which each of its tokens begins."""
        for first in range(0, len(texts), _BATCH):
            for made in self._engine.encode_batch(
                list(texts[first : first + _BATCH]), add_special_tokens=False
            ):
                yield [start for start, _ in made.offsets]

    def count(self, text: str) -> int:
        """Tokens of ``text``, with the special ones."""
        return len(self._engine.encode(text, add_special_tokens=False).ids) + self.num_special


def load_tokenizer(folder: str | None) -> CaptionTokenizer:
    """The tokenizer of a folder (path or URI), or CLIP's own; one is kept per process.

    Raises ``UserError`` for a folder without vocab.json and merges.txt, or tokenizer.json.
    """
    return _load(None if folder is None else as_uri(folder))


def tokenizer_sha256(folder: str | None) -> str:
    """What the tokenizer is known by, wherever it lies."""
    digest = hashlib.sha256()
    for name, data in sorted(_files(None if folder is None else as_uri(folder)).items()):
        digest.update(f"{name}\n{len(data)}\n".encode() + data)
    return digest.hexdigest()


def tokenizer_part(config: CurationConfig) -> dict[str, str]:
    """``tokenizer_sha256`` where captions have a token budget, else nothing."""
    if config.captions.token_budget is None:
        return {}
    return {"tokenizer_sha256": tokenizer_sha256(config.captions.tokenizer)}


@functools.lru_cache(maxsize=2)
def _load(uri: str | None) -> CaptionTokenizer:
    from tokenizers import Tokenizer

    files = _files(uri)
    try:
        if "tokenizer.json" in files:
            engine = Tokenizer.from_str(files["tokenizer.json"].decode())
            return CaptionTokenizer(engine, engine.num_special_tokens_to_add(False))
        if "vocab.json" in files:
            lines = files["merges.txt"].decode().split("\n")
            merges = [_pair(line) for line in lines if line and not line.startswith("#version")]
            return CaptionTokenizer(_clip_engine(json.loads(files["vocab.json"]), merges), 2)
    except Exception as error:  # the engine raises bare Exception for a file it cannot read
        raise UserError(
            expected=f"a tokenizer in {uri}", got=str(error)[:200], remedy="copy it again"
        ) from error
    lines = gzip.decompress(files[_CLIP_MERGES]).decode().split("\n")
    num_bytes = 256
    merges = [_pair(line) for line in lines[1 : _CLIP_VOCABULARY_SIZE - 2 * num_bytes - 2 + 1]]
    return CaptionTokenizer(_clip_engine(_clip_vocabulary(merges), merges), 2)


def _files(uri: str | None) -> dict[str, bytes]:
    if uri is None:
        spec = importlib.util.find_spec("open_clip")  # found, not imported: that takes seconds
        if spec is None or spec.origin is None:
            raise UserError(
                expected="open_clip, which carries CLIP's vocabulary",
                got="it is not installed",
                remedy="set captions.tokenizer to a folder",
            )
        return {_CLIP_MERGES: Path(spec.origin).with_name(_CLIP_MERGES).read_bytes()}
    for names in (("vocab.json", "merges.txt"), ("tokenizer.json",)):
        found = [storage.join(uri, name) for name in names]
        if all(map(storage.exists, found)):
            return {name: storage.read_bytes(at) for name, at in zip(names, found, strict=True)}
    raise UserError(
        expected=f"vocab.json and merges.txt, or tokenizer.json, in {uri}",
        got="neither",
        remedy="point captions.tokenizer at the text encoder's folder, or leave it out for CLIP's",
    )


def _pair(line: str) -> tuple[str, str]:
    left, right = line.split(" ")
    return left, right


def _clip_vocabulary(merges: Sequence[tuple[str, str]]) -> dict[str, int]:
    """Bytes, bytes that end a word, merges, begin, end: the published order."""
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = sorted(ByteLevel.alphabet(), key=lambda sign: (ord(sign) >= 256, sign))
    tokens = [*alphabet, *(sign + _WORD_END for sign in alphabet), *map("".join, merges)]
    return {token: index for index, token in enumerate(tokens)}


def _clip_engine(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    """CLIP's: lower case, and byte pairs whose words end in ``</w>``."""
    from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
    from tokenizers.models import BPE

    model: Any = BPE(
        vocab=vocabulary,
        merges=merges,
        end_of_word_suffix=_WORD_END,
        continuing_subword_prefix="",
    )
    engine = Tokenizer(model)
    engine.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    engine.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return engine


def budgeted(texts: pl.Series, budget: int, tokenizer: CaptionTokenizer) -> pl.DataFrame:
    """``text`` of at most ``budget`` tokens, and ``cut``: one of ``CUTS``, null for a whole one.

    A token is at least a byte, so short captions of ASCII are not even counted.
    """
    is_ascii = texts.str.len_bytes() == texts.str.len_chars()
    is_short = is_ascii & (texts.str.len_bytes() + tokenizer.num_special < budget)
    positions = (~is_short).arg_true().to_list()
    long = texts.filter(~is_short).to_list()
    heads = [text[: budget * _MAX_TOKEN_CHARS] for text in long]
    fitted: dict[int, tuple[str, str]] = {}
    for position, text, starts in zip(positions, heads, tokenizer.starts(heads), strict=True):
        if len(starts) + tokenizer.num_special > budget:
            fitted[position] = _fit(text, starts, budget, tokenizer)
    cuts = pl.Series("cut", [None] * len(texts), dtype=pl.String)
    if fitted:
        texts = texts.clone().scatter(list(fitted), [text for text, _ in fitted.values()])
        cuts = cuts.scatter(list(fitted), [cut for _, cut in fitted.values()])
    return pl.DataFrame([texts.alias("text"), cuts])


def _fit(
    text: str, starts: Sequence[int], budget: int, tokenizer: CaptionTokenizer
) -> tuple[str, str]:
    room = max(budget - tokenizer.num_special, 0)
    for cut, ends in (
        ("sentence", sentence_ends(text)),
        ("clause", [match.end() for match in _CLAUSE.finditer(text)]),
        ("word", [match.start() for match in _SPACE.finditer(text)]),
        ("character", range(1, len(text))),
    ):
        for end in reversed(ends[: bisect_left(ends, starts[room] + 1)]):
            if cut == "clause" and bisect_left(starts, end) < room * MIN_CLAUSE_RATIO:
                break
            prefix = text[:end].rstrip()
            if tokenizer.count(prefix) <= budget:
                return prefix.rstrip(_CLAUSE_SIGNS) if cut == "clause" else prefix, cut
    return "", "character"


# Sentences ---------------------------------------------------------------------------------------

_SPACE = re.compile(r"\s+")
_CLAUSE_SIGNS = ",;:\u3001\uff0c\uff1b \u2013\u2014"
_CLAUSE = re.compile(r"[,;:](?=\s)|[\u3001\uff0c\uff1b]|\s[\u2013\u2014-](?=\s)")
_SENTENCE = re.compile(
    r"[.!?\u2026]+[\"'\u201d\u2019)\]]*(?=\s+[\"'\u201c\u2018(\[]?[^a-z\s])"
    r"|[\u3002\uff01\uff1f]+[\u201d\u2019\u300d\u300f\uff09]*"
)
_ABBREVIATIONS = frozenset(
    {"mr", "mrs", "ms", "dr", "st", "no", "vs", "prof", "jr", "sr", "ca", "approx", "fig", "vol"}
    | {"e.g", "i.e", "etc", "inc", "ltd", "co", "mt", "ft", "dept", "feat", "c"}
)
_LAST_WORD = re.compile(r"[^\s(\[\"']*$")


def sentence_ends(text: str) -> list[int]:
    """Where the sentences of ``text`` end, the last one at its end.

    A full stop after an abbreviation or an initial ends none, nor does one before a small letter.
    """
    ends = []
    for match in _SENTENCE.finditer(text):
        if match[0] == ".":
            found = _LAST_WORD.search(text, max(match.start() - 16, 0), match.start())
            word = found[0].lower() if found else ""
            if word in _ABBREVIATIONS or (len(word.rpartition(".")[2]) == 1 and word.isalpha()):
                continue
            if re.fullmatch(r"(?:[a-z]\.)+[a-z]", word):
                continue
        ends.append(match.end())
    return ends if ends and ends[-1] == len(text) else [*ends, len(text)]
