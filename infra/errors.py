"""The one exception a person is meant to read."""

from __future__ import annotations


class UserError(Exception):
    """A user's mistake or a world that does not answer: one line, no traceback.

    Either ``UserError("line")`` or the three parts every message should have:
    ``UserError(expected="…", got="…", remedy="…")``. ``str(error)`` never holds a line break.
    """

    def __init__(
        self,
        message: str | None = None,
        *,
        expected: str | None = None,
        got: str | None = None,
        remedy: str | None = None,
    ) -> None:
        parts = [message] if message else []
        if expected is not None:
            parts.append(f"expected {expected}")
        if got is not None:
            parts.append(f"got {got}")
        if remedy is not None:
            parts.append(remedy)
        self.expected = expected
        self.got = got
        self.remedy = remedy
        self.line = " ".join("; ".join(parts).split())
        super().__init__(self.line)

    def __reduce__(self) -> tuple[object, ...]:
        """Travel between processes (Spark and Ray workers) whatever the subclass's arguments."""
        return (_rebuild, (type(self), self.line, self.__dict__))


def _rebuild(kind: type[UserError], line: str, state: dict[str, object]) -> UserError:
    error = kind.__new__(kind)
    Exception.__init__(error, line)
    error.__dict__.update(state)
    return error
