"""The painted world's web: serves its images by Host header, and misbehaves on cue.

    python -m demo.web --world FOLDER [--port 0] [--port-file FILE]

Paths: `/images/…` and `/copies/…` from images.json; `/fault/<name>/…` with a name from FAULTS;
`/robots.txt`; `/__stats` counts requests by path. Loopback only. Ends with its parent.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import os
import socket
import struct
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from demo.world import Scene, Thing, WorldConfig, render_array

_TYPES = {"png": "image/png", "jpg": "image/jpeg", "webp": "image/webp"}
_DRIP_SECONDS = 0.5
_MAX_FAULT_SECONDS = 120.0


class World:
    """What images.json says, drawn when asked."""

    def __init__(self, folder: Path) -> None:
        known = json.loads((folder / "world.json").read_text())
        self.config = WorldConfig.model_validate(known["config"])
        self.images: dict[str, dict[str, Any]] = json.loads((folder / "images.json").read_text())
        self.encoded = lru_cache(maxsize=4096)(self._encode)

    def _encode(self, key: str) -> bytes:
        spec = self.images[key]
        image = draw(spec, self.config)
        buffer = io.BytesIO()
        kind = spec["format"]
        options = {"png": {}, "jpg": {"quality": 95, "subsampling": 0}, "webp": {"quality": 95}}
        name = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}[kind]
        image.save(buffer, name, **options[kind])
        return buffer.getvalue()


def scene_from_json(data: dict[str, Any]) -> Scene:
    things = tuple(Thing(**thing) for thing in data["things"])
    return Scene(data["background"], things, data["background_to"])


def draw(spec: dict[str, Any], config: WorldConfig) -> Image.Image:
    """The image of one images.json entry: the scene in the middle, the background to the edges."""
    width, height = spec["width"], spec["height"]
    short = min(width, height)
    pixels = render_array(scene_from_json(spec["scene"]), short, config)
    right, down = width - short, height - short
    around = ((down // 2, down - down // 2), (right // 2, right - right // 2), (0, 0))
    pixels = np.pad(pixels, around, mode="edge")
    if spec["noise"]:
        rng = np.random.default_rng(spec["seed"])
        pixels = pixels + rng.normal(0, spec["noise"], pixels.shape).astype(np.float32)
    image = Image.fromarray(np.clip(pixels.round(), 0, 255).astype(np.uint8))
    if spec.get("watermark"):
        pen = ImageDraw.Draw(image, "RGBA")
        for y in range(0, height, max(24, height // 4)):
            pen.text((4, y + 4), "SAMPLE SAMPLE SAMPLE", fill=(255, 255, 255, 140))
    return image


class Handler(BaseHTTPRequestHandler):
    """HTTP/1.1 with keep-alive; the world and counters hang on the server object."""

    protocol_version = "HTTP/1.1"
    server: PaintedServer
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.server.count(path)
        if path == "/__stats":
            self._send(200, json.dumps(self.server.requests).encode(), "application/json")
        elif path == "/robots.txt":
            self._send(200, b"User-agent: *\nAllow: /\n", "text/plain")
        elif path.startswith("/fault/"):
            fault = FAULTS.get(path.split("/")[2])
            if fault is None:
                self._send(404, b"no such fault", "text/plain")
            else:
                fault(self)
        else:
            self._image(path)

    def _image(self, path: str) -> None:
        host = self.headers.get("Host", "").partition(":")[0]
        spec = self.server.world.images.get(host + path)
        if spec is None:
            self._send(404, b"not found", "text/plain")
            return
        body = self.server.world.encoded(host + path)
        self._send(200, body, _TYPES[spec["format"]], spec.get("headers", {}))

    def _send(
        self, status: int, body: bytes, kind: str, headers: dict[str, str] | None = None
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _start(self, headers: dict[str, str], status: int = 200) -> None:
        """Begin an answer after which the connection is not used again."""
        self.close_connection = True
        self.send_response(status)
        for name, value in {"Content-Type": "image/png", **headers}.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet: `/__stats` counts."""


def _status(code: int) -> Callable[[Handler], None]:
    return lambda handler: handler._send(code, b"fault on cue", "text/plain")


def _slow_drip(handler: Handler) -> None:
    handler._start({"Content-Length": "100000"})
    until = time.monotonic() + _MAX_FAULT_SECONDS
    while time.monotonic() < until:
        handler.wfile.write(b"x")
        handler.wfile.flush()
        time.sleep(_DRIP_SECONDS)


def _slow_headers(handler: Handler) -> None:
    handler.close_connection = True
    until = time.monotonic() + _MAX_FAULT_SECONDS
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    while time.monotonic() < until:
        handler.wfile.write(b"X-A: b\r\n")
        handler.wfile.flush()
        time.sleep(_DRIP_SECONDS)


def _endless(handler: Handler) -> None:
    handler._start({"Transfer-Encoding": "chunked"})
    chunk = b"10000\r\n" + b"\0" * 0x10000 + b"\r\n"
    until = time.monotonic() + _MAX_FAULT_SECONDS
    while time.monotonic() < until:
        handler.wfile.write(chunk)


def _redirect_loop(handler: Handler) -> None:
    handler._send(302, b"", "text/plain", {"Location": handler.path})


def _redirect_internal(handler: Handler) -> None:
    # Without this server's port, which differs from start to start and would reach the ledger.
    handler._send(302, b"", "text/plain", {"Location": "http://127.0.0.1/__canary"})


def _short_body(handler: Handler) -> None:
    handler._start({"Content-Length": "5000"})
    handler.wfile.write(b"\x89PNG\r\n\x1a\n" + b"\0" * 100)


def _reset(handler: Handler) -> None:
    handler.close_connection = True
    linger = struct.pack("ii", 1, 0)
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)


def _html(handler: Handler) -> None:
    handler._send(200, b"<html><body>parked domain</body></html>", "image/png")


def _bomb(handler: Handler) -> None:
    handler._send(200, pixel_bomb(50_000), "image/png")


def _gzip_bomb(handler: Handler) -> None:
    body = gzip.compress(b"\0" * 20_000_000)
    handler._send(200, body, "image/png", {"Content-Encoding": "gzip"})


@lru_cache(maxsize=2)
def pixel_bomb(side: int) -> bytes:
    """A small PNG whose header promises side x side pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    rows = zlib.compress(b"\0" * (side // 8 + 1) * 64)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


FAULTS: dict[str, Callable[[Handler], None]] = {
    "404": _status(404),
    "410": _status(410),
    "429": _status(429),
    "500": _status(500),
    "503": _status(503),
    "slow-drip": _slow_drip,
    "slow-headers": _slow_headers,
    "endless": _endless,
    "redirect-loop": _redirect_loop,
    "redirect-internal": _redirect_internal,
    "short-body": _short_body,
    "reset": _reset,
    "html": _html,
    "bomb": _bomb,
    "gzip-bomb": _gzip_bomb,
}


class PaintedServer(ThreadingHTTPServer):
    """One world on one loopback port."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, folder: Path, port: int = 0) -> None:
        self.world = World(folder)
        self.requests: Counter[str] = Counter()
        self._lock = threading.Lock()
        super().__init__(("127.0.0.1", port), Handler)

    def count(self, path: str) -> None:
        with self._lock:
            self.requests[path] += 1

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up in the middle of a fault is the point of the fault."""


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m demo.web", description=__doc__)
    parser.add_argument("--world", type=Path, required=True, help="a folder from build_world")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--port-file", type=Path, help="the port is written here once it listens")
    options = parser.parse_args()
    server = PaintedServer(options.world, options.port)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    port = server.server_address[1]
    if options.port_file:
        staged = options.port_file.with_suffix(".tmp")
        staged.write_text(str(port))
        staged.replace(options.port_file)
    print(f"painted world on http://127.0.0.1:{port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
