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
from infra.errors import UserError
from infra.shard_members import samples_of
from training.randomness import derive

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
AHEAD_PER_THREAD = 8

T = TypeVar("T")
R = TypeVar("R")


def read_samples(path: Path) -> Iterator[tuple[dict[str, Any], bytes]]:
    """(what is known, image bytes) of each sample in a WebDataset tar, in its order.

    Raises ``UserError`` for a sample that lacks one of them, and ``BadMember``.
    """
    with tarfile.open(path, "r:") as tar:
        for key, members in samples_of(tar, "a shard"):
            image = next((members[name] for name in IMAGE_EXTENSIONS if name in members), None)
            if image is None or "json" not in members:
                raise UserError(
                    expected=f"an image and its json for sample {key}",
                    got=", ".join(sorted(members)),
                    remedy="curate it again",
                )
            yield json.loads(members["json"]), image


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
