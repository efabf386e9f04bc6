"""What a takedown says: what goes, where its bytes were besides, what looks like it and stays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from app.verb import Output

if TYPE_CHECKING:
    from pipelines.neighbourhood import Neighbour
    from pipelines.takedown import Looked, Sample, Takedown, TakedownResult
    from pipelines.tombstones import Tombstones

_SHOWN = 20


def foreseen(
    name: str, looked: Sequence[Looked], near: Sequence[Neighbour], out: Output
) -> dict[str, Any]:
    """What would go from a dataset, told and as JSON."""
    from pipelines.takedown import all_of

    hit = [each for each in looked if each.num_rows]
    samples, rows = max(((each.num_samples, each.num_rows) for each in hit), default=(0, 0))
    copies = all_of(each.copies for each in looked)
    alike = all_of(each.alike for each in looked)
    out.say(f"{name}: would remove {samples:,} samples, {rows:,} rows in all")
    _say_samples(out, copies, "have the bytes of what is named, from other addresses")
    _say_samples(out, alike, "look like a row that would go, and would stay")
    return {
        "dataset": name,
        "versions": sorted(each.version for each in hit),
        "samples": samples,
        "near": [asdict(each) for each in near],
        "copies": [asdict(each) for each in copies],
        "alike": [asdict(each) for each in alike],
    }


def carried_out(made: TakedownResult, out: Output, *, keep_copies: bool) -> dict[str, Any]:
    """What went from a dataset, told and as JSON."""
    out.say(
        f"{made.dataset}: {made.num_samples:,} samples removed, {made.num_rows:,} rows in all, "
        f"{len(made.versions)} versions replaced, {made.num_bytes / 1e6:,.1f} MB deleted"
    )
    for old, new in made.versions.items():
        out.say(f"  {old[:12]} is now {new[:12]}")
    ended = "and stay" if keep_copies else "and are removed with it"
    _say_samples(
        out, made.copies, f"have the bytes of what is named, from other addresses, {ended}"
    )
    _say_samples(out, made.alike, "look like a row that went, and stay; --sample removes them")
    return {
        "dataset": made.dataset,
        "versions": made.versions,
        "samples": made.num_samples,
        "rows": made.num_rows,
        "bytes_deleted": made.num_bytes,
        "copies": [asdict(each) for each in made.copies],
        "alike": [asdict(each) for each in made.alike],
    }


def stays_out(takedown: Takedown, kept_out: Tombstones, out: Output) -> dict[str, Any]:
    """What does not come back, and where not, told and as JSON."""
    names = sorted(root.rpartition("/")[2] for root in takedown.roots)
    where = f"every dataset of {takedown.store_uri}, also of those made later"
    if takedown.store_uri is None:
        where = f"{', '.join(names)}, and no other dataset"
    what = "what was named"
    if takedown.with_copies:
        what += f", and {len(kept_out.images):,} images by their bytes, wherever they come from"
    out.say(f"stays out of {where}: {what}")
    return {"of": takedown.store_uri or names, "images": len(kept_out.images)}


def _say_samples(out: Output, samples: Sequence[Sample], what: str) -> None:
    if not samples:
        return
    out.say(f"  {len(samples):,} samples {what}:")
    for each in samples[:_SHOWN]:
        out.say(f"    {each.sample_id}  {each.url}")
    if len(samples) > _SHOWN:
        out.say(f"    and {len(samples) - _SHOWN:,} more; --json lists all")
