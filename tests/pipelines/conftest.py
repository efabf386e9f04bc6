"""A hostile web server on loopback, a canary that counts who calls, and images on demand."""

from __future__ import annotations

import io
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.config import CurationConfig, FetchConfig
from pipelines.fetch import Fetcher
from pipelines.hosts import Lookup
from pipelines.tombstones import Tombstones

Route = Callable[[socket.socket, str], None]
HOST = "evil.example"


class EvilWeb:
    """Answers each path with whatever bytes its route sends, at the route's own pace.

    ``requests`` holds every request head received. ``fetcher()`` reaches it as
    ``http://evil.example/``, with the address guard on for everything else.
    """

    def __init__(self) -> None:
        self.routes: dict[str, Route] = {}
        self.requests: list[str] = []
        self.stopping = threading.Event()
        self._fetchers: list[Fetcher] = []
        web = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                web.serve(self.request)

        class Server(socketserver.ThreadingTCPServer):
            daemon_threads = True
            allow_reuse_address = True

        self.server = Server(("127.0.0.1", 0), Handler)
        self.port = int(self.server.server_address[1])
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True)
        self.thread.start()

    def serve(self, connection: socket.socket) -> None:
        connection.settimeout(10)
        pending = b""
        try:
            while True:
                while b"\r\n\r\n" not in pending:
                    received = connection.recv(65536)
                    if not received:
                        return
                    pending += received
                head, _, pending = pending.partition(b"\r\n\r\n")
                self.requests.append(head.decode("latin-1"))
                path = head.split(b" ")[1].decode("latin-1")
                self.routes[path.split("?")[0]](connection, path)
        except (OSError, KeyError):
            return

    def route(self, path: str, *parts: bytes, pause_seconds: float = 0.0) -> None:
        """Answer ``path`` with ``parts``, a pause after each; a last part of b"" hangs up."""

        def send(connection: socket.socket, _: str) -> None:
            for part in parts:
                if part == b"":
                    connection.shutdown(socket.SHUT_RDWR)
                    raise OSError("hung up")
                connection.sendall(part)
                if pause_seconds:
                    time.sleep(pause_seconds)

        self.routes[path] = send

    def forever(self, path: str, head: bytes, part: bytes, pause_seconds: float = 0.0) -> None:
        """Answer ``path`` with ``head`` and then ``part`` without end."""

        def send(connection: socket.socket, _: str) -> None:
            connection.sendall(head)
            while not self.stopping.wait(pause_seconds):
                connection.sendall(part)

        self.routes[path] = send

    def config(self, **changes: Any) -> FetchConfig:
        known: dict[str, Any] = {
            "connect_to": {f"{HOST}:80": f"127.0.0.1:{self.port}"},
            "total_deadline_seconds": 10.0,
            "retries": 0,
            "backoff_seconds": 0.01,
            "num_threads": 4,
            "opt_outs": {"robots_txt": False, "tdm_reservation": False},
        }
        return FetchConfig(**(known | changes))

    def fetcher(
        self,
        lookup: Lookup | None = None,
        tls: Any = None,
        tombstones: Tombstones | None = None,
        **changes: Any,
    ) -> Fetcher:
        def refuse(host: str, port: int) -> list[str]:
            raise AssertionError(f"{host}:{port} was looked up")

        fetcher = Fetcher(self.config(**changes), lookup or refuse, tls, tombstones)
        self._fetchers.append(fetcher)
        return fetcher

    def stop(self) -> None:
        self.stopping.set()
        for fetcher in self._fetchers:
            fetcher.close()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


def response(body: bytes, *headers: str, status: str = "200 OK") -> bytes:
    """A whole HTTP response with a Content-Length."""
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + body


@pytest.fixture
def evil_web() -> Iterator[EvilWeb]:
    web = EvilWeb()
    yield web
    web.stop()


class Canary:
    """Counts the connections made to it; there must be none."""

    def __init__(self) -> None:
        self.hits = 0
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._socket.settimeout(0.05)
        self.port = int(self._socket.getsockname()[1])
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._count, daemon=True)
        self._thread.start()

    def _count(self) -> None:
        while not self._stopping.is_set():
            try:
                connection, _ = self._socket.accept()
            except TimeoutError:
                continue
            self.hits += 1
            connection.close()

    def stop(self) -> None:
        time.sleep(0.06)
        self._stopping.set()
        self._thread.join()
        self._socket.close()


@pytest.fixture
def canary() -> Iterator[Canary]:
    bird = Canary()
    yield bird
    bird.stop()
    assert bird.hits == 0, "the guard let a connection through to a private address"


def picture(seed: int = 0, width_px: int = 320, height_px: int = 256) -> Image.Image:
    """A picture of coloured tiles, different for every seed."""
    rng = np.random.default_rng(seed)
    tiles = rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(tiles).resize((width_px, height_px), Image.Resampling.NEAREST)


def encoded(image: Image.Image, format_name: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_name, **options)
    return buffer.getvalue()


@pytest.fixture
def make_picture() -> Callable[..., Image.Image]:
    return picture


@pytest.fixture
def encode() -> Callable[..., bytes]:
    return encoded


@pytest.fixture
def http_response() -> Callable[..., bytes]:
    return response


@dataclass
class TrapWorld:
    """A few dozen rows of metadata with a trap of every kind, and the web they point at.

    ``expected`` maps a row's URL (rows with one URL end alike) to how it must end.
    """

    folder: Path
    web: EvilWeb
    rows: list[dict[str, Any]]
    captions: list[dict[str, Any]]
    expected: dict[str, str]

    def config(self, **changes: Any) -> CurationConfig:
        known: dict[str, Any] = {
            "metadata": [str(self.folder / "metadata")],
            "captions": {"files": [str(self.folder / "captions" / "*.parquet")]},
            "partitions": 3,
            "filters": {
                "min_width_px": 128, "min_height_px": 128, "max_aspect_ratio": 3.0,
                "min_aesthetic_score": 4.5, "max_watermark_prob": 0.5, "max_unsafe_prob": 0.5,
            },
            "fetch": self.web.config(
                max_bytes=200_000, total_deadline_seconds=1.2, retries=1, opt_outs={}
            ),
            "resize": {"image_size_px": 64},
            "shards": {"max_samples": 7},
        }  # fmt: skip
        return CurationConfig.model_validate(known | changes)

    def write(self, num_files: int = 3, order: Sequence[int] | None = None) -> None:
        """Write the metadata as ``num_files`` files; ``order`` renames them."""
        for kind in ("metadata", "captions"):
            for path in (self.folder / kind).glob("*.parquet"):
                path.unlink()
            (self.folder / kind).mkdir(parents=True, exist_ok=True)
        table = pa.Table.from_pylist(self.rows, TRAP_SCHEMA)
        for index in range(num_files):
            name = index if order is None else order[index]
            part = table.take(list(range(index, table.num_rows, num_files)))
            pq.write_table(part, self.folder / "metadata" / f"part-{name}.parquet")
        long = pa.Table.from_pylist(self.captions)
        pq.write_table(long, self.folder / "captions" / "long.parquet")


TRAP_SCHEMA = pa.schema(
    [
        ("URL", pa.string()), ("TEXT", pa.string()), ("WIDTH", pa.float64()),
        ("HEIGHT", pa.float64()), ("similarity", pa.float64()), ("hash", pa.int64()),
        ("punsafe", pa.float32()), ("pwatermark", pa.float32()),
        ("AESTHETIC_SCORE", pa.float32()), ("__index_level_0__", pa.int64()),
    ]
)  # fmt: skip


def make_trap_world(folder: Path, web: EvilWeb, num_good: int = 30) -> TrapWorld:
    world = TrapWorld(folder, web, [], [], {})

    def add(path: str, ends: str, body: bytes | None = None, url: str = "", **changes: Any) -> None:
        number = len(world.rows)
        url = url or f"http://{HOST}{path}"
        world.rows.append(
            {
                "URL": url, "TEXT": f"picture number {number}", "WIDTH": 320.0, "HEIGHT": 256.0,
                "similarity": 0.3, "hash": number, "punsafe": 0.1, "pwatermark": 0.2,
                "AESTHETIC_SCORE": 5.0 + number % 5 / 4, "__index_level_0__": number,
            } | changes
        )  # fmt: skip
        if url not in world.expected:
            world.expected[url] = ends
        if body is not None:
            web.route(path, body)

    for number in range(num_good):
        add(f"/good/{number}.jpg", "committed", response(encoded(picture(number))))
        if number % 2 == 0:
            long = " ".join(["a long caption with many words"] * 9) + f" {number}"
            caption = {"url": world.rows[-1]["URL"], "caption": long, "model": "captioner-1"}
            world.captions.append(caption)
    world.captions.append({"url": "http://nobody.example/", "caption": "x", "model": "m"})
    # Metadata.
    add("", "no_url", URL=None)
    add("/f/1", "unknown_size", WIDTH=None)
    add("/f/2", "too_small", WIDTH=100.0)
    add("/f/3", "aspect_ratio", WIDTH=1000.0)
    add("/f/4", "unknown_aesthetic_score", AESTHETIC_SCORE=float("nan"))
    add("/f/5", "low_aesthetic_score", AESTHETIC_SCORE=4.0)
    add("/f/6", "unknown_watermark_prob", pwatermark=None)
    add("/f/7", "watermarked", pwatermark=0.9)
    add("/f/8", "unknown_unsafe_prob", punsafe=2.0)
    add("/f/9", "unsafe", punsafe=0.9)
    add("/f/10", "caption_too_long", TEXT="x" * 3000)
    add("/f/11", "no_caption", TEXT=" \u200b ")
    # Copies: of a row, of a URL, of the bytes under two URLs.
    world.rows.append(dict(world.rows[0]))
    world.rows.append(world.rows[1] | {"TEXT": "another text", "AESTHETIC_SCORE": 4.6})
    twin = response(encoded(picture(10_000)))
    add("/twin/a.jpg", "committed", twin, AESTHETIC_SCORE=9.0)
    for name in "bcdefg":
        add(f"/twin/{name}.jpg", "duplicate_image", twin, AESTHETIC_SCORE=5.0)
    # The web.
    for url, ends in (
        ("file:///etc/passwd", "scheme"), ("http://user@evil.example/", "url"),
        ("http://evil.example:22/", "port"), ("http://127.0.0.1/", "address"),
    ):  # fmt: skip
        add("", ends, url=url)
    add("/w/1", "http_404", response(b"no", status="404 Not Found"))
    add("/w/2", "http_500", response(b"no", status="500 Oops"))
    add("/w/3", "redirect", response(b"", "Location: http://169.254.169.254/", status="302 x"))
    add("/w/4", "redirect", response(b"", "Location: /w/4", status="302 x"))
    add("/w/5", "optout", response(encoded(picture(1)), "X-Robots-Tag: noai"))
    robots = b"User-agent: *\nDisallow: /private\nAllow: /private/open\n"
    web.route("/robots.txt", response(robots))
    reserved = b'[{"location": "/reserved/*", "tdm-reservation": 1}]'
    web.route("/.well-known/tdmrep.json", response(reserved))
    add("/private/1.jpg", "robots_txt", response(encoded(picture(30_000))))
    add("/private/open.jpg", "committed", response(encoded(picture(30_001))))
    add("/reserved/1.jpg", "tdm_reservation", response(encoded(picture(30_002))))
    add("/w/14", "tdm_reservation", response(encoded(picture(1)), "TDM-Reservation: 1"))
    add("/w/6", "too_big", response(b"x" * 300_000))
    add("/w/7", "short_body")
    web.route("/w/7", b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\nabc", b"")
    add("/w/8", "timeout")
    web.forever("/w/8", b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n", b"x", 0.1)
    add("/w/9", "format", response(b"<html>gone</html>"))
    add("/w/10", "decode", response(encoded(picture(2))[:2000]))
    add("/w/11", "image_too_small", response(encoded(picture(3, 64, 64))))
    add("/w/12", "committed", response(b"", f"Location: http://{HOST}/w/13", status="302 x"))
    web.route("/w/13", response(encoded(picture(20_000))))
    world.write()
    return world


@pytest.fixture
def trap_world(tmp_path: Path, evil_web: EvilWeb) -> TrapWorld:
    return make_trap_world(tmp_path / "world", evil_web)
