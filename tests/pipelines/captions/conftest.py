"""A server that speaks chat completions and misbehaves on demand; small datasets and Spark."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tests.pipelines.scoring.conftest import home, new_dataset, spark

__all__ = ["home", "new_dataset", "spark"]

KEY = "sk-test-captioner-0123456789abcdef"
# What to send for an image that is asked for the n-th time: (status, headers, body, pause) or None
# for a good answer.
Reply = tuple[int, dict[str, str], bytes, float]
Behaviour = Callable[[str, int], Reply | None]


def caption_of(image: bytes) -> str:
    """A caption of some 30 words, another one for every image."""
    mark = hashlib.sha256(image).hexdigest()[:8]
    return (
        f"Coloured tiles numbered {mark} fill the picture from edge to edge. Some of them are "
        "dark green and others are pale, and a soft light falls over the whole from the left."
    )


def completion(text: str | None, finish_reason: str = "stop", **message: Any) -> bytes:
    """A chat completion as servers send it."""
    said = {
        "model": "served-captioner-1",
        "choices": [
            {"message": {"content": text, **message}, "finish_reason": finish_reason, "index": 0}
        ],
        "usage": {"prompt_tokens": 700, "completion_tokens": 40},
    }
    return json.dumps(said).encode()


class CaptionServer:
    """``requests``: how often each image was asked for, by the sha256 of its bytes."""

    def __init__(self) -> None:
        self.behaviour: Behaviour = lambda image, number: None
        self.requests: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.most_at_once = 0
        self.is_down = False
        self._at_once = 0
        self._lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                server.answer(self)

            def log_message(self, format: str, *args: Any) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.05,), daemon=True
        )
        self._thread.start()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        content = body["messages"][0]["content"]
        image = base64.b64decode(content[0]["image_url"]["url"].partition("base64,")[2])
        name = hashlib.sha256(image).hexdigest()
        with self._lock:
            self.bodies.append(body)
            self.keys.append(handler.headers["Authorization"])
            self.requests[name] += 1
            number = self.requests[name]
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        reply = self.behaviour(name, number)
        if self.is_down:
            reply = (503, {}, b"", 0.0)
        status, headers, data, pause = reply or (200, {}, completion(caption_of(image)), 0.0)
        time.sleep(pause)
        with self._lock:
            self._at_once -= 1
        try:
            handler.send_response(status if handler.path == "/v1/chat/completions" else 404)
            for key, value in headers.items():
                handler.send_header(key, value)
            handler.send_header("Content-Length", str(len(data)))
            handler.end_headers()
            handler.wfile.write(data)
        except OSError:
            pass  # the client's deadline was shorter

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def caption_server() -> Iterator[CaptionServer]:
    server = CaptionServer()
    yield server
    server.stop()
