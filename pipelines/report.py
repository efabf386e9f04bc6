"""A page a person can look at: the funnel, and some of the samples that were kept."""

from __future__ import annotations

import base64
import html
import json

from infra import storage
from infra.manifest import DatasetManifest, dataset_root
from pipelines.ledger import COMMITTED
from pipelines.publish import funnel_of
from pipelines.shards import read_shard

NUM_SAMPLES_SHOWN = 48
_MAX_SHARD_BYTES = 64_000_000
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:70rem;padding:0 1rem;
color:#222;background:#fff}
h1{font-size:1.4rem} code{background:#f2f2f2;padding:.1em .3em;border-radius:3px}
table{border-collapse:collapse} td{padding:.15rem .8rem .15rem 0} td.n{text-align:right}
.bar{background:#c9d6e8;height:.8rem;border-radius:2px;min-width:1px}
.committed .bar{background:#3b7}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(9rem,1fr));gap:1rem}
figure{margin:0} img{width:100%;border-radius:4px} figcaption{font-size:.75rem;color:#555;
max-height:6.5em;overflow:hidden}
"""


def write_report(manifest_uri: str, manifest: DatasetManifest) -> str:
    """Write ``report.html`` beside the manifest; self-contained, no scripts."""
    uri = storage.join(dataset_root(manifest_uri), manifest.version, "report.html")
    storage.write_bytes(uri, report_html(manifest, _samples(manifest_uri, manifest)).encode())
    return uri


def report_html(manifest: DatasetManifest, samples: list[tuple[str, str, str]]) -> str:
    """The page. ``samples`` are (caption, image type, base64 of the image)."""
    rows_in = max(manifest.counts["rows_in"], 1)
    funnel = "".join(
        f'<tr class="{html.escape(name)}"><td>{html.escape(name.replace("_", " "))}</td>'
        f'<td class="n">{number:,}</td>'
        f'<td style="width:40rem"><div class="bar" style="width:{100 * number / rows_in:.2f}%">'
        "</div></td></tr>"
        for name, number in funnel_of(manifest).items()
    )
    figures = "".join(
        f'<figure><img alt="" src="data:image/{kind};base64,{data}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        for caption, kind, data in samples
    )
    num_bytes = sum(shard.num_bytes for shard in manifest.shards)
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        f"<title>{html.escape(manifest.name)}</title><style>{_STYLE}</style>"
        f"<h1>Dataset {html.escape(manifest.name)}</h1>"
        f"<p>Version <code>{manifest.version}</code>: {manifest.counts[COMMITTED]:,} samples in "
        f"{len(manifest.shards)} shards, {num_bytes / 1e6:,.1f} MB.</p>"
        f"<h2>Where the rows went</h2><table>{funnel}</table>"
        f'<h2>Some that stayed</h2><div class="grid">{figures}</div></html>\n'
    )


def _samples(manifest_uri: str, manifest: DatasetManifest) -> list[tuple[str, str, str]]:
    """The first samples of the first shards; sample ids are hashes, so they are as if drawn."""
    samples: list[tuple[str, str, str]] = []
    for shard in manifest.shards:
        if len(samples) >= NUM_SAMPLES_SHOWN or shard.num_bytes > _MAX_SHARD_BYTES:
            break
        data = storage.read_bytes(storage.join(dataset_root(manifest_uri), shard.path))
        for _, members in read_shard(data):
            if len(samples) >= NUM_SAMPLES_SHOWN:
                break
            caption = json.loads(members["json"])["caption"]
            image = next(name for name in members if name not in ("json", "txt"))
            kind = "jpeg" if image == "jpg" else image
            samples.append((caption, kind, base64.b64encode(members[image]).decode()))
    return samples
