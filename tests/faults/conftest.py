"""A fault proxy before the tests' S3 server; the hostile web and its canary, for faults too."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests.faults.s3_proxy import S3Proxy
from tests.pipelines.conftest import canary, evil_web, trap_world

if TYPE_CHECKING:
    from tests.conftest import S3Server

__all__ = ["canary", "evil_web", "s3_proxy", "trap_world"]


@pytest.fixture(scope="session")
def _session_s3_proxy(_session_s3_server: S3Server) -> Iterator[S3Proxy]:
    proxy = S3Proxy(_session_s3_server.port)
    yield proxy
    proxy.stop()


@pytest.fixture
def s3_proxy(
    s3_server: S3Server, _session_s3_proxy: S3Proxy, monkeypatch: pytest.MonkeyPatch
) -> S3Proxy:
    """The session's S3 server behind a proxy that breaks nothing yet; the environment points at it.

    Requests of earlier tests are forgotten. Use your own key prefix.
    """
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", _session_s3_proxy.endpoint)
    _session_s3_proxy.faults, _session_s3_proxy.requests = [], []
    return _session_s3_proxy
