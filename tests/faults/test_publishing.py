"""Drivers that freeze and wake, readers in between, inputs that change, folders of other people."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from infra import lease as leases
from infra import storage
from infra.digests import sha256_bytes
from infra.errors import UserError
from infra.lease import Lease
from infra.manifest import (
    DatasetManifest,
    ShardEntry,
    publish_manifest,
    shard_path,
    verify_dataset,
)
from pipelines import engine
from pipelines.clean import clean
from pipelines.curate import curate
from pipelines.plan import plan_curation, refuse_changed_inputs
from tests.faults.small_curation import (
    NAME,
    all_but_published,
    config_of,
    curated,
    small_world,
)
from tests.pipelines import test_build
from tests.pipelines.conftest import EvilWeb, TrapWorld

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def world(tmp_path: Path, evil_web: EvilWeb) -> TrapWorld:
    return small_world(tmp_path / "world", evil_web)


def no_spark() -> Any:
    raise AssertionError("Spark was asked for")


def contents(store_uri: str) -> dict[str, str]:
    """Digest of every object but leases, which say who works."""
    return {
        info.uri: sha256_bytes(storage.read_bytes(info.uri))
        for info in storage.list_objects(store_uri)
        if not info.uri.endswith("lease.json")
    }


FROZEN = """
import os, signal, sys
from infra.errors import UserError
from pipelines import curate as module
from pipelines.config import CurationConfig

store_uri, name, door, config = sys.argv[1:]
known = getattr(module, door)

def frozen(*arguments):
    if door == "assemble_manifest":
        found = known(*arguments)
    print("at the door", flush=True)
    os.kill(os.getpid(), signal.SIGSTOP)
    return found if door == "assemble_manifest" else known(*arguments)

setattr(module, door, frozen)
try:
    module.curate(name, CurationConfig.model_validate_json(config), store_uri, None)
    print("published", flush=True)
except UserError as error:
    print("refused", error, flush=True)
"""


BEFORE_IT_LOOKS = ("assemble_manifest", "refused attempt 1 lost")
AFTER_IT_LOOKED = ("publish_manifest", "published")  # the same bytes under the same names


@pytest.mark.parametrize(
    ("store_uri", "door", "ends"),
    [
        pytest.param("file", *BEFORE_IT_LOOKS),
        pytest.param("file", *AFTER_IT_LOOKED, marks=pytest.mark.slow),
        pytest.param("s3", *BEFORE_IT_LOOKS, marks=pytest.mark.slow),
        pytest.param("s3", *AFTER_IT_LOOKED, marks=pytest.mark.slow),
    ],
    indirect=["store_uri"],
)
def test_a_driver_that_was_frozen_and_replaced_changes_nothing(
    world: TrapWorld, store_uri: str, door: str, ends: str
) -> None:
    config = config_of(world)
    all_but_published(config, store_uri)
    child = subprocess.Popen(
        [sys.executable, "-c", FROZEN, store_uri, NAME, door, config.model_dump_json()],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "at the door\n"
        while psutil.Process(child.pid).status() != psutil.STATUS_STOPPED:
            time.sleep(0.01)
        defaults = Lease.__init__.__kwdefaults__
        assert defaults is not None
        with pytest.MonkeyPatch.context() as patch:  # the one who takes over sits elsewhere
            patch.setattr(leases, "_machine", lambda: "another machine")
            patch.setitem(defaults, "stale_seconds", 1.0)
            result = curate(NAME, config, store_uri, no_spark)
        before = contents(store_uri)
        os.kill(child.pid, signal.SIGCONT)
        output, _ = child.communicate(timeout=120)
    finally:
        child.kill()
        child.communicate()
    assert output.startswith(ends)
    assert contents(store_uri) == before
    assert verify_dataset(result.manifest_uri) == []
    assert plan_curation(NAME, config, store_uri).decision == "SKIP"


def test_a_second_attempt_at_every_task_changes_nothing_that_is_listed(
    world: TrapWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a speculative copy does, or a task whose worker was thought dead: before the manifest is
    written, and long after."""
    config, store_uri = config_of(world), (tmp_path / "store").as_uri()
    plan, manifest = curated(config, store_uri)
    before = contents(store_uri)
    again = plan_curation(NAME, config, (tmp_path / "other").as_uri())
    late = replace(again, build=plan.build)

    def publish_nothing(*_: Any) -> str:
        return storage.join(plan.build.dataset_root, manifest.version, "manifest.json")

    monkeypatch.setattr(test_build, "publish_manifest", publish_nothing)
    assert test_build.run(late).version == manifest.version
    after = contents(store_uri)
    assert is_listed(after) == is_listed(before)
    assert len(is_listed(before)) > len(manifest.shards)
    clean(plan.build.dataset_root)
    assert plan_curation(NAME, config, store_uri).decision == "SKIP"


def is_listed(found: dict[str, str]) -> dict[str, str]:
    """Without working files: an attempt notes them in the order in which it came to them."""
    return {uri: sha256 for uri, sha256 in found.items() if "/work/" not in uri}


def version(number: int) -> tuple[list[tuple[str, bytes]], DatasetManifest]:
    """A small dataset whose shards are partly those of the version before."""
    files = []
    for n in (number, number + 1):
        data = one_sample(n)
        files.append((shard_path(sha256_bytes(data)), data))
    entries = [ShardEntry(path, len(data), sha256_bytes(data), 1) for path, data in files]
    counts = {"rows_in": 2, "committed": 2, "rejected": 0, "failed": 0}
    return files, DatasetManifest("d", "f" * 64, entries, [], counts)


def one_sample(number: int) -> bytes:
    import io
    import tarfile

    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        info = tarfile.TarInfo(f"{number:032x}.txt")
        info.size = 3000
        tar.addfile(info, io.BytesIO(str(number).encode().ljust(3000)))
    return buffer.getvalue()


def test_a_reader_sees_whole_versions_while_others_are_written(store_uri: str) -> None:
    root = storage.join(store_uri, "datasets", "d")
    stopped = threading.Event()
    failures: list[str] = []

    def write() -> None:
        try:
            for number in range(12):
                files, manifest = version(number)
                for path, data in files:
                    storage.write_bytes(storage.join(root, path), data)
                publish_manifest(root, manifest)
        except BaseException as error:
            failures.append(repr(error))
            raise
        finally:
            stopped.set()

    writer = threading.Thread(target=write)
    writer.start()
    seen: set[str] = set()
    num_reads = 0
    is_last = False
    while not is_last:
        is_last = stopped.is_set()
        listed = [info.uri for info in storage.list_objects(root)]
        for uri in [uri for uri in listed if uri.endswith("/manifest.json")]:
            assert verify_dataset(uri) == []
            seen.add(uri)
            num_reads += 1
    writer.join()
    assert failures == []
    assert len(seen) == 12
    assert num_reads > 12


def test_inputs_that_change_under_a_build_stop_its_publication(
    world: TrapWorld, tmp_path: Path
) -> None:
    """The rows read were of two states; what was planned is not what would be told."""
    config, store_uri = config_of(world), (tmp_path / "store").as_uri()
    plan = plan_curation(NAME, config, store_uri)
    refuse_changed_inputs(plan)
    world.rows[0]["TEXT"] = "something else"
    world.write(num_files=2)
    with pytest.raises(UserError, match=r"part-0\.parquet as it was when the build began"):
        refuse_changed_inputs(plan)
    again = plan_curation(NAME, config, store_uri)
    assert again.build_key != plan.build_key
    refuse_changed_inputs(again)
    (tmp_path / "world" / "metadata" / "part-1.parquet").unlink()
    with pytest.raises(UserError, match=r"part-1\.parquet as it was"):
        refuse_changed_inputs(again)


def test_a_curation_asks_whether_its_inputs_are_still_the_same(
    world: TrapWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, store_uri = config_of(world), (tmp_path / "store").as_uri()
    fetch = test_build.run

    def change(_: Any, build: Any, units: Any, *__: Any) -> None:
        assert units
        world.rows[0]["TEXT"] = "something else"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(test_build, "publish_manifest", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                fetch(plan_curation(NAME, config, store_uri))
        world.write(num_files=2)

    monkeypatch.setattr(engine, "fetch_images", change)
    monkeypatch.setattr(engine, "write_shards", lambda *_: None)
    with pytest.raises(UserError, match="as it was when the build began"):
        curate(NAME, config, store_uri, lambda: None)  # type: ignore[arg-type, return-value]
    assert not [i for i in storage.list_objects(store_uri) if i.uri.endswith("/manifest.json")]


def test_files_of_other_people_stay_where_a_dataset_is_made(
    world: TrapWorld, tmp_path: Path
) -> None:
    """A name that points at a folder somebody uses: nothing of theirs is replaced or removed."""
    config, store_uri = config_of(world), (tmp_path / "store").as_uri()
    root = storage.join(store_uri, "datasets", NAME)
    theirs = {
        "thesis.tex", "shards/0001.tar", "shards/train-{000..012}.tar", "ledger/2025.xlsx",
        "ledger/january.parquet", "images/a.jpg", "manifest.json", "work.txt", ".git/config",
        "2025/manifest.yaml", "report.html",
    }  # fmt: skip
    for path in theirs:
        storage.write_bytes(storage.join(root, path), path.encode())
    _, manifest = curated(config, store_uri)
    assert plan_curation(NAME, config, store_uri).decision == "SKIP"
    clean(root, with_work=True)
    for path in theirs:
        assert storage.read_bytes(storage.join(root, path)) == path.encode()
    assert verify_dataset(storage.join(root, manifest.version, "manifest.json")) == []
