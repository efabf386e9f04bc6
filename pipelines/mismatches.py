"""Pairs whose image is not what its caption says, judged by the dataset's own embeddings.

Two checks, each in robust standard deviations (1.4826 x the median absolute deviation):

- *concept*: a word that many captions share is a concept; its images lie around a centroid, whose
  place and spread are read off the nearer ones, so that even a third of strangers moves neither
  far. A sample whose image lies too far from one of its words' others is suspected, as are the few
  dozen that poison a concept.
- *split view*: a line is fitted that foretells the recomputed similarity of image and caption from
  the recorded one. A sample far below it has another image than the one that was scored.

Both are learnt from whole shards, evenly drawn, of at most ``max_samples`` samples, so memory does
not grow with the dataset. How many pairs mismatched on purpose (each image beside the next sample's
caption) go unnoticed is measured on the same samples, and told.

Shape suffixes: N samples, P (sample, word) pairs, K concepts, D dimensions of the embedding.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.scoring_config import MismatchConfig

MISMATCHED = "mismatched"
WORD = r"\p{L}[\p{L}\p{M}]{2,}"
MAX_CONCEPTS = 20_000
WORDS_TOLD = 10
_PAIRS_AT_ONCE = 16_384
_CENTRING_STEPS = 3
_TO_SIGMA = 1.4826
_MIN_SCALE = 1e-3  # cosines, below what float16 embeddings tell apart
# A concept's spread is that between these shares of its cosines, from the farthest to the nearest.
_NEAR, _NEAREST = 0.75, 0.95
_MIN_RECORDED = 30  # samples to fit a line to
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Pairs:
    """Embedded samples. ``recorded`` and ``computed`` are similarities; recorded may be null."""

    captions: pl.Series
    recorded: pl.Series
    computed: pl.Series
    images_ND: npt.NDArray[Any]


@dataclass(frozen=True)
class PairModel:
    """What pairs of this dataset are like. ``line``: slope, intercept, median and scale of what
    is left; None where too few samples have a recorded similarity."""

    mean_D: Floats
    concepts: pl.DataFrame  # word, num_images, near, spread; row k is of centroid k
    centroids_KD: Floats
    usual: tuple[float, float]  # median and scale of all pairs' distances, in spreads
    line: tuple[float, float, float, float] | None

    def deviations(self, pairs: Pairs) -> pl.DataFrame:
        """Per sample: ``concept`` and ``split_view`` (null where it cannot be asked), ``word``."""
        found = self._by_word(pairs).sort("concept", "word", descending=[True, False])
        worst = found.unique("row", keep="first", maintain_order=True)
        rows = pl.DataFrame({"row": np.arange(len(pairs.images_ND), dtype=np.uint32)})
        split_view = pl.Series("split_view", [None] * rows.height, pl.Float64)
        if self.line is not None:
            slope, intercept, median, scale = self.line
            left = pairs.computed - (pairs.recorded * slope + intercept)
            split_view = ((median - left) / scale).alias("split_view")
        return rows.join(worst, on="row", how="left", maintain_order="left").with_columns(
            split_view
        )

    def suspected(self, pairs: Pairs, max_deviations: float) -> pl.Series:
        """Per sample whether either check finds it too far off; False where none can be asked."""
        far = [pl.col(name) > max_deviations for name in ("concept", "split_view")]
        return self.deviations(pairs).select(pl.any_horizontal(far).fill_null(False)).to_series()

    def _by_word(self, pairs: Pairs) -> pl.DataFrame:
        """(row, word, concept): how far the image lies from each concept of its caption."""
        known = self.concepts.with_row_index("k")
        told = words_of(pairs.captions).join(known, on="word", maintain_order="left")
        vectors = centred(pairs.images_ND, self.mean_D)
        cosines = _cosines(vectors, self.centroids_KD, told["row"], told["k"])
        told = told.with_columns(pl.Series("cosine", cosines))
        median, scale = self.usual
        far = (_distance() - median) / scale
        return told.select("row", "word", far.alias("concept"))

    def write(self, path: Path) -> None:
        """As parquet: a row per concept, what is not of a concept in the schema's metadata."""
        other = {"mean": self.mean_D.tolist(), "usual": self.usual, "line": self.line}
        table = self.concepts.with_columns(
            pl.Series("centroid", [row.tobytes() for row in self.centroids_KD], pl.Binary)
        ).to_arrow()
        table = table.replace_schema_metadata({"atelier.pairs": json.dumps(other)})
        pq.write_table(table, path, compression="zstd")

    @classmethod
    def read(cls, data: bytes) -> PairModel:
        """What ``write`` wrote."""
        table = pq.ParquetFile(pa.BufferReader(data)).read()
        other = json.loads(table.schema.metadata[b"atelier.pairs"])
        frame = pl.DataFrame(pl.from_arrow(table))
        mean = np.asarray(other["mean"], np.float32)
        raw = b"".join(frame["centroid"])
        return cls(
            mean,
            frame.drop("centroid"),
            np.frombuffer(raw, np.float32).reshape(frame.height, len(mean)),
            tuple(other["usual"]),
            None if other["line"] is None else tuple(other["line"]),
        )


def words_of(captions: pl.Series) -> pl.DataFrame:
    """(row, word): every word of three letters or more, once per caption, in lower case."""
    words = pl.col("caption").str.to_lowercase().str.extract_all(WORD).alias("word")
    frame = pl.DataFrame({"caption": captions}).with_row_index("row").select("row", words)
    found = frame.filter(pl.col("word").list.len() > 0).explode("word")
    return found.unique(maintain_order=True)


def centred(images_ND: npt.NDArray[Any], mean_D: Floats) -> Floats:
    """Directions from the dataset's mean image: CLIP's embeddings lie in a narrow cone."""
    vectors = images_ND.astype(np.float32) - mean_D
    lengths = np.sqrt((vectors * vectors).sum(axis=1, keepdims=True))
    scaled: Floats = vectors / np.maximum(lengths, np.float32(1e-6))
    return scaled


def learn(pairs: Pairs, config: MismatchConfig) -> PairModel:
    """The concepts and the line of these samples."""
    num_samples = len(pairs.images_ND)
    told = words_of(pairs.captions)
    counts = told.group_by("word").agg(pl.len().alias("num_images"))
    is_concept = pl.col("num_images").is_between(config.min_images, config.max_share * num_samples)
    chosen = counts.filter(is_concept).sort("num_images", "word", descending=[True, False])
    chosen = chosen.head(MAX_CONCEPTS).with_row_index("k")
    told = told.join(chosen, on="word", maintain_order="left").sort("k", maintain_order=True)
    mean_D = pairs.images_ND.mean(axis=0, dtype=np.float64).astype(np.float32)
    vectors = centred(pairs.images_ND, mean_D)
    is_near = np.ones(told.height, bool)
    # The nearer half of a concept's images says where it lies, whatever the farther half is.
    for _ in range(_CENTRING_STEPS):
        centroids = _centroids(vectors, told.filter(is_near), chosen.height)
        told = told.with_columns(
            pl.Series("cosine", _cosines(vectors, centroids, told["row"], told["k"]))
        )
        middle = pl.col("cosine").median().over("k")
        is_near = told.select(pl.col("cosine") >= middle).to_series().to_numpy()
    near, nearest = (
        pl.col("cosine").cast(pl.Float64).quantile(share, "linear") for share in (_NEAR, _NEAREST)
    )
    stats = told.group_by("k").agg(
        near.alias("near"), pl.max_horizontal(nearest - near, _MIN_SCALE).alias("spread")
    )
    concepts = chosen.join(stats, on="k", maintain_order="left")
    distances = told.join(concepts, on="k").select(_distance()).to_series()
    usual = _middle(distances.to_numpy())
    line = _line(pairs.recorded, pairs.computed)
    return PairModel(mean_D, concepts.drop("k"), centroids, usual, line)


def _distance() -> pl.Expr:
    """How far an image lies from its concept's near ones, in that concept's spreads."""
    return (pl.col("near") - pl.col("cosine").cast(pl.Float64)) / pl.col("spread")


def _middle(values: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Median and robust standard deviation; (0, 1) of nothing."""
    if not len(values):
        return 0.0, 1.0
    median = float(np.median(values))
    return median, max(float(np.median(np.abs(values - median))) * _TO_SIGMA, _MIN_SCALE)


def _line(recorded: pl.Series, computed: pl.Series) -> tuple[float, float, float, float] | None:
    """A least-squares line, fitted again without the tenth that is farthest below it."""
    both = pl.DataFrame({"x": recorded, "y": computed}).cast(pl.Float64).drop_nulls()
    if both.height < _MIN_RECORDED or both["x"].n_unique() < 2:
        return None
    x, y = both["x"].to_numpy(), both["y"].to_numpy()
    chosen = np.ones(len(x), bool)
    for _ in range(2):
        slope, intercept = (float(each) for each in np.polyfit(x[chosen], y[chosen], 1))
        left = y - (slope * x + intercept)
        chosen = left >= np.quantile(left, 0.1)
    return slope, intercept, *_middle(left)


def _centroids(vectors_ND: Floats, told: pl.DataFrame, num_concepts: int) -> Floats:
    """The direction of the sum of each concept's images; ``told`` is sorted by ``k``."""
    sums = np.zeros((num_concepts, vectors_ND.shape[1]), np.float32)
    for rows, concepts in _slices(told["row"], told["k"]):
        present, first = np.unique(concepts, return_index=True)
        sums[present] += np.add.reduceat(vectors_ND[rows], first, axis=0)
    return centred(sums, np.zeros(vectors_ND.shape[1], np.float32))


def _cosines(vectors_ND: Floats, centroids_KD: Floats, row: pl.Series, k: pl.Series) -> Floats:
    parts = [
        (vectors_ND[rows] * centroids_KD[concepts]).sum(axis=1)
        for rows, concepts in _slices(row, k)
    ]
    return np.concatenate([np.zeros(0, np.float32), *parts])


def _slices(row: pl.Series, k: pl.Series) -> Iterator[tuple[npt.NDArray[Any], npt.NDArray[Any]]]:
    """Pairs, so many at once that their vectors take some dozen megabytes."""
    rows, concepts = row.to_numpy(), k.to_numpy()
    for start in range(0, len(rows), _PAIRS_AT_ONCE):
        chunk = slice(start, start + _PAIRS_AT_ONCE)
        yield rows[chunk], concepts[chunk]


def described(
    model: PairModel, pairs: Pairs, swapped: Pairs, config: MismatchConfig
) -> dict[str, Any]:
    """What a report says: who is suspected, of which words, and how many of ``swapped`` pass."""
    found = model.deviations(pairs)
    flags = model.suspected(pairs, config.max_deviations)
    noticed = model.suspected(swapped, config.max_deviations)
    by_word = (
        found.filter(pl.col("concept") > config.max_deviations)
        .group_by("word")
        .agg(pl.len().alias("suspected"))
        .join(model.concepts, on="word")
        .sort("suspected", "word", descending=[True, False])
        .head(WORDS_TOLD)
    )
    split_view = (found["split_view"] > config.max_deviations).sum()
    return {
        "samples": found.height,
        "suspected": int(flags.sum()),
        "by_concept": int((found["concept"] > config.max_deviations).sum()),
        "by_split_view": int(split_view),
        "with_concept": found.height - found["concept"].null_count(),
        "with_recorded_similarity": found.height - found["split_view"].null_count(),
        "swapped": noticed.len(),
        "swapped_unnoticed": noticed.len() - int(noticed.sum()),
        "words": [list(row) for row in by_word.select("word", "suspected", "num_images").rows()],
    }
