"""The pages that say which test proves what name tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent
PAGES = sorted((ROOT.parent / "docs").glob("reliability-*.md"))
NAMED = re.compile(r"`([a-z_/]+\.py)(?:::(test_[a-z0-9_]+))?(?:…)?(?:\[[^\]`]*\])?`")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_test_that_a_page_names_is_there(page: Path) -> None:
    found = NAMED.findall(page.read_text(encoding="utf-8"))
    assert len(found) > 10
    missing = []
    for file, name in found:
        path = ROOT / file
        if not path.is_file() or f"def {name}" not in path.read_text(encoding="utf-8"):
            missing.append(f"{file}::{name}")
    assert missing == []


def test_every_page_it_links_is_there() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((benchmarks/[^)]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).is_file(), target


# The lettered cases of a page: how many there are of each letter.
CASES = {"reliability-curation": {"C": 29, "D": 8}}


@pytest.mark.parametrize("name", CASES)
def test_every_numbered_case_is_there(name: str) -> None:
    (page,) = [page for page in PAGES if page.stem == name]
    rows = re.findall(r"^\| ([A-Z])(\d+) \| .+ \| .+ \| .+ \|$", page.read_text(), re.M)
    found = {letter: {int(n) for each, n in rows if each == letter} for letter in CASES[name]}
    assert found == {letter: set(range(1, n + 1)) for letter, n in CASES[name].items()}
