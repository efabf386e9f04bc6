"""What a dataset's folder holds, for whom, and what nobody needs any more.

Nothing that a version lists, that a build or a derivation under way relies on, or that this module
does not know is ever removed, and nothing while a driver is at work. A version's manifest goes
before its files and a marker before what it names, so that a kill in the middle leaves what the
next call removes, and never a version or a marker without its files.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta

from infra import storage
from infra.environment import applied
from infra.manifest import (
    MANIFEST_NAME,
    WITHDRAWN_NAME,
    DatasetManifest,
    successor_of,
)
from infra.progress import Progress, Silent
from infra.storage_probe import PROBE_PREFIX
from pipelines.exclusive import nobody_else
from pipelines.ledger_counts import FOLDER as COUNTS_FOLDER
from pipelines.stored import (
    BY_SHARD,
    LATEST,
    VERSION,
    listed_paths,
    live_versions,
    paths_beside,
    paths_in_notes,
    sizes_under,
)
from pipelines.tombstones import FOLDER as TOMBSTONES_FOLDER
from pipelines.workspace import noted_version

_DELETE_THREADS = 8
_UPLOAD_OF_TRAINING = timedelta(days=1)
_CACHES = ("work/inputs", "work/verified")
_CONTENT_NAMED = re.compile(r"shards/[0-9a-f]{32}\.tar|ledger/[0-9a-f]{32}\.parquet")


@dataclass
class Stock:
    """Path relative to the dataset's root -> what it is, for what stays and for what may go.

    ``sizes`` has the bytes of both. ``going``: versions that are to be removed. ``uploads``: parts
    on the server that killed writers left and that will become no object.
    """

    dataset_root: str
    sizes: dict[str, int]
    kept: dict[str, str] = field(default_factory=dict)
    removable: dict[str, str] = field(default_factory=dict)
    going: list[str] = field(default_factory=list)
    uploads: list[storage.UnfinishedUpload] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.dataset_root.rstrip("/").rpartition("/")[2]

    def by_kind(self, paths: Mapping[str, str]) -> dict[str, tuple[int, int]]:
        """What it is -> (files, bytes), most bytes first."""
        files, num_bytes = Counter[str](), Counter[str]()
        for path, kind in paths.items():
            files[kind] += 1
            num_bytes[kind] += self.sizes[path]
        ranked = sorted(files, key=lambda kind: (-num_bytes[kind], kind))
        return {kind: (files[kind], num_bytes[kind]) for kind in ranked}

    @property
    def removable_bytes(self) -> int:
        return sum(self.sizes[path] for path in self.removable)


def take_stock(
    dataset_root: str, *, needed: Collection[str] | None = None, with_work: bool = False
) -> Stock:
    """Look at every file's name, and into manifests and markers; changes nothing.

    ``needed``: the versions that somebody refers to; the others may go. None: all are needed.
    ``with_work``: working files may go, too. A finished build then reads its inputs again for a
    retry, one under way begins again.
    """
    stock = Stock(dataset_root, sizes_under(dataset_root))
    stock.uploads = [
        each for each in storage.unfinished_uploads(dataset_root) if _is_given_up(stock, each)
    ]
    every = live_versions(dataset_root)
    live = every if needed is None else _needed(every, needed)
    stock.going = sorted({each.version for each in every} - {each.version for each in live})
    listed = listed_paths(live)
    beside = paths_beside(dataset_root, live, stock.sizes)
    at_work = _Work(stock, [each.version for each in live], with_work=with_work)
    for path in stock.sizes:
        kind, is_kept = _kind_of(path, listed, beside, at_work, set(stock.going))
        (stock.kept if is_kept else stock.removable)[path] = kind
    return stock


def clean(
    dataset_root: str,
    *,
    needed: Collection[str] | None = None,
    with_work: bool = False,
    environment: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> Stock:
    """Remove what ``take_stock`` says may go; returns it. ``LeaseHeld`` while a driver works."""
    with (
        applied(environment or {}),
        nobody_else(dataset_root, "cleaning") as lease,
    ):
        stock = take_stock(dataset_root, needed=needed, with_work=with_work)
        bar = progress or Silent()
        bar.update(0, len(stock.removable))
        for some in _in_order(stock.removable):
            lease.check()
            _delete(dataset_root, some, bar)
        lease.check()
        for upload in stock.uploads:
            storage.drop_upload(upload)
        return stock


def _is_given_up(stock: Stock, upload: storage.UnfinishedUpload) -> bool:
    """Whether nobody sends parts any more. Who cleans has the dataset alone, but for training,
    which writes tokens and takes no lease of the dataset: those have a day."""
    path = upload.uri.removeprefix(stock.dataset_root.rstrip("/") + "/")
    return not path.startswith("tokens/") or upload.age > _UPLOAD_OF_TRAINING


def _needed(every: list[DatasetManifest], needed: Collection[str]) -> list[DatasetManifest]:
    return [manifest for manifest in every if manifest.version in needed]


class _Work:
    """The working files: whose they are, and which of them their owner names."""

    def __init__(self, stock: Stock, versions: list[str], *, with_work: bool) -> None:
        self._with_work = with_work
        root = stock.dataset_root
        folders: dict[str, list[str]] = {}
        for path in stock.sizes:
            parts = path.split("/")
            if parts[0] == "work" and len(parts) > 2 and "/".join(parts[:2]) not in _CACHES:
                folders.setdefault("/".join(parts[:2]), []).append(path)
        self.finished: dict[str, str | None] = {}
        for folder in folders:
            version = noted_version(storage.join(root, folder, "result.json"))
            if version is not None:
                self.finished[folder] = successor_of(root, version)
        self._versions = set(versions)
        notes = [
            path
            for folder, paths in folders.items()
            for path in paths
            if path.endswith(".json") and not self._goes(folder)
        ]
        self.named = paths_in_notes(root, notes)

    def _goes(self, folder: str) -> bool:
        """Whether all of a folder may go: asked for, or of a version that is not there."""
        return self._with_work or self._is_void(folder)

    def _is_void(self, folder: str) -> bool:
        return folder in self.finished and self.finished[folder] not in self._versions

    def kind_of(self, path: str) -> tuple[str, bool]:
        """What a working file is, and whether it stays."""
        folder, _, rest = path.removeprefix("work/").partition("/")
        folder = f"work/{folder}"
        if not rest and folder.startswith(f"work/{PROBE_PREFIX}"):
            return "parts of killed attempts", False
        if not rest or rest == "lease.json":
            return "leases", True
        if folder in _CACHES:
            version = rest.removesuffix(".json")
            is_kept = folder != "work/verified" or version in self._versions
            return "notes of what was read before", is_kept
        if self._is_void(folder):
            return "work for versions that are gone", False
        state = "finished" if folder in self.finished else "under way or given up"
        if rest == "result.json":
            return f"work, {state}", True
        if self._with_work:
            return f"work, {state}", False
        if path.endswith(".json") or path in self.named:
            return f"work, {state}", True
        return "parts of killed attempts", False


def _kind_of(
    path: str, listed: set[str], beside: set[str], work: _Work, going: set[str]
) -> tuple[str, bool]:
    """What a file is, in words, and whether it stays."""
    first = path.split("/")[0]
    if first == "work":
        return work.kind_of(path)
    if path in listed:
        return {"shards": "shards", "ledger": "ledgers"}.get(first, "counts of ledgers"), True
    if first in going:
        return "versions that nobody refers to", False
    if path in beside:
        return _BESIDE.get(first, "manifests and pages"), True
    if _CONTENT_NAMED.fullmatch(path):
        if path in work.named:
            return "shards and ledgers of work under way", True
        return "shards and ledgers that no version lists", False
    if first == COUNTS_FOLDER:
        return "counts of ledgers that are gone", False
    if VERSION.fullmatch(first) and path.split("/")[1:] != [WITHDRAWN_NAME]:
        return "pages without a manifest", False
    if first in BY_SHARD or path == LATEST:
        return f"{first} of shards that no version lists", False
    return "other files", True


_BESIDE = {name: name for name in BY_SHARD} | {TOMBSTONES_FOLDER: "tombstones"}


def _in_order(removable: Iterable[str]) -> list[list[str]]:
    """Manifests, then notes and markers, then what these name."""
    manifests, notes, others = [], [], []
    for path in sorted(removable):
        if path.endswith(f"/{MANIFEST_NAME}"):
            manifests.append(path)
        elif path.endswith(".json"):
            notes.append(path)
        else:
            others.append(path)
    return [each for each in (manifests, notes, others) if each]


def _delete(dataset_root: str, paths: list[str], bar: Progress) -> None:
    with ThreadPoolExecutor(_DELETE_THREADS) as pool:
        for _ in pool.map(lambda path: storage.delete(storage.join(dataset_root, path)), paths):
            bar.advance()
