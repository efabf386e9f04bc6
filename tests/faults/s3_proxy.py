"""A proxy before a real S3 server that breaks what it is told to break, and notes every request.

It changes neither path nor host, so signatures stay right. Faults are told by request: how often,
for which action, for which part of the path.
"""

from __future__ import annotations

import http.client
import threading
import time
from collections import Counter
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>slower</Message></Error>"
INTERNAL = b"<Error><Code>InternalError</Code><Message>We encountered an error</Message></Error>"
HOP_BY_HOP = {"connection", "transfer-encoding", "content-length", "expect", "keep-alive"}


@dataclass
class Fault:
    """What happens to the next ``times`` requests that fit, ``after`` so many that did.

    ``reset``: the connection ends before the server hears of it; ``lose_answer``: after it did.
    ``delay``: the answer comes ``seconds`` late. ``status``: answered with that code in the
    server's place. ``error_in_200``: the server is asked, the answer is an error that says 200.
    ``flip_sent``, ``flip_received``: a bit of the body changes. ``cut_answer``: half of the body.
    """

    kind: str
    action: str = ""
    path: str = ""
    times: int = 1
    after: int = 0
    status: int = 0
    body: bytes = SLOW_DOWN
    seconds: float = 0.0


@dataclass(frozen=True)
class Request:
    """A request as it came. ``action`` is S3's word for it."""

    action: str
    verb: str
    path: str
    headers: tuple[tuple[str, str], ...]
    body: bytes


class S3Proxy(ThreadingHTTPServer):
    """``faults`` are taken in turn, ``requests`` is what came, in order."""

    daemon_threads = True

    def __init__(self, port: int) -> None:
        self.target_port = port
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True)
        self.thread.start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def actions(self) -> Counter[str]:
        """Action -> how often it was asked for."""
        return Counter(request.action for request in self.requests)

    def fault_for(self, request: Request) -> Fault | None:
        with self.lock:
            self.requests.append(request)
            for fault in self.faults:
                fits = fault.action in ("", request.action) and fault.path in request.path
                if fits and fault.after:
                    fault.after -= 1
                elif fits and fault.times:
                    fault.times -= 1
                    return fault
        return None

    def stop(self) -> None:
        self.shutdown()
        self.server_close()
        self.thread.join()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hung up is no news."""


def action_of(verb: str, path: str, headers: dict[str, str]) -> str:
    """S3's word for a request."""
    parts = urlsplit(path)
    query = parse_qs(parts.query, keep_blank_values=True)
    is_object = "/" in parts.path.strip("/")
    if "x-amz-copy-source" in headers:
        return "Copy"
    if "x-amz-rename-source" in headers or "renameObject" in query:
        return "Rename"
    if "uploads" in query:
        return "ListUploads" if verb == "GET" else "CreateUpload"
    if "uploadId" in query:
        return {"PUT": "UploadPart", "POST": "CompleteUpload", "DELETE": "AbortUpload"}[verb]
    if verb == "POST" and "delete" in query:
        return "DeleteObjects"
    if verb == "GET" and not is_object:
        return "List"
    return verb.title()


class Handler(BaseHTTPRequestHandler):
    """One connection of a client."""

    server: S3Proxy
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are in ``S3Proxy.requests``."""

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        lower = {name.lower(): value for name, value in self.headers.items()}
        action = action_of(self.command, self.path, lower)
        headers = tuple(self.headers.items())
        request = Request(action, self.command, self.path, headers, body)
        fault = self.server.fault_for(request)
        kind = "" if fault is None else fault.kind
        if fault is not None and kind in ("reset", "status"):
            return self._refuse(fault)
        status, reason, answered, data = self._forward(request, flipped(body, kind, "flip_sent"))
        if kind == "lose_answer":
            return self._hang_up()
        if fault is not None and kind == "error_in_200":
            status, data = 200, fault.body
        if fault is not None and kind == "delay":
            time.sleep(fault.seconds)
        data = flipped(data, kind, "flip_received")
        self._answer(status, reason, answered, data, is_cut=kind == "cut_answer")

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _serve

    def _forward(
        self, request: Request, body: bytes
    ) -> tuple[int, str, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.target_port, timeout=60)
        connection.putrequest(request.verb, request.path, skip_host=True, skip_accept_encoding=True)
        for name, value in request.headers:
            if name.lower() not in HOP_BY_HOP:
                connection.putheader(name, value)
        connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body)
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        return answer.status, answer.reason, answer.getheaders(), data

    def _answer(
        self, status: int, reason: str, headers: list[tuple[str, str]], data: bytes, *, is_cut: bool
    ) -> None:
        self.send_response_only(status, reason)
        for name, value in headers:
            if name.lower() not in HOP_BY_HOP:
                self.send_header(name, value)
        length = dict((name.lower(), value) for name, value in headers).get("content-length")
        told = length if self.command == "HEAD" and length else str(len(data))
        self.send_header("Content-Length", told)
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if is_cut else data)
        if is_cut:
            self._hang_up()

    def _refuse(self, fault: Fault) -> None:
        if fault.kind == "reset":
            return self._hang_up()
        headers = [("Content-Type", "application/xml")]
        self._answer(fault.status, "told to", headers, fault.body, is_cut=False)

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.close()


def flipped(data: bytes, kind: str, wanted: str) -> bytes:
    """The data with one bit changed in its middle, when that is the fault."""
    if kind != wanted or not data:
        return data
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
