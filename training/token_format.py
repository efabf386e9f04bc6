"""How cached tokens lie on storage: one Parquet file per shard, and a manifest over them.

A row is a sample: its tokens as little-endian uint16 in row-major order, where it was cut from,
its scores and all its captions. The grid's height and width stand in the file's metadata.
"""

from __future__ import annotations

import io
import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import DTypeLike, NDArray

from infra import storage
from infra.errors import UserError
from training.data import Captions, TokenShard

CACHE_SCHEMA_VERSION = 2
_SIZES_AND_CROPS = ("original_width_px", "original_height_px", "crop_top_px", "crop_left_px")
_SCORES = ("preference_score", "aesthetic_score")
_CAPTION = pa.struct([("origin", pa.string()), ("text", pa.string())])


@dataclass(frozen=True)
class CacheEntry:
    """The cached tokens of one shard; ``path`` is relative to the cache's folder.

    ``grid_height`` and ``grid_width`` count tokens, and are those of every sample in it;
    ``left_out`` counts the samples that are not in it, by reason; ``num_with_origin`` the samples
    that have a caption of each origin.
    """

    path: str
    num_bytes: int
    sha256: str
    num_samples: int
    shard_sha256: str
    grid_height: int
    grid_width: int
    left_out: dict[str, int] = field(default_factory=dict)
    num_with_origin: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class CacheManifest:
    """All shards of a dataset version under one tokenizer, resolution and crop policy."""

    dataset_sha256: str
    encoder_sha256: str
    resolution_px: int
    crop: str
    shards: list[CacheEntry]
    schema_version: int = CACHE_SCHEMA_VERSION

    @property
    def num_samples(self) -> int:
        """Samples that have tokens."""
        return sum(entry.num_samples for entry in self.shards)

    def left_out(self) -> dict[str, int]:
        """Samples without tokens, by reason."""
        total: dict[str, int] = {}
        for entry in self.shards:
            for reason, count in entry.left_out.items():
                total[reason] = total.get(reason, 0) + count
        return total

    def to_json(self) -> dict[str, Any]:
        """What is stored."""
        return asdict(self)


def parse_entry(raw: Any, origin: str) -> CacheEntry:
    """The entry in a JSON object; ``origin`` names it in errors."""
    if not isinstance(raw, dict) or set(raw) != {each.name for each in fields(CacheEntry)}:
        raise UserError(f"{origin} is not an entry of a token cache; delete it to make it again")
    return CacheEntry(**raw)


def load_cache_manifest(uri: str) -> CacheManifest:
    """The manifest of a finished cache. Raises ``ObjectMissing`` or ``UserError``."""
    raw = storage.read_json(uri)
    names = {each.name for each in fields(CacheManifest)}
    if not isinstance(raw, dict) or set(raw) != names:
        raise UserError(f"{uri} is not the manifest of a token cache; delete it to make it again")
    if raw["schema_version"] != CACHE_SCHEMA_VERSION:
        raise UserError(
            expected=f"token cache schema {CACHE_SCHEMA_VERSION} at {uri}",
            got=repr(raw["schema_version"]),
            remedy="delete it to make it again",
        )
    shards = [parse_entry(entry, uri) for entry in raw["shards"]]
    return CacheManifest(**{**raw, "shards": shards})


@dataclass(frozen=True)
class CachedSample:
    """What is known about a sample besides its tokens. Scores may be unknown."""

    sample_id: str
    original_width_px: int
    original_height_px: int
    crop_top_px: int
    crop_left_px: int
    preference_score: float | None
    aesthetic_score: float | None
    captions: Captions


def write_tokens(samples: list[CachedSample], tokens_NHW: NDArray[np.uint16]) -> bytes:
    """A shard's Parquet file. The same samples give the same bytes."""
    height, width = tokens_NHW.shape[1:]
    rows = [row.astype("<u2").tobytes() for row in tokens_NHW]
    columns: dict[str, pa.Array] = {
        "sample_id": pa.array([each.sample_id for each in samples], pa.string()),
        "tokens": pa.array(rows, pa.binary(2 * height * width)),
    }
    for name in _SIZES_AND_CROPS:
        columns[name] = pa.array([getattr(each, name) for each in samples], pa.int32())
    for name in _SCORES:
        columns[name] = pa.array([getattr(each, name) for each in samples], pa.float32())
    captions = [[{"origin": o, "text": t} for o, t in each.captions] for each in samples]
    columns["captions"] = pa.array(captions, pa.list_(_CAPTION))
    table = pa.table(columns)
    grid = {"grid_height": str(height), "grid_width": str(width)}
    sink = io.BytesIO()
    pq.write_table(table.replace_schema_metadata(grid), sink, compression="zstd")
    return sink.getvalue()


def read_tokens(data: bytes) -> TokenShard:
    """A shard from its Parquet file.

    Arrow's ``to_numpy`` and ``read_table`` import pandas first, which takes longer than a hundred
    shards; neither is used.
    """
    table = pq.ParquetFile(pa.BufferReader(data)).read().combine_chunks()
    grid = table.schema.metadata
    height, width = int(grid[b"grid_height"]), int(grid[b"grid_width"])
    sizes = [_values(table[name], np.int32).astype(np.float32) for name in _SIZES_AND_CROPS]
    preference, aesthetic = (
        np.array([math.nan if score is None else score for score in column], np.float32)
        for column in (table[name].to_pylist() for name in _SCORES)
    )
    tokens = _values(table["tokens"], np.dtype("<u2"), height * width)
    return TokenShard(
        sample_ids=table["sample_id"].to_pylist(),
        tokens_NHW=tokens.reshape(-1, height, width),
        sizes_and_crops_N4=np.stack(sizes, axis=1),
        preference_score_N=preference,
        aesthetic_score_N=aesthetic,
        captions=_captions(table["captions"]),
    )


def _values(column: pa.ChunkedArray, kind: DTypeLike, per_row: int = 1) -> NDArray[Any]:
    """The ``per_row`` values of each row, none of them null, as they lie in memory."""
    if column.num_chunks == 0:
        return np.empty(0, kind)
    array = column.chunk(0)
    start, size = array.offset * per_row, len(array) * per_row
    return np.frombuffer(array.buffers()[1], kind)[start : start + size]


def _captions(column: pa.ChunkedArray) -> list[Captions]:
    """(origin, text) pairs of each row: two flat lists are ten times quicker than nested ones."""
    if column.num_chunks == 0:
        return []
    array = column.chunk(0)
    flat = array.flatten()
    pairs = list(zip(*(flat.field(n).to_pylist() for n in ("origin", "text")), strict=True))
    offsets = np.frombuffer(array.buffers()[1], np.int32)[array.offset :][: len(array) + 1]
    ends = (offsets[1:] - offsets[0]).tolist()
    return [tuple(pairs[start:end]) for start, end in zip([0, *ends], ends, strict=False)]


def load_tokens(folder_uri: str, entry: CacheEntry) -> TokenShard:
    """A cached shard from storage; raises ``DigestMismatch`` for other bytes than were written."""
    uri = storage.join(folder_uri, entry.path)
    return read_tokens(storage.read_bytes(uri, entry.sha256))
