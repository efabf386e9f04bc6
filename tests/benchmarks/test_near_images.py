"""Copies among many pictures: precision and recall, beside a 64-bit perceptual hash.

``ATELIER_BENCH_SCENES`` pictures (50,000) and a tenth as many copies, made by every core.
"""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import polars as pl
import pytest
from numpy.typing import NDArray

from pipelines.duplicate_config import PerceptualConfig
from pipelines.duplicates import rank_of
from pipelines.near_images import ENTRIES_PER_TASK, entries, losers, pairs
from pipelines.perceptual import bits_for, signature
from pipelines.resize import Pixels
from tests.pipelines.alike import KINDS, altered, scene

NUM_SCENES = int(os.environ.get("ATELIER_BENCH_SCENES", "50000"))
ONE_COPY_OF = 10
_ROWS_AT_ONCE = 500

pytestmark = [pytest.mark.bench, pytest.mark.timeout(7200)]
Made = tuple[bytes, int]


def phash(pixels: Pixels) -> int:
    """The usual one: signs about the median of 8 x 8 DCT terms of 32 x 32 grey pixels."""
    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    small = cv2.resize(grey, (32, 32), interpolation=cv2.INTER_AREA).astype(np.float32)
    terms = np.asarray(cv2.dct(small))[:8, :8].ravel()
    bits = terms > np.median(terms[1:])
    return int(bits @ (np.uint64(1) << np.arange(64, dtype=np.uint64)))


def made(seed: int) -> list[Made]:
    """A scene's signature and hash, and its copy's when it has one."""
    cv2.setNumThreads(1)
    pixels = scene(seed)
    found = [(signature(pixels), phash(pixels))]
    if seed % ONE_COPY_OF == 0:
        kind = KINDS[seed // ONE_COPY_OF % len(KINDS)]
        copy = altered(pixels, np.random.default_rng((1, seed)), kind)
        found.append((signature(copy), phash(copy)))
    return found


def report(name: str, found: set[tuple[int, int]], origin: dict[int, int]) -> str:
    """``found``: (kept, lost) by number; a copy is right when its original takes it away."""
    gone = {lost for _, lost in found if lost in origin}
    wrong = len(losers((f"{kept:09}", f"{lost:09}") for kept, lost in found) - {
        f"{copy:09}" for copy in origin
    })  # fmt: skip
    right = {lost for kept, lost in found if origin.get(lost) == kept}
    copies = sorted(origin)
    recalls = [
        sum(copy in right for copy in copies[kind :: len(KINDS)]) / len(copies[kind :: len(KINDS)])
        for kind in range(len(KINDS))
    ]
    by_kind = ", ".join(f"{kind} {recall:.4f}" for kind, recall in zip(KINDS, recalls, strict=True))
    precision = len(gone) / max(len(gone) + wrong, 1)
    recall = len(right) / len(origin)
    return f"{name}: precision {precision:.4f}, recall {recall:.4f} ({by_kind}); {wrong} wrong"


def hash_pairs(hashes: NDArray[np.uint64], max_distance: int) -> set[tuple[int, int]]:
    found: set[tuple[int, int]] = set()
    for start in range(0, len(hashes), _ROWS_AT_ONCE):
        block = hashes[start : start + _ROWS_AT_ONCE]
        near = np.bitwise_count(block[:, None] ^ hashes) <= max_distance
        ones, others = np.nonzero(near)
        keep = ones + start < others
        found.update(zip((ones[keep] + start).tolist(), others[keep].tolist(), strict=True))
    return found


def test_planted_copies_are_found(capsys: pytest.CaptureFixture[str]) -> None:
    began = time.perf_counter()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        both = list(pool.map(made, range(NUM_SCENES)))
    seconds = time.perf_counter() - began
    scenes, copies = [each[0] for each in both], [each[1] for each in both if len(each) > 1]
    # Copies come after all scenes, as images of a lower score do.
    everything = scenes + copies
    origin = {NUM_SCENES + number: number * ONE_COPY_OF for number in range(len(copies))}
    config = PerceptualConfig()
    images = pl.DataFrame(
        {
            "slot": pl.Series([0] * len(everything), dtype=pl.Int32),
            "rank": [rank_of(0, None, f"{number:032x}") for number in range(len(everything))],
            "signature": [each[0] for each in everything],
        }
    )
    began = time.perf_counter()
    table = pl.concat(entries(images, config, bits_for(len(everything))))
    num_tasks = max(1, table.height // ENTRIES_PER_TASK)
    numbers: set[tuple[int, int]] = set()
    for task in range(num_tasks):
        found = pairs(table.filter(pl.col("bucket") % num_tasks == task), config)
        kept, lost = (
            [int(rank.rpartition("-")[2], 16) for rank in found[name]] for name in ("kept", "lost")
        )
        numbers.update(zip(kept, lost, strict=True))
    match_seconds = time.perf_counter() - began
    hashes = np.array([each[1] for each in everything], np.uint64)
    with capsys.disabled():
        print(f"\n{NUM_SCENES} scenes and {len(copies)} copies, made in {seconds:.0f} s")
        print(
            f"{table.height / len(everything):.0f} entries an image; "
            f"entered and compared in {match_seconds:.0f} s on one core, "
            f"{len(everything) / match_seconds:.0f} images/s"
        )
        print(report("signatures", numbers, origin))
        for distance in (4, 8, 10, 14):
            print(report(f"pHash of 64 bits, distance <= {distance}",
                         hash_pairs(hashes, distance), origin))  # fmt: skip
