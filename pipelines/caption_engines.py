"""Models that say what an image shows. An engine answers every image: with a text or a cause."""

from __future__ import annotations

import base64
import json
import os
import random
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any, Protocol
from urllib.parse import urlsplit

from infra.errors import UserError
from pipelines.captioning_config import CaptioningConfig, EndpointConfig
from pipelines.connection import Deadline, Failed, connect, retry_after_seconds

MAX_ANSWER_BYTES = 4_000_000
_IMAGE_TYPES = ((b"\xff\xd8", "jpeg"), (b"\x89PNG", "png"), (b"RIFF", "webp"))
_WRONG_SETUP = frozenset({401, 403, 404, 405})
_PASSING = frozenset({408, 409, 425, 429})


@dataclass(frozen=True)
class Answer:
    """What came back for one image: ``text``, or an ``error`` and whether it may pass."""

    text: str = ""
    model: str | None = None
    finish_reason: str | None = None
    error: str | None = None
    retryable: bool = False
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class Captioner(Protocol):
    """Answers images in their order."""

    def answers(self, images: Sequence[bytes]) -> Iterator[Answer]: ...


class EndpointCaptioner:
    """Asks a server, several images at once. Bounded: answers of ``concurrency`` in memory."""

    def __init__(self, config: CaptioningConfig, endpoint: EndpointConfig) -> None:
        self._config = config
        self._endpoint = endpoint
        self._key = api_key(endpoint)
        parts = urlsplit(endpoint.url)
        self._host, self._tls = parts.hostname or "", parts.scheme == "https"
        self._port = parts.port or (443 if self._tls else 80)
        self._at = parts.netloc
        self._path = parts.path.rstrip("/") + "/chat/completions"
        self._lock = threading.Lock()
        self._failures_in_a_row = 0

    def answers(self, images: Sequence[bytes]) -> Iterator[Answer]:
        """Raises ``UserError`` for a server that refuses us, or answers nothing any more."""
        with ThreadPoolExecutor(self._endpoint.concurrency, "caption") as pool:
            try:
                yield from pool.map(self._ask, images)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _ask(self, image: bytes) -> Answer:
        body = json.dumps(self._request(image)).encode()
        answer = Answer(error="no_attempt", retryable=True)
        for attempt in range(self._endpoint.retries + 1):
            answer, asked_seconds = self._attempt(body)
            if not answer.retryable:
                break
            if attempt < self._endpoint.retries:
                time.sleep(self._wait_seconds(attempt, asked_seconds))
        self._watch(answer)
        return answer

    def _wait_seconds(self, attempt: int, asked_seconds: float | None) -> float:
        wait: float = self._endpoint.backoff_seconds * 2**attempt * random.uniform(0.8, 1.2)
        return min(max(wait, asked_seconds or 0.0), self._endpoint.max_wait_seconds)

    def _watch(self, answer: Answer) -> None:
        with self._lock:
            self._failures_in_a_row = self._failures_in_a_row + 1 if answer.error else 0
            is_given_up = self._failures_in_a_row >= self._endpoint.max_failures_in_a_row
        if is_given_up:
            raise UserError(
                expected=f"captions from {self._endpoint.url}",
                got=f"{answer.error}, for {self._endpoint.max_failures_in_a_row} images in a row",
                remedy="look at the server and run again; every answer is kept",
            )

    def _attempt(self, body: bytes) -> tuple[Answer, float | None]:
        """One exchange: the answer, and the seconds the server asks us to wait."""
        try:
            status, retry_after, data = self._post(body)
        except TimeoutError:
            return Answer(error="timeout", retryable=True), None
        except (OSError, HTTPException, Failed):
            return Answer(error="connection", retryable=True), None
        if status in _WRONG_SETUP:
            name = self._endpoint.api_key_env
            raise UserError(
                expected=f"{self._endpoint.url} to caption with {self._endpoint.model}",
                got=f"HTTP {status}",
                remedy="check the address, the model's name and "
                + (f"the key in ${name}" if name else "whether it wants an api_key_env"),
            )
        if status != 200:
            passing = status in _PASSING or status >= 500
            return Answer(error=f"http_{status}", retryable=passing), retry_after
        return parse_answer(data), None

    def _post(self, body: bytes) -> tuple[int, float | None, bytes]:
        head = [
            f"POST {self._path} HTTP/1.1",
            f"Host: {self._at}",
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
            "Accept: application/json",
            "Connection: close",
        ]
        if self._key:
            head.append(f"Authorization: Bearer {self._key}")
        deadline = Deadline(self._endpoint.deadline_seconds)
        tls = ssl.create_default_context() if self._tls else None
        try:
            connection = connect((self._host, self._port), tls, self._host, deadline)
        except socket.gaierror as error:
            raise ConnectionError("no such host") from error
        try:
            request = ("\r\n".join(head) + "\r\n\r\n").encode("latin-1") + body
            response = connection.exchange(request, deadline, MAX_ANSWER_BYTES)
            return response.status, retry_after_seconds(response.headers), response.read()
        finally:
            connection.close()

    def _request(self, image: bytes) -> dict[str, Any]:
        kind = next((kind for magic, kind in _IMAGE_TYPES if image.startswith(magic)), "jpeg")
        address = f"data:image/{kind};base64,{base64.b64encode(image).decode()}"
        content = [
            {"type": "image_url", "image_url": {"url": address}},
            {"type": "text", "text": self._config.prompt},
        ]
        return {
            "model": self._endpoint.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": self._config.max_tokens,
            "temperature": self._endpoint.temperature,
            "seed": self._endpoint.seed,
        }


def api_key(endpoint: EndpointConfig) -> str | None:
    """The key, from the environment of this process."""
    if endpoint.api_key_env is None:
        return None
    key = os.environ.get(endpoint.api_key_env, "")
    if not key or not key.isascii() or not key.isprintable():
        raise UserError(
            expected=f"the endpoint's key in the environment variable {endpoint.api_key_env}",
            got="nothing" if not key else "what cannot be sent in a header",
            remedy=f"export {endpoint.api_key_env}=..., or leave api_key_env out",
        )
    return key


def parse_answer(data: bytes) -> Answer:
    """A chat completion's first choice; what is none is a failure that may pass."""
    try:
        said = json.loads(data)
        choice = said["choices"][0]
        message = choice["message"]
        text = message.get("content") or ""
        if isinstance(text, list):  # parts, as some servers send them
            text = " ".join(str(part.get("text") or "") for part in text)
        usage = said.get("usage") or {}
        refusal = message.get("refusal")
        return Answer(
            text=str(text),
            model=str(said["model"])[:200] if said.get("model") else None,
            finish_reason="refusal" if refusal else str(choice.get("finish_reason") or "")[:40],
            prompt_tokens=_count(usage.get("prompt_tokens")),
            completion_tokens=_count(usage.get("completion_tokens")),
        )
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return Answer(error="garbage", retryable=True)


def _count(value: object) -> int | None:
    return value if type(value) is int and 0 <= value < 1 << 31 else None
