"""The report as one page: no script, nothing loaded from elsewhere, all text from data escaped."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping, Sequence
from itertools import pairwise

from infra.manifest import DatasetManifest
from pipelines.histograms import LEDGER_BINS, SAMPLE_BINS
from pipelines.image_config import blurred_faces_in_words
from pipelines.ledger import COMMITTED
from pipelines.ledger_counts import ALL, LedgerCounts
from pipelines.publish import funnel_of
from pipelines.reasons import BEFORE_FETCH, words_for
from pipelines.shard_sample import Picture, ShardSample

HOSTS_SHOWN = 15
HOSTS_SHOWN_PER_REASON = 5
VALUES_SHOWN = 20
_COPIES_FROM = (1, 2, 3, 5, 10, 30, 100, 300, 1000)
Pictures = Mapping[str, Sequence[Picture]]
_STYLE = """
:root{--ink:#1d2330;--soft:#667085;--line:#e4e7ec;--paper:#fff;--all:#b9c7dd;--kept:#2f9e6b;
--lost:#d9705f;--failed:#d6a243;--code:#f2f4f7}
@media (prefers-color-scheme:dark){:root{--ink:#e6e9ef;--soft:#98a2b3;--line:#2b3342;
--paper:#12161f;--all:#51617d;--kept:#3fb981;--lost:#e0806f;--failed:#d6a243;--code:#1c2330}}
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:70rem;padding:0 1rem;
color:var(--ink);background:var(--paper)}
h1{font-size:1.6rem;margin-bottom:.2rem} h3{font-size:.95rem;margin:.8rem 0 .4rem}
h2{font-size:1.15rem;margin-top:2.6rem;padding-top:.8rem;border-top:1px solid var(--line)}
code,pre{background:var(--code);padding:.1em .3em;border-radius:3px;overflow-wrap:anywhere}
pre{overflow:auto}
table{border-collapse:collapse} td,th{padding:.2rem .8rem .2rem 0;text-align:left;
vertical-align:top;overflow-wrap:anywhere} td.n,th.n{text-align:right;white-space:nowrap;
font-variant-numeric:tabular-nums} tr+tr td{border-top:1px solid var(--line)}
.tiles{display:flex;flex-wrap:wrap;gap:1rem 2.5rem;margin:1.2rem 0}
.tile b{display:block;font-size:1.7rem;line-height:1.2;font-variant-numeric:tabular-nums}
.tile span,.note{color:var(--soft);font-size:.85rem}
.strip{display:flex;height:1.4rem;border-radius:4px;overflow:hidden;background:var(--line)}
.strip i,.key i{background:var(--lost)} .strip i{min-width:1px}
.key{display:flex;flex-wrap:wrap;gap:.2rem 1.4rem;margin:.5rem 0 0;font-size:.85rem;
color:var(--soft)} .key i{display:inline-block;width:.7rem;height:.7rem;border-radius:2px;
margin-right:.4rem}
.strip .committed,.key .committed{background:var(--kept)}
.strip .failed,.key .failed{background:var(--failed)}
.strip .metadata,.key .metadata{background:var(--all)}
td.bars{width:18rem;vertical-align:middle} .bar{display:flex;height:.8rem}
.bar i{background:var(--all);border-radius:2px 0 0 2px} .bar b{background:var(--lost);
min-width:1px;border-radius:0 2px 2px 0} .committed .bar b{background:var(--kept)}
.plots{display:grid;grid-template-columns:repeat(auto-fill,minmax(20rem,1fr));gap:1.5rem}
.plot{display:flex;align-items:flex-end;height:7rem;border-bottom:1px solid var(--soft);gap:2px}
.bin{flex:1;display:flex;align-items:flex-end;height:100%}
.bin b{flex:1;background:var(--all);border-radius:2px 2px 0 0} .bin b.c{background:var(--kept)}
.axis{display:flex;justify-content:space-between;font-size:.75rem;color:var(--soft)}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(7rem,1fr));gap:.8rem}
figure{margin:0} img{width:100%;border-radius:6px;background:var(--code)}
figcaption{font-size:.7rem;color:var(--soft);max-height:5.6em;overflow:hidden;
overflow-wrap:anywhere}
"""
_TITLES = {
    "shorter_side_px": "shorter side, px (as the metadata says)",
    "aspect_ratio": "width over height (as the metadata says)",
    "aesthetic_score": "aesthetic score",
    "watermark_prob": "probability of a watermark",
    "unsafe_prob": "probability of being unsafe",
    "clip_similarity": "similarity of image and caption (cosine)",
    "caption_words": "words of the caption trained on",
    "caption_tokens": "its tokens (CLIP's, begin and end included)",
    "image_bytes": "bytes of the stored image",
}


def report_page(
    manifest: DatasetManifest, counts: LedgerCounts, sample: ShardSample, rejected: Pictures
) -> str:
    """The page. ``rejected``: reason -> pictures of some that did not stay."""
    title = html.escape(manifest.name)
    return "".join(
        (
            '<!doctype html><html lang="en"><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width">'
            f"<title>{title}</title><style>{_STYLE}</style><h1>Dataset {title}</h1>"
            f'<div class="note">Version <code>{manifest.version}</code></div>',
            _tiles(manifest),
            _strip(manifest),
            _section("Where the rows went", _funnel(manifest)),
            _section("Links that did not come", _links(manifest, counts)),
            _section("All rows, and those that stayed", _ledger_plots(counts)),
            _section("Captions and images", _sample_plots(manifest, sample)),
            _section("Images that many others copy", _copies(counts)),
            _section("Captions that do not fit their images", _pairs(manifest)),
            _section("Faces", _faces(manifest)),
            _section("Hosts", _hosts(counts)),
            _section("Languages and sources", _values(counts)),
            _section("Some that stayed", _figures(sample.pictures)),
            _section("Some that did not", _rejected(rejected)),
            _section("What was asked for", _recipe(manifest)),
            "</html>\n",
        )
    )


def _asked(manifest: DatasetManifest) -> int:
    """Rows that were left to be fetched."""
    before = sum(number for name, number in manifest.rejected.items() if name in BEFORE_FETCH)
    return manifest.counts["rows_in"] - before


def _tiles(manifest: DatasetManifest) -> str:
    """What somebody wants to know first, in large figures."""
    rows_in, samples = manifest.counts["rows_in"], manifest.counts[COMMITTED]
    asked = _asked(manifest)
    num_bytes = sum(shard.num_bytes for shard in manifest.shards)
    facts = [
        (f"{rows_in:,}", "rows of metadata"),
        (f"{asked:,}", "rows left to be fetched"),
        (f"{samples:,}", "samples"),
        (f"{100 * samples / asked:.1f} %" if asked else "none", "of those rows became samples"),
        (f"{num_bytes / 1e6:,.1f} MB", f"in {len(manifest.shards):,} shards"),
    ]
    tiles = "".join(
        f'<div class="tile"><b>{figure}</b> <span>{what}</span></div>' for figure, what in facts
    )
    return f'<div class="tiles">{tiles}</div>'


def _strip(manifest: DatasetManifest) -> str:
    """All rows as one bar: what stayed, and who took the rest."""
    rows_in, counts = manifest.counts["rows_in"], manifest.counts
    by_metadata = rows_in - _asked(manifest)
    parts = [
        (COMMITTED, "stayed", counts[COMMITTED]),
        ("rejected", "rejected once asked for", counts["rejected"] - by_metadata),
        ("failed", "did not come", counts["failed"]),
        ("metadata", "rejected before anything was asked", by_metadata),
    ]
    bar = "".join(
        f'<i class="{kind}" style="width:{100 * number / max(rows_in, 1):.2f}%"></i>'
        for kind, _, number in parts
        if number
    )
    key = "".join(
        f'<span><i class="{kind}"></i>{words}: {number:,} '
        f"({100 * number / max(rows_in, 1):.1f} %)</span>"
        for kind, words, number in parts
    )
    return f'<div class="strip">{bar}</div><div class="key">{key}</div>'


def _section(title: str, body: str) -> str:
    return f"<h2>{title}</h2>{body}" if body else ""


def _cell(text: str, is_number: bool) -> str:
    return f'<td class="n">{text}</td>' if is_number else f"<td>{text}</td>"


def _table(header: Sequence[str], rows: Sequence[Sequence[str | int]]) -> str:
    """Texts are escaped; whole numbers stand to the right."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    body = "".join(
        "<tr>"
        + "".join(
            _cell(f"{cell:,}", True) if isinstance(cell, int) else _cell(html.escape(cell), False)
            for cell in row
        )
        + "</tr>"
        for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _funnel(manifest: DatasetManifest) -> str:
    rows_in = max(manifest.counts["rows_in"], 1)
    left = manifest.counts["rows_in"]
    lines = []
    for name, number in funnel_of(manifest).items():
        if name not in ("rows_in", COMMITTED):
            left -= number
        lines.append(
            f'<tr class="{html.escape(name)}"><td>{html.escape(name.replace("_", " "))}</td>'
            f'<td class="note">{html.escape(words_for(name))}</td><td class="n">{number:,}</td>'
            f'<td class="n">{100 * number / rows_in:.2f} %</td><td class="n">{left:,}</td>'
            f'<td class="bars">{_bar(name, number / rows_in, left / rows_in)}</td></tr>'
        )
    head = (
        '<tr><th></th><th></th><th class="n">rows</th><th class="n">share</th>'
        '<th class="n">left</th></tr>'
    )
    return f"<table>{head}{''.join(lines)}</table>"


def _bar(name: str, taken: float, left: float) -> str:
    """What is left, and behind it what this reason took; in shares of all rows."""
    rest = f'<i style="width:{100 * left:.2f}%"></i>' if name != COMMITTED else ""
    gone = f'<b style="width:{100 * taken:.2f}%"></b>' if name != "rows_in" else ""
    return f'<div class="bar">{rest}{gone}</div>'


def _links(manifest: DatasetManifest, counts: LedgerCounts) -> str:
    asked = _asked(manifest)
    if not manifest.failed or not asked:
        return ""
    ranked = sorted(manifest.failed.items(), key=lambda item: (-item[1], item[0]))
    lines: list[list[str | int]] = [
        [cause, number, f"{100 * number / asked:.2f} %", counts.retryable.get(cause, 0)]
        for cause, number in ranked
    ]
    lost = manifest.counts["failed"]
    return (
        f"<p>{asked:,} rows were left to be fetched; {lost:,} ({100 * lost / asked:.1f} %) did "
        "not come.</p>" + _table(("cause", "rows", "of those asked", "worth another try"), lines)
    )


def _plot(name: str, series: Mapping[str, Sequence[int]], edges: Sequence[float]) -> str:
    """Bars per bin, each series in shares of its own known values; numbers on hover."""
    known = {side: list(counts[:-1]) for side, counts in series.items()}
    totals = {side: sum(counts) for side, counts in known.items()}
    if not any(totals.values()):
        return ""
    highest = max(
        count / totals[side] for side, counts in known.items() for count in counts if totals[side]
    )
    bins = []
    for index in range(len(edges) + 1):
        low = f"{edges[index - 1]:g}" if index else ""
        high = f"{edges[index]:g}" if index < len(edges) else ""
        label = f"{low} to {high}" if low and high else f"below {high}" if high else f"from {low}"
        bars = "".join(
            f'<b class="{"c" if side == COMMITTED else ""}" '
            f'title="{side}: {counts[index]:,}, {label}" '
            f'style="height:{100 * counts[index] / max(totals[side], 1) / highest:.1f}%"></b>'
            for side, counts in known.items()
        )
        bins.append(f'<div class="bin">{bars}</div>')
    marks = [edges[0], edges[len(edges) // 2], edges[-1]]
    axis = "".join(
        f"<span>{f'{mark:,.0f}' if mark >= 100 else f'{mark:.3g}'}</span>" for mark in marks
    )
    unknown = ", ".join(f"{side} {counts[-1]:,}" for side, counts in series.items() if counts[-1])
    note = f'<div class="note">unknown: {unknown}</div>' if unknown else ""
    return (
        f'<div><h3>{_TITLES[name]}</h3><div class="plot">{"".join(bins)}</div>'
        f'<div class="axis">{axis}</div>{note}</div>'
    )


def _ledger_plots(counts: LedgerCounts) -> str:
    plots = "".join(
        _plot(name, {side: sides[side] for side in (ALL, COMMITTED)}, LEDGER_BINS[name])
        for name, sides in counts.histograms.items()
        if name in LEDGER_BINS
    )
    if not plots:
        return ""
    return (
        '<p class="note">Blue: all rows; green: those that stayed. Bars are shares of their own '
        f'colour.</p><div class="plots">{plots}</div>'
    )


def _sample_plots(manifest: DatasetManifest, sample: ShardSample) -> str:
    plots = "".join(
        _plot(name, {COMMITTED: sample.histograms[name]}, SAMPLE_BINS[name])
        for name in SAMPLE_BINS
        if name in sample.histograms
    )
    unread = f" {len(sample.unread):,} shards could not be read." if sample.unread else ""
    return (
        f'<p class="note">As in {sample.num_samples:,} of {manifest.counts[COMMITTED]:,} samples, '
        f"from {sample.num_shards:,} of {len(manifest.shards):,} shards.{unread}</p>"
        f'<div class="plots">{plots}</div>'
    )


def _copies(counts: LedgerCounts) -> str:
    """How many images have how many copies, and which have most."""
    if not counts.copies:
        return ""
    sizes = list(counts.copies.values())
    bounds = [*_COPIES_FROM, max(sizes) + 1]
    lines: list[list[str | int]] = []
    for low, high in pairwise(bounds):
        here = [size for size in sizes if low <= size < high]
        if here:
            label = str(low) if low == high - 1 else f"{low:,} to {high - 1:,}"
            lines.append([label, len(here), sum(here)])
    most = list(counts.copies.items())[:HOSTS_SHOWN_PER_REASON]
    return (
        _table(("copies that went", "images that stayed", "rows"), lines)
        + _table(("most copied", "copies"), most)
        + '<p class="note">By bytes and, where asked, by looks. Where a ledger has many groups, '
        "small ones may be missing.</p>"
    )


def _pairs(manifest: DatasetManifest) -> str:
    """What the newest refilter that compared images with captions found, and what it misses."""
    steps = manifest.attributes.get("derivations", [])
    told = next((step["pairs"] for step in reversed(steps) if "pairs" in step), None)
    if told is None:
        return ""
    rate = 100 * told["suspected"] / max(told["samples"], 1)
    missed = 100 * told["swapped_unnoticed"] / max(told["swapped"], 1)
    text = (
        f"<p>Of {told['samples']:,} samples looked at, {told['suspected']:,} ({rate:.2f} %) are "
        f"suspected: {told['by_concept']:,} lie apart from the other images of a word in their "
        f"caption ({told['with_concept']:,} have such a word), {told['by_split_view']:,} are less "
        "like their caption than was recorded "
        f"({told['with_recorded_similarity']:,} have a recorded similarity).</p>"
        f"<p>Of {told['swapped']:,} pairs mismatched on purpose {told['swapped_unnoticed']:,} "
        f"({missed:.1f} %) went unnoticed.</p>"
    )
    return text + (_table(("word", "suspected", "images"), told["words"]) if told["words"] else "")


def _faces(manifest: DatasetManifest) -> str:
    if manifest.attributes.get("recipe", {}).get("blur_faces") is None:
        return ""
    return f"<p>{html.escape(blurred_faces_in_words().capitalize())}.</p>"


def _hosts(counts: LedgerCounts) -> str:
    kept = list(counts.hosts.get(COMMITTED, {}).items())[:HOSTS_SHOWN]
    lost = [
        (outcome, found)
        for outcome, found in sorted(
            counts.hosts.items(), key=lambda item: (-counts.outcomes.get(item[0], 0), item[0])
        )
        if outcome != COMMITTED and found
    ]
    lines: list[list[str | int]] = []
    for outcome, found in lost:
        first = list(found.items())[:HOSTS_SHOWN_PER_REASON]
        told = ", ".join(f"{host} {number:,}" for host, number in first)
        lines.append([outcome.replace("_", " "), counts.outcomes.get(outcome, 0), told])
    if not kept and not lines:
        return ""
    return (
        "<h3>kept</h3>"
        + _table(("host", "samples"), kept)
        + "<h3>lost</h3>"
        + _table(("why", "rows", "most of them from"), lines)
        + '<p class="note">Where a ledger has many hosts, a host\'s number is a lower bound.</p>'
    )


def _values(counts: LedgerCounts) -> str:
    tables = []
    for name, found in (("language", counts.languages), ("source", counts.sources)):
        ranked = sorted(found.items(), key=lambda item: (-item[1][0], item[0]))[:VALUES_SHOWN]
        if any(value for value, _ in ranked):
            rows: list[list[str | int]] = [
                [value or "(unknown)", *numbers] for value, numbers in ranked
            ]
            tables.append(_table((name, "rows", "stayed"), rows))
    return "<br>".join(tables)


def _figures(pictures: Sequence[Picture]) -> str:
    figures = "".join(
        f'<figure><img alt="" src="data:image/jpeg;base64,'
        f'{base64.b64encode(picture.jpeg).decode()}">'
        f"<figcaption>{html.escape(picture.text)}</figcaption></figure>"
        for picture in pictures
    )
    return f'<div class="grid">{figures}</div>' if figures else ""


def _rejected(rejected: Pictures) -> str:
    return "".join(
        f"<h3>{html.escape(reason.replace('_', ' '))}: {html.escape(words_for(reason))}</h3>"
        + _figures(pictures)
        for reason, pictures in rejected.items()
        if pictures
    )


def _recipe(manifest: DatasetManifest) -> str:
    asked = {
        name: manifest.attributes[name]
        for name in ("recipe", "derivations", "search")
        if name in manifest.attributes
    }
    if not asked:
        return ""
    text = html.escape(json.dumps(asked, indent=1, ensure_ascii=False))
    return f"<details><summary>as JSON</summary><pre>{text}</pre></details>"
