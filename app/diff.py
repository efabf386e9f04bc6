"""`atelier diff`: what changed between two versions of a dataset, for a person or a program."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from app.report import table
from app.verb import Output
from app.verify import reach

if TYPE_CHECKING:
    from pipelines.diff import DatasetDiff


def show_diff(old_uri: str, new_uri: str, out: Output) -> dict[str, Any]:
    """Print the difference of two versions and return it as JSON values."""
    from infra.progress import progress
    from pipelines.diff import diff_datasets

    reach(old_uri)
    reach(new_uri)
    with progress("reading ledgers", None, "rows") as bar:
        found = diff_datasets(old_uri, new_uri, bar)
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
    for name, ids in found.examples.items():
        lines += [f"  {name}  {sample_id}" for sample_id in ids[:3]]
    lines += [
        f"{number:,} rows: {before} -> {after}" for before, after, number in found.outcomes_changed
    ]
    lines += [
        f"{name}: {100 * moved:.1f} % of the histogram moved"
        for name, moved in found.scores_moved.items()
        if moved > 0
    ]
    return lines
