"""WebDataset tars whose bytes depend on their samples alone, named after those bytes."""

from __future__ import annotations

import base64
import io
import json
import re
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from infra import storage
from infra.digests import canonical_json, sha256_file
from infra.manifest import ShardEntry, shard_path
from infra.shard_members import samples_of
from infra.storage_once import upload_once
from pipelines.config import PreferenceConfig, ShardConfig

_KEY = re.compile(r"[0-9a-f]{32}")
_EXTENSION = re.compile(r"[a-z0-9]{1,8}")
SCORE_DIGITS = 6
# In a sample's json only where the metadata has them.
_WHERE_KNOWN = ("human_preference", "recorded_sha256", "recorded_md5")


class ShardWriter:
    """Packs samples into tars on local disk and publishes each when it is full.

    Use it in a ``with`` block. Samples must come in strictly rising key order: a key cannot
    repeat, and the same samples always fall into the same shards.
    """

    def __init__(self, config: ShardConfig, dataset_root: str, folder: Path) -> None:
        self._config = config
        self._dataset_root = dataset_root
        self._path = folder / "shard.tar"
        self._tar: tarfile.TarFile | None = None
        self._num_samples = 0
        self._num_bytes = 0
        self._last_key = ""
        self._keys: list[str] = []
        self.shards: list[ShardEntry] = []
        self.shard_of: dict[str, str] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._tar is not None:  # something went wrong: what is unfinished is not published
            self._tar.close()

    def add(self, key: str, members: dict[str, bytes]) -> None:
        """Add one sample: extension -> bytes. ``ValueError`` for an odd or unordered key."""
        if not _KEY.fullmatch(key) or key <= self._last_key:
            raise ValueError(f"sample key {key!r} after {self._last_key!r}")
        if not all(_EXTENSION.fullmatch(extension) for extension in members):
            raise ValueError(f"member extensions {sorted(members)}")
        num_bytes = sum(map(len, members.values()))
        if self._keys and (
            len(self._keys) >= self._config.max_samples
            or self._num_bytes + num_bytes > self._config.max_bytes
        ):
            self._publish()
        if self._tar is None:
            self._tar = tarfile.TarFile(self._path, "w", format=tarfile.USTAR_FORMAT)
        for extension, data in sorted(members.items()):
            info = tarfile.TarInfo(f"{key}.{extension}")  # mtime, uid and gid are 0, names empty
            info.size = len(data)
            self._tar.addfile(info, io.BytesIO(data))
        self._keys.append(key)
        self._num_bytes += num_bytes
        self._last_key = key

    def finish(self) -> list[ShardEntry]:
        """Publish what is left; every shard, in key order. No samples, no shards."""
        if self._keys:
            self._publish()
        return self.shards

    def _publish(self) -> None:
        if self._tar is not None:
            self._tar.close()
        sha256 = sha256_file(self._path)
        path = shard_path(sha256)
        stored = upload_once(self._path, storage.join(self._dataset_root, path), sha256)
        self.shards.append(ShardEntry(path, stored.num_bytes, sha256, len(self._keys)))
        self.shard_of.update(dict.fromkeys(self._keys, path))
        self._tar, self._keys, self._num_bytes = None, [], 0


def preference_score(known: Mapping[str, Any], config: PreferenceConfig) -> float | None:
    """``offset + scale *`` the score of a sample, or the recipe's value where that is unknown."""
    score: float | None = known.get(config.score)
    if score is None:
        return config.unknown
    return round(config.offset + config.scale * score, SCORE_DIGITS)


def sample_members(
    row: dict[str, Any], image: bytes, extension: str, preference: PreferenceConfig
) -> dict[str, bytes]:
    """The members of one sample: the image, ``.txt`` to train on, ``.json`` with all we know."""
    scores = {
        name: None if row[name] is None else round(row[name], SCORE_DIGITS)
        for name in ("clip_similarity", "aesthetic_score", "watermark_prob", "unsafe_prob")
    }
    known = {
        "sample_id": row["sample_id"],
        "url": row["url"],
        "caption": row["train_caption"],
        "captions": row["captions"],
        "original_width_px": row["original_width_px"],
        "original_height_px": row["original_height_px"],
        "width_px": row["image_width_px"],
        "height_px": row["image_height_px"],
        "crop_left_px": row["crop_left_px"],
        "crop_top_px": row["crop_top_px"],
        **scores,
        "aesthetic_scale": row["aesthetic_scale"],
        "preference_score": preference_score(row, preference),
        "sha256": row["sha256"],
        "language": row["language"],
        "source": row["source"],
    }
    known |= {name: row[name] for name in _WHERE_KNOWN if row.get(name) is not None}
    if row.get("signature") is not None:
        known["signature"] = base64.b64encode(row["signature"]).decode()
    if row.get("measures") is not None:
        known["measures"] = json.loads(row["measures"])
    return {
        extension: image,
        "json": canonical_json(known),
        "txt": row["train_caption"].encode("utf-8"),
    }


def read_shard(data: bytes) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The samples of a tar in memory: key and members by extension. Raises ``BadMember``."""
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        yield from samples_of(tar, "a shard")
