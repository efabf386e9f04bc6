"""The manifest, added up from the markers of one build."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from infra import storage
from infra.config import semantic_part
from infra.digests import canonical_json, sha256_bytes
from infra.manifest import MANIFEST_NAME, SHARD_SIZES, DatasetManifest, load_manifest
from pipelines.build import PartMarker, ReadMarker
from pipelines.caption_tokens import tokenizer_part
from pipelines.decontaminate import decontamination_part
from pipelines.image_checks import checks_part
from pipelines.inputs import units_of
from pipelines.ledger import COMMITTED, FAILED, REASONS, REJECTED
from pipelines.plan import CurationPlan
from pipelines.references import references_part

# Attributes that a retry does not change, and that a derived version cannot be asked for again.
_KEPT = ("captions", "derivations")


def assemble_manifest(name: str, plan: CurationPlan) -> DatasetManifest:
    """List every shard and ledger file and account for every input row.

    After a retry the manifest is that of the version it went on from, with what came. The counts
    come from what was written. Raises ``RuntimeError`` when a row is missing or
    counted twice: that is a bug, and nothing is published.
    """
    build = plan.build
    units = [unit for unit in units_of(plan.inputs) if unit.file.kind == "metadata"]
    read_markers = build.read_all(ReadMarker, max((u.index for u in units), default=-1) + 1)
    part_markers = build.read_all(PartMarker, build.num_partitions)
    reads = [read_markers[unit.index] for unit in units]
    parts = [part_markers[index] for index in range(build.num_partitions)]

    rejected: Counter[str] = Counter()
    failed: Counter[str] = Counter()
    unknown: dict[str, Counter[str]] = {}
    for read in reads:
        rejected.update(read.rejected)
        for policy, values in read.unknown.items():
            unknown.setdefault(policy, Counter()).update(values)
    captions: Counter[str] = Counter()
    for part in parts:
        captions.update(part.captions)
        rejected.update(part.rejected)
        failed.update(part.failed)
    files = [read.ledger for read in reads] + [part.ledger for part in parts]
    ledger = sorted((file for file in files if file is not None), key=lambda file: file.path)
    counts = {
        "rows_in": plan.rows_in,
        COMMITTED: sum(part.committed for part in parts),
        REJECTED: rejected.total(),
        FAILED: failed.total(),
    }
    ended = counts[COMMITTED] + counts[REJECTED] + counts[FAILED]
    in_ledger = sum(entry.num_rows for entry in ledger)
    if not plan.rows_in == ended == in_ledger:
        raise RuntimeError(
            f"{plan.rows_in} rows went in, {ended} are accounted for, {in_ledger} are in the ledger"
        )
    recipe = semantic_part(build.config)
    recorded: dict[str, Counter[str]] = {}
    for part in parts:
        for column, found in part.recorded.items():
            recorded.setdefault(column, Counter()).update(found)
    sizes = {path: size for part in parts for path, size in part.shard_sizes.items()}
    made = DatasetManifest(
        name=name,
        recipe_fingerprint=sha256_bytes(canonical_json(recipe)),
        shards=[shard for part in parts for shard in part.shards],
        ledger=ledger,
        counts=counts,
        rejected=dict(rejected),
        failed=dict(failed),
        parents=[file.identity() for file in plan.inputs],
        attributes={
            "source": build.config.source,
            "image_size_px": build.config.resize.image_size_px,
            "crop": build.config.resize.crop,
            "encode_format": build.config.resize.encode_format,
            "aesthetic_scale": build.config.filters.aesthetic_scale,
            # policy -> value -> rows that went on without it while a filter asks for it
            "unknown": {policy: dict(values) for policy, values in sorted(unknown.items())},
            # what was done to captions of the rows that metadata filters left -> rows
            "captions": dict(sorted(captions.items())),
            **tokenizer_part(build.config),
            **decontamination_part(build.config.decontaminate),
            **references_part(build.config.duplicates, build.config.decontaminate),
            **checks_part(build.config.image_checks),
            "recipe": recipe,
            # recorded_sha256, recorded_md5 -> same, different -> rows
            **{column: dict(found) for column, found in sorted(recorded.items())},
            **({SHARD_SIZES: sizes} if build.config.resize.crop == "bucket" else {}),
        },
    )
    if plan.retried is None:
        return made
    uri = storage.join(build.dataset_root, plan.retried, MANIFEST_NAME)
    return _continued(load_manifest(uri), made)


def _continued(before: DatasetManifest, made: DatasetManifest) -> DatasetManifest:
    """What a retry ``made``, as a successor of the version ``before``: of its recipe, its parents
    and whatever was derived; that version itself when no file is another one."""
    if (made.shards, made.ledger) == (before.shards, before.ledger):
        return before
    kept = {name: before.attributes[name] for name in _KEPT if name in before.attributes}
    return replace(
        made,
        recipe_fingerprint=before.recipe_fingerprint,
        parents=before.parents,
        attributes={**made.attributes, **kept},
    )


def funnel_of(manifest: DatasetManifest) -> dict[str, int]:
    """``rows_in``, what each reason took away in the order of asking, then ``committed``."""
    order = {reason: position for position, reason in enumerate(REASONS)}
    rejected = sorted(
        manifest.rejected.items(), key=lambda item: (order.get(item[0], len(order)), item[0])
    )
    failed = sorted((f"failed:{cause}", number) for cause, number in manifest.failed.items())
    return {
        "rows_in": manifest.counts["rows_in"],
        **dict(rejected),
        **dict(failed),
        COMMITTED: manifest.counts[COMMITTED],
    }
