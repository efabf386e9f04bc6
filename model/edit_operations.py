"""The seven kinds of edit that EMU-Edit's questions name, and how each is painted by default."""

import difflib
from dataclasses import dataclass

from model.errors import ModelError


@dataclass(frozen=True)
class Operation:
    """How an edit is painted unless the caller says otherwise.

    With `everywhere` the whole image is painted anew, else the tokens found to change, or the mask.
    """

    name: str
    about: str
    everywhere: bool = False
    strength: float = 1.0  # share of the steps that are run; less keeps some of the old tokens
    min_change: float = 0.3  # total variation in [0, 1] from which on a token counts as changing
    grow_tokens: int = 0  # tokens by which the place found is widened


OPERATIONS = {
    operation.name: operation
    for operation in (
        Operation("add", "a new thing", min_change=0.15, grow_tokens=1),
        Operation("remove", "a thing goes, what is behind it shows", grow_tokens=1),
        Operation("local", "a thing becomes another, or another colour"),
        Operation("texture", "a thing's surface; its outline mostly stays", strength=0.8),
        Operation("background", "what is around the things", min_change=0.2),
        Operation("global", "the whole scene: weather, season, light", True, strength=0.8),
        Operation("style", "how the picture is made", True, strength=0.6),
    )
}
DEFAULT_STRENGTH = 0.7  # of an edit without operation, mask or source: the whole image


def operation_of(name: str) -> Operation:
    """The operation of this name; ModelError with the nearest one."""
    if name in OPERATIONS:
        return OPERATIONS[name]
    near = difflib.get_close_matches(name, OPERATIONS, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ModelError(f"operation is {name!r}: {hint}expected one of {', '.join(OPERATIONS)}")
