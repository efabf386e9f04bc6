"""One holder at a time, whoever dies, freezes or races."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from infra import lease as leases
from infra import storage
from infra.lease import Lease, LeaseHeld, LeaseLost, LeaseRecord

QUICK: dict[str, Any] = {"heartbeat_seconds": 0.1, "stale_seconds": 1.0, "settle_seconds": 0.05}

HOLDER = """
import sys, time
from infra.errors import UserError
from infra.lease import Lease
uri, settle, start_at = sys.argv[1], float(sys.argv[2]), float(sys.argv[3])
time.sleep(max(0.0, start_at - time.time()))
try:
    lease = Lease(uri, "child", heartbeat_seconds=0.1, settle_seconds=settle)
    print("attempt", lease.acquire(), flush=True)
except UserError as error:
    print("refused", error, flush=True)
    sys.exit(1)
sys.stdin.readline()
try:
    lease.check()
    print("held", flush=True)
except UserError as error:
    print("lost", error, flush=True)
lease.release()
"""


def _holder(uri: str, settle_seconds: float = 0.05, start_at: float = 0.0) -> subprocess.Popen[str]:
    """A process that takes the lease at ``start_at`` (Unix time), or as soon as it can."""
    return subprocess.Popen(
        [sys.executable, "-c", HOLDER, uri, str(settle_seconds), str(start_at)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def _end(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate("\n", timeout=30)
    return output.strip()


@pytest.fixture
def lease_uri(tmp_path: Path) -> str:
    return storage.file_uri(tmp_path / "runs" / "concepts-0" / "lease.json")


def _held_elsewhere(uri: str) -> LeaseRecord:
    """Write the lease of a holder on another machine."""
    record = LeaseRecord("ann@far", "0" * 32, 4, 7, "far away", 1, "some time", True)
    storage.write_json(uri, asdict(record))
    return record


def test_attempts_count_up(store_uri: str) -> None:
    uri = storage.join(store_uri, "lease.json")
    for expected in (1, 2, 3):
        with Lease(uri, "me", **QUICK) as lease:
            assert lease.attempt == expected
            lease.check()


def test_a_living_holder_is_named(lease_uri: str) -> None:
    refused = pytest.raises(LeaseHeld, match=r"ann@here .*wait for it or stop it")
    with Lease(lease_uri, "ann@here", **QUICK), refused:
        Lease(lease_uri, "bob", **QUICK).acquire()


def test_a_holder_in_another_process_is_refused_at_once(lease_uri: str) -> None:
    child = _holder(lease_uri)
    assert _line(child) == "attempt 1"
    started_at = time.monotonic()
    with pytest.raises(LeaseHeld, match="child"):
        Lease(lease_uri, "me", **QUICK).acquire()
    assert time.monotonic() - started_at < 0.5
    assert _end(child) == "held"


def test_a_killed_holder_is_replaced_at_once(lease_uri: str) -> None:
    child = _holder(lease_uri)
    assert _line(child) == "attempt 1"
    child.kill()
    child.communicate()
    started_at = time.monotonic()
    with Lease(lease_uri, "me", stale_seconds=60.0, settle_seconds=0.05) as lease:
        assert lease.attempt == 2
    assert time.monotonic() - started_at < 5


def test_a_silent_holder_elsewhere_is_replaced_when_stale(lease_uri: str) -> None:
    _held_elsewhere(lease_uri)
    with Lease(lease_uri, "me", **QUICK) as lease:
        assert lease.attempt == 5


def test_a_beating_holder_elsewhere_is_refused(lease_uri: str) -> None:
    record = _held_elsewhere(lease_uri)
    script = (
        "import sys, time\n"
        "from infra import storage\n"
        "uri = sys.argv[1]\n"
        "raw = storage.read_json(uri)\n"
        "print('up', flush=True)\n"
        "for _ in range(50):\n"
        "    raw['beat'] += 1; storage.write_json(uri, raw); time.sleep(0.1)\n"
    )
    beating = subprocess.Popen(
        [sys.executable, "-c", script, lease_uri], stdout=subprocess.PIPE, text=True
    )
    assert _line(beating) == "up"
    try:
        with pytest.raises(LeaseHeld, match=record.owner):
            Lease(lease_uri, "me", heartbeat_seconds=0.2, stale_seconds=10.0).acquire()
    finally:
        beating.kill()
        beating.communicate()


def test_a_frozen_holder_finds_out_that_it_was_replaced(
    lease_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = _holder(lease_uri)
    assert _line(child) == "attempt 1"
    os.kill(child.pid, signal.SIGSTOP)
    monkeypatch.setattr(leases, "_machine", lambda: "another machine")  # its pid says nothing here
    with Lease(lease_uri, "me", **QUICK) as lease:
        assert lease.attempt == 2
        os.kill(child.pid, signal.SIGCONT)
        assert _end(child).startswith("lost attempt 1 lost")
        lease.check()


def test_a_lost_lease_is_noticed_by_the_heartbeat(lease_uri: str) -> None:
    told: list[bool] = []
    lease = Lease(lease_uri, "me", on_lost=lambda: told.append(True), **QUICK)
    lease.acquire()
    _held_elsewhere(lease_uri)
    deadline = time.monotonic() + 5
    while not told and time.monotonic() < deadline:
        time.sleep(0.02)
    assert told
    with pytest.raises(LeaseLost, match="ann@far"):
        lease.check()
    lease.release()
    assert storage.read_json(lease_uri)["owner"] == "ann@far"


def test_a_lease_that_this_process_gave_up_is_free(lease_uri: str) -> None:
    lease = Lease(lease_uri, "me", **QUICK)
    lease.acquire()
    held = storage.read_json(lease_uri)
    lease.release()
    storage.write_json(lease_uri, held)  # as if storage had been away when it was released
    with Lease(lease_uri, "me again", **QUICK) as again:
        assert again.attempt == 2


def test_of_two_that_race_one_wins(store_uri: str) -> None:
    num_won = []
    for number in range(4):
        uri = storage.join(store_uri, f"lease-{number}.json")
        start_at = time.time() + 1.5
        racers = [_holder(uri, settle_seconds=0.5, start_at=start_at) for _ in range(2)]
        answers = [_line(racer) for racer in racers]
        num_won.append(sum(answer.startswith("attempt") for answer in answers))
        for racer in racers:
            _end(racer)
    assert num_won == [1, 1, 1, 1]


@pytest.mark.parametrize("damage", [b"", b"[]", b'{"owner": "x"}'])
def test_a_broken_lease_is_one_line(lease_uri: str, damage: bytes) -> None:
    storage.write_bytes(lease_uri, damage)
    with pytest.raises(Exception, match=r"expected .*lease") as caught:
        Lease(lease_uri, "me", **QUICK).acquire()
    assert "\n" not in str(caught.value)


def test_the_record_is_plain_json(lease_uri: str) -> None:
    with Lease(lease_uri, "me", **QUICK):
        raw = json.loads(storage.read_bytes(lease_uri))
    assert raw["owner"] == "me"
    assert raw["held"] is True
    assert replace(LeaseRecord(**raw), held=False).held is False
