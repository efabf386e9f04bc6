"""From an instruction and a caption to the caption that the edited picture should have.

English only, by patterns: `remove the star`, `change the circle to dark blue`, `make the background
green`, `replace the cat with a dog`, `add a hat to the dog`, `make it snow`, `turn the day into
night`, `in the style of Klimt`. What else is told as an instruction (`make the man smile`) is
refused: its result should be given as the wanted caption itself.
"""

import re
from dataclasses import dataclass

from model.errors import ModelError

COLOURS = frozenset(
    """
    beige black blue brown cyan gold golden gray green grey magenta navy orange pink purple
    red silver teal turquoise violet white yellow
    """.split()  # noqa: SIM905  # a list of words is read as one
)
SURFACES = frozenset(
    """
    brick checkered dotted fluffy fur furry glass leather marble metal metallic plain rusty
    shiny stone striped wooden woollen
    """.split()  # noqa: SIM905  # a list of words is read as one
)
_TIMES = {  # what a picture of it says, after a comma
    "day": "by day", "night": "at night", "morning": "in the morning", "evening": "in the evening",
    "dawn": "at dawn", "dusk": "at dusk", "sunrise": "at sunrise", "sunset": "at sunset",
    "spring": "in spring", "summer": "in summer", "autumn": "in autumn", "fall": "in the fall",
    "winter": "in winter",
}  # fmt: skip
_ARTICLES = r"(?:a|an|the|its|their|his|her)"
_SHADES = r"(?:dark|deep|light|pale|bright)"
_THING = rf"(?:{_ARTICLES}\s+)?(?P<thing>.+?)"
_VALUE = rf"(?P<value>(?:{_ARTICLES}\s+)?.+?)"
_LOOK = rf"(?P<value>(?:{_SHADES}\s+)?(?:{'|'.join(sorted(COLOURS | SURFACES))}))"
_TIME = rf"(?:{'|'.join(_TIMES)})"
_PATTERNS = tuple(
    (kind, re.compile(pattern + r"\s*[.!]?\s*", re.IGNORECASE | re.DOTALL))
    for kind, pattern in (
        ("remove", rf"(?:remove|delete|erase|take away|get rid of)\s+{_THING}"),
        ("add", rf"(?:add|insert|put in|draw)\s+{_VALUE}"),
        ("style", rf"(?:(?:make|turn|paint|render|redo)\s+(?:it|this|everything)\s+)?"
                  rf"in the style of\s+{_VALUE}"),
        ("time", rf"(?:turn|change|convert)\s+(?:the\s+)?(?P<thing>{_TIME})\s+(?:in)?to\s+"
                 rf"(?:(?:a|the)\s+)?(?P<value>{_TIME})"),
        ("style", rf"(?:make|turn)\s+(?:it|this)\s+(?:look\s+like|into)\s+{_VALUE}"),
        ("change", rf"(?:change|turn|recolou?r|paint|convert)\s+{_THING}\s+(?:in)?to\s+be\s+"
                   rf"(?:{_LOOK}|(?P<other>{_ARTICLES}\s+.+?))"),
        ("change", rf"(?:change|turn|recolou?r|paint|convert)\s+{_THING}\s+"
                   rf"(?:in)?to\s+(?!be\s){_VALUE}"),
        ("change", rf"(?:replace|swap)\s+{_THING}\s+(?:with|by|for)\s+{_VALUE}"),
        ("global", rf"make\s+(?:it|this|the\s+(?:scene|picture|image|photo))\s+{_VALUE}"),
        # Any other last word may be a verb or a comparative, of which no noun can be made.
        ("change", rf"(?:make|turn|paint|colou?r)\s+(?:the\s+)(?P<thing>.+?)\s+{_LOOK}"),
    )
)  # fmt: skip
_TOLD = re.compile(  # how no caption begins
    r"(?:remove|delete|erase|take|get rid of|add|insert|put|draw|change|turn|recolou?r|paint|"
    r"convert|replace|swap|make|colou?r|render|redo|move|give|let)\s+"
    rf"(?:{_ARTICLES}|it|this|everything)\b.*",
    re.IGNORECASE | re.DOTALL,
)
_WHOLE = r"(?:(?:scene|picture|image|photo|photograph)\b)"
_PLACES = r"(?:left|right|top|bottom|upper|lower|middle|cent(?:er|re)|front|back|side|foreground)\b"


@dataclass(frozen=True)
class Instruction:
    """An instruction as read: its operation and the caption of the picture that is wanted."""

    operation: str
    prompt: str


def is_instruction(words: str) -> bool:
    """Whether the words tell what to do, understood or not; otherwise they are a caption."""
    text = " ".join(words.split())
    known = any(pattern.fullmatch(text) for _, pattern in _PATTERNS)
    return known or _TOLD.fullmatch(text) is not None


def read_instruction(instruction: str, caption: str) -> Instruction:
    """What `instruction` asks of a picture that `caption` describes.

    Raises ModelError where the words cannot be read, or speak of what the caption does not name.
    """
    text, caption = " ".join(instruction.split()), " ".join(caption.split())
    if not caption:
        raise ModelError(
            "an instruction needs a caption of the picture as it is: give one, or give the "
            "wanted caption instead of an instruction"
        )
    for kind, pattern in _PATTERNS:
        if match := pattern.fullmatch(text):
            parts = match.groupdict()
            thing, value = parts.get("thing") or "", parts.get("value") or parts.get("other") or ""
            return _applied(kind, thing, value, caption)
    raise ModelError(
        f"the instruction {text[:80]!r} is not understood: expected one like 'change the circle "
        "to blue' or 'remove the star', or the wanted caption"
    )


def _applied(kind: str, thing: str, value: str, caption: str) -> Instruction:
    plain = caption.rstrip(".")
    if kind == "add":
        return Instruction("add", _with(plain, value))
    if kind == "style":
        return Instruction("style", f"{plain}, in the style of {value}")
    if kind == "global":
        return Instruction("global", f"{plain}, {value}")
    if kind == "time":
        return Instruction("global", _at_time(plain, thing.lower(), value.lower()))
    if thing.lower() == "background" and not re.search(r"\bbackground\b", caption, re.IGNORECASE):
        behind = rf"^{_SHADES}?\s*(?:{'|'.join(sorted(COLOURS | SURFACES))})$"
        if re.match(behind, value, re.IGNORECASE):
            return Instruction("background", _tidied(f"{plain}, on a {value} background"))
        return Instruction("background", _tidied(f"{plain}, with {_noun(value)} in the background"))
    start, end = _find(thing, caption)
    if kind == "remove":
        return Instruction("remove", _without(caption, start, end))
    operation = "background" if thing.lower().endswith("background") else "local"
    look = re.sub(rf"^{_ARTICLES}\s+", "", value, flags=re.IGNORECASE)
    word = re.sub(rf"^{_SHADES}\s+", "", look, flags=re.IGNORECASE).lower()
    for kinds in (COLOURS, SURFACES):
        if word in kinds:
            operation = "texture" if kinds is SURFACES and operation == "local" else operation
            return Instruction(operation, _described(caption, start, end, look, kinds))
    start = _phrase_start(caption, start)
    return Instruction(operation, _tidied(caption[:start] + _noun(value) + caption[end:]))


def _noun(value: str) -> str:
    return value if re.match(rf"{_ARTICLES}\s", value, re.IGNORECASE) else f"a {value}"


def _with(caption: str, value: str) -> str:
    """The caption with a new thing, beside the others or on the one that it is added to."""
    to = re.fullmatch(
        rf"(?P<thing>.+?)\s+to\s+{_ARTICLES}\s+(?P<whose>(?!{_PLACES}).+)", value, re.I
    )
    if to is None:
        return f"{caption} and {value}"
    if re.fullmatch(_WHOLE, to["whose"], re.IGNORECASE):
        return f"{caption} and {to['thing']}"
    _, end = _find(to["whose"], caption)
    return f"{caption[:end]} with {to['thing']}{caption[end:]}"


def _at_time(caption: str, old: str, new: str) -> str:
    """The caption at another time of the day or year, in place of the one it names."""
    for words, other in ((_TIMES[old], _TIMES[new]), (old, new)):
        if named := re.search(rf"\b{words}\b", caption, re.IGNORECASE):
            return _tidied(caption[: named.start()] + other + caption[named.end() :])
    return f"{caption}, {_TIMES[new]}"


def _find(thing: str, caption: str) -> tuple[int, int]:
    match = re.search(rf"\b{re.escape(thing)}\b", caption, re.IGNORECASE)
    if match is None:
        raise ModelError(
            f"the caption does not name {thing[:80]!r}: use the caption's own words, or give the "
            "wanted caption instead of an instruction"
        )
    return match.span()


def _phrase_start(caption: str, start: int) -> int:
    """Where the noun phrase begins whose noun starts at `start`: its adjectives and article."""
    words = "|".join([_SHADES, *sorted(COLOURS | SURFACES | {"large", "small", "big", "tiny"})])
    before = re.search(
        rf"(?:\b{_ARTICLES}\s+)?(?:\b(?:{words})\s+)*$", caption[:start], re.IGNORECASE
    )
    return start if before is None else before.start()


def _without(caption: str, start: int, end: int) -> str:
    """The caption less this phrase, its place and the word that joined it to another."""
    joined = r"(?:\s*,)?\s*\b(?:and|with|beside|next to|left of|right of|above|below|under|over)\s+"
    start = _phrase_start(caption, start)
    before, after = caption[:start], caption[end:]
    if lead := re.search(joined + "$", before, re.IGNORECASE):
        return _tidied(before[: lead.start()] + after)
    if before.rstrip().endswith(","):
        return _tidied(before.rstrip(" ,") + after)
    if tail := re.match(joined, after, re.IGNORECASE):
        return _tidied(before + after[tail.end() :])
    after = re.sub(r"^\s+(?:at|in) the [a-z ]*?(?=\s+on\b|$)", "", after, flags=re.IGNORECASE)
    after = re.sub(r"^\s*(?:on|in|over|against)\s+(?=an?\b|the\b)", "", after, flags=re.IGNORECASE)
    return _tidied(before + after)


def _described(caption: str, start: int, end: int, word: str, kinds: frozenset[str]) -> str:
    """The noun at [start, end) with `word` in place of its adjective of the same kind."""
    noun = caption[start:end]
    words = rf"\b(?:{_SHADES}\s+)?(?:{'|'.join(sorted(kinds))})"
    if old := re.search(rf"{words}\b", noun, re.IGNORECASE):
        noun = noun[: old.start()] + word + noun[old.end() :]
        return _tidied(caption[:start] + noun + caption[end:])
    before = caption[:start]
    if old := re.search(rf"{words}\s+$", before, re.IGNORECASE):
        before = before[: old.start()]
    return _tidied(f"{before}{word} {noun}{caption[end:]}")


def _tidied(caption: str) -> str:
    """Single spaces, no stray comma, and `a` or `an` as the next letter asks."""
    caption = " ".join(caption.split()).strip(" ,")
    caption = re.sub(r"\s+,", ",", caption)
    caption = re.sub(r"\ban\s+(?=[^aeiou\W])", "a ", caption)
    return re.sub(r"\ba\s+(?=[aeiou])", "an ", caption)
