"""Signatures by which pictures that look alike find each other, whatever their size and encoding.

A signature holds a picture's lowest frequencies: of a cosine transform (DCT) over 64 x 64 pixels,
16 x 16 terms of luma and 8 x 8 of each chroma. As a DCT is linear, the terms of a cropped picture
follow from those of the whole one; so one signature can be compared with another as if either
were cropped, or mirrored, without its pixels. Compared are directions, not lengths: brightness and
contrast do not count, and each term is weighted by its frequency, or the few lowest would decide.

To be compared at all, two pictures must share a bucket: the signs of ``num_bits`` of the lowest
terms. A picture lies in one bucket per table and is looked for in those of each of its crops.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipelines.resize import Pixels

Floats = NDArray[np.float32]

_SAMPLE_PX = 64
_LUMA, _CHROMA = 16, 8
# What is compared of a crop: terms beyond need more of the whole than a signature holds.
_LUMA_USED, _CHROMA_USED = 12, 6
_NUM_QUANTISED = _LUMA**2 + 2 * _CHROMA**2
_SCALE = struct.Struct("<f")
_WHOLE = 1 << 14
SIGNATURE_BYTES = _SCALE.size + _NUM_QUANTISED
# Deviation, in levels of 255, below which there is nothing to compare.
_MIN_LUMA_LEVELS = 2.0
_MIN_CHROMA_LEVELS = 1.5
MIN_CHROMA_COSINE = 0.75
NUM_TABLES = 4
MIN_BITS = 16


def signature(pixels: Pixels) -> bytes:
    """The signature of upright sRGB ``pixels``, (height, width, 3) of uint8."""
    import cv2

    small = cv2.resize(pixels, (_SAMPLE_PX, _SAMPLE_PX), interpolation=cv2.INTER_AREA)
    planes = cv2.cvtColor(small, cv2.COLOR_RGB2YCrCb).astype(np.float64)
    sums = [
        (basis @ planes[..., number] @ basis.T * np.sqrt(_squares(len(basis)))).ravel()
        for number, basis in enumerate(map(_whole_cosines, (_LUMA, _CHROMA, _CHROMA)))
    ]
    terms = np.concatenate(sums) / (_WHOLE * _SAMPLE_PX) ** 2
    scale = float(np.abs(terms).max()) / 127 or 1.0
    return _SCALE.pack(scale) + (terms / scale).round().astype(np.int8).tobytes()


@functools.cache
def _whole_cosines(num_terms: int) -> NDArray[np.float64]:
    """(num_terms, 64): the DCT's functions in whole numbers of 1 / ``_WHOLE``.

    Products of bytes with them are sums of whole numbers below 2**53, which float64 holds: they
    come out the same in whatever order a processor's matrix kernel adds them up, and so
    signatures, and with them what is kept, are the same on every machine of a cluster.
    """
    positions = (np.arange(_SAMPLE_PX) + 0.5) / _SAMPLE_PX
    wholes: NDArray[np.float64] = (_waves(num_terms, positions) * _WHOLE).round()
    return wholes


def _cosines(num_terms: int, positions: NDArray[np.float64]) -> Floats:
    """(num_terms, positions): the DCT's orthonormal functions on [0, 1]."""
    return _waves(num_terms, positions).astype(np.float32)


def _waves(num_terms: int, positions: NDArray[np.float64]) -> NDArray[np.float64]:
    waves: NDArray[np.float64] = np.cos(np.pi * np.arange(num_terms)[:, None] * positions)
    waves *= np.sqrt(2)
    waves[0] = 1
    return waves


def _weights(size: int) -> Floats:
    """Natural pictures fall off as one over the frequency; the mean (0) is left out."""
    return np.sqrt(_squares(size)).astype(np.float32)


def _squares(size: int) -> NDArray[np.int64]:
    steps = np.arange(size)
    squares: NDArray[np.int64] = steps[:, None] ** 2 + steps**2
    return squares


@dataclass(frozen=True)
class Views:
    """How a picture may have been cropped: per axis from the left and from the right.

    ``max_crop_ratio`` of a side, at most, in [0, 0.15]; 0 is no crop. ``mirrored``: left for right
    as well.
    """

    max_crop_ratio: float = 0.1
    mirrored: bool = False

    @functools.cached_property
    def _cuts(self) -> list[tuple[float, float]]:
        if self.max_crop_ratio == 0:
            return [(0.0, 0.0)]
        levels = (0.0, self.max_crop_ratio / 2, self.max_crop_ratio)
        return [(left, right) for left in levels for right in levels]

    def _axis(self, stored: int, used: int, *, mirrored: bool) -> Floats:
        """(cuts, used, stored): from a whole side's terms to those of its part."""
        grid = (np.arange(8 * _SAMPLE_PX) + 0.5) / (8 * _SAMPLE_PX)
        wanted = _cosines(used, grid[::-1] if mirrored else grid) / len(grid)
        parts = [wanted @ _cosines(stored, left + (1 - left - right) * grid).T
                 for left, right in self._cuts]  # fmt: skip
        return np.stack(parts)

    def _matrix(self, stored: int, used: int) -> Floats:
        """(views, stored * stored, used * used): from a whole picture's terms to a view's."""
        down = self._axis(stored, used, mirrored=False)
        found = []
        for mirrored in [False, True] if self.mirrored else [False]:
            across = self._axis(stored, used, mirrored=mirrored)
            both = np.einsum("aiu,bjv->abuvij", down, across) * _weights(used)
            found.append(both.reshape(-1, stored**2, used**2))
        return np.concatenate(found)

    @functools.cached_property
    def _luma(self) -> Floats:
        return self._matrix(_LUMA, _LUMA_USED)

    @functools.cached_property
    def _chroma(self) -> Floats:
        return self._matrix(_CHROMA, _CHROMA_USED)

    @property
    def num_views(self) -> int:
        return len(self._cuts) ** 2 * (1 + self.mirrored)

    def luma(self, signatures: Signatures) -> Floats:
        """(N, views, 144) of unit length, or 0 where too flat. The first view is the whole."""
        return _unit(_seen(signatures.luma_NU, self._luma), _MIN_LUMA_LEVELS)

    def luma_of_view(self, signatures: Signatures, view: int) -> Floats:
        """(N, 144): what ``luma`` has at one view."""
        return _unit(signatures.luma_NU @ self._luma[view], _MIN_LUMA_LEVELS)

    def chroma(self, signatures: Signatures) -> Floats:
        """(N, views, 72) of unit length, or 0 where there is hardly any colour."""
        planes = [_seen(signatures.chroma_NPU[:, plane], self._chroma) for plane in (0, 1)]
        return _unit(np.concatenate(planes, axis=-1), _MIN_CHROMA_LEVELS)


def _seen(terms_NU: Floats, matrix_VUF: Floats) -> Floats:
    """(N, views, used * used)."""
    num_views, num_terms, num_used = matrix_VUF.shape
    flat = matrix_VUF.transpose(1, 0, 2).reshape(num_terms, num_views * num_used)
    return (terms_NU @ flat).reshape(-1, num_views, num_used)


def _unit(vectors: Floats, min_levels: float) -> Floats:
    """Of length one; weighted terms of a flat picture with noise are shorter than the minimum."""
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    unit: Floats = np.where(lengths < min_levels, 0, vectors / np.maximum(lengths, 1e-9))
    return unit.astype(np.float32)


@dataclass(frozen=True)
class Signatures:
    """Many signatures' terms, unweighted, in levels of 255."""

    luma_NU: Floats
    chroma_NPU: Floats

    def __getitem__(self, numbers: NDArray[np.int64]) -> Signatures:
        return Signatures(self.luma_NU[numbers], self.chroma_NPU[numbers])

    @classmethod
    def parse(cls, raw: Sequence[bytes]) -> Signatures:
        """From what ``signature`` gave; ``ValueError`` for anything else."""
        if any(len(each) != SIGNATURE_BYTES for each in raw):
            raise ValueError(f"a signature has {SIGNATURE_BYTES} bytes")
        table = np.frombuffer(b"".join(raw), np.uint8).reshape(len(raw), SIGNATURE_BYTES)
        scales = np.ascontiguousarray(table[:, : _SCALE.size]).view("<f4")
        terms = table[:, _SCALE.size :].view(np.int8).astype(np.float32) * scales
        luma = terms[:, : _LUMA**2] / _divisors(_LUMA)
        chroma = terms[:, _LUMA**2 :].reshape(-1, 2, _CHROMA**2) / _divisors(_CHROMA)
        return cls(luma, chroma)


def _divisors(size: int) -> Floats:
    weights = _weights(size)
    weights[0, 0] = 1  # the mean was stored as 0
    return weights.ravel()


def buckets(luma_NVF: Floats, num_bits: int) -> NDArray[np.int64]:
    """(N, views, tables): the bucket of each view; -1 for a picture too flat to be compared."""
    used = luma_NVF.shape[-1]
    side = int(used**0.5)
    rows, columns = np.divmod(np.arange(used), side)
    lowest = np.argsort(rows**2 + columns**2, kind="stable")[1:]
    found = np.empty((*luma_NVF.shape[:2], NUM_TABLES), np.int64)
    for table in range(NUM_TABLES):
        bits = lowest[table::NUM_TABLES][:num_bits]
        signs = luma_NVF[..., bits] > 0
        keys = signs @ (np.int64(1) << np.arange(len(bits), dtype=np.int64))
        found[..., table] = keys * NUM_TABLES + table
    found[(luma_NVF == 0).all(axis=-1)] = -1
    return found


def bits_for(num_images: int) -> int:
    """Bits of a bucket's key: about as many buckets as pictures."""
    return max(MIN_BITS, (max(num_images, 1) - 1).bit_length())


def alike(
    luma_VF: Floats, chroma_VF: Floats, others_luma_MF: Floats, others_chroma_MF: Floats
) -> tuple[Floats, NDArray[np.bool_]]:
    """One picture's views against others as they are: the best cosine (M), and (M) whether the
    colours of that view agree; they do, too, when either picture has none."""
    cosines = others_luma_MF @ luma_VF.T
    best = cosines.argmax(axis=1)
    own_MF = chroma_VF[best]
    has_none = ~(own_MF.any(axis=1) & others_chroma_MF.any(axis=1))
    agree = (own_MF * others_chroma_MF).sum(axis=1) >= MIN_CHROMA_COSINE
    return cosines[np.arange(len(best)), best], has_none | agree
