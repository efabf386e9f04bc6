"""What lies under a dataset's root, and whom it belongs to."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from infra import storage
from infra.manifest import MANIFEST_NAME, WITHDRAWN_NAME, DatasetManifest, load_manifest
from pipelines.ledger_counts import counts_path
from pipelines.tombstones import FOLDER

VERSION = re.compile(r"[0-9a-f]{64}")
LATEST = "embeddings/latest.json"
BY_SHARD = ("captions", "embeddings", "scores", "tokens")
_STEM_CHARS = 32
_READ_THREADS = 8


def dataset_names(store_uri: str) -> list[str]:
    """The datasets of which a store holds anything, sorted."""
    root = storage.join(store_uri, "datasets") + "/"
    listed = storage.list_objects(root)
    return sorted({info.uri.removeprefix(root).partition("/")[0] for info in listed})


def live_versions(dataset_root: str) -> list[DatasetManifest]:
    """The manifests under a dataset's root, in order of version."""
    found = []
    for info in storage.list_objects(dataset_root):
        folder, _, name = info.uri.rpartition("/")
        version = folder.rpartition("/")[2]
        if name == MANIFEST_NAME and folder == storage.join(dataset_root, version):
            found.append(load_manifest(info.uri))
    return sorted(found, key=lambda manifest: manifest.version)


def sizes_under(dataset_root: str) -> dict[str, int]:
    """Path relative to the root -> bytes, of everything there."""
    prefix = dataset_root.rstrip("/") + "/"
    return {
        info.uri.removeprefix(prefix): info.num_bytes for info in storage.list_objects(dataset_root)
    }


def listed_paths(live: list[DatasetManifest]) -> set[str]:
    """What versions list, and the counts of their ledgers."""
    kept = {shard.path for manifest in live for shard in manifest.shards}
    kept |= {file.path for manifest in live for file in manifest.ledger}
    return kept | {counts_path(file) for manifest in live for file in manifest.ledger}


def paths_beside(
    dataset_root: str, live: list[DatasetManifest], sizes: Mapping[str, int]
) -> set[str]:
    """What belongs to versions without being listed: pages, tombstones, notes of withdrawals, and
    embeddings, scores, captions and tokens of shards that a version lists. Working files do not.
    """
    versions = {manifest.version for manifest in live}
    stems = {shard.sha256[:_STEM_CHARS] for manifest in live for shard in manifest.shards}
    kept = {path for path in sizes if _belongs(path, stems, versions)}
    notes = [path for path in kept if path.startswith(BY_SHARD) and path.endswith(".json")]
    kept |= paths_in_notes(dataset_root, notes)
    if LATEST in sizes:
        latest = storage.read_json(storage.join(dataset_root, LATEST))
        if isinstance(latest, dict) and latest.get("manifest") in kept:
            kept.add(LATEST)
        else:
            kept.discard(LATEST)
    return kept


def _belongs(path: str, stems: set[str], versions: set[str]) -> bool:
    """Whether a file stays for what it is called."""
    name = path.rpartition("/")[2]
    parts = path.split("/")
    if parts[0] == FOLDER or parts[0] in versions or name.endswith("lease.json"):
        return True
    if name == WITHDRAWN_NAME and VERSION.fullmatch(parts[0]):
        return True
    if parts[0] in BY_SHARD:
        known = {*parts, name.partition(".")[0]}
        return not (known.isdisjoint(stems) and known.isdisjoint(versions))
    return False


def paths_in_notes(dataset_root: str, notes: list[str]) -> set[str]:
    """Every ``path`` in these JSON files; one that cannot be read names none."""

    def read(path: str) -> set[str]:
        try:
            value = json.loads(storage.read_bytes(storage.join(dataset_root, path)))
        except (storage.ObjectMissing, ValueError):
            return set()
        return set(_paths_in(value))

    found: set[str] = set()
    with ThreadPoolExecutor(_READ_THREADS) as pool:
        for paths in pool.map(read, notes):
            found |= paths
    return found


def _paths_in(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for name, found in value.items():
            if name == "path" and isinstance(found, str):
                yield found
            else:
                yield from _paths_in(found)
    elif isinstance(value, list):
        for found in value:
            yield from _paths_in(found)
