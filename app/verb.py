"""What every verb shares: how it speaks, and how its errors become one line and an exit code."""

from __future__ import annotations

import errno
import functools
import json
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn, ParamSpec

import typer

from infra.errors import UserError

FAILED, STOPPED, TERMINATED = 1, 130, 143
Parameters = ParamSpec("Parameters")


class Output:
    """Lines for a person, or one JSON object for a program; never both."""

    def __init__(self, as_json: bool = False) -> None:
        self.as_json = as_json
        if as_json:
            os.environ["ATELIER_QUIET"] = "1"

    def say(self, text: str = "") -> None:
        """Print for a person."""
        if not self.as_json:
            print(text, flush=True)

    def result(self, value: Any) -> None:
        """Print for a program."""
        if self.as_json:
            print(json.dumps(value, indent=1, default=str), flush=True)

    def fail(self, line: str) -> NoReturn:
        """End the verb with one line."""
        raise UserError(line)


def verb(run: Callable[Parameters, None]) -> Callable[Parameters, None]:
    """Turn a person's mistakes into lines on stderr; a bug keeps its traceback."""

    @functools.wraps(run)
    def guarded(*arguments: Parameters.args, **options: Parameters.kwargs) -> None:
        previous = signal.getsignal(signal.SIGTERM)
        Terminated.came = False
        stop_on_terminate()
        try:
            run(*arguments, **options)
        except KeyboardInterrupt as stop:
            said = ["stopped", *getattr(stop, "__notes__", ())]
            print(
                f"\natelier: {'; '.join(said)}; the same command goes on where it was",
                file=sys.stderr,
            )
            raise typer.Exit(TERMINATED if Terminated.came else STOPPED) from None
        except Exception as error:
            lines = lines_of(error)
            if lines is None:
                raise
            if options.get("json_"):
                print(json.dumps({"error": lines}, indent=1), flush=True)
            for line in lines:
                print(f"atelier: {line}", file=sys.stderr)
            raise typer.Exit(FAILED) from None
        finally:
            signal.signal(signal.SIGTERM, previous)

    return guarded


def lines_of(error: Exception) -> list[str] | None:
    """The lines for a person, None for a bug."""
    if isinstance(error, UserError):
        return list(getattr(error, "lines", [str(error)]))
    if type(error).__name__ == "ModelError" and type(error).__module__ == "model.errors":
        return [" ".join(str(error).split())]
    if isinstance(error, BrokenPipeError):
        return []
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" of {error.filename}" if error.filename else ""
        return [f"the disk{where} is full; free some space, and the same command goes on"]
    return None


def stop_on_terminate() -> None:
    """Let SIGTERM end a verb as Ctrl-C does, so that children and locks are released."""
    signal.signal(signal.SIGTERM, _stop)


class Terminated(KeyboardInterrupt):
    """SIGTERM came. Ray, interrupted while it waits, raises a plain one of its own instead."""

    came = False


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    del number, frame
    Terminated.came = True
    raise Terminated
