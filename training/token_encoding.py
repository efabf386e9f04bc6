"""Encoding curated shards: pixels to tokens, one shard after the other, none waited for.

While a network encodes a shard, the next one is fetched and the one before is stored.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from infra import storage
from infra.digests import sha256_bytes
from model import VQTokenizer
from training.config import CropPolicy
from training.data import Captions
from training.devices import own_device
from training.images import Crop, decode_image, fill, square_crop
from training.publish import fetch_checkpoint
from training.shards import ahead, crop_draws, read_samples
from training.token_format import CachedSample, CacheEntry, write_tokens

ENCODED_PIXELS = 1 << 20  # pixels in one pass of the tokenizer
TOO_SMALL = "smaller_than_resolution"
UNREADABLE = "unreadable_image"
NO_CAPTION = "no_caption"
VQ_FOLDER = "vqvae"


@dataclass(frozen=True)
class ShardTask:
    """One shard to encode: all that a process elsewhere needs to know."""

    shard_uri: str
    shard_sha256: str
    shard_bytes: int
    tokenizer: str
    cache_uri: str
    resolution_px: int
    crop: CropPolicy
    grid_height: int
    grid_width: int

    @property
    def stem(self) -> str:
        """The name of the shard's files in the cache."""
        return self.shard_sha256[:32]


def encode_shards(tasks: Iterable[ShardTask]) -> Iterator[CacheEntry]:
    """The entry of each task's shard, once it is stored. A task is taken when the one before it
    begins to be encoded; at most three shards are on this machine at a time."""
    waiting = iter(tasks)
    with (
        tempfile.TemporaryDirectory(prefix="atelier-tokens-") as scratch,
        ThreadPoolExecutor(2, "tokens") as pool,
    ):

        def fetch_next() -> tuple[ShardTask, Future[Path]] | None:
            task = next(waiting, None)
            return None if task is None else (task, pool.submit(_fetch, task, Path(scratch)))

        coming, storing = fetch_next(), list[Future[CacheEntry]]()
        while coming is not None:
            task, fetching = coming
            path = fetching.result()
            coming = fetch_next()
            entry, data = encode_shard(task, path)
            path.unlink()
            while storing:
                yield storing.pop().result()
            storing.append(pool.submit(_store, task, entry, data))
        while storing:
            yield storing.pop().result()


def _fetch(task: ShardTask, folder: Path) -> Path:
    path = folder / f"{task.stem}.tar"
    storage.download(task.shard_uri, path, sha256=task.shard_sha256)
    return path


def _store(task: ShardTask, entry: CacheEntry, data: bytes) -> CacheEntry:
    storage.write_bytes(storage.join(task.cache_uri, entry.path), data)
    storage.write_json(storage.join(task.cache_uri, f"{task.stem}.json"), asdict(entry))
    return entry


def encode_shard(task: ShardTask, path: Path) -> tuple[CacheEntry, bytes]:
    """The tokens of a fetched shard as they are stored, and their entry."""
    samples, tokens_NHW, left_out = _encode_samples(read_samples(path), task)
    data = write_tokens(samples, tokens_NHW)
    entry = CacheEntry(
        path=f"{task.stem}.parquet",
        num_bytes=len(data),
        sha256=sha256_bytes(data),
        num_samples=len(samples),
        shard_sha256=task.shard_sha256,
        grid_height=task.grid_height,
        grid_width=task.grid_width,
        left_out=left_out,
        num_with_origin=_num_with_origin(samples),
    )
    return entry, data


def _num_with_origin(samples: list[CachedSample]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for sample in samples:
        for origin in {origin for origin, _ in sample.captions}:
            counts[origin] = counts.get(origin, 0) + 1
    return counts


def _encode_samples(
    pairs: Iterable[tuple[dict[str, Any], bytes]], task: ShardTask
) -> tuple[list[CachedSample], np.ndarray[Any, np.dtype[np.uint16]], dict[str, int]]:
    device = str(own_device())
    vq = load_vq(str(find_vq(task.tokenizer)), device)
    size_px = task.grid_width * vq.downsample_factor, task.grid_height * vq.downsample_factor
    batch_size = max(1, ENCODED_PIXELS // (size_px[0] * size_px[1]))
    samples: list[CachedSample] = []
    tokens = [np.empty((0, task.grid_height, task.grid_width), np.uint16)]
    waiting: list[Crop] = []
    left_out = {TOO_SMALL: 0, UNREADABLE: 0, NO_CAPTION: 0}
    threads = len(os.sched_getaffinity(0))
    for reason, sample, crop in ahead(lambda p: _prepare(*p, task.crop, size_px), pairs, threads):
        if sample is None or crop is None:
            left_out[reason] += 1
            continue
        samples.append(sample)
        waiting.append(crop)
        if len(waiting) == batch_size:
            tokens.append(_encode(vq, waiting, device))
            waiting = []
    if waiting:
        tokens.append(_encode(vq, waiting, device))
    return samples, np.concatenate(tokens), left_out


def _prepare(
    known: dict[str, Any], data: bytes, policy: CropPolicy, size_px: tuple[int, int]
) -> tuple[str, CachedSample | None, Crop | None]:
    """(why not, the sample, its crop): the last two are None for a sample that is left out."""
    sample_id = str(known["sample_id"])
    captions = _captions(known)
    if not captions:
        return NO_CAPTION, None, None
    try:
        pixels = decode_image(data)
    except (OSError, ValueError):
        return UNREADABLE, None, None
    if policy == "bucket":
        crop = fill(pixels, *size_px)
    else:
        crop = square_crop(pixels, size_px[0], policy, crop_draws(sample_id))
    if crop is None:
        return TOO_SMALL, None, None
    width_px = int(known.get("original_width_px") or pixels.shape[1])
    height_px = int(known.get("original_height_px") or pixels.shape[0])
    # Curation may have cut a part from the original; its offsets shrink with the image.
    scale = max(size_px[0] / width_px, size_px[1] / height_px)
    cut_top_px, cut_left_px = known.get("crop_top_px") or 0, known.get("crop_left_px") or 0
    return (
        "",
        CachedSample(
            sample_id=sample_id,
            original_width_px=width_px,
            original_height_px=height_px,
            crop_top_px=crop.crop_top_px + round(cut_top_px * scale),
            crop_left_px=crop.crop_left_px + round(cut_left_px * scale),
            preference_score=known.get("preference_score"),
            aesthetic_score=known.get("aesthetic_score"),
            captions=captions,
        ),
        crop,
    )


def _captions(known: dict[str, Any]) -> Captions:
    pairs = [(str(c["origin"]), str(c["text"])) for c in known.get("captions") or () if c["text"]]
    if not pairs and known.get("caption"):
        pairs = [("alt", str(known["caption"]))]
    return tuple(pairs)


def _encode(vq: VQTokenizer, crops: list[Crop], device: str) -> Any:
    pixels = torch.from_numpy(np.stack([crop.pixels_HW3 for crop in crops])).to(device)
    images_B3HW = pixels.permute(0, 3, 1, 2).float() / 255.0
    return vq.encode(images_B3HW.contiguous()).cpu().numpy().astype(np.uint16)


# --- the tokenizer -------------------------------------------------------------------------------


@lru_cache(maxsize=4)
def find_vq(tokenizer: str) -> Path:
    """The local ``vqvae`` folder of a model folder or of a published checkpoint's address."""
    folder = fetch_checkpoint(tokenizer) if "://" in tokenizer else Path(tokenizer)
    return folder / VQ_FOLDER


@lru_cache(maxsize=4)
def load_vq(folder: str, device: str) -> VQTokenizer:
    """The tokenizer in float32, read once for all shards that a process encodes."""
    return VQTokenizer.from_pretrained(folder).to(device)


def let_go() -> None:
    """Leave a GPU's memory to training."""
    load_vq.cache_clear()
    cuda: Any = torch.cuda
    cuda.empty_cache()  # does nothing where there is none
