"""From an instruction and a caption to the caption that the edited picture should have.

English only, by patterns: `remove the star`, `change the circle to blue`, `make the background
green`, `replace the cat with a dog`, `add a tree`, `make it snow`, `in the style of Klimt`. What is
read otherwise should be given as the wanted caption itself.
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
_ARTICLES = r"(?:a|an|the|its|their|his|her)"
_THING = rf"(?:{_ARTICLES}\s+)?(?P<thing>.+?)"
_VALUE = rf"(?P<value>(?:{_ARTICLES}\s+)?.+?)"
_PATTERNS = tuple(
    (kind, re.compile(pattern + r"\s*[.!]?\s*", re.IGNORECASE | re.DOTALL))
    for kind, pattern in (
        ("remove", rf"(?:remove|delete|erase|take away|get rid of)\s+{_THING}"),
        ("add", rf"(?:add|insert|put in|draw)\s+{_VALUE}"),
        ("style", rf"(?:(?:make|turn|paint|render|redo)\s+(?:it|this|everything)\s+)?"
                  rf"in the style of\s+{_VALUE}"),
        ("style", rf"(?:make|turn)\s+(?:it|this)\s+(?:look\s+like|into)\s+{_VALUE}"),
        ("change", rf"(?:change|turn|recolou?r|paint|convert)\s+{_THING}\s+"
                   rf"(?:in)?to\s+(?:be\s+)?{_VALUE}"),
        ("change", rf"(?:replace|swap)\s+{_THING}\s+(?:with|by|for)\s+{_VALUE}"),
        ("global", rf"make\s+(?:it|this|the\s+(?:scene|picture|image|photo))\s+{_VALUE}"),
        ("change", r"(?:make|paint|colou?r)\s+(?:the\s+)(?P<thing>.+)\s+(?P<value>\w+)"),
    )
)  # fmt: skip


@dataclass(frozen=True)
class Instruction:
    """An instruction as read: its operation and the caption of the picture that is wanted."""

    operation: str
    prompt: str


def is_instruction(words: str) -> bool:
    """Whether the words read as an instruction; otherwise they are a caption."""
    text = " ".join(words.split())
    return any(pattern.fullmatch(text) for _, pattern in _PATTERNS)


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
            thing, value = parts.get("thing") or "", parts.get("value") or ""
            return _applied(kind, thing, value, caption)
    raise ModelError(
        f"the instruction {text[:80]!r} is not understood: expected one like 'change the circle "
        "to blue' or 'remove the star', or the wanted caption"
    )


def _applied(kind: str, thing: str, value: str, caption: str) -> Instruction:
    if kind == "add":
        return Instruction("add", f"{caption.rstrip('.')} and {value}")
    if kind == "style":
        return Instruction("style", f"{caption.rstrip('.')}, in the style of {value}")
    if kind == "global":
        return Instruction("global", f"{caption.rstrip('.')}, {value}")
    start, end = _find(thing, caption)
    if kind == "remove":
        return Instruction("remove", _without(caption, start, end))
    operation = "background" if thing.lower().endswith("background") else "local"
    word = re.sub(rf"^{_ARTICLES}\s+", "", value, flags=re.IGNORECASE)
    for kinds in (COLOURS, SURFACES):
        if word.lower() in kinds:
            operation = "texture" if kinds is SURFACES and operation == "local" else operation
            return Instruction(operation, _described(caption, start, end, word, kinds))
    start = _phrase_start(caption, start)
    value = value if re.match(rf"{_ARTICLES}\s", value, re.IGNORECASE) else f"a {value}"
    return Instruction(operation, _tidied(caption[:start] + value + caption[end:]))


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
    words = "|".join(sorted(COLOURS | SURFACES | {"large", "small", "big", "tiny"}))
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
    if old := re.search(rf"\b(?:{'|'.join(sorted(kinds))})\b", noun, re.IGNORECASE):
        noun = noun[: old.start()] + word + noun[old.end() :]
        return _tidied(caption[:start] + noun + caption[end:])
    before = caption[:start]
    if old := re.search(rf"\b(?:{'|'.join(sorted(kinds))})\s+$", before, re.IGNORECASE):
        before = before[: old.start()]
    return _tidied(f"{before}{word} {noun}{caption[end:]}")


def _tidied(caption: str) -> str:
    """Single spaces, no stray comma, and `a` or `an` as the next letter asks."""
    caption = " ".join(caption.split()).strip(" ,")
    caption = re.sub(r"\s+,", ",", caption)
    caption = re.sub(r"\ban\s+(?=[^aeiou\W])", "a ", caption)
    return re.sub(r"\ba\s+(?=[aeiou])", "an ", caption)
