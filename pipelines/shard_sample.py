"""A bounded look into a version's shards: how long captions are, how large images, and some.

Shards and sample ids are named by hashes, so the first samples of the shards with the smallest
digests are as if drawn, and the same whoever looks.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

import polars as pl

from infra import storage
from infra.errors import UserError
from infra.manifest import DatasetManifest, ShardEntry
from infra.shard_members import BadMember, samples_of
from pipelines.caption_tokens import load_tokenizer
from pipelines.histograms import SAMPLE_BINS, counted
from pipelines.thumbnails import thumbnail

NUM_SHARDS = 12
SAMPLES_PER_SHARD = 250
NUM_PICTURES = 48
_IMAGES = ("jpg", "png", "webp")


@dataclass(frozen=True)
class Picture:
    """A thumbnail (JPEG) with what stands below it."""

    sample_id: str
    text: str
    jpeg: bytes


@dataclass
class ShardSample:
    """What was looked at. ``histograms``: value -> counts as ``histograms.counted`` has them.

    ``pictures`` are those of the smallest sample ids. ``unread``: shards that could not be read.
    """

    num_samples: int = 0
    num_shards: int = 0
    histograms: dict[str, list[int]] = field(default_factory=dict)
    pictures: list[Picture] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)


def sample_shards(dataset_root: str, manifest: DatasetManifest) -> ShardSample:
    """Look at up to ``NUM_SHARDS`` shards and the first ``SAMPLES_PER_SHARD`` samples of each."""
    found = ShardSample()
    rows: list[tuple[str, str, int]] = []
    images: dict[str, bytes] = {}
    for shard in sorted(manifest.shards, key=lambda entry: entry.sha256)[:NUM_SHARDS]:
        try:
            first = list(islice(first_samples(dataset_root, shard), SAMPLES_PER_SHARD))
        except (storage.ObjectMissing, BadMember, tarfile.TarError, EOFError, ValueError, KeyError):
            found.unread.append(shard.path)  # `atelier verify` says what is wrong with it
            continue
        found.num_shards += 1
        for key, members in first:
            image = next(members[name] for name in _IMAGES if name in members)
            rows.append((key, str(json.loads(members["json"])["caption"]), len(image)))
            images[key] = image
        for key in sorted(images)[NUM_PICTURES:]:
            del images[key]
    captions = {key: caption for key, caption, _ in rows}
    for key in sorted(images):
        if (jpeg := thumbnail(images[key])) is not None:
            found.pictures.append(Picture(key, captions[key], jpeg))
    found.num_samples = len(rows)
    found.histograms = _histograms([row[1] for row in rows], [row[2] for row in rows])
    return found


def first_samples(dataset_root: str, shard: ShardEntry) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The samples of a shard as they come; whoever stops early reads no further."""
    with (
        storage.open_stream(storage.join(dataset_root, shard.path)) as stream,
        tarfile.open(fileobj=stream, mode="r|") as tar,
    ):
        yield from samples_of(tar, shard.path)


def _histograms(captions: list[str], num_bytes: list[int]) -> dict[str, list[int]]:
    texts = pl.Series("caption", captions, dtype=pl.String)
    words = texts.str.split(" ").list.len()
    found = {
        "caption_words": counted(words, SAMPLE_BINS["caption_words"]),
        "image_bytes": counted(pl.Series(num_bytes, dtype=pl.Int64), SAMPLE_BINS["image_bytes"]),
    }
    try:
        tokenizer = load_tokenizer(None)
    except UserError:
        return found  # no CLIP vocabulary on this machine
    tokens = [len(starts) + tokenizer.num_special for starts in tokenizer.starts(captions)]
    series = pl.Series(tokens, dtype=pl.Int64)
    return found | {"caption_tokens": counted(series, SAMPLE_BINS["caption_tokens"])}
