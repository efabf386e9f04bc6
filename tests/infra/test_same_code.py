"""A worker whose code is not the driver's says so before it works."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from infra.same_code import VARIABLE, check_same_code, code_expected
from tests.conftest import run_python

WORKER = "from infra.same_code import check_same_code; check_same_code(); print('works')"


def test_the_same_code_works_and_a_changed_line_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "some_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    code = package / "steps.py"
    code.write_text('def double(x):\n    """Twice."""\n    return 2 * x\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    environment = {**code_expected("some_package"), "PYTHONPATH": str(tmp_path)}
    sys.modules.pop("some_package", None)
    assert run_python(WORKER, **environment).stdout == "works\n"
    code.write_text('def double(x):\n    """2 x."""  # a comment\n    return 2 * x\n')
    assert run_python(WORKER, **environment).stdout == "works\n"
    code.write_text('def double(x):\n    """Twice."""\n    return x + x + 0\n')
    done = run_python(WORKER, **environment)
    assert done.stdout == ""
    assert "expected the driver's code of some_package on every machine" in done.stderr
    assert "install the same version there" in done.stderr


def test_nothing_is_asked_where_no_driver_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    check_same_code()
