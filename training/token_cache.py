"""Image tokens, computed once per dataset, tokenizer, resolution and crop policy.

Under ``<store>/datasets/<name>/tokens/<encoder12>-<resolution>px-<crop>/`` lie
``<shard32>.parquet`` and, after it, its entry ``<shard32>.json``, both named by the shard's content
and so shared between versions of the dataset; and ``<version>/manifest.json``, written last.
``encoder`` stands for the tokenizer's weights and the code that applies them. A cache that was cut
off goes on with the shards that have no entry.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from infra import storage
from infra.digests import code_digest, folder_sha256, sha256_bytes
from infra.errors import UserError
from infra.manifest import dataset_root, load_whole
from infra.storage import DigestMismatch, ObjectMissing
from model import VQTokenizer
from training.config import CropPolicy, StageConfig
from training.data import Captions, TokenDataset, TokenShard, select
from training.grids import grids_of
from training.images import Crop, decode_image, fill, square_crop
from training.publish import fetch_checkpoint
from training.shards import ahead, crop_draws, read_samples
from training.token_format import (
    CachedSample,
    CacheEntry,
    CacheManifest,
    load_cache_manifest,
    load_tokens,
    parse_entry,
    write_tokens,
)

ENCODED_PIXELS = 1 << 20  # pixels in one pass of the tokenizer
TOO_SMALL = "smaller_than_resolution"
UNREADABLE = "unreadable_image"
NO_CAPTION = "no_caption"
VQ_FOLDER = "vqvae"
ENCODING_CODE = ("model.vq", "model.vq_layers", "training.images")


@dataclass(frozen=True)
class ShardTask:
    """One shard to encode: all that a process elsewhere needs to know."""

    shard_uri: str
    shard_sha256: str
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


@dataclass(frozen=True)
class CachePlan:
    """What a cache consists of. ``manifest_uri`` exists once it is complete."""

    manifest_uri: str
    tasks: list[ShardTask]
    dataset_sha256: str
    encoder_sha256: str


Submit = Callable[[Callable[[ShardTask], CacheEntry], list[ShardTask]], Iterable[CacheEntry]]


def in_turn(
    function: Callable[[ShardTask], CacheEntry], tasks: list[ShardTask]
) -> list[CacheEntry]:
    """Encode shard after shard in this process."""
    return [function(task) for task in tasks]


def ensure_token_cache(
    dataset_manifest_uri: str,
    tokenizer: str,
    resolution_px: int,
    crop: CropPolicy = "center",
    submit: Submit = in_turn,
    dataset_sha256: str | None = None,
) -> str:
    """Encode what is missing and return the address of the cache's manifest.

    ``tokenizer`` is the address of a published checkpoint or a local model folder, with ``vqvae/``.
    ``submit`` runs a function over shards, here or on other machines.
    """
    plan = plan_cache(dataset_manifest_uri, tokenizer, resolution_px, crop, dataset_sha256)
    if not is_complete(plan):
        for _ in submit(ensure_shard, plan.tasks):
            continue
        publish_cache(plan)
    return plan.manifest_uri


def plan_cache(
    dataset_manifest_uri: str,
    tokenizer: str,
    resolution_px: int,
    crop: CropPolicy,
    dataset_sha256: str | None = None,
) -> CachePlan:
    """Where the tokens of a dataset lie or will lie, and one task per shard."""
    manifest = load_whole(dataset_manifest_uri, dataset_sha256)
    vq_folder = find_vq(tokenizer)
    encoder_sha256 = sha256_bytes(f"{folder_sha256(vq_folder)} {_code_sha256()}".encode())
    factor = load_vq(str(vq_folder), "cpu").downsample_factor
    if resolution_px % factor:
        raise UserError(
            expected=f"a resolution_px that is a multiple of {factor}, the tokenizer's",
            got=str(resolution_px),
        )
    root = dataset_root(dataset_manifest_uri)
    name = f"{encoder_sha256[:12]}-{resolution_px}px-{crop}"
    cache_uri = storage.join(root, "tokens", name)
    grids = grids_of(manifest, crop, resolution_px, factor)
    shards = {shard.sha256: shard for shard in manifest.shards}
    return CachePlan(
        manifest_uri=storage.join(cache_uri, manifest.version, "manifest.json"),
        tasks=[
            ShardTask(
                shard_uri=storage.join(root, shard.path),
                shard_sha256=shard.sha256,
                tokenizer=tokenizer,
                cache_uri=cache_uri,
                resolution_px=resolution_px,
                crop=crop,
                grid_height=grids[shard.path][0],
                grid_width=grids[shard.path][1],
            )
            for shard in shards.values()
        ],
        dataset_sha256=manifest.version,
        encoder_sha256=encoder_sha256,
    )


def is_complete(plan: CachePlan) -> bool:
    """Whether the cache's manifest was written, and every file it lists is there in full size.

    One listing, no reading: what went missing is encoded again, other bytes are told when read.
    """
    if not storage.exists(plan.manifest_uri):
        return False
    folder_uri = _folder_uri(plan.manifest_uri)
    sizes = {info.uri: info.num_bytes for info in storage.list_objects(folder_uri)}
    entries = load_cache_manifest(plan.manifest_uri).shards
    return all(sizes.get(storage.join(folder_uri, e.path)) == e.num_bytes for e in entries)


def _folder_uri(manifest_uri: str) -> str:
    return manifest_uri.rsplit("/", 2)[0]


def publish_cache(plan: CachePlan) -> CacheManifest:
    """Write the manifest over the shards' entries; raises ``UserError`` when one is missing."""
    entries = [read_entry(task) for task in plan.tasks]
    missing = [task.stem for task, entry in zip(plan.tasks, entries, strict=True) if entry is None]
    if missing:
        raise UserError(
            expected=f"the tokens of all {len(entries)} shards",
            got=f"{len(missing)} without, the first being {missing[0]}",
            remedy="run the same command again; it keeps what is whole",
        )
    first = plan.tasks[0] if plan.tasks else None
    manifest = CacheManifest(
        dataset_sha256=plan.dataset_sha256,
        encoder_sha256=plan.encoder_sha256,
        resolution_px=first.resolution_px if first else 0,
        crop=first.crop if first else "center",
        shards=[entry for entry in entries if entry is not None],
    )
    storage.write_json(plan.manifest_uri, manifest.to_json())
    return manifest


# --- one shard -----------------------------------------------------------------------------------


def read_entry(task: ShardTask) -> CacheEntry | None:
    """The entry of a shard whose tokens are there in full size; None when they are not."""
    uri = storage.join(task.cache_uri, f"{task.stem}.json")
    try:
        entry = parse_entry(storage.read_json(uri), uri)
        num_bytes = storage.stat(storage.join(task.cache_uri, entry.path)).num_bytes
    except ObjectMissing:
        return None
    grid = entry.grid_height, entry.grid_width
    is_same = (
        entry.shard_sha256 == task.shard_sha256
        and grid == (task.grid_height, task.grid_width)
        and num_bytes == entry.num_bytes
    )
    return entry if is_same else None


def ensure_shard(task: ShardTask) -> CacheEntry:
    """The entry of a shard, encoded now unless it was before."""
    return read_entry(task) or encode_shard(task)


def encode_shard(task: ShardTask) -> CacheEntry:
    """Encode a shard and store its tokens, then its entry."""
    with tempfile.TemporaryDirectory(prefix="atelier-tokens-") as scratch:
        path = Path(scratch) / "shard.tar"
        storage.download(task.shard_uri, path, sha256=task.shard_sha256)
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
    storage.write_bytes(storage.join(task.cache_uri, entry.path), data)
    storage.write_json(storage.join(task.cache_uri, f"{task.stem}.json"), asdict(entry))
    return entry


def _num_with_origin(samples: list[CachedSample]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for sample in samples:
        for origin in {origin for origin, _ in sample.captions}:
            counts[origin] = counts.get(origin, 0) + 1
    return counts


def _encode_samples(
    pairs: Iterable[tuple[dict[str, Any], bytes]], task: ShardTask
) -> tuple[list[CachedSample], np.ndarray[Any, np.dtype[np.uint16]], dict[str, int]]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
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
    """The tokenizer in float32, read once per process."""
    return VQTokenizer.from_pretrained(folder).to(device)


@lru_cache(maxsize=1)
def _code_sha256() -> str:
    return code_digest(*ENCODING_CODE)


# --- reading -------------------------------------------------------------------------------------


def open_tokens(manifest_uri: str, config: StageConfig) -> TokenDataset:
    """The cached samples that a stage trains on; shards are read and verified when first needed.

    Shards are looked through for the stage's filters now, unless their entries already say that
    every sample passes.
    """
    manifest = load_cache_manifest(manifest_uri)
    folder_uri = _folder_uri(manifest_uri)

    def load(number: int) -> TokenShard:
        entry = manifest.shards[number]
        try:
            return load_tokens(folder_uri, entry)
        except (ObjectMissing, DigestMismatch) as error:
            what = "gone" if isinstance(error, ObjectMissing) else "damaged"
            uri = storage.join(folder_uri, entry.path)
            remedy = "" if what == "gone" else f"delete {uri} and "
            raise UserError(
                f"the tokens of shard {entry.shard_sha256[:12]} are {what} ({error}); {remedy}run "
                "the same command again: they are encoded anew, and training goes on"
            ) from error

    whole = [_passes_whole(entry, config) for entry in manifest.shards]
    sizes = [entry.num_samples if is_whole else None for entry, is_whole in
             zip(manifest.shards, whole, strict=True)]  # fmt: skip
    grids = [(entry.grid_height, entry.grid_width) for entry in manifest.shards]
    return select(load, sizes, grids, config)


def _passes_whole(entry: CacheEntry, config: StageConfig) -> bool:
    if config.min_aesthetic_score is not None or config.min_preference_score is not None:
        return False
    wanted = [origin for origin, weight in config.caption_mix.items() if weight > 0]
    return any(entry.num_with_origin.get(o, 0) == entry.num_samples for o in wanted)
