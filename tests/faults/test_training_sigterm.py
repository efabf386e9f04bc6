"""SIGTERM reaches this process's own handler from the moment Ray has started, not Ray's."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

CODE = """
import os, signal, sys, time
from infra.cluster import ClusterConfig
from infra.sessions import ray_session

def end(number, frame):
    sys.exit(143)

signal.signal(signal.SIGTERM, end)
with ray_session(ClusterConfig(cpus_per_worker=1), {}):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(30)
"""


def test_sigterm_is_ours_as_soon_as_ray_runs(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATELIER_HOME", str(tmp_path_factory.mktemp("home")))
    done = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 143, done.stderr
    assert "SIGTERM received" not in done.stderr
