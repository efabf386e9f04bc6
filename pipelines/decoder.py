"""Decoding in a process of its own, so that an image that crashes a codec costs one row.

Pillow, libjpeg, libwebp and their kin read bytes from strangers. They do so in a child that holds
no credentials, can write no file and may take only so much memory. When it dies or hangs, the row
fails with ``decoder_crash`` and the next image gets a new child. A child serves a whole Python
worker; handing an image over takes some 0.1 ms.

The two speak over pipes: first the configuration as JSON and a reply when the child is ready, then
per image its bytes one way, and JSON with the encoded images behind it the other way, each led by
its length.
"""

from __future__ import annotations

import atexit
import fcntl
import json
import os
import resource
import select
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import IO, Any

from pydantic import TypeAdapter

from pipelines.config import ResizeConfig
from pipelines.connection import Failed
from pipelines.guard import Rejected
from pipelines.image_checks import measure_of
from pipelines.images import NO_LOOKS, Bounds, Looks, StoredImage, store_images

COMMAND = [sys.executable, "-c", "from pipelines.decoder import serve; serve()"]
START_SECONDS = 60.0
IMAGE_SECONDS = 60.0
# What decoding may take on top of what a started child has: the costliest way (16 bits to float)
# holds three copies of 8 bytes per pixel and channel-sized ones beside them.
_BYTES_PER_PIXEL = 48
_SPARE_BYTES = 512 * 1024 * 1024
_MAX_FILES = 64  # modules that are imported late
_LENGTH = struct.Struct(">Q")
_READ_BYTES = 1 << 20


class Decoder:
    """``store`` is ``images.store_images``, elsewhere. One caller at a time; others wait."""

    def __init__(
        self, configs: Sequence[ResizeConfig], bounds: Bounds, looks: Looks = NO_LOOKS
    ) -> None:
        self._setup = json.dumps(
            {
                "configs": [each.model_dump(mode="json") for each in configs],
                "bounds": asdict(bounds),
                "looks": TypeAdapter(Looks).dump_python(looks, mode="json"),
            }
        ).encode()
        self._process: subprocess.Popen[bytes] | None = None
        self._arrived = bytearray()
        self._lock = threading.Lock()

    def store(self, body: bytes) -> list[StoredImage | Rejected]:
        """Raises ``Rejected`` as ``store_images`` does, ``Failed("decoder_crash")`` when the child
        is lost over the image, and ``RuntimeError`` for what nobody foresaw."""
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._start()
            try:
                return self._exchange(body)
            except (OSError, EOFError, TimeoutError) as error:
                raise Failed("decoder_crash", self._lost(error), retryable=False) from error

    def close(self) -> None:
        """End the child."""
        process, self._process = self._process, None
        self._arrived.clear()
        if process is not None:
            process.kill()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with suppress(OSError):
                        pipe.close()
            process.wait()

    def _start(self) -> None:
        self.close()
        environment = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PATH": os.defpath}
        self._process = subprocess.Popen(
            COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, bufsize=0
        )
        for pipe in self._pipes():
            with suppress(OSError):  # the user's share of pipes is used up: slower, no more
                fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _READ_BYTES)
        try:
            self._send(self._setup)
            self._receive(time.monotonic() + START_SECONDS)
        except (OSError, EOFError, TimeoutError) as error:
            raise RuntimeError(f"the decoder does not start: {self._lost(error)}") from error

    def _exchange(self, body: bytes) -> list[StoredImage | Rejected]:
        self._send(body)
        ends_at = time.monotonic() + IMAGE_SECONDS
        answer: dict[str, Any] = json.loads(self._receive(ends_at))
        if "rejected" in answer:
            raise Rejected(*answer["rejected"])
        if "error" in answer:
            raise RuntimeError(answer["error"])
        found: list[StoredImage | Rejected] = []
        for each in answer["images"]:
            if "rejected" in each:
                found.append(Rejected(*each["rejected"]))
            else:
                mark = each.pop("signature")
                mark = None if mark is None else bytes.fromhex(mark)
                found.append(StoredImage(self._receive(ends_at), **each, signature=mark))
        return found

    def _lost(self, error: BaseException) -> str:
        """How the child ended, in a word; there is none any more."""
        process = self._process
        code = None
        if process is not None and not isinstance(error, TimeoutError):
            with suppress(subprocess.TimeoutExpired):
                code = process.wait(timeout=5)
        self.close()
        if code is None:
            return f"no answer in {IMAGE_SECONDS:.0f} s"
        return f"signal {-code}" if code < 0 else f"exit status {code}"

    def _send(self, data: bytes) -> None:
        stdin = self._pipes()[0]
        # One write where the pipe has room: every call hands the interpreter to another thread.
        view = memoryview(_LENGTH.pack(len(data)) + data)
        while view:
            view = view[stdin.write(view) :]

    def _receive(self, ends_at: float) -> bytes:
        (length,) = _LENGTH.unpack(self._read(_LENGTH.size, ends_at))
        return self._read(length, ends_at)

    def _read(self, num_bytes: int, ends_at: float) -> bytes:
        """The answer's next bytes; all that has come is taken at once, and kept."""
        while len(self._arrived) < num_bytes:
            stdout = self._pipes()[1]
            waiting = select.poll()
            waiting.register(stdout, select.POLLIN)
            if not waiting.poll(max(0.0, ends_at - time.monotonic()) * 1000):
                raise TimeoutError
            part = stdout.read(_READ_BYTES)
            if not part:
                raise EOFError
            self._arrived += part
        found = bytes(self._arrived[:num_bytes])
        del self._arrived[:num_bytes]
        return found

    def _pipes(self) -> tuple[IO[bytes], IO[bytes]]:
        if self._process is None or self._process.stdin is None or self._process.stdout is None:
            raise EOFError
        return self._process.stdin, self._process.stdout


_shared: dict[str, Decoder] = {}
_shared_lock = threading.Lock()


def shared_decoder(
    configs: Sequence[ResizeConfig], bounds: Bounds, looks: Looks = NO_LOOKS
) -> Decoder:
    """This process's decoder. One is kept; another configuration replaces it."""
    key = f"{[each.model_dump_json() for each in configs]} {bounds} {looks} {COMMAND}"
    with _shared_lock:
        if key not in _shared:
            _close_shared()
            _shared[key] = Decoder(configs, bounds, looks)
        return _shared[key]


@atexit.register
def _close_shared() -> None:
    for decoder in _shared.values():
        decoder.close()
    _shared.clear()


# --- the child -----------------------------------------------------------------------------------


def serve() -> None:
    """Answer on standard output what comes on standard input, until it ends."""
    source, sink = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    setup = json.loads(_next(source) or b"")
    configs = [ResizeConfig.model_validate(each) for each in setup["configs"]]
    bounds = Bounds(**setup["bounds"])
    looks = TypeAdapter(Looks).validate_python(setup["looks"])
    for check in looks.checks:
        measure_of(check.measure)  # what it imports counts as there from the start
    _confine(bounds)
    _put(sink, b"ready")
    while (body := _next(source)) is not None:
        answer, blobs = _answer(body, configs, bounds, looks)
        _put(sink, json.dumps(answer).encode(), *blobs)


def _answer(
    body: bytes, configs: Sequence[ResizeConfig], bounds: Bounds, looks: Looks
) -> tuple[dict[str, Any], list[bytes]]:
    try:
        found = store_images(body, configs, bounds, looks)
    except Rejected as rejection:
        return {"rejected": [rejection.reason, rejection.detail]}, []
    except Exception as error:
        return {"error": type(error).__name__}, []
    images: list[dict[str, Any]] = []
    for each in found:
        if isinstance(each, Rejected):
            images.append({"rejected": [each.reason, each.detail]})
        else:
            known = {key: value for key, value in vars(each).items() if key != "data"}
            known["signature"] = None if each.signature is None else each.signature.hex()
            images.append(known)
    return {"images": images}, [each.data for each in found if isinstance(each, StoredImage)]


def _confine(bounds: Bounds) -> None:
    """Give up what decoding does not need."""
    with open("/proc/self/statm", encoding="ascii") as file:
        now_bytes = int(file.read().split()[0]) * resource.getpagesize()
    most_bytes = now_bytes + _SPARE_BYTES + _BYTES_PER_PIXEL * bounds.max_pixels
    for kind, limit in (
        (resource.RLIMIT_AS, most_bytes),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, _MAX_FILES),
    ):
        _, hard = resource.getrlimit(kind)
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (limit, limit))


def _next(source: IO[bytes]) -> bytes | None:
    """What was sent, or None when there will be no more."""
    head = source.read(_LENGTH.size)
    return source.read(_LENGTH.unpack(head)[0]) if len(head) == _LENGTH.size else None


def _put(sink: IO[bytes], *parts: bytes) -> None:
    sink.write(b"".join(piece for part in parts for piece in (_LENGTH.pack(len(part)), part)))
    sink.flush()
