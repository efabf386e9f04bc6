"""What a captioner said of each image of a dataset, kept so that no image is asked for twice.

``captions/<key12>/`` under the dataset's root: ``parts/<shard>/`` has answers as they come, some
dozens a file; when a shard's are all there they become one content-named file in ``answers/``, and
a marker in ``units/``. Last comes ``<version>/manifest.json``. When it was asked, and what it cost,
is told by the markers alone: nothing that has a digest depends on it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
from pydantic import TypeAdapter, ValidationError

from infra import storage
from infra.config import semantic_part
from infra.digests import canonical_json, sha256_bytes
from infra.errors import UserError
from infra.manifest import FileEntry, ShardEntry
from pipelines.caption_clean import cleaned
from pipelines.caption_config import CaptionConfig
from pipelines.caption_engines import Answer, Captioner, EndpointCaptioner
from pipelines.caption_local import local_captioner
from pipelines.captioning_config import CaptioningConfig
from pipelines.embed import IMAGE_EXTENSIONS, KEY_CHARS, publish_file
from pipelines.shards import read_shard

ANSWERS_VERSION = 1
_READ_THREADS = 8
# ``captions``: what the sample has, as JSON. ``text`` is clean and without personal data.
# ``asked_on``: the day, UTC. It and the tokens are in parts alone, and in the marker's sums.
ANSWERS_SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("captions", pa.string()),
        ("text", pa.string()),
        ("model", pa.string()),
        ("finish_reason", pa.string()),
        ("error", pa.string()),
        ("retryable", pa.bool_()),
        ("prompt_tokens", pa.int32()),
        ("completion_tokens", pa.int32()),
        ("asked_on", pa.string()),
    ]
)
_SCHEMA = pl.Schema(ANSWERS_SCHEMA)
_OF_THE_MOMENT = ("prompt_tokens", "completion_tokens", "asked_on")
Sample = tuple[str, bytes, str]  # sample id, image, what it has as JSON


@dataclass(frozen=True)
class CaptionedShard:
    """The marker of a shard. ``asked_on``: first and last day, UTC; tokens as the server counts."""

    shard: str
    shard_sha256: str
    num_samples: int
    num_failed: int
    num_retryable: int
    answers: FileEntry
    prompt_tokens: int
    completion_tokens: int
    asked_on: list[str]


@dataclass(frozen=True)
class CaptionTask:
    """All that a worker needs to caption any shard. ``identity`` says what answers depend on."""

    dataset_root: str
    config: CaptioningConfig
    identity: dict[str, Any]
    redacts: bool

    @property
    def key(self) -> str:
        """The sha256 over the identity."""
        return sha256_bytes(canonical_json(self.identity))

    @property
    def folder(self) -> str:
        """Where these answers lie, relative to the dataset's root."""
        return f"captions/{self.key[:KEY_CHARS]}"

    def marker_uri(self, shard_sha256: str) -> str:
        """The marker of one shard."""
        return storage.join(self.dataset_root, self.folder, "units", f"{shard_sha256[:32]}.json")

    def parts(self, shard_sha256: str) -> str:
        """The folder of a shard's answers while they come, relative to the dataset's root."""
        return f"{self.folder}/parts/{shard_sha256[:32]}"

    def read_marker(self, shard: ShardEntry) -> CaptionedShard | None:
        """The shard's marker, or None when it is missing or unreadable."""
        try:
            data = storage.read_bytes(self.marker_uri(shard.sha256))
            marker = TypeAdapter(CaptionedShard).validate_json(data, strict=True)
        except (storage.ObjectMissing, ValidationError):
            return None
        return marker if marker.shard_sha256 == shard.sha256 else None

    def engine(self) -> Captioner:
        """The captioner, loaded or ready to ask."""
        if self.config.endpoint is not None:
            return EndpointCaptioner(self.config, self.config.endpoint)
        return local_captioner(self.config.model_dump_json(), self.identity["model_sha256"])


def identity_of(config: CaptioningConfig, model_sha256: str | None) -> dict[str, Any]:
    """What decides an answer: engine, model, prompt and sampling; not where, when or how fast."""
    asked = semantic_part(config)
    asked.pop("take")
    if config.local is not None:
        asked["local"] = True
    return {
        "engine": "local" if config.local is not None else "endpoint",
        "model": config.endpoint.model if config.endpoint is not None else "local",
        "model_sha256": model_sha256,
        "prompt_sha256": sha256_bytes(config.prompt.encode()),
        **asked,
        "version": ANSWERS_VERSION,
    }


def caption_shard(
    task: CaptionTask, shard: ShardEntry, folder: Path, *, retry_failed: bool = False
) -> CaptionedShard:
    """Ask for every sample that has no answer yet, publish them all, and write the marker last."""
    before = task.read_marker(shard) if retry_failed else None
    known = _known(task, shard, before)
    samples = samples_of(task, shard)
    engine = task.engine()
    while chunk := list(islice(_unanswered(samples, known), task.config.checkpoint_samples)):
        made = ask(task, engine, shard, chunk, folder)
        known = pl.concat([known, made])
    return _finish(task, shard, known, before, folder)


def _unanswered(samples: Iterator[Sample], known: pl.DataFrame) -> Iterator[Sample]:
    answered = set(known["sample_id"])
    return (sample for sample in samples if sample[0] not in answered)


def samples_of(task: CaptionTask, shard: ShardEntry) -> Iterator[Sample]:
    """The shard's samples in its order, its digest checked."""
    data = storage.read_bytes(storage.join(task.dataset_root, shard.path), shard.sha256)
    for key, members in read_shard(data):
        image = next((members[ext] for ext in IMAGE_EXTENSIONS if ext in members), b"")
        has = json.loads(members.get("json", b"{}")).get("captions") or []
        yield key, image, canonical_json(has).decode()


def ask(
    task: CaptionTask,
    engine: Captioner,
    shard: ShardEntry,
    samples: Sequence[Sample],
    folder: Path,
) -> pl.DataFrame:
    """Ask, and keep what came: rows of ``ANSWERS_SCHEMA``.

    When the engine gives up, the texts that came before are kept.
    """
    found: list[Answer] = []
    try:
        found.extend(engine.answers([image for _, image, _ in samples]))
    except UserError:
        pairs = zip(samples, found, strict=False)
        good = [(sample, answer) for sample, answer in pairs if answer.error is None]
        if good:
            _keep(task, shard, _rows(task, good), folder)
        raise
    made = _rows(task, list(zip(samples, found, strict=True)))
    _keep(task, shard, made, folder)
    return made


def _rows(task: CaptionTask, answered: Sequence[tuple[Sample, Answer]]) -> pl.DataFrame:
    """Texts are cleaned here, so that nothing else is ever stored."""
    found = [answer for _, answer in answered]
    config = CaptionConfig(personal_data="redact" if task.redacts else "off")
    texts = cleaned(pl.Series([each.text for each in found], dtype=pl.String), config, is_alt=False)
    today = datetime.now(UTC).date().isoformat()
    rows = [
        {"sample_id": key, "captions": has, **asdict(answer), "text": text, "asked_on": today}
        for ((key, _, has), answer), text in zip(answered, texts["text"], strict=True)
    ]
    return pl.DataFrame(rows, schema=_SCHEMA)


def _keep(task: CaptionTask, shard: ShardEntry, made: pl.DataFrame, folder: Path) -> None:
    """Store answers beside those that came before."""
    path = folder / "part.parquet"
    made.write_parquet(path)
    publish_file(path, task.dataset_root, task.parts(shard.sha256), "parquet", made.height)


def known_answers(task: CaptionTask, shard: ShardEntry) -> pl.DataFrame:
    """The shard's answers so far."""
    return _known(task, shard, None)


def _known(task: CaptionTask, shard: ShardEntry, marker: CaptionedShard | None) -> pl.DataFrame:
    parts = storage.join(task.dataset_root, task.parts(shard.sha256))
    frames = [pl.DataFrame(schema=_SCHEMA)]
    # A failure that may pass is no answer to somebody who comes again.
    for info in sorted(storage.list_objects(parts), key=lambda info: info.uri):
        frames.append(pl.read_parquet(storage.read_bytes(info.uri)))
    if marker is not None:
        frames.append(read_answers(task.dataset_root, marker.answers))
    found = pl.concat(frames, how="diagonal").filter(~pl.col("retryable"))
    return found.unique("sample_id", keep="first", maintain_order=True)


def read_answers(dataset_root: str, entry: FileEntry) -> pl.DataFrame:
    """The rows of ``ANSWERS_SCHEMA`` of a listed file, its digest checked."""
    uri = storage.join(dataset_root, entry.path)
    return pl.read_parquet(storage.read_bytes(uri, entry.sha256))


def _finish(
    task: CaptionTask,
    shard: ShardEntry,
    known: pl.DataFrame,
    before: CaptionedShard | None,
    folder: Path,
) -> CaptionedShard:
    """Publish ``known``; of those that ``before`` has, only its marker knows when and for what."""
    ordered = known.sort("sample_id")
    if ordered.height != shard.num_samples:
        raise RuntimeError(
            f"{shard.path} has {shard.num_samples} samples, {ordered.height} have an answer"
        )
    path = folder / "answers.parquet"
    ordered.drop(_OF_THE_MOMENT).write_parquet(path)  # no part of what has a digest
    relative = f"{task.folder}/answers"
    days = sorted({*known["asked_on"].drop_nulls(), *(before.asked_on if before else ())})
    spent = (before.prompt_tokens, before.completion_tokens) if before else (0, 0)
    marker = CaptionedShard(
        shard=shard.path,
        shard_sha256=shard.sha256,
        num_samples=ordered.height,
        num_failed=ordered["error"].count(),
        num_retryable=int(ordered["retryable"].sum()),
        answers=publish_file(path, task.dataset_root, relative, "parquet", ordered.height),
        prompt_tokens=spent[0] + int(ordered["prompt_tokens"].sum()),
        completion_tokens=spent[1] + int(ordered["completion_tokens"].sum()),
        asked_on=[days[0], days[-1]] if days else [],
    )
    storage.write_json(task.marker_uri(shard.sha256), asdict(marker))
    storage.delete_prefix(storage.join(task.dataset_root, task.parts(shard.sha256)))
    return marker


@dataclass(frozen=True)
class AnswersManifest:
    """The answers for one version by one captioner; known by the sha256 of its bytes."""

    dataset: str
    dataset_version: str
    identity: dict[str, Any]
    shards: list[str]
    answers: list[FileEntry]

    @property
    def sha256(self) -> str:
        """What these answers are known by."""
        return sha256_bytes(canonical_json(asdict(self)))


def finished_shards(
    task: CaptionTask, shards: Sequence[ShardEntry], *, retry_failed: bool = False
) -> dict[str, CaptionedShard]:
    """Shard's sha256 -> marker, for those whose answers are there in full size.

    ``retry_failed``: those with failures that may have passed are not finished.
    """
    folder = storage.join(task.dataset_root, task.folder)
    listed = {info.uri: info.num_bytes for info in storage.list_objects(folder)}
    begun = [shard for shard in shards if task.marker_uri(shard.sha256) in listed]
    with ThreadPoolExecutor(_READ_THREADS) as pool:
        markers = [marker for marker in pool.map(task.read_marker, begun) if marker is not None]
    return {
        marker.shard_sha256: marker
        for marker in markers
        if listed.get(storage.join(task.dataset_root, marker.answers.path))
        == marker.answers.num_bytes
        and not (retry_failed and marker.num_retryable)
    }


def refuse_empty(num_samples: int, name: str) -> None:
    """A version without samples has nothing to caption."""
    if num_samples == 0:
        raise UserError(f"dataset {name} has no samples; there is nothing to caption")
