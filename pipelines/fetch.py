"""Fetching an image from the open web: bounded in bytes and time, and only from public addresses.

``Fetcher.fetch(url)`` returns the body, or raises ``Rejected`` (the row is refused for what it
is) or ``Failed`` (it did not work; says whether another try may). Ambient proxies, netrc and
cookies play no part: the requests are written here.
"""

from __future__ import annotations

import http.client
import random
import re
import socket
import ssl
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from email.message import Message
from http.client import HTTPResponse

from pipelines.config import FetchConfig
from pipelines.connection import Connection, Deadline, Failed, connect
from pipelines.guard import Rejected, Target, check_addresses, parse_url, redirect_url

Lookup = Callable[[str, int], list[str]]

OPT_OUT_DIRECTIVES = frozenset({"noai", "noimageai", "noindex", "noimageindex", "noml", "none"})
_REDIRECT_STATUSES = frozenset({301, 302, 303, 307, 308})
_PASSING_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504})
_VALUED_DIRECTIVES = ("unavailable_after", "max-snippet", "max-image-preview", "max-video-preview")
_AGENT = re.compile(r"\*|[a-z][a-z0-9_.-]*")
_DRAIN_BYTES = 64 * 1024
_READ_BYTES = 64 * 1024
_MAX_ADDRESSES_TRIED = 3
_LOOKUP_THREADS = 8


def system_lookup(host: str, port: int) -> list[str]:
    """The addresses the machine's resolver gives for ``host``, in its order."""
    answers = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
    return list(dict.fromkeys(str(answer[4][0]) for answer in answers))


def is_opted_out(headers: Message, robots_token: str) -> bool:
    """Whether any X-Robots-Tag header forbids what we do, for all agents or for ours.

    A header is a comma-separated list; ``agent:`` before a directive holds for the rest of its
    header. ``unavailable_after`` carries a date that may itself hold commas and colons.
    """
    for header in headers.get_all("X-Robots-Tag", []):
        agent = "*"
        for item in str(header).lower().split(","):
            directive = item.strip()
            while ":" in directive and not directive.startswith(_VALUED_DIRECTIVES):
                name, _, rest = directive.partition(":")
                if not _AGENT.fullmatch(name.strip()):
                    break
                agent, directive = name.strip(), rest.strip()
            if directive in OPT_OUT_DIRECTIVES and agent in ("*", robots_token.lower()):
                return True
    return False


class Fetcher:
    """Downloads for one task; safe to call from many threads.

    Holds at most ``num_threads`` idle connections and, in its callers' threads, one body of at
    most ``max_bytes`` each. ``lookup`` and ``tls`` exist for tests and private trust stores.
    """

    def __init__(
        self,
        config: FetchConfig,
        lookup: Lookup = system_lookup,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._config = config
        self._resolver = _Resolver(lookup)
        self._tls = tls
        self._pool = _Pool(config.num_threads)
        self._host_slots: dict[str, threading.BoundedSemaphore] = {}
        self._lock = threading.Lock()

    def fetch(self, url: str) -> bytes:
        """The body behind ``url``, after redirects and retries."""
        target = parse_url(url, self._config.allowed_ports)
        for attempt in range(self._config.retries + 1):
            try:
                with self._slot(target):
                    return self._attempt(target)
            except Failed as failure:
                if attempt == self._config.retries or not failure.retry_now:
                    raise
                wait_seconds = self._config.backoff_seconds * 2**attempt
                if failure.retry_after_seconds is not None:
                    wait_seconds = max(wait_seconds, failure.retry_after_seconds)
                if wait_seconds > self._config.total_deadline_seconds:
                    raise
                time.sleep(wait_seconds * (1 + 0.1 * random.random()))
        raise AssertionError("unreachable: the last attempt returns or raises")

    def close(self) -> None:
        self._pool.close()
        self._resolver.close()

    def _slot(self, target: Target) -> threading.BoundedSemaphore:
        with self._lock:
            if target.place not in self._host_slots:
                slots = threading.BoundedSemaphore(self._config.max_per_host)
                self._host_slots[target.place] = slots
            return self._host_slots[target.place]

    def _attempt(self, target: Target) -> bytes:
        """One attempt: all hops under one deadline."""
        deadline = Deadline(self._config.total_deadline_seconds)
        seen = {target.url}
        for hop in range(self._config.max_redirects + 1):
            try:
                with _causes():
                    found = self._hop(target, deadline)
            except Rejected as rejection:
                if hop == 0 or rejection.reason in ("optout", "encoding", "redirect"):
                    raise
                raise Rejected("redirect", f"hop {hop}: {rejection}") from rejection
            if isinstance(found, bytes):
                return found
            target = found
            if target.url in seen:
                raise Rejected("redirect", "loop")
            seen.add(target.url)
        raise Rejected("redirect", f"more than {self._config.max_redirects} hops")

    def _hop(self, target: Target, deadline: Deadline) -> bytes | Target:
        """One request: the body, or where a redirect leads."""
        connection, response = self._exchange(target, deadline)
        is_reusable = False
        try:
            if is_opted_out(response.headers, self._config.robots_token):
                raise Rejected("optout", "X-Robots-Tag")
            if response.status == 200:
                body = self._read_body(response)
                is_reusable = True
                return body
            is_reusable = _drain(response)
            return self._next_target(target, response)
        finally:
            if is_reusable and not response.will_close:
                self._pool.put(target, connection)
            else:
                connection.close()

    def _next_target(self, target: Target, response: HTTPResponse) -> Target:
        location = response.headers.get("Location")
        if response.status not in _REDIRECT_STATUSES or location is None:
            raise Failed(
                f"http_{response.status}",
                retryable=response.status in _PASSING_STATUSES,
                retry_after_seconds=_retry_after(response.headers),
            )
        # http.client reads headers as latin-1; servers mean UTF-8.
        location = location.encode("latin-1", "replace").decode("utf-8", "replace")
        try:
            return parse_url(redirect_url(target, location), self._config.allowed_ports)
        except Rejected as rejection:
            raise Rejected("redirect", str(rejection)) from rejection

    def _exchange(self, target: Target, deadline: Deadline) -> tuple[Connection, HTTPResponse]:
        request = self._request_bytes(target)
        kept = self._pool.take(target)
        if kept is not None:
            try:
                return kept, kept.exchange(request, deadline, self._config.max_bytes)
            except (ConnectionError, ssl.SSLError):
                kept.close()  # the server had hung up in the meantime: not this request's fault
            except BaseException:
                kept.close()
                raise
        connection = self._connect(target, deadline)
        try:
            return connection, connection.exchange(request, deadline, self._config.max_bytes)
        except BaseException:
            connection.close()
            raise

    def _connect(self, target: Target, deadline: Deadline) -> Connection:
        mapped = self._config.connect_to.get(target.place)
        if mapped is not None:
            address, _, port = mapped.rpartition(":")
            places = [(address.strip("[]"), int(port))]
        else:
            addresses = check_addresses(
                self._resolver.addresses(target.host, target.port, deadline)
            )
            places = [(address, target.port) for address in addresses[:_MAX_ADDRESSES_TRIED]]
        tls = self._tls_context() if target.scheme == "https" else None
        for place in places[:-1]:
            # Half of what is left: an address that does not answer leaves time for the next.
            with suppress(OSError):
                return connect(place, tls, target.host, Deadline(deadline.remaining() / 2))
        try:
            return connect(places[-1], tls, target.host, deadline)
        except (TimeoutError, ssl.SSLError):
            raise
        except OSError as error:
            raise Failed("connect", error.strerror or str(error), retryable=True) from error

    def _tls_context(self) -> ssl.SSLContext:
        with self._lock:
            if self._tls is None:
                self._tls = ssl.create_default_context()
            return self._tls

    def _request_bytes(self, target: Target) -> bytes:
        lines = (
            f"GET {target.request_path} HTTP/1.1",
            f"Host: {target.host_header}",
            f"User-Agent: {self._config.user_agent}",
            "Accept: image/jpeg, image/png, image/webp, image/*;q=0.8",
            "Accept-Encoding: identity",
            "Connection: keep-alive",
        )
        return ("\r\n".join(lines) + "\r\n\r\n").encode("ascii")

    def _read_body(self, response: HTTPResponse) -> bytes:
        max_bytes = self._config.max_bytes
        if response.length is not None and response.length > max_bytes:
            raise Failed("too_big", f"{response.length} bytes announced", retryable=False)
        decode = _decoder(response.headers.get("Content-Encoding", "identity"), max_bytes)
        chunks: list[bytes] = []
        num_bytes = 0
        while chunk := response.read(_READ_BYTES):
            decoded = decode(chunk)
            num_bytes += len(decoded)
            if num_bytes > max_bytes:
                raise Failed("too_big", f"more than {max_bytes} bytes", retryable=False)
            chunks.append(decoded)
        if response.length:
            raise Failed("short_body", f"{response.length} bytes missing", retryable=True)
        return b"".join(chunks)


@contextmanager
def _causes() -> Iterator[None]:
    """Turn what sockets, TLS and HTTP raise into ``Failed`` with a cause from our list."""
    try:
        yield
    except TimeoutError as error:
        raise Failed("timeout", "deadline", retryable=True, retry_now=False) from error
    except ssl.SSLCertVerificationError as error:
        raise Failed("tls", error.verify_message, retryable=False) from error
    except ssl.SSLError as error:
        raise Failed("tls", error.reason or "handshake", retryable=True) from error
    except http.client.IncompleteRead as error:
        raise Failed("short_body", "body ended early", retryable=True) from error
    except ConnectionError as error:
        raise Failed("disconnect", type(error).__name__, retryable=True) from error
    except (http.client.HTTPException, ValueError, zlib.error) as error:
        raise Failed("protocol", type(error).__name__, retryable=False) from error
    except OSError as error:
        raise Failed("network", error.strerror or type(error).__name__, retryable=True) from error


def _drain(response: HTTPResponse) -> bool:
    """Read a small announced body so that the connection can be kept; False when it is not."""
    if response.length is None or response.length > _DRAIN_BYTES:
        return False
    response.read()
    return True


def _retry_after(headers: Message) -> float | None:
    value = headers.get("Retry-After", "")
    return float(value) if value.isascii() and value.isdigit() and len(value) < 6 else None


def _decoder(encoding: str, max_bytes: int) -> Callable[[bytes], bytes]:
    """Undo a Content-Encoding we did not ask for, never giving more than ``max_bytes`` + 1."""
    name = encoding.strip().lower()
    if name in ("", "identity"):
        return bytes
    if name not in ("gzip", "x-gzip", "deflate"):
        raise Rejected("encoding", name[:20])
    inflater = zlib.decompressobj(zlib.MAX_WBITS | 32)
    return lambda chunk: inflater.decompress(chunk, max_bytes + 1)


class _Resolver:
    """Names to addresses, remembered for one task, each look-up bounded by the caller's deadline.

    ``getaddrinfo`` cannot be interrupted: a look-up that outlives its caller goes on in one of a
    few threads, and its answer serves the next caller.
    """

    def __init__(self, lookup: Lookup) -> None:
        self._lookup = lookup
        self._threads = ThreadPoolExecutor(_LOOKUP_THREADS, thread_name_prefix="lookup")
        self._answers: dict[str, Future[list[str]]] = {}
        self._lock = threading.Lock()

    def addresses(self, host: str, port: int, deadline: Deadline) -> list[str]:
        with self._lock:
            future = self._answers.get(host)
            if future is None:
                future = self._threads.submit(self._lookup, host, port)
                self._answers[host] = future
        try:
            found = future.result(timeout=deadline.remaining())
        except TimeoutError as error:
            raise Failed("dns", "deadline", retryable=True, retry_now=False) from error
        except UnicodeError as error:
            raise Rejected("url", "host name") from error
        except OSError as error:
            unknown = isinstance(error, socket.gaierror) and error.errno == socket.EAI_NONAME
            if not unknown:
                self._forget(host, future)
            cause = "dns_no_such_host" if unknown else "dns"
            raise Failed(cause, str(error.strerror), retryable=not unknown) from error
        if not found:
            raise Failed("dns_no_such_host", "no address", retryable=False)
        return found

    def _forget(self, host: str, future: Future[list[str]]) -> None:
        with self._lock:
            if self._answers.get(host) is future:
                del self._answers[host]

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


class _Pool:
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
