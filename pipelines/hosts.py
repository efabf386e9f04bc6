"""What is remembered about hosts: addresses, kept connections, and how much each may be asked.

All of it is bounded in number and in time.
"""

from __future__ import annotations

import socket
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

from pipelines.config import FetchConfig
from pipelines.connection import Connection, Deadline, Failed
from pipelines.guard import Rejected, Target

Lookup = Callable[[str, int], list[str]]

# ``getaddrinfo`` does not say how long an answer holds.
_REMEMBER_ADDRESSES_SECONDS = 300.0
_REMEMBER_NO_SUCH_HOST_SECONDS = 60.0
_MAX_NAMES = 50_000
_MAX_LOOKUP_THREADS = 64
_MAX_HOSTS = 50_000
_PAUSE_SECONDS = 60.0
_BUSY_STATUSES = ("http_429", "http_503")
_HOST_FAILURES = frozenset(
    {"connect", "disconnect", "dns", "network", "timeout", "tls", *_BUSY_STATUSES}
)


def system_lookup(host: str, port: int) -> list[str]:
    """The addresses the machine's resolver gives for ``host``, in its order."""
    answers = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
    return list(dict.fromkeys(str(answer[4][0]) for answer in answers))


class Resolver:
    """Names to addresses, each look-up bounded by the caller's deadline.

    ``getaddrinfo`` cannot be interrupted: a look-up that outlives its caller goes on in one of a
    few threads, and its answer serves the next caller. Answers, and that a name does not exist,
    are remembered for a while; a failure in passing is not.
    """

    def __init__(self, lookup: Lookup, num_threads: int) -> None:
        self._lookup = lookup
        num_threads = min(num_threads, _MAX_LOOKUP_THREADS)
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="lookup")
        self._answers: OrderedDict[str, Future[list[str] | OSError | UnicodeError]] = OrderedDict()
        self._expires_at: dict[str, float] = {}
        self._lock = threading.Lock()

    def addresses(self, host: str, port: int, deadline: Deadline) -> list[str]:
        """Every address of ``host``; ``Failed`` (``dns``, ``dns_no_such_host``) without one."""
        now = time.monotonic()
        with self._lock:
            future = self._answers.get(host)
            if future is None or self._expires_at.get(host, now) < now:
                future = self._threads.submit(self._look_up, host, port)
                self._answers[host] = future
                self._expires_at.pop(host, None)
        try:
            found = future.result(timeout=deadline.remaining())
        except TimeoutError as error:
            raise Failed("dns", "deadline", retryable=True, retry_now=False) from error
        if isinstance(found, UnicodeError):
            raise Rejected("url", "host name")
        if isinstance(found, OSError) and not _is_unknown(found):
            raise Failed("dns", str(found.strerror), retryable=True)
        if isinstance(found, OSError) or not found:
            raise Failed("dns_no_such_host", "no address", retryable=False)
        return found

    def _look_up(self, host: str, port: int) -> list[str] | OSError | UnicodeError:
        found: list[str] | OSError | UnicodeError
        try:
            found = self._lookup(host, port)
        except (OSError, UnicodeError) as error:
            found = error.with_traceback(None)
        with self._lock:
            if isinstance(found, OSError) and not _is_unknown(found):
                self._answers.pop(host, None)
                return found
            is_answer = isinstance(found, list)
            seconds = _REMEMBER_ADDRESSES_SECONDS if is_answer else _REMEMBER_NO_SUCH_HOST_SECONDS
            self._expires_at[host] = time.monotonic() + seconds
            while len(self._expires_at) > _MAX_NAMES:
                oldest = next(iter(self._expires_at))
                del self._expires_at[oldest]
                self._answers.pop(oldest, None)
        return found

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


def _is_unknown(error: OSError) -> bool:
    return isinstance(error, socket.gaierror) and error.errno == socket.EAI_NONAME


class Pool:
    """Idle connections by place. Bounded: the one idle longest goes first."""

    def __init__(self, max_idle: int) -> None:
        self._max_idle = max_idle
        self._idle: deque[tuple[tuple[str, str], Connection]] = deque()
        self._lock = threading.Lock()

    def take(self, target: Target) -> Connection | None:
        key = (target.scheme, target.place)
        with self._lock:
            for position in range(len(self._idle) - 1, -1, -1):
                if self._idle[position][0] == key:
                    connection = self._idle[position][1]
                    del self._idle[position]
                    break
            else:
                return None
        if connection.is_clean():
            return connection
        connection.close()
        return None

    def put(self, target: Target, connection: Connection) -> None:
        with self._lock:
            self._idle.append(((target.scheme, target.place), connection))
            dropped = self._idle.popleft()[1] if len(self._idle) > self._max_idle else None
        if dropped is not None:
            dropped.close()

    def close(self) -> None:
        with self._lock:
            idle, self._idle = list(self._idle), deque()
        for _, connection in idle:
            connection.close()


class Budgets:
    """How much each host is asked: so many requests at once, so many per second, and none for a
    while after it asked for peace or stopped answering.

    Hosts that ``connect_to`` names are the recipe's own and have no rate.
    """

    def __init__(self, config: FetchConfig) -> None:
        self._config = config
        self._hosts: OrderedDict[str, _Host] = OrderedDict()
        self._lock = threading.Lock()

    @contextmanager
    def turn(self, target: Target, deadline: Deadline) -> Iterator[None]:
        """Wait for a place at the host, off the deadline; what is raised inside is judged.

        While the host is left alone, raises ``Failed`` at once, with the cause that led to it.
        """
        host = self._host(target)
        try:
            with deadline.paused():
                host.slots.acquire()
            try:
                host.wait(deadline)
                yield
                host.worked()
            except Rejected:
                host.worked()
                raise
            except Failed as failure:
                host.failed(failure)
                raise
            finally:
                host.slots.release()
        finally:
            with self._lock:
                host.num_users -= 1

    def _host(self, target: Target) -> _Host:
        rate = self._config.max_requests_per_second_per_host
        if target.place in self._config.connect_to:
            rate = None
        with self._lock:
            host = self._hosts.get(target.place)
            if host is None:
                host = self._hosts[target.place] = _Host(self._config, rate)
            host.num_users += 1
            self._hosts.move_to_end(target.place)
            if len(self._hosts) > _MAX_HOSTS:
                oldest, idle = next(iter(self._hosts.items()))
                if idle.num_users == 0:
                    del self._hosts[oldest]
        return host


class _LeftAlone(Failed):
    """Nothing was asked: the host failed too often just now."""

    def __init__(self, cause: str, detail: str, *, retryable: bool) -> None:
        super().__init__(cause, detail, retryable=retryable, retry_now=False)


class _Host:
    def __init__(self, config: FetchConfig, rate: float | None) -> None:
        self.slots = threading.BoundedSemaphore(config.max_per_host)
        self.num_users = 0
        self._interval_seconds = 0.0 if rate is None else 1 / rate
        self._max_wait_seconds = config.total_deadline_seconds
        self._max_failures = config.max_failures_in_a_row
        self._num_failures = 0
        self._last_cause = ""
        self._next_at = 0.0
        self._down_until = 0.0
        self._lock = threading.Lock()

    def wait(self, deadline: Deadline) -> None:
        with self._lock:
            now = time.monotonic()
            if now < self._down_until:
                raise _LeftAlone(self._last_cause, "host left alone for now", retryable=True)
            starts_at = max(now, self._next_at)
            self._next_at = starts_at + self._interval_seconds
        if starts_at > now:
            with deadline.paused():
                time.sleep(starts_at - now)

    def worked(self) -> None:
        with self._lock:
            self._num_failures = 0

    def failed(self, failure: Failed) -> None:
        """Count what says something about the host, not about one of its files."""
        if isinstance(failure, _LeftAlone):
            return
        if failure.cause not in _HOST_FAILURES:
            self.worked()
            return
        with self._lock:
            now = time.monotonic()
            asked_seconds = failure.retry_after_seconds
            if asked_seconds is not None and asked_seconds <= self._max_wait_seconds:
                self._next_at = max(self._next_at, now + asked_seconds)
            self._num_failures += 1
            self._last_cause = failure.cause
            if self._max_failures is not None and self._num_failures >= self._max_failures:
                self._down_until = now + _PAUSE_SECONDS
                self._num_failures = self._max_failures - 1  # then one more try decides
