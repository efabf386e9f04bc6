"""Imports cost: what everything imports must not pull in what few need."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("boto3", "botocore", "mlflow", "pyarrow", "pyspark", "ray", "rich", "torch", "psutil")


@pytest.mark.parametrize(
    "modules",
    [
        "infra.errors, infra.digests, infra.progress, infra.environment",
        "infra.config, infra.storage, infra.manifest, infra.cluster",
        "infra.sessions, infra.local.services",
    ],
)
def test_nothing_heavy_is_imported_before_it_is_used(modules: str) -> None:
    code = f"import sys, {modules}; print(*(set({HEAVY!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
