"""Copies of a database in use, and which one comes back when it is gone or damaged."""

from __future__ import annotations

import random
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from infra.errors import UserError
from infra.local.backups import MARK_TABLE, NUM_KEPT, Backups, back_up, copies_of, mend, problem_of


@pytest.fixture
def database(tmp_path: Path) -> Path:
    """Forty runs, with an index over their names."""
    path = tmp_path / "mlflow.db"
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(f"CREATE TABLE {MARK_TABLE} (version_num TEXT)")
        connection.execute("CREATE TABLE runs (name TEXT, note TEXT)")
        connection.execute("CREATE INDEX by_name ON runs (name)")
    _add(path, range(40))
    return path


def _add(database: Path, numbers: range) -> None:
    with closing(sqlite3.connect(database)) as connection, connection:
        rows = [(f"run-{number}", "x" * 200) for number in numbers]
        connection.executemany("INSERT INTO runs VALUES (?, ?)", rows)


def _names(database: Path) -> list[str]:
    with closing(sqlite3.connect(database)) as connection:
        return sorted(str(row[0]) for row in connection.execute("SELECT name FROM runs"))


def _mended(database: Path) -> list[str]:
    said: list[str] = []
    mend(database, said.append)
    return said


def test_a_sound_database_stays(database: Path) -> None:
    back_up(database)
    _add(database, range(40, 50))
    assert _mended(database) == []
    assert len(_names(database)) == 50


def test_the_first_start_has_nothing_to_mend(tmp_path: Path) -> None:
    assert _mended(tmp_path / "mlflow.db") == []


def test_a_lost_database_comes_back(database: Path) -> None:
    back_up(database)
    expected = _names(database)
    database.unlink()
    (line,) = _mended(database)
    assert "is gone; that of" in line
    assert line.endswith("is back")
    assert _names(database) == expected


def test_a_journal_without_its_database_is_not_played_into_the_copy(database: Path) -> None:
    back_up(database)
    expected = _names(database)
    _leave_half_written(database)
    journal = database.with_name("mlflow.db-journal")
    stale = journal.read_bytes()
    database.unlink()
    (database.with_name("backups") / ".unfinished-journal").write_bytes(stale)
    _mended(database)
    assert not journal.exists()
    assert _names(database) == expected
    back_up(database)
    assert [_names(copy) for copy in copies_of(database)] == [expected] * 2
    assert not list(database.with_name("backups").glob(".unfinished*"))


def test_no_room_for_the_copy_is_one_line(database: Path) -> None:
    back_up(database)
    expected = _names(database)
    database.unlink()
    full = database.with_name("mlflow.db.unfinished")
    full.symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"is gone, and its copy .* cannot be put back") as caught:
        _mended(database)
    assert "\n" not in str(caught.value)
    _mended(database)  # the same command again, once there is room
    assert _names(database) == expected


def test_only_the_newest_are_kept_and_one_that_is_damaged_is_passed_by(database: Path) -> None:
    for number in range(NUM_KEPT + 2):
        _add(database, range(100 + number, 101 + number))
        back_up(database)
    copies = copies_of(database)
    assert [len(_names(copy)) for copy in copies] == [45, 44, 43]
    copies[0].write_bytes(copies[0].read_bytes()[:-5000])
    database.unlink()
    _mended(database)
    assert len(_names(database)) == 44


def _cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def _without_header(data: bytes) -> bytes:
    return b"\0" * 100 + data[100:]


def _with_a_torn_page(data: bytes) -> bytes:
    return data[:8192] + b"\xff" * 4096 + data[12288:]


@pytest.mark.parametrize("damage", [_cut, _without_header, _with_a_torn_page, lambda data: b""])
@pytest.mark.parametrize("has_copy", [True, False])
def test_a_damaged_database_is_set_aside(
    database: Path, damage: Callable[[bytes], bytes], has_copy: bool
) -> None:
    expected = _names(database)
    if has_copy:
        back_up(database)
    damaged = damage(database.read_bytes())
    database.write_bytes(damaged)
    (line,) = _mended(database)
    assert "is damaged" in line
    assert "\n" not in line
    (aside,) = database.parent.glob("mlflow.db.damaged-*")
    assert aside.read_bytes() == damaged
    if has_copy:
        assert _names(database) == expected
    else:
        assert "there is no copy, so it begins empty" in line
        assert not database.exists()


def test_flipped_bytes_never_cost_a_run(database: Path) -> None:
    """Found, and the copy comes back; or not found, and then all runs are there by name."""
    back_up(database)
    expected = _names(database)
    sound = database.read_bytes()
    rng = random.Random(5)
    num_found = 0
    for _ in range(200):
        data = bytearray(sound)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        database.write_bytes(data)
        num_found += len(_mended(database))
        assert _names(database) == expected
        for aside in database.parent.glob("mlflow.db.damaged-*"):
            aside.unlink()
    assert num_found > 5


def test_a_damaged_database_is_not_copied(database: Path) -> None:
    back_up(database)
    database.write_bytes(_with_a_torn_page(database.read_bytes()))
    with pytest.raises(sqlite3.DatabaseError):
        back_up(database)
    assert len(copies_of(database)) == 1
    assert [path.name for path in database.with_name("backups").iterdir()] == [
        copies_of(database)[0].name
    ]


def _leave_half_written(database: Path) -> None:
    """A writer that is killed in the middle of what it writes."""
    code = f"""
import os, sqlite3
connection = sqlite3.connect({str(database)!r}, isolation_level=None)
connection.execute("PRAGMA cache_size = 1")
connection.execute("BEGIN")
rows = [(f"half-{{n}}", "y" * 500) for n in range(900)]
connection.executemany("INSERT INTO runs VALUES (?, ?)", rows)
os.kill(os.getpid(), 9)
"""
    subprocess.run([sys.executable, "-c", code], check=False)


def test_what_a_killed_writer_left_is_finished_and_no_damage(database: Path) -> None:
    _leave_half_written(database)
    assert database.with_name("mlflow.db-journal").stat().st_size > 0
    assert problem_of(database) is None
    assert _mended(database) == []
    assert len(_names(database)) == 40


def test_copies_follow_changes_and_the_last_one_is_made_at_the_end(database: Path) -> None:
    backups = Backups(database, interval_seconds=0.01)
    deadline = time.monotonic() + 20
    while not copies_of(database) and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    (first,) = copies_of(database)  # nothing changed, so there is no second
    backups.close()
    assert copies_of(database) == [first]
    slow = Backups(database, interval_seconds=3600.0)
    _add(database, range(40, 44))
    slow.close()
    assert len(_names(copies_of(database)[0])) == 44
