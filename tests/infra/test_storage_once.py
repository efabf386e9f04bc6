"""What is there with the same bytes is not written again: an overwrite can lose it."""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from infra import storage
from infra.digests import sha256_bytes
from infra.storage_once import upload_once, write_once

DATA = b"some bytes" * 40
NUM_KILLS = 15


def test_the_same_bytes_are_left_alone_and_others_are_replaced(
    s3_server: Any, tmp_path: Path
) -> None:
    file = s3_server.folder / "atelier" / "once" / "x"
    uri = f"{s3_server.store_uri}/once/x"
    (tmp_path / "x").write_bytes(DATA)
    first = upload_once(tmp_path / "x", uri, sha256_bytes(DATA))
    os.utime(file, (1, 1))
    assert upload_once(tmp_path / "x", uri, sha256_bytes(DATA)) == first
    assert write_once(uri, DATA) == first
    assert file.stat().st_mtime == 1
    for damaged in (b"S" + DATA[1:], DATA[:-1], b""):
        storage.write_bytes(uri, damaged)
        assert upload_once(tmp_path / "x", uri, sha256_bytes(DATA)) == first
        assert storage.read_bytes(uri) == DATA
        storage.write_bytes(uri, damaged)
        assert write_once(uri, DATA) == first
        assert storage.read_bytes(uri) == DATA


@pytest.mark.slow
def test_a_server_killed_again_and_again_keeps_what_it_took(own_s3_server: Any) -> None:
    """Second attempts at the same work, at any moment: no acknowledged object is lost."""
    names = [f"shards/{number}.tar" for number in range(6)]
    for name in names:
        write_once(f"{own_s3_server.store_uri}/{name}", DATA)
    is_over = threading.Event()

    def write_again(name: str) -> None:
        while not is_over.is_set():
            with suppress(storage.StorageUnavailable):
                write_once(f"{own_s3_server.store_uri}/{name}", DATA)

    writers = [threading.Thread(target=write_again, args=(name,)) for name in names]
    for writer in writers:
        writer.start()
    try:
        for number in range(NUM_KILLS):
            time.sleep(0.1 + number % 5 * 0.05)
            own_s3_server.kill()
            files = [own_s3_server.folder / "atelier" / name for name in names]
            assert [file.read_bytes() for file in files] == [DATA] * len(names)
            own_s3_server.start()
    finally:
        is_over.set()
        for writer in writers:
            writer.join()
