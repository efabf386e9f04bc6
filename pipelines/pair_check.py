"""What pairs of a scored version are like, learnt before a refilter and kept as a file for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from infra.manifest import FileEntry
from pipelines.embed import EmbeddedShard, embeddings_folder, publish_file, read_embeddings
from pipelines.embeddings import EmbeddingsManifest
from pipelines.mismatches import Pairs, described, learn
from pipelines.scores import ScoredShard, cosines, read_scores
from pipelines.scoring_config import MismatchConfig
from pipelines.verdicts import RefilterJob, embedded_pairs


@dataclass(frozen=True)
class _Unit:
    """The embedded samples of one shard, with the embeddings of their captions."""

    pairs: Pairs
    texts_ND: npt.NDArray[Any]


def learn_pairs(job: RefilterJob, config: MismatchConfig) -> tuple[FileEntry, dict[str, Any]]:
    """Learn, publish the model under its content's name, and return it with what a report says.

    Memory: ``max_samples`` embeddings of images and captions, 3 KB each for 768 dimensions.
    """
    chosen = drawn(job.embeddings, config.max_samples)
    units = [_read(job, job.embeddings.units[n], job.scores.units[n]) for n in chosen]
    pairs = Pairs(
        pl.concat([unit.pairs.captions for unit in units]),
        pl.concat([unit.pairs.recorded for unit in units]),
        pl.concat([unit.pairs.computed for unit in units]),
        np.concatenate([unit.pairs.images_ND for unit in units]),
    )
    model = learn(pairs, config)
    swapped = _swapped(pairs, np.concatenate([unit.texts_ND for unit in units]))
    told = described(model, pairs, swapped, config)
    folder = f"{embeddings_folder(job.embeddings.identity.key)}/pairs"
    with TemporaryDirectory(prefix="atelier-pairs-") as temporary:
        path = Path(temporary, "pairs.parquet")
        model.write(path)
        entry = publish_file(path, job.dataset_root, folder, "parquet", model.concepts.height)
    return entry, told


def drawn(embeddings: EmbeddingsManifest, max_samples: int) -> list[int]:
    """Which shards are learnt from: evenly over the version, as many as the bound takes, or one."""
    largest = max((unit.num_embedded for unit in embeddings.units), default=0)
    num_units = len(embeddings.units)
    most = min(num_units, max(1, max_samples // max(largest, 1)))
    return sorted({n * num_units // most for n in range(most)})


def _read(job: RefilterJob, unit: EmbeddedShard, scored: ScoredShard) -> _Unit:
    computed = read_scores(job.dataset_root, scored.scores)
    dim = job.embeddings.identity.dim
    pairs = embedded_pairs(job.dataset_root, unit, computed, dim)
    return _Unit(pairs, read_embeddings(job.dataset_root, unit.texts, dim))


def _swapped(pairs: Pairs, texts_ND: npt.NDArray[Any]) -> Pairs:
    """Each image beside the next sample's caption, with the similarity recorded for that."""
    following = np.roll(np.arange(len(texts_ND)), -1)
    computed = cosines(pairs.images_ND, texts_ND[following])
    return Pairs(
        pairs.captions[following],
        pairs.recorded[following],
        pl.Series(computed, dtype=pl.Float64),
        pairs.images_ND,
    )
