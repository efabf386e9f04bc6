"""Versions, aliases and their history, against a real MLflow server."""

from __future__ import annotations

import secrets
import subprocess
import sys
from pathlib import Path

import pytest

from infra import storage
from infra.errors import UserError
from infra.tracking_server import TrackingRefused, TrackingServer
from training import publish, registry, versions
from training.versions import RegisteredVersion

pytestmark = pytest.mark.slow


def _version(
    server: TrackingServer, name: str, store_uri: str, exported: Path, *, gate: str = "passed"
) -> RegisteredVersion:
    """A new version of ``name`` over a real published folder."""
    published = publish.publish_folder(exported, store_uri, "concepts", {})
    experiment_id = server.experiment_id("registry tests")
    run = server.create_run(experiment_id, name, {})
    versions.create_registered_model(server, name)
    tags = {
        versions.TAG_STAGE: "concepts",
        versions.TAG_STAGE_KEY: secrets.token_hex(32),
        versions.TAG_SHA256: published.sha256,
        versions.TAG_GATE: gate,
    }
    return versions.create_version(server, name, published.uri, run.run_id, tags)


@pytest.fixture
def name() -> str:
    return f"registry-{secrets.token_hex(4)}-concepts"


def test_a_version_is_made_once_per_key_and_content(
    server: TrackingServer, name: str, local_store: str, exported: Path
) -> None:
    first = _version(server, name, local_store, exported)
    again = versions.create_version(server, name, first.uri, first.run_id, first.tags)
    assert again == first
    other = versions.create_version(
        server, name, first.uri, first.run_id, {**first.tags, versions.TAG_SHA256: "0" * 64}
    )
    assert other.version == first.version + 1
    key = first.tags[versions.TAG_STAGE_KEY]
    assert versions.find_versions(server, name, key) == [first, other]
    assert versions.find_versions(server, name, "f" * 64) == []
    assert versions.all_versions(server, "nobody registered this") == []
    with pytest.raises(UserError, match="there are 1, 2"):
        versions.get_version(server, name, 9)


def test_ready_moves_back_and_forth_with_a_history(
    server: TrackingServer, name: str, local_store: str, exported: Path
) -> None:
    one, two, three = (_version(server, name, local_store, exported) for _ in range(3))
    assert registry.version_by_alias(server, name) is None
    for version in (one, two, three):
        registry.promote(server, local_store, version, why="trained", who="ann")
    assert registry.promote(server, local_store, three, why="again") is None
    assert registry.rollback(server, local_store, name, "concepts").new == two.version
    assert registry.rollback(server, local_store, name, "concepts").new == one.version
    with pytest.raises(UserError, match="earlier ready version"):
        registry.rollback(server, local_store, name, "concepts")
    registry.promote(server, local_store, three, why="better after all")
    assert registry.rollback(server, local_store, name, "concepts").new == one.version
    moves = registry.history(local_store, "concepts", name)
    assert [(move.old, move.new) for move in moves] == [
        (None, 1), (1, 2), (2, 3), (3, 2), (2, 1), (1, 3), (3, 1)
    ]  # fmt: skip
    assert moves[0].who == "ann"
    assert registry.version_by_alias(server, name) == one


def test_a_version_that_failed_its_gate_is_never_ready(
    server: TrackingServer, name: str, local_store: str, exported: Path
) -> None:
    bad = _version(server, name, local_store, exported, gate="failed")
    registry.promote(server, local_store, bad, registry.CANDIDATE, why="trained")
    with pytest.raises(UserError, match="passed its gate"):
        registry.promote(server, local_store, bad, why="I like it")
    assert registry.version_by_alias(server, name) is None


def test_who_saw_an_older_alias_is_told(
    server: TrackingServer, name: str, local_store: str, exported: Path
) -> None:
    one, two = (_version(server, name, local_store, exported) for _ in range(2))
    registry.promote(server, local_store, one, why="first", expected=None)
    with pytest.raises(UserError, match="somebody moved it"):
        registry.promote(server, local_store, two, why="second", expected=None)
    registry.promote(server, local_store, two, why="second", expected=one.version)


def test_rollback_refuses_a_damaged_version(
    server: TrackingServer, name: str, local_store: str, exported: Path
) -> None:
    one, two = (_version(server, name, local_store, exported) for _ in range(2))
    for version in (one, two):
        registry.promote(server, local_store, version, why="trained")
    storage.write_bytes(storage.join(one.uri, "model_index.json"), b"{}")
    with pytest.raises(UserError, match=r"model_index\.json"):
        registry.rollback(server, local_store, name, "concepts")
    assert registry.version_by_alias(server, name) == two


@pytest.mark.parametrize(
    "address",
    ["{store}/../elsewhere/{sha}", "{store}/models/concepts/%2e%2e/{sha}", "file:///etc/{sha}"],
)
def test_a_source_outside_the_store_is_refused(
    server: TrackingServer, name: str, local_store: str, exported: Path, address: str
) -> None:
    good = _version(server, name, local_store, exported)
    uri = address.format(store=local_store, sha=good.sha256)
    tags = {**good.tags, versions.TAG_STAGE_KEY: secrets.token_hex(32)}
    try:
        bad = versions.create_version(server, name, uri, good.run_id, tags)
    except TrackingRefused:
        return  # MLflow saw it first
    with pytest.raises(UserError, match="to lie at"):
        registry.promote_verified(server, local_store, bad, why="mine")
    registry.promote(server, local_store, bad, why="by hand")
    registry.promote(server, local_store, good, why="trained")
    with pytest.raises(UserError, match="to lie at"):
        registry.rollback(server, local_store, name, "concepts")
    assert registry.version_by_alias(server, name) == good


PROMOTER = """
import sys
from infra.errors import UserError
from infra.tracking_server import TrackingServer
from training import registry, versions
uri, store, name, number = sys.argv[1:]
server = TrackingServer(uri)
version = versions.get_version(server, name, int(number))
sys.stdin.readline()
try:
    registry.promote(server, store, version, why="race", expected=None)
    print("won")
except UserError as error:
    print("lost", error)
"""


def test_of_two_that_promote_one_wins(
    server: TrackingServer, name: str, local_store: str, exported: Path
) -> None:
    made = [_version(server, name, local_store, exported) for _ in range(2)]
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", PROMOTER, server.uri, local_store, name, str(each.version)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for each in made
    ]
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    answers = [racer.communicate(timeout=60)[0].split()[0] for racer in racers]
    assert sorted(answers) == ["lost", "won"]
    winner = made[answers.index("won")]
    assert registry.version_by_alias(server, name) == winner
    assert [move.new for move in registry.history(local_store, "concepts", name)] == [
        winner.version
    ]


def test_an_alias_set_before_a_crash_is_written_down_afterwards(
    server: TrackingServer, name: str, local_store: str, exported: Path
) -> None:
    one = _version(server, name, local_store, exported)
    registry._set_alias(server, one, registry.READY)  # and then the power went
    move = registry.promote(server, local_store, one, why="run again")
    assert move is not None
    assert (move.old, move.new) == (None, one.version)
