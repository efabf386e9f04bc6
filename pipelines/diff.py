"""What changed between two versions of a dataset, from their ledgers.

One pass over each ledger spills the columns that matter into local buckets by sample id (and by
URL for captions), and buckets are joined one at a time: memory does not grow with the dataset.
What captions are trained on is in shards alone; those that both versions list need not be read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from tempfile import TemporaryDirectory

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from infra import storage
from infra.digests import sha256_bytes
from infra.manifest import DatasetManifest, ShardEntry, dataset_root, load_manifest
from infra.progress import Progress
from pipelines.histograms import added, counted, equal_edges
from pipelines.ledger import COMMITTED, FAILED, ledger_batches
from pipelines.publish import funnel_of
from pipelines.shard_sample import first_samples

NUM_EXAMPLES = 20
NUM_MOVE_EXAMPLES = 5
TEXT_CHARS = 200  # of a caption that is shown
ROWS_PER_BUCKET = 5_000_000
MAX_BUCKETS = 256
_NO_ROW = "no row"
# Score -> (lowest, highest) value of its histogram of NUM_BINS equal bins.
SCORE_RANGES = {
    "clip_similarity": (-1.0, 1.0),
    "aesthetic_score": (0.0, 10.0),
    "watermark_prob": (0.0, 1.0),
    "unsafe_prob": (0.0, 1.0),
}
NUM_BINS = 20
_SHA256_CHARS = 16
_TEXTS_AT_ONCE = 5_000
_MOVES = pa.schema([(name, pa.string()) for name in ("sample_id", "old", "new")])
_TEXTS = pa.schema([(name, pa.string()) for name in ("sample_id", "digest", "text")])
_COLUMNS = ["sample_id", "url", "disposition", "reason", "sha256"]


@dataclass
class DatasetDiff:
    """The difference of two versions.

    Samples are committed rows, matched by sample id (the hash of URL and caption); ``changed``
    ones have another image sha256. ``captions_changed`` counts URLs committed in both versions
    under other captions only. ``outcomes_changed`` are (old, new, rows), most first.
    ``histograms``: score -> version -> counts of committed samples per bin, the last one unknown.
    ``scores_moved``: the share of samples in another bin, 0 to 1 (total variation distance).
    ``rows_in_both``: sample ids that both ledgers have. ``overlap``: samples of both over samples
    of either, 0 to 1. ``moves``: "old -> new" outcome -> some sample ids. ``texts_changed``: of
    the samples in both, how many have another caption to train on; None when shards were not read.
    """

    old_version: str
    new_version: str
    old_funnel: dict[str, int]
    new_funnel: dict[str, int]
    added: int = 0
    removed: int = 0
    changed: int = 0
    kept: int = 0
    captions_changed: int = 0
    rows_in_both: int = 0
    overlap: float = 0.0
    texts_changed: int | None = None
    outcomes_changed: list[tuple[str, str, int]] = field(default_factory=list)
    examples: dict[str, list[str]] = field(default_factory=dict)
    histograms: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    scores_moved: dict[str, float] = field(default_factory=dict)
    moves: dict[str, list[str]] = field(default_factory=dict)
    texts: list[tuple[str, str, str]] = field(default_factory=list)


def diff_datasets(
    old_uri: str,
    new_uri: str,
    progress: Progress | None = None,
    *,
    with_texts: bool = False,
    moves_path: Path | None = None,
) -> DatasetDiff:
    """Compare two manifests' versions; they may belong to different datasets.

    ``with_texts``: shards that only one of them lists are read, for the captions to train on.
    ``moves_path``: a parquet file to write, one row (``sample_id, old, new``) per row that ends
    otherwise, by sample id within each of its parts. Raises ``DigestMismatch`` or ``ObjectMissing``
    when a ledger file, or a shard that is read, is damaged: nothing is said of a version then.
    """
    manifests = {"old": load_manifest(old_uri), "new": load_manifest(new_uri)}
    old, new = manifests["old"], manifests["new"]
    found = DatasetDiff(old.version, new.version, funnel_of(old), funnel_of(new))
    most = max(manifest.counts["rows_in"] for manifest in manifests.values())
    num_buckets = min(MAX_BUCKETS, 1 + most // ROWS_PER_BUCKET)
    found.histograms = {
        name: {side: [0] * (NUM_BINS + 1) for side in manifests} for name in SCORE_RANGES
    }
    with TemporaryDirectory(prefix="atelier-diff-") as name:
        folder = Path(name)
        for side, uri in (("old", old_uri), ("new", new_uri)):
            _spill(side, uri, manifests[side], folder, num_buckets, found, progress)
        outcomes: Counter[tuple[str, str]] = Counter()
        with ExitStack() as stack:
            writer = None
            if moves_path is not None:
                writer = stack.enter_context(pq.ParquetWriter(moves_path, _MOVES))
            for bucket in range(num_buckets):
                _compare_ids(folder, bucket, found, outcomes, writer)
                _compare_urls(folder, bucket, found)
        if with_texts:
            _compare_texts((old_uri, old), (new_uri, new), folder, num_buckets, found)
    either = found.kept + found.changed + found.added + found.removed
    found.overlap = (found.kept + found.changed) / either if either else 1.0
    ranked = sorted(outcomes.items(), key=lambda item: (-item[1], item[0]))
    found.outcomes_changed = [(before, after, number) for (before, after), number in ranked]
    for score, sides in found.histograms.items():
        a, b = (max(sum(counts), 1) for counts in (sides["old"], sides["new"]))
        pairs = zip(sides["old"], sides["new"], strict=True)
        found.scores_moved[score] = sum(abs(x / a - y / b) for x, y in pairs) / 2
    return found


def _spill(
    side: str,
    uri: str,
    manifest: DatasetManifest,
    folder: Path,
    num_buckets: int,
    found: DatasetDiff,
    progress: Progress | None,
) -> None:
    ids = pa.schema([(n, pa.string()) for n in ("sample_id", "outcome", "sha256")])
    urls = pa.schema([(n, pa.string()) for n in ("url_hash", "sample_id")])
    with ExitStack() as stack:
        writers = {
            (kind, bucket): stack.enter_context(
                pq.ParquetWriter(folder / f"{side}-{kind}-{bucket}", schema)
            )
            for kind, schema in (("ids", ids), ("urls", urls))
            for bucket in range(num_buckets)
        }
        batches = (
            ledger_batches(dataset_root(uri), entry, [*_COLUMNS, *SCORE_RANGES], folder)
            for entry in manifest.ledger
        )
        for rows in chain.from_iterable(batches):
            committed = rows.filter(pl.col("disposition") == COMMITTED)
            _add_scores(side, committed, found)
            failed = pl.lit("failed:") + pl.col("reason")
            outcome = (
                pl.when(pl.col("disposition") == COMMITTED)
                .then(pl.lit(""))  # sorts first: of a row and its rejected copies, the row counts
                .when(pl.col("disposition") == FAILED)
                .then(failed)
                .otherwise("reason")
            )
            by_id = rows.with_columns(
                outcome.alias("outcome"), pl.col("sha256").str.head(_SHA256_CHARS)
            ).drop_nulls("sample_id")
            by_url = committed.with_columns(pl.col("url").hash(0).alias("url_hash"))
            for kind, frame, schema, key in (
                ("ids", by_id, ids, pl.col("sample_id").hash(0)),
                ("urls", by_url, urls, pl.col("url_hash")),
            ):
                split = frame.with_columns((key % num_buckets).alias("bucket"))
                for (bucket,), part in split.group_by("bucket"):
                    columns = part.select(pl.col(schema.names).cast(pl.String))
                    writers[kind, int(str(bucket))].write_table(columns.to_arrow().cast(schema))
            if progress is not None:
                progress.advance(rows.height)


def _add_scores(side: str, committed: pl.DataFrame, found: DatasetDiff) -> None:
    for name, (low, high) in SCORE_RANGES.items():
        counts = counted(committed[name], equal_edges(low, high, NUM_BINS))
        found.histograms[name][side] = added(found.histograms[name][side], counts)


def _compare_ids(
    folder: Path,
    bucket: int,
    found: DatasetDiff,
    outcomes: Counter[tuple[str, str]],
    writer: pq.ParquetWriter | None,
) -> None:
    sides = [
        pl.read_parquet(folder / f"{side}-ids-{bucket}")
        .sort("outcome", "sha256", nulls_last=True)
        .unique("sample_id", keep="first", maintain_order=True)
        for side in ("old", "new")
    ]
    both = sides[0].join(sides[1], on="sample_id", how="full", coalesce=True, suffix="_new")
    was, is_ = (pl.col(name).eq_missing(pl.lit("")) for name in ("outcome", "outcome_new"))
    same = pl.col("sha256").eq_missing(pl.col("sha256_new"))
    for name, rule in (
        ("added", is_ & ~was), ("removed", was & ~is_), ("changed", was & is_ & ~same)
    ):  # fmt: skip
        ids = both.filter(rule)["sample_id"]
        setattr(found, name, getattr(found, name) + ids.len())
        known = found.examples.get(name, [])
        smallest = ids.sort().head(NUM_EXAMPLES).to_list()
        found.examples[name] = sorted(known + smallest)[:NUM_EXAMPLES]
    found.kept += both.filter(was & is_ & same).height
    found.rows_in_both += both.select(
        (pl.col("outcome").is_not_null() & pl.col("outcome_new").is_not_null()).sum()
    ).item()
    moved = (
        both.filter(~pl.col("outcome").eq_missing(pl.col("outcome_new")))
        .select("sample_id", old=_named("outcome"), new=_named("outcome_new"))
        .sort("sample_id")
    )
    if writer is not None and moved.height:
        writer.write_table(moved.to_arrow().cast(_MOVES))
    for (before, after), rows in moved.group_by("old", "new"):
        outcomes[str(before), str(after)] += rows.height
        known = found.moves.get(f"{before} -> {after}", [])
        smallest = rows["sample_id"].head(NUM_MOVE_EXAMPLES).to_list()
        found.moves[f"{before} -> {after}"] = sorted(known + smallest)[:NUM_MOVE_EXAMPLES]


def _named(column: str) -> pl.Expr:
    name = pl.col(column)
    is_committed = name == ""
    return pl.when(is_committed).then(pl.lit(COMMITTED)).otherwise(name).fill_null(_NO_ROW)


def _compare_urls(folder: Path, bucket: int, found: DatasetDiff) -> None:
    old, new = (pl.read_parquet(folder / f"{side}-urls-{bucket}") for side in ("old", "new"))
    shared = old.join(new, on=["url_hash", "sample_id"], how="semi").select("url_hash")
    in_both = old.join(new, on="url_hash", how="semi").join(shared, on="url_hash", how="anti")
    found.captions_changed += in_both["url_hash"].n_unique()


# --- captions to train on ------------------------------------------------------------------------

Side = tuple[str, DatasetManifest]


def _compare_texts(
    old: Side, new: Side, folder: Path, num_buckets: int, found: DatasetDiff
) -> None:
    """Count the samples of both whose ``.txt`` differs, and show some."""
    paths = [{(shard.path, shard.sha256) for shard in side[1].shards} for side in (old, new)]
    shared = paths[0] & paths[1]
    for name, (uri, manifest) in (("old", old), ("new", new)):
        shards = [each for each in manifest.shards if (each.path, each.sha256) not in shared]
        _spill_texts(name, dataset_root(uri), shards, folder, num_buckets)
    found.texts_changed = 0
    for bucket in range(num_buckets):
        a, b = (pl.read_parquet(folder / f"{side}-texts-{bucket}") for side in ("old", "new"))
        both = a.join(b, on="sample_id", suffix="_new")
        differ = both.filter(pl.col("digest") != pl.col("digest_new")).sort("sample_id")
        found.texts_changed += differ.height
        shown = differ.head(NUM_EXAMPLES).select("sample_id", "text", "text_new").rows()
        found.texts = sorted([*found.texts, *shown])[:NUM_EXAMPLES]


def _spill_texts(
    side: str, root: str, shards: Sequence[ShardEntry], folder: Path, num_buckets: int
) -> None:
    with ExitStack() as stack:
        writers = [
            stack.enter_context(pq.ParquetWriter(folder / f"{side}-texts-{bucket}", _TEXTS))
            for bucket in range(num_buckets)
        ]
        for shard in shards:
            samples = _whole_samples(root, shard, folder)
            texts = (_text_row(key, members["txt"]) for key, members in samples)
            while rows := list(islice(texts, _TEXTS_AT_ONCE)):
                frame = pl.DataFrame(rows, schema=_TEXTS.names, orient="row")
                number = (pl.col("sample_id").hash(0) % num_buckets).alias("bucket")
                for (bucket,), part in frame.with_columns(number).group_by("bucket"):
                    table = part.select(_TEXTS.names).to_arrow().cast(_TEXTS)
                    writers[int(str(bucket))].write_table(table)


def _whole_samples(
    root: str, shard: ShardEntry, folder: Path
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The samples of a shard whose every byte has been compared with its digest."""
    path = folder / Path(shard.path).name
    storage.download(storage.join(root, shard.path), path, shard.sha256)
    yield from first_samples(storage.file_uri(folder), replace(shard, path=path.name))
    path.unlink()


def _text_row(key: str, text: bytes) -> tuple[str, str, str]:
    shown = text[: 4 * TEXT_CHARS].decode("utf-8", "replace")[:TEXT_CHARS]
    return key, sha256_bytes(text)[: 2 * _SHA256_CHARS], shown
