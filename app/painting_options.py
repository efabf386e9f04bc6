"""What a person types for `sample` and `edit`: sizes, seeds, boxes and sides, read in one place."""

from __future__ import annotations

import math
import sys
from pathlib import Path

from app.easel import Adapters
from infra.errors import UserError

MAX_SIDE_PX = 8192
MAX_IMAGES = 1000
MAX_SEED = 2**64 - 1
SIDES = ("left", "top", "right", "bottom")


def size_of(text: str) -> tuple[int, int]:
    """(width, height) in px of `512` or `768x512`."""
    parts = text.lower().split("x")
    numbers = [_whole(part) for part in (parts * 2 if len(parts) == 1 else parts)]
    if len(numbers) != 2 or any(n is None or not 1 <= n <= MAX_SIDE_PX for n in numbers):
        raise UserError(
            expected=f"a side or WIDTHxHEIGHT in px, each 1 to {MAX_SIDE_PX}, after --size",
            got=repr(text),
            remedy="for example --size 512 or --size 768x512",
        )
    return int(numbers[0] or 0), int(numbers[1] or 0)


def seeds_of(text: str) -> list[int]:
    """The seeds of `7`, `0-3` or `1,5,10-12`, in that order."""
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        start, end = _whole(first), _whole(last) if dash else _whole(first)
        if start is None or end is None or not start <= end <= MAX_SEED:
            raise UserError(
                expected="numbers and ranges such as 7, 0-3 or 1,5,10-12 after --seeds",
                got=repr(text[:80]),
            )
        if len(seeds) + end - start >= MAX_IMAGES:
            raise UserError(expected=f"at most {MAX_IMAGES} seeds", got=repr(text[:80]))
        seeds += range(start, end + 1)
    return seeds


def box_of(text: str) -> tuple[int, int, int, int]:
    """(x, y, width, height) in px of `x,y,w,h`."""
    numbers = [_whole(part) for part in text.split(",")]
    if len(numbers) != 4 or any(n is None for n in numbers) or not (numbers[2] and numbers[3]):
        raise UserError(
            expected="x,y,width,height in px, the last two above 0, after --box",
            got=repr(text[:80]),
            remedy="x and y are those of the upper left corner",
        )
    x, y, width, height = (int(n or 0) for n in numbers)
    return x, y, width, height


def sides_of(texts: list[str]) -> dict[str, int]:
    """Pixels per side of `left=64` or `left=64,top=32`, several times."""
    sides: dict[str, int] = {}
    for part in ",".join(texts).split(","):
        name, _, number = part.strip().partition("=")
        pixels = _whole(number)
        if name not in SIDES or pixels is None or not 1 <= pixels <= MAX_SIDE_PX:
            raise UserError(
                expected=f"SIDE=PX after --outpaint, with a side of {', '.join(SIDES)} and 1 to "
                f"{MAX_SIDE_PX} px",
                got=repr(part[:80]),
                remedy="for example --outpaint left=64,right=64",
            )
        sides[name] = pixels
    return sides


def interval_of(text: str) -> tuple[float, float]:
    """The shares of the steps, in [0, 1], between which guidance is on, of `0.1,0.8`."""
    numbers = [_number(part) for part in text.split(",")]
    if len(numbers) != 2 or any(n is None or not 0 <= n <= 1 for n in numbers):
        raise UserError(
            expected="FROM,TO after --guidance-interval, two shares of the steps in 0 to 1",
            got=repr(text[:80]),
            remedy="for example --guidance-interval 0.1,0.8",
        )
    return float(numbers[0] or 0), float(numbers[1] or 0)


def adapters_of(texts: list[str]) -> tuple[Adapters, ...]:
    """Adapters and weights of `FOLDER` or `FOLDER:WEIGHT`; a name with a colon is a name first."""
    found = []
    for text in texts:
        path, colon, number = text.rpartition(":")
        weight = _number(number) if colon and path else None
        if weight is None or Path(text).exists():
            found.append(Adapters(text))
        elif math.isfinite(weight):
            found.append(Adapters(path, weight))
        else:
            raise UserError(expected="a number after the colon of --lora", got=repr(number))
    return tuple(found)


def prompts_of(words: list[str], file: Path | None) -> list[str]:
    """The prompts given, then those of the file: one a line, blank lines left out, - is stdin."""
    prompts = list(words)
    if file is not None:
        try:
            raw = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
            lines = raw.decode("utf-8-sig").splitlines()
        except OSError as error:
            raise UserError(
                expected="a text file with one prompt a line after --prompts",
                got=f"{file}: {error.strerror or error}",
            ) from None
        except UnicodeDecodeError:
            raise UserError(expected=f"{file} in UTF-8", got="other bytes") from None
        prompts += [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(
            expected="at least one prompt",
            got="none",
            remedy='give it as atelier sample "a red circle", or a file with --prompts',
        )
    return [printable(prompt) for prompt in prompts]


def printable(text: str) -> str:
    """The text with every code unit that is no character (bytes that are not UTF-8) replaced."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _whole(text: str) -> int | None:
    text = text.strip()
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= 20 else None


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
