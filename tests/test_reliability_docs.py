"""The pages that say which test proves what name tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent
PAGES = sorted((ROOT.parent / "docs").glob("reliability-*.md"))
# The cases of the project's list that each page answers, by letter: 1 to so many.
CASES = {
    "reliability-curation": {"A": 15, "B": 36, "C": 29, "D": 8},
    "reliability-training": {"E": 28, "F": 11},
}
NAMED = re.compile(r"`([a-z0-9_/]+\.py)(?:::(test_[a-z0-9_]+))?(?:…)?(?:\[[^\]`]*\])?`")


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


def numbered_rows(page: Path) -> list[tuple[str, str]]:
    """(number, row) of every row of a table whose first cell is a case's number."""
    rows = []
    for line in page.read_text(encoding="utf-8").splitlines():
        if found := re.match(r"\| *([A-Z]\d+) *\|", line):
            rows.append((found.group(1), line))
    return rows


@pytest.mark.parametrize("page", CASES)
def test_every_case_of_the_list_has_one_row_with_a_test(page: str) -> None:
    rows = numbered_rows(ROOT.parent / "docs" / f"{page}.md")
    numbers = [number for number, _ in rows if number[0] in CASES[page]]
    wanted = [f"{letter}{n}" for letter, last in CASES[page].items() for n in range(1, last + 1)]
    assert sorted(numbers) == sorted(wanted)
    without = [number for number, line in rows if not any(name for _, name in NAMED.findall(line))]
    assert without == []
