"""Image tokens, computed once per dataset, tokenizer, resolution and crop policy.

Under ``<store>/datasets/<name>/tokens/<encoder12>-<resolution>px-<crop>/`` lie
``<shard32>.parquet`` and, after it, its entry ``<shard32>.json``, both named by the shard's content
and so shared between versions of the dataset; and ``<version>/manifest.json``, written last.
``encoder`` stands for the tokenizer's weights and the code that applies them. A cache that was cut
off goes on with the shards that have no entry.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

from infra import storage
from infra.digests import code_digest, folder_sha256, sha256_bytes
from infra.errors import UserError
from infra.manifest import dataset_root, load_whole
from infra.storage import DigestMismatch, ObjectMissing
from training.config import CropPolicy, StageConfig
from training.data import TokenDataset, TokenShard, select
from training.grids import grids_of
from training.session import LocalSession, Session
from training.token_encoding import (
    ShardTask,
    encode_shards,
    find_vq,
    let_go,
    load_vq,
)
from training.token_format import (
    CacheEntry,
    CacheManifest,
    load_cache_manifest,
    load_tokens,
    parse_entry,
)

ENCODING_CODE = ("model.vq", "model.vq_layers", "training.images")
READERS = 32  # entries read at a time
WAIT_SECONDS = 1.0  # between two looks at what other workers have done

Tell = Callable[[int, int], None]


@dataclass(frozen=True)
class CachePlan:
    """What a cache consists of. ``manifest_uri`` exists once it is complete."""

    manifest_uri: str
    tasks: list[ShardTask]
    dataset_sha256: str
    encoder_sha256: str


def ensure_token_cache(
    dataset_manifest_uri: str,
    tokenizer: str,
    resolution_px: int,
    crop: CropPolicy = "center",
    dataset_sha256: str | None = None,
) -> str:
    """Encode what is missing in this process; returns the address of the cache's manifest.

    ``tokenizer`` is the address of a published checkpoint or a local model folder, with ``vqvae/``.
    """
    plan = plan_cache(dataset_manifest_uri, tokenizer, resolution_px, crop, dataset_sha256)
    fill_caches([plan], LocalSession())
    return plan.manifest_uri


def fill_caches(
    plans: Sequence[CachePlan], session: Session, tell: Tell = lambda done, total: None
) -> None:
    """Encode what is missing of these caches and publish them; all workers share the work.

    The largest shards come first, each to the next worker that is free. In the first worker,
    ``tell`` learns how many shards are encoded, of how many. What was cut off goes on with the
    shards that have no entry.
    """
    known = {}
    if session.rank == 0:
        known = {n: read_entries(p.tasks) for n, p in enumerate(plans) if not is_complete(p)}
    missing = session.from_first(_missing(plans, known))
    total = sum(len(plan.tasks) for plan in plans)
    name = f"{plans[0].manifest_uri} of {len(plans)}"

    def taken() -> Iterator[ShardTask]:
        while (number := session.add(f"taken {name}", 1)) <= len(missing):
            of_plan, of_task = missing[number - 1]
            yield plans[of_plan].tasks[of_task]

    def stored(now: int) -> int:
        done = session.add(f"stored {name}", now)
        if session.rank == 0 and missing:
            tell(total - len(missing) + done, total)
        return done

    for _ in encode_shards(taken()):
        stored(1)
    if session.rank == 0:
        while stored(0) < len(missing):
            time.sleep(WAIT_SECONDS)
        for number, entries in known.items():
            publish_cache(plans[number], entries)
    if missing:
        let_go()
    session.barrier()


def _missing(
    plans: Sequence[CachePlan], known: Mapping[int, Sequence[CacheEntry | None]]
) -> list[tuple[int, int]]:
    """(plan, task) of every shard without an entry, the largest first: what is begun last is then
    over soon, and no worker waits long for another."""
    found = [
        (number, place)
        for number, entries in known.items()
        for place, entry in enumerate(entries)
        if entry is None
    ]
    return sorted(found, key=lambda at: -plans[at[0]].tasks[at[1]].shard_bytes)


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
                shard_bytes=shard.num_bytes,
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


def publish_cache(plan: CachePlan, known: Sequence[CacheEntry | None] = ()) -> CacheManifest:
    """Write the manifest over the shards' entries; raises ``UserError`` when one is missing.

    ``known`` are entries that were read before, by task; the others are read now.
    """
    entries = list(known) or [None] * len(plan.tasks)
    unread = [place for place, entry in enumerate(entries) if entry is None]
    found = read_entries([plan.tasks[place] for place in unread])
    for place, entry in zip(unread, found, strict=True):
        entries[place] = entry
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


def read_entries(tasks: Sequence[ShardTask]) -> list[CacheEntry | None]:
    """By task, the entry of a shard whose tokens are there in full size; None when they are not.

    One listing says what is there; entries are read many at a time.
    """
    folders = {task.cache_uri for task in tasks}
    sizes = {
        info.uri: info.num_bytes for folder in folders for info in storage.list_objects(folder)
    }
    with ThreadPoolExecutor(READERS, "entries") as pool:
        return list(pool.map(lambda task: _read_entry(task, sizes), tasks))


def _read_entry(task: ShardTask, sizes: Mapping[str, int]) -> CacheEntry | None:
    uri = storage.join(task.cache_uri, f"{task.stem}.json")
    if uri not in sizes:
        return None
    try:
        entry = parse_entry(storage.read_json(uri), uri)
    except ObjectMissing:
        return None
    grid = entry.grid_height, entry.grid_width
    is_same = (
        entry.shard_sha256 == task.shard_sha256
        and grid == (task.grid_height, task.grid_width)
        and sizes.get(storage.join(task.cache_uri, entry.path)) == entry.num_bytes
    )
    return entry if is_same else None


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
