"""Search a dataset's images by words or by an image, and publish what was found as a dataset."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import polars as pl

from infra import storage
from infra.digests import canonical_json, sha256_bytes
from infra.errors import UserError
from infra.lease import Lease
from infra.manifest import SHARD_SIZES, DatasetManifest, load_manifest, publish_manifest
from pipelines.clip_model import ClipEncoder
from pipelines.columns import CANONICAL_SCHEMA
from pipelines.config import ShardConfig
from pipelines.embed import read_rows
from pipelines.embeddings import EmbeddingsManifest, load_embeddings
from pipelines.exclusive import refuse_while_removing
from pipelines.ledger import COMMITTED, REJECTED, LedgerFile
from pipelines.report import write_report
from pipelines.shards import ShardWriter, read_shard
from pipelines.stored import LATEST, live_versions
from pipelines.tombstones import TAKEDOWN, Tombstones, load_tombstones
from pipelines.vector_index import VectorIndex, Vectors

EXPORTED = "search"  # the attribute that exports have
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Hit:
    """A found sample; ``cosine`` is of its image with the query, in [-1, 1]."""

    sample_id: str
    cosine: float
    caption: str
    url: str
    shard: str
    aesthetic_score: float | None

    def to_json(self) -> dict[str, Any]:
        """For a program."""
        return asdict(self)


def point_to_latest(dataset_root: str, embeddings: EmbeddingsManifest, uri: str) -> None:
    """Say which embeddings a search in this dataset takes: the newest that were published."""
    relative = uri.removeprefix(dataset_root).strip("/")
    storage.write_json(
        storage.join(dataset_root, LATEST), {"manifest": relative, "sha256": embeddings.sha256}
    )


def latest_embeddings(dataset_root: str) -> EmbeddingsManifest:
    """The embeddings that ``point_to_latest`` named; ``UserError`` when there are none."""
    try:
        latest = storage.read_json(storage.join(dataset_root, LATEST))
        uri = storage.join(dataset_root, str(latest["manifest"]))
        return load_embeddings(uri, str(latest["sha256"]))
    except (storage.ObjectMissing, KeyError, TypeError):
        raise UserError(
            expected=f"embeddings of the dataset at {dataset_root}",
            got="none",
            remedy="run `atelier score RECIPE` first",
        ) from None


def searchable_datasets(store_uri: str) -> list[str]:
    """The names of the datasets that have embeddings, sorted."""
    root = storage.join(store_uri, "datasets")
    prefix = root.rstrip("/") + "/"
    names = [info.uri.removeprefix(prefix) for info in storage.list_objects(root)]
    return sorted(name.split("/")[0] for name in names if name.endswith("/" + LATEST))


def text_query(encoder: ClipEncoder, words: str) -> Vectors:
    """The embedding of a text, float32 of shape (dim,)."""
    return encoder.encode_text(encoder.tokenize([words]))[0].cpu().numpy()


def image_query(encoder: ClipEncoder, path: Path) -> Vectors:
    """The embedding of an image file; ``UserError`` when it is none."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            prepared = encoder.prepare(image)
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(expected="an image file", got=f"{path} ({error})") from error
    return encoder.encode_image(prepared[None])[0].cpu().numpy()


def find(index: VectorIndex, query: Vectors, k: int) -> list[Hit]:
    """The ``k`` images nearest to ``query`` (dim,), best first, then by sample id."""
    (found,) = index.search(np.asarray(query, np.float32)[None], k)
    by_unit: dict[int, list[tuple[int, float]]] = defaultdict(list)
    for vector, cosine in found:
        number, row = index.place(vector)
        by_unit[number].append((row, cosine))
    hits = []
    for number, rows in by_unit.items():
        unit = index.embeddings.units[number]
        table = pl.DataFrame(pl.from_arrow(read_rows(index.dataset_root, unit)))
        known = {row["row"]: row for row in table.iter_rows(named=True)}
        for row, cosine in rows:
            sample = known[row]
            hits.append(
                Hit(
                    sample_id=sample["sample_id"],
                    cosine=cosine,
                    caption=sample["caption"],
                    url=sample["url"] or "",
                    shard=unit.shard,
                    aesthetic_score=sample["aesthetic_score"],
                )
            )
    return sorted(hits, key=lambda hit: (-hit.cosine, hit.sample_id))


@dataclass(frozen=True)
class Export:
    """A version made of hits; ``num_taken_down`` of them stayed out."""

    manifest_uri: str
    num_samples: int
    num_taken_down: int


def export_hits(
    hits: Sequence[Hit],
    index: VectorIndex,
    store_uri: str,
    name: str,
    query: dict[str, Any],
    shards: ShardConfig | None = None,
) -> Export:
    """Publish the hits as a version of dataset ``name``: shards, ledger, manifest.

    Samples are copied as they are, but for those that were taken down, from the dataset searched,
    from ``name`` or from the store: they are rows of the ledger. ``query`` (JSON) is kept in the
    manifest with the dataset they come from. ``UserError`` for a name whose dataset is no export,
    and ``LeaseHeld`` while a takedown or a cleaning is at work on it.
    """
    source = index.embeddings
    origin = storage.join(index.dataset_root, source.dataset_version, "manifest.json")
    parent = load_manifest(origin, source.dataset_version)
    if not _NAME.fullmatch(name):
        raise UserError(
            expected="a dataset name of a-z, 0-9, '.', '_' and '-', at most 64 long", got=repr(name)
        )
    root = storage.join(store_uri, "datasets", name)
    if root == index.dataset_root:
        raise UserError(f"--export {name} is the dataset that was searched; give another name")
    _refuse_other_datasets(root, name)
    with (
        Lease(storage.join(root, "work", "export", "lease.json"), f"export of {name}") as lease,
        TemporaryDirectory(prefix="atelier-export-") as folder,
    ):
        refuse_while_removing(root)
        rows, samples = _without_taken_down(
            _samples_of(hits, index, parent),
            load_tombstones(index.dataset_root) | load_tombstones(root),
        )
        if not samples:
            raise UserError(f"all {len(hits)} samples that were found were taken down")
        with ShardWriter(shards or ShardConfig(), root, Path(folder)) as writer:
            for key in sorted(samples):
                writer.add(key, samples[key])
            entries = writer.finish()
        placed = pl.col("sample_id").replace_strict(
            writer.shard_of, default=None, return_dtype=pl.String
        )
        with LedgerFile(Path(folder), "export") as ledger:
            ledger.add(rows.with_columns(placed.alias("shard")))
            in_ledger = ledger.publish(root)
        num_gone = rows.height - len(samples)
        selection = {"dataset": source.dataset, "query": query, "embeddings": source.sha256}
        manifest = DatasetManifest(
            name=name,
            recipe_fingerprint=sha256_bytes(canonical_json(selection)),
            shards=entries,
            ledger=[] if in_ledger is None else [in_ledger],
            counts={
                "rows_in": rows.height,
                "committed": len(samples),
                "rejected": num_gone,
                "failed": 0,
            },
            rejected={TAKEDOWN: num_gone} if num_gone else {},
            parents=[{"dataset": source.dataset, "version": source.dataset_version}],
            attributes={
                **{key: value for key, value in parent.attributes.items() if key != SHARD_SIZES},
                EXPORTED: selection,
            },
        )
        lease.check()
        uri = publish_manifest(root, manifest)
        write_report(uri, manifest)
    return Export(uri, len(samples), num_gone)


def _refuse_other_datasets(root: str, name: str) -> None:
    """An export adds a version; among those of a curation it would be taken for one of them."""
    versions = live_versions(root)
    is_other = any(EXPORTED not in version.attributes for version in versions)
    if not versions:  # a curation may be under way
        work = storage.list_objects(storage.join(root, "work"))
        is_other = any(not info.uri.endswith("lease.json") for info in work)
    if is_other:
        raise UserError(
            expected="a new name after --export, or that of an earlier export",
            got=f"{name}, a dataset of another kind",
        )


def _without_taken_down(
    samples: dict[str, dict[str, bytes]], tombstones: Tombstones
) -> tuple[pl.DataFrame, dict[str, dict[str, bytes]]]:
    """The ledger's rows of these samples, and the samples that stay."""
    rows = _ledger_rows(samples)
    gone = tombstones.covers(rows)
    rows = rows.with_columns(
        pl.when(gone).then(pl.lit(REJECTED)).otherwise(pl.lit(COMMITTED)).alias("disposition"),
        pl.when(gone).then(pl.lit(TAKEDOWN)).otherwise(pl.lit(None, pl.String)).alias("reason"),
    )
    kept = set(rows.filter(~gone)["sample_id"])
    return rows, {key: members for key, members in samples.items() if key in kept}


def _samples_of(
    hits: Sequence[Hit], index: VectorIndex, parent: DatasetManifest
) -> dict[str, dict[str, bytes]]:
    wanted: dict[str, set[str]] = defaultdict(set)
    for hit in hits:
        wanted[hit.shard].add(hit.sample_id)
    samples: dict[str, dict[str, bytes]] = {}
    for shard in parent.shards:
        ids = wanted.get(shard.path)
        if ids:
            data = storage.read_bytes(storage.join(index.dataset_root, shard.path), shard.sha256)
            samples |= {key: members for key, members in read_shard(data) if key in ids}
    missing = {hit.sample_id for hit in hits} - set(samples)
    if missing:
        raise RuntimeError(f"{len(missing)} hits are not in their shards, first: {min(missing)}")
    return samples


def _ledger_rows(samples: dict[str, dict[str, bytes]]) -> pl.DataFrame:
    """One row per sample, by id, from what its ``.json`` says."""
    columns = [name for name in CANONICAL_SCHEMA.names if name != "caption"]
    rows = []
    for key in sorted(samples):
        known = json.loads(samples[key]["json"])
        known["width_px"] = known.get("original_width_px")
        known["height_px"] = known.get("original_height_px")
        rows.append({name: known.get(name) for name in [*columns, "sha256"]})
    canonical = pl.Schema(CANONICAL_SCHEMA)
    types: dict[str, Any] = {name: canonical[name] for name in columns}
    return pl.DataFrame(rows, schema={**types, "sha256": pl.String})
