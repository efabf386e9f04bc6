"""`atelier diff`: what changed between two versions of a dataset, for a person or a program."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.report import shortened, table
from app.verb import Output
from infra.errors import UserError

if TYPE_CHECKING:
    from pipelines.diff import DatasetDiff

MOVES_SHOWN = 2
TEXTS_SHOWN = 3


def show_diff(
    old: str,
    new: str,
    store: str | None,
    out: Output,
    *,
    with_texts: bool = False,
    moves_path: Path | None = None,
) -> dict[str, Any]:
    """Print the difference of two versions and return it as JSON values."""
    from app.upkeep import find_version, place_of_dataset
    from infra.progress import progress
    from pipelines.diff import diff_datasets

    old_uri, new_uri = (
        find_version(each, place_of_dataset(each, store, out).store_uri) for each in (old, new)
    )
    if moves_path is not None and not moves_path.absolute().parent.is_dir():
        raise UserError(expected=f"a folder for {moves_path}", got="none", remedy="make it first")
    with progress("reading ledgers", None, "rows") as bar:
        found = diff_datasets(old_uri, new_uri, bar, with_texts=with_texts, moves_path=moves_path)
    for line in diff_lines(found):
        out.say(line)
    return asdict(found)


def diff_lines(found: DatasetDiff) -> list[str]:
    """The page for a person."""
    if found.old_version == found.new_version:
        return ["the same version"]
    names = list(dict.fromkeys((*found.old_funnel, *found.new_funnel)))
    funnels = [
        (name, found.old_funnel.get(name, 0), found.new_funnel.get(name, 0)) for name in names
    ]
    lines = table(
        ("rows", "old", "new", "change"),
        [(name.replace("_", " "), f"{a:,}", f"{b:,}", f"{b - a:+,}") for name, a, b in funnels],
    )
    lines.append("")
    lines.append(
        f"samples: {found.added:,} added, {found.removed:,} removed, "
        f"{found.changed:,} with another image, {found.kept:,} as they were; "
        f"{found.captions_changed:,} URLs with another caption"
    )
    lines.append(
        f"in both: {found.rows_in_both:,} rows, {found.kept + found.changed:,} samples "
        f"({100 * found.overlap:.1f} % of those in either)"
    )
    for name, ids in found.examples.items():
        lines += [f"  {name}  {sample_id}" for sample_id in ids[:3]]
    for before, after, number in found.outcomes_changed:
        lines.append(f"{number:,} rows: {before} -> {after}")
        ids = found.moves.get(f"{before} -> {after}", [])
        lines += [f"  {sample_id}" for sample_id in ids[:MOVES_SHOWN]]
    if found.texts_changed is not None:
        lines.append(f"{found.texts_changed:,} samples of both have another caption to train on")
    for sample_id, before, after in found.texts[:TEXTS_SHOWN]:
        lines += [
            f"  {sample_id}",
            f"    - {shortened(before, 90)}",
            f"    + {shortened(after, 90)}",
        ]
    lines += [
        f"{name}: {100 * moved:.1f} % of the histogram moved"
        for name, moved in found.scores_moved.items()
        if moved > 0
    ]
    return lines
