"""Signatures by another road, and on other processors."""

from __future__ import annotations

import hashlib
import os
import struct
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from pipelines.perceptual import signature

ROOT = Path(__file__).parents[2]
# OpenBLAS picks its kernels by processor; they add up in different orders.
KERNELS = ["Prescott", "Haswell", "SkylakeX"]
DIGEST = """
import hashlib
import numpy as np
from pipelines.perceptual import signature
draw = np.random.default_rng(7)
found = b"".join(
    signature(draw.integers(0, 256, (90, 120, 3), dtype=np.uint8)) for _ in range(64)
)
print(hashlib.sha256(found).hexdigest())
"""


def test_terms_are_those_of_a_cosine_transform() -> None:
    pixels = np.random.default_rng(3).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    planes = cv2.cvtColor(pixels, cv2.COLOR_RGB2YCrCb).astype(np.float64)
    expected = []
    for number, size in enumerate((16, 8, 8)):
        # Orthonormal over 64 places; ours are orthonormal on [0, 1].
        terms = np.asarray(cv2.dct(planes[..., number]))[:size, :size] / 64
        expected.append((terms * np.hypot(*np.mgrid[:size, :size])).ravel())
    raw = signature(pixels)
    (scale,) = struct.unpack_from("<f", raw)
    found = np.frombuffer(raw, np.int8, offset=4) * scale
    assert np.abs(found - np.concatenate(expected)).max() <= scale / 2 * 1.001
    assert np.abs(found).max() == pytest.approx(np.abs(np.concatenate(expected)).max(), rel=1e-4)


def test_the_processor_does_not_matter() -> None:
    draw = np.random.default_rng(7)
    pictures = [draw.integers(0, 256, (90, 120, 3), dtype=np.uint8) for _ in range(64)]
    digests = {hashlib.sha256(b"".join(map(signature, pictures))).hexdigest()}
    for kernel in KERNELS:
        environment = {**os.environ, "OPENBLAS_CORETYPE": kernel, "PYTHONPATH": str(ROOT)}
        ended = subprocess.run(
            [sys.executable, "-c", DIGEST], env=environment, capture_output=True, text=True
        )
        if ended.returncode < 0:
            continue  # an instruction that this processor lacks
        assert ended.returncode == 0, ended.stderr
        digests.add(ended.stdout.strip())
    assert len(digests) == 1
