"""What web pages leave in captions and no picture shows: markup, addresses, file names, phrases.

Each step first asks Polars which captions it may concern, and works on those alone. It is cautious:
what could be said of a picture stays. Captions are one visible line before and after.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import polars as pl

from pipelines.caption_boilerplate import BOILERPLATE_PHRASES
from pipelines.caption_config import CaptionConfig, CleanConfig
from pipelines.caption_personal import KINDS, without_personal_data

MARKUP, URL, FILE_NAME, BOILERPLATE = "markup", "web_address", "file_name", "boilerplate"
STEPS = (MARKUP, URL, FILE_NAME, BOILERPLATE)
CHANGES = (*STEPS, *KINDS)
# Control, format (zero width, bidi), private and unassigned characters draw nothing honest.
_INVISIBLE = r"[\p{Cc}\p{Cf}\p{Co}\p{Cn}]"
_MAX_UNESCAPES = 4


def clean_text(text: pl.Expr) -> pl.Expr:
    """One line, composed (NFC), without invisible characters: safe in logs, pages and prompts."""
    one_line = text.str.replace_all(r"\s+", " ")
    visible = one_line.str.replace_all(_INVISIBLE, "").str.normalize("NFC")
    return visible.str.replace_all(r"\s+", " ").str.strip_chars(" ")


@dataclass(frozen=True)
class Step:
    """``quick``: what every text that changes matches, in Polars' dialect."""

    name: str
    quick: str
    apply: Callable[[pl.Series], pl.Series]


def cleaned(texts: pl.Series, config: CaptionConfig, *, is_alt: bool) -> pl.DataFrame:
    """``text``, and per name of ``CHANGES`` whether it changed; rows in the order of ``texts``.

    Synthetic captions (not ``is_alt``) lose markup and personal data only. With ``personal_data``
    off its kinds are all false; with drop they are told, and the text is redacted all the same.
    """
    texts = _visible(texts)
    flags: dict[str, pl.Series] = {}
    steps = steps_of(config.clean, is_alt=is_alt)
    texts = _run([step for step in steps if step.name == MARKUP], texts, flags)
    if config.personal_data != "off":
        texts = _redact(texts, config.personal_data_word, flags)
    redacted = texts
    texts = _run([step for step in steps if step.name != MARKUP], texts, flags)
    changed = texts != redacted
    if config.personal_data != "off" and changed.any():  # what was cut may have joined something
        again = {name: flag.filter(changed) for name, flag in flags.items()}
        rest = _redact(texts.filter(changed), config.personal_data_word, again)
        positions = changed.arg_true()
        texts = texts.clone().scatter(positions, rest)
        flags = {name: flag.scatter(positions, again[name]) for name, flag in flags.items()}
    none = pl.Series([False], dtype=pl.Boolean).new_from_index(0, len(texts))
    return pl.DataFrame(
        [texts.alias("text"), *(flags.get(name, none).alias(name) for name in CHANGES)]
    )


def _visible(texts: pl.Series) -> pl.Series:
    return texts.to_frame("text").select(clean_text(pl.col("text"))).to_series()


def _redact(texts: pl.Series, word: str, flags: dict[str, pl.Series]) -> pl.Series:
    found = without_personal_data(texts, word)
    for kind in KINDS:
        flags[kind] = found[kind] | flags[kind] if kind in flags else found[kind]
    return found["text"]


def _run(steps: Sequence[Step], texts: pl.Series, flags: dict[str, pl.Series]) -> pl.Series:
    for step in steps:
        concerned = texts.str.contains(step.quick).fill_null(False)
        flags[step.name] = concerned
        if not concerned.any():
            continue
        some = texts.filter(concerned)
        made = _visible(step.apply(some))
        positions = concerned.arg_true()
        flags[step.name] = concerned.clone().scatter(positions, made != some)
        texts = texts.clone().scatter(positions, made)
    return texts


def steps_of(config: CleanConfig, *, is_alt: bool) -> list[Step]:
    """The steps that are on, in order."""
    found = []
    if config.markup:
        found.append(Step(MARKUP, _MARKUP, _without_markup))
    if is_alt and config.urls:
        found.append(Step(URL, _URL, lambda texts: _ended(texts.str.replace_all(_URL, " "))))
    if is_alt and config.file_names:
        found.append(Step(FILE_NAME, _FILE_NAME, _without_file_names))
    phrases = (BOILERPLATE_PHRASES if config.boilerplate else ()) + tuple(
        rf"(?i){_edge(phrase[0])}{re.escape(phrase)}{_edge(phrase[-1])}"
        for phrase in (" ".join(each.split()) for each in config.phrases)
    )
    if is_alt and phrases:
        quick = "|".join(f"(?:{phrase})" for phrase in phrases)
        found.append(Step(BOILERPLATE, quick, lambda texts: _without(phrases, texts)))
    return found


def _edge(character: str) -> str:
    return r"\b" if character.isalnum() else ""


def _without(patterns: Sequence[str], texts: pl.Series) -> pl.Series:
    for pattern in patterns:
        texts = texts.str.replace_all(pattern, " ")
    return _ended(texts)


_HANGING = r"^[\s\-\u2013\u2014|,;:»•·/>]+|[\s\-\u2013\u2014|,;:»•·/<(\[]+$"


def _ended(texts: pl.Series) -> pl.Series:
    """Without brackets around nothing, and without signs that separate it from nothing."""
    return (
        texts.str.replace_all(r"\(\s*\)|\[\s*\]|\"\s*\"|“\s*”", " ")
        .str.replace_all(r"\s+([,.;!?)\]])", "$1")
        .str.replace_all(_HANGING, "")
    )


# Markup ------------------------------------------------------------------------------------------

_TAGS = (
    r"(?is)<(?:script|style|iframe|svg|template)\b[^>]*>.*?</(?:script|style|iframe"
    r"|svg|template)\s*>",
    r"(?s)<!--.*?(?:-->|$)|<!\[CDATA\[|\]\]>|<![A-Za-z][^<>]*>|<\?.*?(?:\?>|$)",
    r"</?[A-Za-z][^<>]*>",
    r"(?i)<(?:a|b|body|div|embed|form|iframe|img|input|link|meta|object|script|span"
    r"|style|svg)\b[^<>]*$",
    r"(?i)\bjavascript:\S*|\bvbscript:\S*|\bdata:(?:text|image|application)/\S*",
    r"<\|[^<>|\s]{1,64}\|>",
    r"(?i)\[/?(?:inst|sys|pad|unk|cls|sep|mask|bos|eos|b|i|u|url|img|caption)(?:[ =][^\[\]]*)?\]",
    r"^[\"']?=[\s=+\-@]*",
)
_FORMULA = r"^[\"']?[+\-@]+([A-Za-z][A-Za-z0-9.]*\s?[(|!])"
_ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][0-9A-Fa-f]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")
_MARKUP = "|".join(f"(?:{each})" for each in (*_TAGS, _FORMULA, _ENTITY.pattern))


def _without_markup(texts: pl.Series) -> pl.Series:
    has_entity = texts.str.contains(_ENTITY.pattern)
    decoded = [_unescaped(text) for text in texts.filter(has_entity)]
    texts = _visible(texts.clone().scatter(has_entity.arg_true(), decoded))
    for pattern in _TAGS:
        texts = texts.str.replace_all(pattern, " ")
    return texts.str.replace_all(_FORMULA, "${1}").str.strip_chars()


def _unescaped(text: str) -> str:
    """Entities decoded, also those of a page that escaped its text more than once."""
    for _ in range(_MAX_UNESCAPES):
        decoded = _ENTITY.sub(lambda match: html.unescape(match[0]), text)
        if decoded == text:
            break
        text = decoded
    return text


# Addresses and file names ------------------------------------------------------------------------

_URL = r"(?i)\b(?:https?|ftp)://\S+|\bwww\.[a-z0-9-]+\.\S+|\b[a-z0-9-]+\.(?:com|net|org|info|de|co\.uk)/\S*"
_EXTENSIONS = r"(?:jpe?g|png|gif|webp|bmp|tiff?|svg|heic|avif|jfif)"
_FILE_NAME = (
    rf"(?i)[\w)\]]\.{_EXTENSIONS}\b|^(?:img|dscn?|dscf|dsc|pict|mvi|gopr|pxl|vid|scan|screenshot)"
    r"[ _-]?\d[\d _.-]*$|^(?:screen ?shot|whatsapp image)\b[\d .:apmtAPMT_-]*$"
)
# What cameras, scanners and upload forms name their files: letters, and then a number.
_CAMERA = (
    r"(?i)^(?:(?:img|image|dscn?|dscf|p|pict?|picture|photo|foto|mvi|gopr?|pxl|wp|vid"
    r"|scan|file|untitled"
    r"|download|unnamed|screen ?shot|whatsapp image|fullsizerender|cover"
    r"|thumb(?:nail)?|logo|banner"
    r"|slide|product|item|large|small|original|default|main|front|back|at|am|pm|x"
    r"|edit|copy|final|v)"
    r"|[0-9a-f]{8,}|\W|_|\d)*$"
)


def _without_file_names(texts: pl.Series) -> pl.Series:
    """A caption that is a file's name becomes its words, or nothing; else the name is cut."""
    stem = texts.str.replace(rf"(?i)\.{_EXTENSIONS}$", "").str.replace_all(r"[_\-+]|%20", " ")
    is_whole = texts.str.contains(rf"(?i)^[^\s/]+\.{_EXTENSIONS}$")
    is_named = is_whole | ~texts.str.contains(rf"(?i)\.{_EXTENSIONS}\b")
    is_camera = stem.str.contains(_CAMERA)
    cut = texts.str.replace_all(rf"(?i)[^\s/,;:|]+\.{_EXTENSIONS}\b", " ")
    frame = pl.DataFrame({"stem": stem, "cut": _ended(cut), "named": is_named, "camera": is_camera})
    made = pl.when("named").then(pl.when("camera").then(pl.lit("")).otherwise("stem"))
    return frame.select(made.otherwise("cut").alias("text")).to_series()
