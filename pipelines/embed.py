"""One shard becomes embeddings: the task of a Spark worker, and what it leaves on storage.

The loop and the model's call are clip-retrieval's ``Runner`` and ``ClipMapper``. Its reader and
writer are not, for they lose samples: the reader decodes with ``warn_and_continue``, so a sample
that fails is gone without a trace, and it looks for one image extension only; the writer keeps a
partition of up to a million samples in memory until its end and then writes three files one after
another at their final names, with no mark of what is whole, so nothing can be resumed. Its Spark
distributor can run no other reader or writer than these. Here a unit is a shard: read with its
digest checked, every sample either embedded or named with its error, and published whole, under
content-derived names, before its marker is written. What a task has of a shard that takes long is
stored now and then (``embed_parts``).
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter, ValidationError

from infra import storage
from infra.digests import sha256_file
from infra.errors import UserError
from infra.manifest import FileEntry, ShardEntry
from infra.storage_once import upload_once
from pipelines.clip_model import (
    ClipEncoder,
    ClipIdentity,
    encoder_of,
    prepared,
    problem_with,
    runner_and_mapper,
)
from pipelines.decode_pool import DecodePool
from pipelines.embed_parts import PARTS, STEM_CHARS, Embeddings, Part, store_part, stored_parts
from pipelines.shards import read_shard

if TYPE_CHECKING:
    import torch

KEY_CHARS = 12
IMAGE_EXTENSIONS = ("jpg", "png", "webp")
_Pool = DecodePool["torch.Tensor"]
_Pending = list[tuple[str, "Future[torch.Tensor]"]]

# One row per sample of the shard, in its order, with the scores that the sample carries. ``row``
# counts the shard's embedded samples and is null beside an ``error``.
ROWS_SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("row", pa.int32()),
        ("error", pa.string()),
        ("url", pa.string()),
        ("caption", pa.string()),
        ("clip_similarity", pa.float64()),
        ("unsafe_prob", pa.float64()),
        ("watermark_prob", pa.float64()),
        ("aesthetic_score", pa.float64()),
        ("aesthetic_scale", pa.string()),
    ]
)
_FROM_JSON = ROWS_SCHEMA.names[3:]


@dataclass(frozen=True)
class EmbeddedShard:
    """What one shard became; the marker of a unit and an entry of the embeddings' manifest."""

    shard: str
    shard_sha256: str
    num_samples: int
    num_embedded: int
    images: FileEntry
    texts: FileEntry
    rows: FileEntry


@dataclass(frozen=True)
class EmbedTask:
    """All that a worker needs to embed any shard of a dataset."""

    dataset_root: str
    identity: ClipIdentity
    weights_uri: str
    batch_size: int
    num_threads: int | None
    decode_threads: int
    checkpoint_seconds: float
    decode_deadline_seconds: float

    @property
    def folder(self) -> str:
        """Where this model's embeddings of the dataset lie, relative to the dataset's root."""
        return embeddings_folder(self.identity.key)

    def marker_uri(self, shard_sha256: str) -> str:
        """The marker of one shard."""
        return storage.join(self.dataset_root, self.folder, "units", f"{shard_sha256[:32]}.json")

    def parts(self, shard_sha256: str) -> str:
        """The folder of a shard's embeddings while they are made."""
        return storage.join(self.dataset_root, self.folder, PARTS, shard_sha256[:STEM_CHARS])

    def read_marker(self, shard: ShardEntry) -> EmbeddedShard | None:
        """The shard's marker, or None when it is missing or unreadable."""
        try:
            data = storage.read_bytes(self.marker_uri(shard.sha256))
            marker = TypeAdapter(EmbeddedShard).validate_json(data, strict=True)
        except (storage.ObjectMissing, ValidationError):
            return None
        return marker if marker.shard_sha256 == shard.sha256 else None


def embeddings_folder(model_key: str) -> str:
    """``embeddings/<key12>`` under a dataset's root."""
    return f"embeddings/{model_key[:KEY_CHARS]}"


def embed_shard(task: EmbedTask, shard: ShardEntry, folder: Path) -> EmbeddedShard:
    """Embed every image and caption of ``shard``, publish, and write the marker last.

    A task that was killed goes on after the last part that it stored. ``folder`` is a temporary
    one. Raises ``DigestMismatch`` when the shard's bytes are not those of the dataset's manifest.
    """
    encoder = encoder_of(task.identity, task.weights_uri, task.num_threads)
    data = storage.read_bytes(storage.join(task.dataset_root, shard.path), shard.sha256)
    begun = stored_parts(task.parts(shard.sha256), task.batch_size)
    reader = ShardReader(data, encoder, task, begun.end)
    writer = ShardEmbeddings(task, shard, reader, folder, begun)
    _run(encoder, reader, writer)
    if writer.marker is None:
        raise RuntimeError("clip-retrieval's runner did not flush its writer")
    return writer.marker


def _run(encoder: ClipEncoder, reader: ShardReader, writer: ShardEmbeddings) -> None:
    import contextlib

    runner, clip_mapper = runner_and_mapper()

    def mapper() -> Any:
        with contextlib.redirect_stdout(io.StringIO()):
            made = clip_mapper(
                enable_image=True,
                enable_text=True,
                enable_metadata=False,
                use_mclip=False,
                clip_model=encoder.clip_model,
                use_jit=False,
                mclip_model="",
            )
        # It would compute in bf16 on every GPU, and round before it normalises.
        made.model_img, made.model_txt = encoder.encode_image, encoder.encode_text
        return made

    runner(lambda _: reader, mapper, lambda _: writer, lambda _: _NoLog(), 1)(0)


class _NoLog:
    """In the place of clip-retrieval's logger, a process that writes statistics beside the data."""

    def start(self) -> None: ...

    def end(self) -> None: ...

    def __call__(self, stats: Mapping[str, Any]) -> None: ...


class ShardReader:
    """The batches of one shard in its order, the next one decoded while the model works.

    ``first`` samples are passed by. ``errors`` names the samples after them that could not be
    decoded, ``samples`` holds what all say of themselves; both are complete when the iteration is.
    ``end`` is how many samples there are up to and with the batch that was given last.
    """

    def __init__(self, shard: bytes, encoder: ClipEncoder, task: EmbedTask, first: int = 0) -> None:
        self._shard = shard
        self._encoder = encoder
        self._task = task
        self.errors: dict[str, str] = {}
        self.samples: dict[str, dict[str, Any]] = {}
        self.end = first

    def __iter__(self) -> Iterator[dict[str, Any]]:
        samples = read_shard(self._shard)
        for key, members in islice(samples, self.end):
            self.samples[key] = _described(members)
        task = self._task
        with _Pool(task.decode_threads, task.decode_deadline_seconds) as pool:
            pending = self._submit(samples, pool)
            while pending:
                current, pending = pending, self._submit(samples, pool)
                batch = self._collect(current, pool)
                self.end += len(current)
                if batch is not None:
                    yield batch

    def _submit(self, samples: Iterator[tuple[str, dict[str, bytes]]], pool: _Pool) -> _Pending:
        images: _Pending = []
        for key, members in islice(samples, self._task.batch_size):
            self.samples[key] = _described(members)
            image = next((members[ext] for ext in IMAGE_EXTENSIONS if ext in members), b"")
            images.append((key, pool.submit(partial(prepared, self._encoder, image))))
        return images

    def _collect(self, pending: _Pending, pool: _Pool) -> dict[str, Any] | None:
        import torch

        keys: list[str] = []
        images: list[torch.Tensor] = []
        for key, future in pending:
            try:
                images.append(pool.wait(future))
                keys.append(key)
            except TimeoutError as error:
                self.errors[key] = f"decode: {error}"
            except (OSError, ValueError, SyntaxError) as error:  # what Pillow raises for bad bytes
                self.errors[key] = f"decode: {type(error).__name__}"
        if not keys:
            return None
        captions = [self.samples[key]["caption"] for key in keys]
        return {
            "image_tensor": torch.stack(images),
            "image_filename": keys,
            "text_tokens": self._encoder.tokenize(captions),
            "text": captions,
        }


def _described(members: Mapping[str, bytes]) -> dict[str, Any]:
    """What a sample's ``.json`` says, with the caption of ``.txt``: the one that is trained on."""
    known = json.loads(members.get("json", b"{}"))
    found = {name: known.get(name) for name in _FROM_JSON}
    return found | {"caption": members.get("txt", b"").decode("utf-8", "replace")}


class ShardEmbeddings:
    """Gathers a shard's embeddings and publishes them together when all are there.

    ``begun`` is what an earlier task stored of them. Memory: 4 bytes x dimension per sample, so
    60 MB for 10,000 samples of ViT-L/14.
    """

    def __init__(
        self, task: EmbedTask, shard: ShardEntry, reader: ShardReader, folder: Path, begun: Part
    ) -> None:
        self._task = task
        self._shard = shard
        self._reader = reader
        self._folder = folder
        self._made = begun
        self._since = Part(first=begun.end)
        self._stored_at = time.monotonic()
        self.marker: EmbeddedShard | None = None

    def __call__(self, batch: Mapping[str, Any]) -> None:
        """Take what the mapper made of one batch; store a part when it is time."""
        images, texts = batch["image_embs"], batch["text_embs"]
        problems = [problem_with(*pair) for pair in zip(images, texts, strict=True)]
        whole = np.array([problem is None for problem in problems])
        for key, problem in zip(batch["image_filename"], problems, strict=True):
            if problem is None:
                self._since.keys.append(key)
            else:
                self._reader.errors[key] = f"embedding: {problem}"
        self._since.images.append(images[whole])
        self._since.texts.append(texts[whole])
        if time.monotonic() - self._stored_at >= self._task.checkpoint_seconds:
            since = self._take_in()
            store_part(self._task.parts(self._shard.sha256), since, self._task.batch_size)
            self._stored_at = time.monotonic()

    def _take_in(self) -> Part:
        """Add what came since the last part to what is made; returns it."""
        since = self._since
        since.end = self._reader.end
        known = self._made.errors
        since.errors = {k: v for k, v in self._reader.errors.items() if k not in known}
        self._made.add(since)
        self._since = Part(first=since.end)
        return since

    def flush(self) -> None:
        """Publish the files, then the marker; then no part is needed any more."""
        self._take_in()
        samples, made = self._reader.samples, self._made
        num_ended = len(made.keys) + len(made.errors)
        if len(samples) != self._shard.num_samples or num_ended != len(samples):
            raise RuntimeError(
                f"{self._shard.path} has {self._shard.num_samples} samples by its manifest, "
                f"{len(samples)} were read, {len(made.keys)} embedded, {len(made.errors)} failed"
            )
        images = self._publish_array("images", made.images)
        texts = self._publish_array("texts", made.texts)
        marker = EmbeddedShard(
            shard=self._shard.path,
            shard_sha256=self._shard.sha256,
            num_samples=len(samples),
            num_embedded=len(made.keys),
            images=images,
            texts=texts,
            rows=self._publish_rows(_companions(images, texts)),
        )
        storage.write_json(self._task.marker_uri(self._shard.sha256), asdict(marker))
        storage.delete_prefix(self._task.parts(self._shard.sha256))
        self.marker = marker

    def _publish_array(self, kind: str, parts: list[Embeddings]) -> FileEntry:
        empty = np.zeros((0, self._task.identity.dim), np.float16)
        array = np.concatenate([empty, *parts])
        path = self._folder / f"{kind}.npy"
        with path.open("wb") as file:
            np.lib.format.write_array(file, array, allow_pickle=False)
        return self._publish(path, kind, "npy", len(array))

    def _publish_rows(self, companions: dict[str, str]) -> FileEntry:
        row_of = {key: row for row, key in enumerate(self._made.keys)}
        rows = [
            {
                "sample_id": key,
                "row": row_of.get(key),
                "error": self._made.errors.get(key),
                **known,
            }
            for key, known in self._reader.samples.items()
        ]
        path = self._folder / "rows.parquet"
        table = pa.Table.from_pylist(rows, ROWS_SCHEMA.with_metadata(companions))
        pq.write_table(table, path, compression="zstd")
        return self._publish(path, "rows", "parquet", len(rows))

    def _publish(self, path: Path, kind: str, suffix: str, num_rows: int) -> FileEntry:
        relative = f"{self._task.folder}/{kind}"
        return publish_file(path, self._task.dataset_root, relative, suffix, num_rows)


def publish_file(
    path: Path, dataset_root: str, folder: str, suffix: str, num_rows: int
) -> FileEntry:
    """Upload a finished file as ``<folder>/<its sha256>.<suffix>`` under the dataset's root."""
    sha256 = sha256_file(path)
    relative = f"{folder}/{sha256[:32]}.{suffix}"
    stored = upload_once(path, storage.join(dataset_root, relative), sha256)
    return FileEntry(relative, stored.num_bytes, sha256, num_rows)


def _companions(images: FileEntry, texts: FileEntry) -> dict[str, str]:
    """What a file of rows says of itself: the arrays that its row numbers point into."""
    return {"images_sha256": images.sha256, "texts_sha256": texts.sha256}


def read_embeddings(dataset_root: str, entry: FileEntry, dim: int) -> Embeddings:
    """The float16 array (rows, dim) of a listed file, its digest and shape checked."""
    data = storage.read_bytes(storage.join(dataset_root, entry.path), entry.sha256)
    array = np.load(io.BytesIO(data), allow_pickle=False)
    if array.shape != (entry.num_rows, dim) or array.dtype != np.float16:
        raise UserError(
            expected=f"float16 embeddings of shape ({entry.num_rows}, {dim}) in {entry.path}",
            got=f"{array.dtype} of shape {array.shape}",
            remedy="embed the dataset again",
        )
    return array  # type: ignore[no-any-return]


def read_rows(dataset_root: str, unit: EmbeddedShard) -> pa.Table:
    """The table of ``ROWS_SCHEMA`` of a shard, its digest checked.

    Raises ``UserError`` when its rows do not belong to the unit's arrays, or not in their order.
    """
    data = storage.read_bytes(storage.join(dataset_root, unit.rows.path), unit.rows.sha256)
    table = pq.ParquetFile(pa.BufferReader(data)).read()
    told = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
    expected = _companions(unit.images, unit.texts)
    rows = table["row"].drop_null().to_pylist()
    if (
        any(told.get(name, sha256) != sha256 for name, sha256 in expected.items())
        or table.num_rows != unit.num_samples
        or rows != list(range(unit.num_embedded))
    ):
        raise UserError(
            expected=f"rows of the embeddings {unit.images.path} in {unit.rows.path}",
            got=f"{table.num_rows} rows of {told.get('images_sha256', 'others')[:12]}",
            remedy="embed the dataset again",
        )
    return table
