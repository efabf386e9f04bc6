"""What ends Spark itself (a full disk, a small heap, a lost process), told in one line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from infra.config import atelier_home
from infra.errors import UserError

_GOES_ON = "what is finished is kept, and the same command goes on"
_NO_ROOM = re.compile(r"No space left on device|Disk quota exceeded")
_NO_HEAP = re.compile(r"OutOf(?:Direct)?Memory(?:Error|Exception):?[^\n]{0,60}")
_LOST = re.compile(r"ExecutorLostFailure[^\n]{0,200}|Python worker exited unexpectedly \(crashed\)")
_SHUT_DOWN = "SparkContext was shut down"  # by a JVM that ends
_LOG_BYTES = 256 * 1024
_starts: dict[Path, int] = {}  # how long a log was when this process's newest JVM started


def spark_log() -> Path:
    """What the JVM writes to."""
    return atelier_home() / "logs" / "spark.log"


def jvm_starts() -> None:
    """What the log holds from here on is of a new JVM."""
    log = spark_log()
    _starts[log] = log.stat().st_size if log.exists() else 0


def trouble_of(error: BaseException) -> UserError | None:
    """The line for a person, where Spark failed for what the machine lacks; None for a bug."""
    text = "\n".join(_text(each) for each in _chain(error))
    is_gone = any(_is_silence(each) for each in _chain(error)) or _SHUT_DOWN in text
    if is_gone:
        text += _tail(spark_log())
    if found := _NO_ROOM.search(text):
        return UserError(
            expected="room for Spark's working files (spark.local.dir, TMPDIR)",
            got=found.group(),
            remedy="free some space, or name another disk in cluster.spark_properties "
            f"(spark.local.dir); {_GOES_ON}",
        )
    if found := _NO_HEAP.search(text):
        return UserError(
            expected="a heap in which Spark can work",
            got=found.group(),
            remedy="raise cluster.spark_driver_memory_mb, or on a cluster spark.executor.memory in "
            f"cluster.spark_properties; {_GOES_ON}",
        )
    if found := _LOST.search(text):
        return UserError(
            expected="Spark's workers to outlive their tasks",
            got=found.group(),
            remedy="see whether memory ran out (on a cluster raise spark.executor.memoryOverhead, "
            f"else run fewer tasks at once: cluster.spark_master); {_GOES_ON}",
        )
    if is_gone:
        return UserError(
            expected="Spark's JVM to run until the work is done",
            got=f"no answer: it was killed or died (see {spark_log()})",
            remedy=_GOES_ON,
        )
    return None


def _is_silence(error: BaseException) -> bool:
    """Whether the JVM did not answer. py4j may say so without a cause, and without Java's words."""
    from py4j.protocol import Py4JError, Py4JNetworkError

    if isinstance(error, (Py4JNetworkError, ConnectionError)):
        return True
    return type(error) is Py4JError and "Trace:" not in str(error)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """``error`` and what it came of."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # a Java exception asks the JVM, which may be gone, for its words
        return type(error).__name__


def _tail(log: Path) -> str:
    try:
        with log.open("rb") as file:
            file.seek(max(_starts.get(log, 0), log.stat().st_size - _LOG_BYTES))
            return file.read().decode("utf-8", "replace")
    except OSError:
        return ""
