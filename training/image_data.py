"""Curated images as batches, for whoever trains on pixels: any order of training goes on exactly.

The order is that of ``training.order``: a batch is a function of (seed, number), so a position is
one integer, whatever the number of workers. The next shards are fetched and verified, and the next
batches decoded, while a batch is in use.

Shape suffixes: B samples, 3 colours 0 … 255 (uint8), H/W pixels.
"""

from __future__ import annotations

import os
import tempfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from infra import storage
from infra.errors import UserError
from infra.manifest import DatasetManifest, dataset_root, load_whole
from training.config import SquareCrop
from training.images import decode_image, square_crop
from training.order import PlannedOrder, rank_slice
from training.resident import ResidentShards
from training.shards import crop_draws, read_samples

BATCHES_AHEAD = 2


@dataclass(frozen=True)
class ImageShard:
    """A shard's samples: (what is known, encoded image)."""

    samples: list[tuple[dict[str, Any], bytes]]

    @property
    def num_bytes(self) -> int:
        """About what it takes in memory."""
        return sum(len(data) + 2000 for _, data in self.samples)


@dataclass(frozen=True)
class ImageBatch:
    """A worker's part of batch ``number``. ``left_out`` are samples without a square of the size
    that was asked for, or unreadable; they are in neither ``images_B3HW`` nor ``known``."""

    number: int
    images_B3HW: Tensor
    known: list[dict[str, Any]]
    left_out: list[str]


@dataclass(frozen=True)
class ImageOrder:
    """What decides which image comes when, and how it is cut."""

    resolution_px: int
    global_batch_size: int
    seed: int = 0
    crop: SquareCrop = "center"
    shuffle_window_shards: int = 8


class ImageBatches:
    """The batches of one worker, from where ``load_state_dict`` says, without an end.

    ``rank`` of ``world_size`` workers takes its part of every batch. At most ``max_resident_bytes``
    of shards stay in memory.
    """

    def __init__(
        self,
        manifest_uri: str,
        order: ImageOrder,
        rank: int = 0,
        world_size: int = 1,
        num_threads: int | None = None,
        max_resident_bytes: int = 2 << 30,
    ) -> None:
        self._manifest_uri = manifest_uri
        self._manifest: DatasetManifest = load_whole(manifest_uri)
        self._order = order
        sizes = [shard.num_samples for shard in self._manifest.shards]
        self._planned = PlannedOrder(sizes, order.seed, order.shuffle_window_shards)
        self._ends = np.cumsum(sizes)
        self._rows = rank_slice(order.global_batch_size, rank, world_size)
        self._shards = ResidentShards(self._load, max_resident_bytes)
        self._num_threads = num_threads or len(os.sched_getaffinity(0))
        self._batch = 0

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch is taken from; the same on every worker."""
        return {
            "batch": self._batch,
            "dataset_sha256": self._manifest.version,
            "seed": self._order.seed,
            "global_batch_size": self._order.global_batch_size,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on there. Raises ``UserError`` when it is the state of another order."""
        own = self.state_dict()
        odd = sorted(name for name in own if name != "batch" and state.get(name) != own[name])
        if odd:
            raise UserError(
                expected=f"a position in this order ({odd[0]} {own[odd[0]]})",
                got=f"{odd[0]} {state.get(odd[0])}",
                remedy="open the dataset as it was opened when the position was saved",
            )
        self._batch = int(state["batch"])

    def __iter__(self) -> Iterator[ImageBatch]:
        """Batch after batch; what is prepared and not taken does not count."""
        with ThreadPoolExecutor(self._num_threads, "decode") as pool:
            upcoming: deque[tuple[int, list[Future[Decoded]]]] = deque()
            number = self._batch
            try:
                while True:
                    while len(upcoming) <= BATCHES_AHEAD:
                        parts = self._encoded(number)
                        upcoming.append((number, self._submit(pool, parts)))
                        number += 1
                    first, decoding = upcoming.popleft()
                    batch = _collate(first, [future.result() for future in decoding])
                    self._batch = first + 1
                    yield batch
            finally:
                pool.shutdown(cancel_futures=True)

    def _submit(
        self, pool: ThreadPoolExecutor, samples: list[tuple[dict[str, Any], bytes]]
    ) -> list[Future[Decoded]]:
        size = max(1, len(samples) // (4 * self._num_threads))
        parts = [samples[at : at + size] for at in range(0, len(samples), size)]
        return [pool.submit(decode_squares, part, self._order) for part in parts]

    def _encoded(self, number: int) -> list[tuple[dict[str, Any], bytes]]:
        """The samples of this worker's part of a batch, in order."""
        size = self._order.global_batch_size
        start, stop = number * size + self._rows.start, number * size + self._rows.stop
        self._shards.want(self._planned.shards_ahead(start))
        indices = self._planned.visit(start, stop).indices
        shard_of = np.searchsorted(self._ends, indices, side="right")
        starts = self._ends[shard_of] - [self._manifest.shards[s].num_samples for s in shard_of]
        pairs = zip(shard_of.tolist(), (indices - starts).tolist(), strict=True)
        return [self._shards.get(shard).samples[row] for shard, row in pairs]

    def _load(self, number: int) -> ImageShard:
        entry = self._manifest.shards[number]
        uri = storage.join(dataset_root(self._manifest_uri), entry.path)
        with tempfile.TemporaryDirectory(prefix="atelier-images-") as scratch:
            path = Path(scratch) / "shard.tar"
            storage.download(uri, path, sha256=entry.sha256)
            samples = list(read_samples(path))
        if len(samples) != entry.num_samples:
            raise UserError(
                expected=f"{entry.num_samples} samples in {uri}, as its manifest says",
                got=str(len(samples)),
                remedy="curate it again",
            )
        return ImageShard(samples)


Decoded = tuple[list[NDArray[np.uint8]], list[dict[str, Any]], list[str]]


def decode_squares(samples: list[tuple[dict[str, Any], bytes]], order: ImageOrder) -> Decoded:
    """(squares, what is known of each, ids of those left out)."""
    squares: list[NDArray[np.uint8]] = []
    known: list[dict[str, Any]] = []
    left_out: list[str] = []
    for each, data in samples:
        sample_id = str(each["sample_id"])
        try:
            pixels = decode_image(data)
        except (OSError, ValueError):
            left_out.append(sample_id)
            continue
        square = square_crop(pixels, order.resolution_px, order.crop, crop_draws(sample_id))
        if square is None:
            left_out.append(sample_id)
            continue
        squares.append(square.pixels_HW3)
        known.append(each)
    return squares, known, left_out


def _collate(number: int, parts: list[Decoded]) -> ImageBatch:
    squares = [square for part in parts for square in part[0]]
    known = [each for part in parts for each in part[1]]
    left_out = [name for part in parts for name in part[2]]
    stacked = np.stack(squares) if squares else np.empty((0, 0, 0, 3), np.uint8)
    images = torch.from_numpy(stacked).permute(0, 3, 1, 2)
    return ImageBatch(number, images, known, left_out)
