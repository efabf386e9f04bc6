"""Curated shards: their samples, and work on many samples at once."""

from __future__ import annotations

import json
import tarfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from infra.digests import sha256_bytes
from training.randomness import derive

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
AHEAD_PER_THREAD = 8

T = TypeVar("T")
R = TypeVar("R")


def read_samples(path: Path) -> Iterator[tuple[dict[str, Any], bytes]]:
    """(what is known, image bytes) of each sample in a WebDataset tar, in its order."""
    known: dict[str, Any] | None = None
    image: bytes | None = None
    stem: str | None = None
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            key, _, suffix = member.name.partition(".")
            file = tar.extractfile(member)
            if file is None:
                continue
            if key != stem:
                if known is not None and image is not None:
                    yield known, image
                stem, known, image = key, None, None
            if suffix == "json":
                known = json.loads(file.read())
            elif f".{suffix}" in IMAGE_SUFFIXES:
                image = file.read()
    if known is not None and image is not None:
        yield known, image


def crop_draws(sample_id: str) -> tuple[float, float]:
    """Where a random crop of this sample lies, top and left, in [0, 1)."""
    key = int(sha256_bytes(sample_id.encode())[:8], 16)
    return derive(key, "crop top") / 2**64, derive(key, "crop left") / 2**64


def ahead(function: Callable[[T], R], items: Iterable[T], num_threads: int) -> Iterator[R]:
    """``function`` of each item in order, worked out by threads a bounded number ahead.

    Decoding leaves Python's lock alone: while a network takes a batch, the next is decoded.
    """
    with ThreadPoolExecutor(num_threads, "ahead") as pool:
        upcoming: deque[Future[R]] = deque()
        try:
            for item in items:
                upcoming.append(pool.submit(function, item))
                if len(upcoming) > AHEAD_PER_THREAD * num_threads:
                    yield upcoming.popleft().result()
            while upcoming:
                yield upcoming.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
