"""One HTTP/1.1 connection whose every wait ends at a deadline.

``http.client`` parses the responses; the socket underneath is ours, so that the time left is set
before *each* receive (a timeout per receive would let a server drip bytes for ever) and the
bytes received are counted whatever they are: headers, chunk sizes, trailers or body.
"""

from __future__ import annotations

import io
import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from email.message import Message
from email.utils import parsedate_to_datetime
from http.client import HTTPResponse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

# Hints that come before the answer; ``http.client`` passes over 100 itself.
_INTERIM_STATUSES = frozenset({102, 103})
HEADER_ALLOWANCE_BYTES = 256 * 1024
_READ_BUFFER_BYTES = 64 * 1024


class Failed(Exception):
    """The download did not work. ``retryable``: another run may fare better.

    ``retry_now``: a further attempt in this run is worth it. A used-up deadline is not: it gave
    the server all the time there was.
    """

    def __init__(
        self,
        cause: str,
        detail: str = "",
        *,
        retryable: bool,
        retry_now: bool | None = None,
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(f"{cause}: {detail}" if detail else cause)
        self.cause = cause
        self.detail = detail
        self.retryable = retryable
        self.retry_now = retryable if retry_now is None else retry_now
        self.retry_after_seconds = retry_after_seconds


def retry_after_seconds(headers: Message) -> float | None:
    """The wait that ``Retry-After`` asks for, seconds, >= 0; None when no wait can be read.

    Both of its forms are read. A date is held against the server's own clock where it tells the
    time: ours may differ.
    """
    told = headers.get("Retry-After", "").strip()
    if told.isascii() and told.isdigit():
        return float(told)
    ends_at = _moment(told)
    if ends_at is None:
        return None
    now = _moment(headers.get("Date", "")) or datetime.now(UTC)
    return max((ends_at - now).total_seconds(), 0.0)


def _moment(told: str) -> datetime | None:
    """An HTTP date in any of its three forms, one of which has no zone; None for other text."""
    try:
        found = parsedate_to_datetime(told)
    except (ValueError, OverflowError):
        return None
    return found if found.tzinfo is not None else found.replace(tzinfo=UTC)


class Deadline:
    """A moment by which everything must have ended. Waiting for one's turn moves it."""

    def __init__(self, seconds: float) -> None:
        self._ends_at = time.monotonic() + seconds

    def remaining(self) -> float:
        """Seconds left, > 0; raises ``TimeoutError`` when there are none."""
        left = self._ends_at - time.monotonic()
        if left <= 0:
            raise TimeoutError("deadline passed")
        return left

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is spent inside is not counted."""
        began_at = time.monotonic()
        try:
            yield
        finally:
            self._ends_at += time.monotonic() - began_at


class Connection:
    """A connected socket that can carry one exchange after another."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._source = _DeadlineSource(sock)
        self._reader = _KeptReader(self._source, _READ_BUFFER_BYTES)
        self.num_exchanges = 0

    def exchange(self, request: bytes, deadline: Deadline, max_bytes: int) -> HTTPResponse:
        """Send ``request`` and read the response up to its body.

        Everything received until the next exchange, headers included, may not pass
        ``max_bytes`` plus an allowance for headers, nor the deadline.
        """
        self._source.begin(deadline, max_bytes + HEADER_ALLOWANCE_BYTES)
        self.num_exchanges += 1
        self._socket.settimeout(deadline.remaining())
        self._socket.sendall(request)
        while True:
            response = HTTPResponse(_ResponseSource(self._reader), method="GET")  # type: ignore[arg-type]
            response.begin()
            if response.status not in _INTERIM_STATUSES:
                return response

    def is_clean(self) -> bool:
        """Whether nothing is left over from the last exchange, and the server has not hung up."""
        self._source.poll()
        try:
            leftover = self._reader.peek(1)
        except (OSError, ValueError):
            return False
        return not leftover and not self._source.at_end

    def close(self) -> None:
        self._socket.close()


def connect(
    address: tuple[str, int], tls: ssl.SSLContext | None, host: str, deadline: Deadline
) -> Connection:
    """Dial exactly ``address`` (an IP and a port); TLS names and verifies ``host``."""
    sock = socket.create_connection(address, timeout=deadline.remaining())
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if tls is not None:
            sock.settimeout(deadline.remaining())
            sock = tls.wrap_socket(sock, server_hostname=host)
        return Connection(sock)
    except BaseException:
        sock.close()
        raise


class _DeadlineSource(io.RawIOBase):
    """The receiving half of a socket."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__()
        self._socket = sock
        self._deadline: Deadline | None = None
        self._num_bytes_left = 0
        self.at_end = False

    def begin(self, deadline: Deadline, max_bytes: int) -> None:
        self._deadline = deadline
        self._num_bytes_left = max_bytes

    def poll(self) -> None:
        """From here to the next exchange, take only what has already arrived."""
        self._deadline = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int | None:
        self._socket.settimeout(0 if self._deadline is None else self._deadline.remaining())
        try:
            num_bytes = self._socket.recv_into(buffer)
        except (BlockingIOError, ssl.SSLWantReadError):
            return None
        self.at_end = num_bytes == 0
        self._num_bytes_left -= num_bytes
        if self._num_bytes_left < 0:
            raise Failed(
                "too_big", "more bytes than a body and its headers may have", retryable=False
            )
        return num_bytes


class _KeptReader(io.BufferedReader):
    """``HTTPResponse`` closes its file after each body; the connection lives on."""

    def close(self) -> None:
        pass


class _ResponseSource:
    """What ``HTTPResponse`` asks of a socket."""

    def __init__(self, reader: io.BufferedReader) -> None:
        self._reader = reader

    def makefile(self, mode: str) -> io.BufferedReader:
        return self._reader
