"""Nearest images by embedding: an exact index while it fits the memory, a compressed one else.

autofaiss chooses the compressed layout for the memory; it is built here, for autofaiss's own
factory calls faiss in a way that current faiss refuses (``OPQMatrix(d, M=…)``), and reads all
embeddings from one folder. Candidates of a compressed index are ranked again by exact cosines, so
an index decides what is found and never what its score is. Vector n is the n-th embedded sample,
in the order of the embeddings' manifest.
"""

from __future__ import annotations

import warnings
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter, ValidationError

from infra import storage
from infra.errors import UserError
from infra.manifest import FileEntry
from pipelines.clip_model import local_copy
from pipelines.embed import EmbeddedShard, embeddings_folder, publish_file, read_embeddings
from pipelines.embeddings import EmbeddingsManifest
from pipelines.scoring_config import IndexConfig
from pipelines.units import ProgressCallback

Vectors = npt.NDArray[np.float32]
FLAT = "Flat"
_TRAIN_PER_LIST = 64  # faiss wants 39 to 256 training vectors per list
_MORE_CANDIDATES = 10  # a compressed index is asked for so many times k
_MIN_PROBES = 32
_QUERIES_AT_ONCE = 1024
_NEIGHBOURS = 64  # near-duplicate candidates per image of a compressed index


@dataclass(frozen=True)
class IndexRecord:
    """A published index: ``kind`` is faiss's name of its layout."""

    embeddings_sha256: str
    kind: str
    file: FileEntry


@dataclass(frozen=True)
class VectorIndex:
    """A loaded index with the embeddings it was made of."""

    dataset_root: str
    embeddings: EmbeddingsManifest
    kind: str
    faiss_index: Any

    @property
    def is_exact(self) -> bool:
        """Whether nothing near can be missed."""
        return self.kind == FLAT

    @property
    def _ends(self) -> list[int]:
        return list(accumulate(unit.num_embedded for unit in self.embeddings.units))

    def place(self, vector: int) -> tuple[int, int]:
        """(unit, row in the unit) of the n-th vector."""
        ends = self._ends
        unit = bisect_right(ends, vector)
        return unit, vector - (ends[unit - 1] if unit else 0)

    def search(self, queries: Vectors, k: int) -> list[list[tuple[int, float]]]:
        """Per query its nearest vectors with their cosines, best first; at most ``k``."""
        total = self.faiss_index.ntotal
        if total == 0:
            return [[] for _ in queries]
        num = min(k if self.is_exact else k * _MORE_CANDIDATES, total)
        cosines, vectors = self.faiss_index.search(normalised(queries), num)
        found = []
        for query, row, scores in zip(queries, vectors, cosines, strict=True):
            ids = [int(vector) for vector in row if vector >= 0]
            if not self.is_exact:
                scores = self.exact(query, ids)
            pairs = zip(ids, map(float, scores), strict=False)
            found.append(sorted(pairs, key=lambda pair: (-pair[1], pair[0]))[:k])
        return found

    def exact(self, query: Vectors, vectors: list[int]) -> list[float]:
        """The cosines of one query with some vectors, from the embeddings themselves."""
        places = [self.place(vector) for vector in vectors]
        units = {unit: self.unit_vectors(unit) for unit in sorted({unit for unit, _ in places})}
        wanted = normalised(query[None])[0]
        return [float(units[unit][row] @ wanted) for unit, row in places]

    def unit_vectors(self, unit: int) -> Vectors:
        """The image embeddings of one unit, float32 of length one."""
        return unit_vectors(self.dataset_root, self.embeddings, self.embeddings.units[unit])

    def near_pairs(self, min_cosine: float) -> Iterator[tuple[int, int, float]]:
        """(a, b, cosine) with a < b for images at least as close as ``min_cosine``.

        All of them with an exact index; else those among the 64 nearest of one of the two.
        """
        start = 0
        for number, unit in enumerate(self.embeddings.units):
            vectors = self.unit_vectors(number)
            for first in range(0, len(vectors), _QUERIES_AT_ONCE):
                block = vectors[first : first + _QUERIES_AT_ONCE]
                for offset, other, cosine in self._near(block, min_cosine):
                    one = start + first + offset
                    if one != other:
                        yield min(one, other), max(one, other), cosine
            start += unit.num_embedded

    def _near(self, block: Vectors, min_cosine: float) -> Iterator[tuple[int, int, float]]:
        if self.is_exact:
            # faiss's bound is exclusive
            limits, cosines, ids = self.faiss_index.range_search(block, min_cosine - 1e-6)
            for offset in range(len(block)):
                for at in range(int(limits[offset]), int(limits[offset + 1])):
                    if cosines[at] >= min_cosine:
                        yield offset, int(ids[at]), float(cosines[at])
            return
        for offset, found in enumerate(self.search(block, _NEIGHBOURS)):
            yield from ((offset, other, cosine) for other, cosine in found if cosine >= min_cosine)


def normalised(vectors: npt.NDArray[Any]) -> Vectors:
    """Rows of length one, float32; what is stored has that length to float16 only."""
    wide = np.ascontiguousarray(vectors, dtype=np.float32)
    lengths = np.linalg.norm(wide, axis=1, keepdims=True)
    return np.asarray(wide / np.maximum(lengths, 1e-12), np.float32)


def unit_vectors(root: str, embeddings: EmbeddingsManifest, unit: EmbeddedShard) -> Vectors:
    """A unit's image embeddings, read with their digest checked."""
    return normalised(read_embeddings(root, unit.images, embeddings.identity.dim))


def open_index(
    dataset_root: str,
    embeddings: EmbeddingsManifest,
    config: IndexConfig,
    progress: ProgressCallback | None = None,
) -> VectorIndex:
    """The published index of these embeddings, built and published first when there is none.

    ``progress`` is called with (vectors added, vectors in all) while it is built.
    """
    folder = f"{embeddings_folder(embeddings.identity.key)}/{embeddings.dataset_version}"
    record_uri = storage.join(dataset_root, folder, "index.json")
    kind = choose_kind(embeddings, config)
    record = _read_record(record_uri, embeddings, kind)
    if record is None:
        with TemporaryDirectory(prefix="atelier-index-") as temporary:
            path = Path(temporary, "index.faiss")
            made = _build(dataset_root, embeddings, kind, config, progress)
            _faiss().write_index(made, str(path))
            entry = publish_file(path, dataset_root, f"{folder}/index", "faiss", made.ntotal)
        record = IndexRecord(embeddings.sha256, kind, entry)
        storage.write_json(record_uri, asdict(record))
    path = local_copy(storage.join(dataset_root, record.file.path), record.file.sha256)
    return VectorIndex(dataset_root, embeddings, kind, _probing(_faiss().read_index(str(path))))


def choose_kind(embeddings: EmbeddingsManifest, config: IndexConfig) -> str:
    """``Flat`` when 4 bytes x dimension x images fit the memory, else what autofaiss advises."""
    num, dim = embeddings.counts["embedded"], embeddings.identity.dim
    if 4 * dim * num <= config.max_memory_mb << 20:
        return FLAT
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from autofaiss.external.optimize import get_optimal_index_keys_v2
    keys = get_optimal_index_keys_v2(
        num, dim, f"{config.max_memory_mb}MB", should_be_memory_mappable=True
    )
    if not keys:
        raise UserError(
            expected=f"an index of {num} embeddings within {config.max_memory_mb} MiB",
            got="no layout that is so small",
            remedy="raise scoring.index.max_memory_mb",
        )
    return str(keys[0])


def _read_record(uri: str, embeddings: EmbeddingsManifest, kind: str) -> IndexRecord | None:
    try:
        record = TypeAdapter(IndexRecord).validate_json(storage.read_bytes(uri), strict=True)
    except (storage.ObjectMissing, ValidationError):
        return None
    is_this = record.embeddings_sha256 == embeddings.sha256 and record.kind == kind
    return record if is_this else None


def _build(
    root: str,
    embeddings: EmbeddingsManifest,
    kind: str,
    config: IndexConfig,
    progress: ProgressCallback | None,
) -> Any:
    faiss = _faiss()
    dim = embeddings.identity.dim
    index = faiss.index_factory(dim, kind, faiss.METRIC_INNER_PRODUCT)
    if not index.is_trained:
        index.train(_training_vectors(root, embeddings, config))
    total = embeddings.counts["embedded"]
    for unit in embeddings.units:
        index.add(unit_vectors(root, embeddings, unit))
        if progress is not None:
            progress(index.ntotal, total)
    if index.ntotal != total:
        raise RuntimeError(f"the index has {index.ntotal} of {total} vectors")
    return index


def _training_vectors(root: str, embeddings: EmbeddingsManifest, config: IndexConfig) -> Vectors:
    """An even sample over all units, as large as the memory and the lists make sense of."""
    total, dim = embeddings.counts["embedded"], embeddings.identity.dim
    fits = max(1, (config.max_train_memory_mb << 20) // (4 * dim))
    useful = max(20_000, _TRAIN_PER_LIST * 8 * int(total**0.5))
    step = max(1, -(-total // min(fits, useful)))
    parts = [unit_vectors(root, embeddings, unit)[::step] for unit in embeddings.units]
    return np.concatenate(parts)


def _probing(index: Any) -> Any:
    """Let an index of lists look into a sixteenth of them, at least 32: recall over speed."""
    faiss = _faiss()
    try:
        lists = faiss.extract_index_ivf(index)
    except RuntimeError:
        return index
    lists.nprobe = min(lists.nlist, max(_MIN_PROBES, lists.nlist // 16))
    return index


def _faiss() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SWIG's own deprecations
        import faiss
    return faiss
