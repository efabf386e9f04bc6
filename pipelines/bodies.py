"""Where the body of a row comes from: a tar that the dataset lists, or the web.

An address inside a tar is never asked of the web, and one of a tar that is not listed of nobody.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol, Self

from infra import storage
from pipelines.config import FetchConfig
from pipelines.connection import Failed
from pipelines.fetch import shared_fetcher
from pipelines.guard import Rejected
from pipelines.tar_samples import SCHEME, place_of
from pipelines.tombstones import Tombstones

if TYPE_CHECKING:
    import pyarrow as pa

_MAX_OPEN = 64


class Bodies(Protocol):
    """What fetches: ``Rejected`` for what is refused, ``Failed`` for what did not work."""

    def fetch(self, url: str) -> bytes:
        """The body behind ``url``."""


class ListedBodies:
    """The web, as the recipe has it, and ``tars`` (name -> address); for many threads.

    Keeps at most ``_MAX_OPEN`` tars open until the block ends. A body is read by its range, and is
    held to the bound on bodies from the web. Of the web, nothing that ``tombstones`` bar is asked.
    """

    def __init__(
        self, config: FetchConfig, tars: Mapping[str, str], tombstones: Tombstones
    ) -> None:
        self._web = shared_fetcher(config, tombstones)
        self._max_bytes = config.max_bytes
        self._tars = tars
        self._open: dict[str, pa.NativeFile] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.clear()

    def fetch(self, url: str) -> bytes:
        """The body behind ``url``; ``Rejected`` or ``Failed``."""
        return self._inside(url) if url.startswith(SCHEME) else self._web.fetch(url)

    def _inside(self, url: str) -> bytes:
        try:
            place = place_of(url)
        except ValueError as error:
            raise Rejected("url", "no address inside a tar") from error
        if place is None:
            raise Rejected("url", "a sample without an image")
        if place.tar not in self._tars:
            raise Rejected("scheme", f"{place.tar} is not a tar of this dataset")
        if place.num_bytes > self._max_bytes:
            raise Failed("too_big", f"{place.num_bytes} bytes", retryable=False)
        try:
            body = bytes(self._file(place.tar).read_at(place.num_bytes, place.offset))
        except OSError as error:
            raise Failed("storage", str(error), retryable=True) from error
        if len(body) < place.num_bytes:
            missing = place.num_bytes - len(body)
            raise Failed("short_body", f"{missing} bytes missing", retryable=True)
        return body

    def _file(self, tar: str) -> pa.NativeFile:
        with self._lock:
            if tar not in self._open:
                filesystem, path = storage.arrow_filesystem(self._tars[tar])
                if len(self._open) >= _MAX_OPEN:  # whoever still reads it keeps it open
                    self._open.pop(next(iter(self._open)))
                self._open[tar] = filesystem.open_input_file(path)
            return self._open[tar]
