"""Fetching an image from the open web: bounded in bytes and time, and only from public addresses.

``Fetcher.fetch(url)`` returns the body, or raises ``Rejected`` (the row is refused for what it
is) or ``Failed`` (it did not work; says whether another try may). Ambient proxies, netrc and
cookies play no part: the requests are written here.
"""

from __future__ import annotations

import http.client
import random
import ssl
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPResponse

from pipelines.config import FetchConfig
from pipelines.connection import Connection, Deadline, Failed, connect, retry_after_seconds
from pipelines.consent import MAX_POLICY_BYTES, Consent
from pipelines.guard import Rejected, Target, check_addresses, parse_url, redirect_url
from pipelines.hosts import Budgets, Lookup, Pool, Resolver, system_lookup
from pipelines.tombstones import TAKEDOWN, Tombstones

_REDIRECT_STATUSES = frozenset({301, 302, 303, 307, 308})
_REFUSED_TARGETS = frozenset({"url", "scheme", "port", "address"})
_PASSING_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504})
_DRAIN_BYTES = 64 * 1024
_READ_BYTES = 64 * 1024
_MAX_ADDRESSES_TRIED = 3
_MIN_POLICY_REDIRECTS = 5  # what RFC 9309 wants followed


@dataclass(frozen=True)
class _Purpose:
    """What a request is for: a body of at most ``max_bytes``; ``is_image`` asks for consent.

    A longer body fails, or, ``is_cut``, is taken as far as it may.
    """

    max_bytes: int
    max_redirects: int
    is_image: bool = True
    is_cut: bool = False


class Fetcher:
    """Downloads for one process; safe to call from many threads.

    Holds at most ``num_threads`` idle connections and, in its callers' threads, one body of at
    most ``max_bytes`` each. Nothing that ``tombstones`` bar is asked for, wherever a redirect
    leads. ``lookup`` and ``tls`` exist for tests and private trust stores.
    """

    def __init__(
        self,
        config: FetchConfig,
        lookup: Lookup = system_lookup,
        tls: ssl.SSLContext | None = None,
        tombstones: Tombstones | None = None,
    ) -> None:
        self._config = config
        self._tombstones = tombstones or Tombstones()
        self._image = _Purpose(config.max_bytes, config.max_redirects)
        self._policy = _Purpose(
            MAX_POLICY_BYTES,
            max(config.max_redirects, _MIN_POLICY_REDIRECTS),
            is_image=False,
            is_cut=True,
        )
        self._resolver = Resolver(lookup, config.num_threads)
        self._tls = tls
        self._pool = Pool(config.num_threads)
        self._budgets = Budgets(config)
        self._consent = Consent(
            config.opt_outs, config.robots_token, lambda target: self._get(target, self._policy)
        )
        self._lock = threading.Lock()

    def fetch(self, url: str) -> bytes:
        """The body behind ``url``, after redirects and retries; ``Rejected`` or ``Failed``.

        Talking to servers takes ``total_deadline_seconds`` at most, over all hops and attempts;
        waiting for a host's turn, or as long as a server asked, is not counted. A site's own
        rules are read before, once per site, each within a deadline of its own.
        """
        return self._get(parse_url(url, self._config.allowed_ports), self._image)

    def close(self) -> None:
        self._pool.close()
        self._resolver.close()

    def _get(self, target: Target, purpose: _Purpose) -> bytes:
        """All attempts, under one deadline."""
        deadline = Deadline(self._config.total_deadline_seconds)
        for attempt in range(self._config.retries + 1):
            try:
                return self._attempt(target, purpose, deadline)
            except Failed as failure:
                if attempt == self._config.retries or not failure.retry_now:
                    raise
                wait_seconds = self._config.backoff_seconds * 2**attempt
                if failure.retry_after_seconds is not None:
                    wait_seconds = max(wait_seconds, failure.retry_after_seconds)
                if wait_seconds > self._config.total_deadline_seconds:
                    raise
                with deadline.paused():
                    time.sleep(wait_seconds * (1 + 0.1 * random.random()))
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _attempt(self, target: Target, purpose: _Purpose, deadline: Deadline) -> bytes:
        """One attempt, hop by hop; a body in which nothing is wrong, or an exception."""
        seen = {target.url}
        for hop in range(purpose.max_redirects + 1):
            if self._tombstones and self._tombstones.bar(target):
                # A site's file behind such a redirect is one that cannot be had.
                raise Rejected(TAKEDOWN if purpose.is_image else "redirect")
            try:
                if purpose.is_image:
                    with deadline.paused():
                        self._consent.check_site(target)
                with self._budgets.turn(target, deadline), _causes():
                    found = self._hop(target, purpose, deadline)
            except Rejected as rejection:
                if hop == 0 or rejection.reason not in _REFUSED_TARGETS:
                    raise
                raise Rejected("redirect", f"hop {hop}: {rejection}") from rejection
            if isinstance(found, bytes):
                return found
            target = found
            if target.url in seen:
                raise Rejected("redirect", "loop")
            seen.add(target.url)
        raise Rejected("redirect", f"more than {purpose.max_redirects} hops")

    def _hop(self, target: Target, purpose: _Purpose, deadline: Deadline) -> bytes | Target:
        """One request: the body, or where a redirect leads."""
        connection, response = self._exchange(target, purpose, deadline)
        is_reusable = False
        try:
            if purpose.is_image:
                self._consent.check_headers(response.headers)
            if response.status == 200:
                body = self._read_body(response, purpose)
                is_reusable = response.isclosed()
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
                retry_after_seconds=retry_after_seconds(response.headers),
            )
        # http.client reads headers as latin-1; servers mean UTF-8.
        location = location.encode("latin-1", "replace").decode("utf-8", "replace")
        try:
            return parse_url(redirect_url(target, location), self._config.allowed_ports)
        except Rejected as rejection:
            raise Rejected("redirect", str(rejection)) from rejection

    def _exchange(
        self, target: Target, purpose: _Purpose, deadline: Deadline
    ) -> tuple[Connection, HTTPResponse]:
        request = self._request_bytes(target, purpose)
        kept = self._pool.take(target)
        if kept is not None:
            try:
                return kept, kept.exchange(request, deadline, purpose.max_bytes)
            except (ConnectionError, ssl.SSLError):
                kept.close()  # the server had hung up in the meantime: not this request's fault
            except BaseException:
                kept.close()
                raise
        connection = self._connect(target, deadline)
        try:
            return connection, connection.exchange(request, deadline, purpose.max_bytes)
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

    def _request_bytes(self, target: Target, purpose: _Purpose) -> bytes:
        accepted = "image/jpeg, image/png, image/webp, image/*;q=0.8"
        lines = (
            f"GET {target.request_path} HTTP/1.1",
            f"Host: {target.host_header}",
            f"User-Agent: {self._config.user_agent}",
            f"Accept: {accepted if purpose.is_image else '*/*'}",
            "Accept-Encoding: identity",
            "Connection: keep-alive",
        )
        return ("\r\n".join(lines) + "\r\n\r\n").encode("ascii")

    def _read_body(self, response: HTTPResponse, purpose: _Purpose) -> bytes:
        max_bytes = purpose.max_bytes
        if response.length is not None and response.length > max_bytes and not purpose.is_cut:
            raise Failed("too_big", f"{response.length} bytes announced", retryable=False)
        encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
        inflater = None if encoding in ("", "identity") else _inflater(encoding)
        chunks: list[bytes] = []
        num_bytes = 0
        while chunk := response.read(_READ_BYTES):
            # Never more than one byte over the cap, however much a chunk unpacks to.
            decoded = chunk if inflater is None else inflater.decompress(chunk, max_bytes + 1)
            num_bytes += len(decoded)
            chunks.append(decoded)
            if num_bytes > max_bytes and purpose.is_cut:
                return b"".join(chunks)[:max_bytes]
            if num_bytes > max_bytes:
                raise Failed("too_big", f"more than {max_bytes} bytes", retryable=False)
        if response.length:
            raise Failed("short_body", f"{response.length} bytes missing", retryable=True)
        if inflater is not None and not inflater.eof:
            raise Failed("short_body", f"the {encoding} stream ended early", retryable=True)
        return b"".join(chunks)


_shared: dict[str, Fetcher] = {}
_shared_lock = threading.Lock()


def shared_fetcher(config: FetchConfig, tombstones: Tombstones) -> Fetcher:
    """This process's fetcher: what it learnt of hosts in one task serves the next.

    One is kept; another configuration, or other tombstones, replace it.
    """
    key = config.model_dump_json() + tombstones.digest
    with _shared_lock:
        if key not in _shared:
            for fetcher in _shared.values():
                fetcher.close()
            _shared.clear()
            _shared[key] = Fetcher(config, tombstones=tombstones)
        return _shared[key]


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


def _inflater(encoding: str) -> zlib._Decompress:
    """Undoes a Content-Encoding that was not asked for."""
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise Rejected("encoding", encoding[:20])
    return zlib.decompressobj(zlib.MAX_WBITS | 32)
