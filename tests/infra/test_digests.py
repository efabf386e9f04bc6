from __future__ import annotations

import ast
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.digests import canonical_json, code_digest, sha256_bytes, sha256_file
from infra.errors import UserError

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda children: st.lists(children) | st.dictionaries(st.text(), children),
    max_leaves=20,
)


@given(json_values)
def test_canonical_json_reads_back_equal(value: Any) -> None:
    assert json.loads(canonical_json(value)) == value


@given(st.dictionaries(st.text(), st.integers(), min_size=2))
def test_key_order_does_not_change_the_bytes(value: dict[str, int]) -> None:
    backwards = dict(reversed(value.items()))
    assert canonical_json(backwards) == canonical_json(value)


@pytest.mark.parametrize("value", [float("nan"), [float("inf")], {"a": -float("inf")}])
def test_not_a_number_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        canonical_json(value)


def test_keys_that_json_would_merge_are_refused() -> None:
    with pytest.raises(TypeError, match="string keys"):
        canonical_json({"a": [{1: "one"}]})


def test_digest_of_a_file_is_that_of_its_bytes(tmp_path: Path) -> None:
    data = bytes(range(256)) * 9000
    (tmp_path / "f").write_bytes(data)
    assert sha256_file(tmp_path / "f") == sha256_bytes(data) == hashlib.sha256(data).hexdigest()


def _package(folder: Path, name: str, body: str) -> None:
    (folder / name / "inner").mkdir(parents=True)
    (folder / name / "__init__.py").write_text('"""Says."""\n')
    (folder / name / "inner" / "part.py").write_text(body)


def test_code_counts_and_prose_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    _package(tmp_path, "pkg_a", 'def f():\n    """One."""\n    return 1\n')
    part = tmp_path / "pkg_a" / "inner" / "part.py"
    before = code_digest("pkg_a")
    part.write_text('# a comment\ndef f():\n    """Two."""\n\n    return 1\n')
    assert code_digest("pkg_a") == before
    part.write_text('def f():\n    """Two."""\n    return 2\n')
    assert code_digest("pkg_a") != before
    assert "pkg_a" not in sys.modules


def test_code_digest_covers_every_package_in_any_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    _package(tmp_path, "pkg_b", "x = 1\n")
    _package(tmp_path, "pkg_c", "y = 1\n")
    assert code_digest("pkg_b", "pkg_c") == code_digest("pkg_c", "pkg_b")
    assert code_digest("pkg_b", "pkg_c") != code_digest("pkg_b")
    assert code_digest("infra.digests") != code_digest("infra.errors")
    with pytest.raises(UserError, match="no_such_package"):
        code_digest("no_such_package")


def test_code_is_parsed_once_and_a_damaged_memory_of_it_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATELIER_HOME", str(tmp_path / "home"))
    monkeypatch.syspath_prepend(str(tmp_path))
    _package(tmp_path, "pkg_d", "x = 1\n")
    parsed: list[str] = []
    parse = ast.parse

    def counted(source: bytes, filename: str) -> ast.Module:
        parsed.append(filename)
        return parse(source, filename)

    monkeypatch.setattr("infra.digests.ast.parse", counted)
    expected = code_digest("pkg_d")
    assert code_digest("pkg_d") == expected
    assert parsed == ["pkg_d/__init__.py", "pkg_d/inner/part.py"]
    (memory,) = (tmp_path / "home" / "cache" / "code").iterdir()
    text = memory.read_text()
    for damaged in ("0" * 64 + text[64:], text[:70], "", "\xff"):
        memory.write_text(damaged)
        assert code_digest("pkg_d") == expected
        assert memory.read_text() == text
    (tmp_path / "pkg_d" / "inner" / "part.py").write_text("x = 2\n")
    assert code_digest("pkg_d") != expected


def test_a_home_that_cannot_be_written_to_costs_time_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = code_digest("infra.errors")
    (tmp_path / "home").write_text("a file")
    monkeypatch.setenv("ATELIER_HOME", str(tmp_path / "home"))
    assert code_digest("infra.errors") == expected
