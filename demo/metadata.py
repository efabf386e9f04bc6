"""The painted world's metadata: Parquet in LAION's v2-aesthetics schema, with that schema's traps.

`build_world` writes, for the same configuration the same bytes:
  metadata/part-*.parquet   URL, TEXT, WIDTH, HEIGHT, similarity, punsafe, pwatermark,
                            AESTHETIC_SCORE, hash, __index_level_0__
  captions/long.parquet     url, caption, model: long captions from the scene graph
  truth/rows.parquet        url, trap, expected ("committed", "rejected", "failed"), scene as JSON
  images.json               what the web server answers for each URL
  world.json                the configuration and the count of each trap; written last
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from demo.captions import CAPTIONER, alt_text, long_caption
from demo.world import Scene, WorldConfig, sample_scene

HOSTS = ("gallery.example", "museum.example", "archive.example")
FORMATS = ("png", "png", "jpg", "webp")
SOUND = "sound"

# What a careful curation does with each kind of row. "either" depends on the recipe's filters.
EXPECTED = {
    SOUND: "committed",
    "null_watermark": "either",
    "null_aesthetic": "either",
    "wrong_size": "committed",
    "duplicate_url": "rejected",
    "duplicate_image": "rejected",
    "watermarked": "rejected",
    "low_resolution": "rejected",
    "extreme_aspect": "rejected",
    "low_aesthetic": "rejected",
    "unsafe": "rejected",
    "short_caption": "rejected",
    "hostile_url": "rejected",
    "opted_out": "rejected",
    "not_an_image": "rejected",
    "dead_404": "failed",
    "dead_500": "failed",
    "short_body": "failed",
    "redirect_loop": "rejected",
    "redirect_internal": "rejected",
}
HOSTILE_URLS = (
    "file:///etc/passwd",
    "http://169.254.169.254/latest/meta-data/{n}",
    "http://127.0.0.1/{n}.png",
    "http://2130706433/{n}.png",
    "http://0x7f.1/{n}.png",
    "http://[::ffff:127.0.0.1]/{n}.png",
    "http://user:secret@gallery.example/{n}.png",
    "ftp://gallery.example/{n}.png",
    "http://gallery.example:6379/{n}.png",
    "data:image/png;base64,AAAA{n}",
)
_FAULTS = {
    "dead_404": "404",
    "dead_500": "500",
    "short_body": "short-body",
    "redirect_loop": "redirect-loop",
    "redirect_internal": "redirect-internal",
    "not_an_image": "html",
}

SCHEMA = pa.schema(
    [
        ("URL", pa.string()),
        ("TEXT", pa.string()),
        ("WIDTH", pa.float64()),
        ("HEIGHT", pa.float64()),
        ("similarity", pa.float64()),
        ("punsafe", pa.float32()),
        ("pwatermark", pa.float32()),
        ("AESTHETIC_SCORE", pa.float32()),
        ("hash", pa.int64()),
        ("__index_level_0__", pa.int64()),
    ]
)


@dataclass
class Row:
    """One metadata row and the image behind it."""

    url: str
    text: str
    width: float
    height: float
    similarity: float
    unsafe: float | None
    watermark: float | None
    aesthetic: float | None
    hash: int
    trap: str
    scene: Scene
    image: dict[str, Any] = field(default_factory=dict)
    long_caption: str = ""


def build_world(config: WorldConfig, folder: str | Path) -> Path:
    """Write the world below `folder` and return it. Finished worlds are kept as they are."""
    folder = Path(folder)
    stamp = {"config": config.model_dump(mode="json"), "version": 1}
    world_file = folder / "world.json"
    if world_file.is_file():
        known = json.loads(world_file.read_text())
        if {key: known.get(key) for key in stamp} == json.loads(json.dumps(stamp)):
            return folder
        world_file.unlink()
    rows = make_rows(config)
    for name in ("metadata", "captions", "truth"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for old in (folder / "metadata").glob("*.parquet"):
        old.unlink()
    _write_metadata(rows, config, folder / "metadata")
    _write_captions(rows, folder / "captions" / "long.parquet")
    _write_truth(rows, folder / "truth" / "rows.parquet")
    images = {row.url.removeprefix("http://"): row.image for row in rows if row.image}
    (folder / "images.json").write_text(json.dumps(images))
    counts = dict(sorted(Counter(row.trap for row in rows).items()))
    world_file.write_text(json.dumps({**stamp, "num_rows": len(rows), "rows": counts}, indent=1))
    return folder


def make_rows(config: WorldConfig) -> list[Row]:
    """All rows, in order; row i depends on the seed and i (a duplicate on an earlier row too)."""
    traps = [trap for trap in EXPECTED if trap != SOUND]
    rows: list[Row] = []
    originals: list[Row] = []
    for index in range(config.num_rows):
        rng = np.random.default_rng([config.seed, 1, index])
        trap = SOUND
        if rng.random() < config.trap_ratio and originals:
            trap = str(rng.choice(traps))
        row = _sound_row(rng, index, config)
        if trap == SOUND:
            originals.append(row)
        else:
            original = originals[int(rng.integers(len(originals)))]
            row = _spoil(row, trap, rng, index, original)
        rows.append(row)
    return rows


def _sound_row(rng: np.random.Generator, index: int, config: WorldConfig) -> Row:
    scene = sample_scene(rng, config)
    short = int(rng.choice(config.native_sizes_px))
    width, height = [(short, short), (short * 5 // 4, short), (short, short * 5 // 4)][
        int(rng.choice(3, p=(0.7, 0.15, 0.15)))
    ]
    aesthetic = float(np.round(rng.uniform(4.6, 9.0), 3))
    extension = str(rng.choice(FORMATS))
    url = f"http://{rng.choice(HOSTS)}/images/{config.seed}-{index:07d}.{extension}"
    noise = 0.0 if config.clean_images else max(0.0, 9.0 - aesthetic) * 1.5
    image = {
        "scene": asdict(scene),
        "width": width,
        "height": height,
        "format": extension,
        "noise": noise,
        "seed": index,
    }
    return Row(
        url,
        alt_text(scene, rng, config),
        float(width),
        float(height),
        float(np.round(rng.uniform(0.28, 0.42), 4)),
        float(np.round(rng.beta(1, 30), 5)),
        float(np.round(rng.beta(1, 12), 5)),
        aesthetic,
        int(rng.integers(-(2**62), 2**62)),
        SOUND,
        scene,
        image,
        long_caption(scene, rng, config),
    )


def _spoil(row: Row, trap: str, rng: np.random.Generator, index: int, original: Row) -> Row:
    """The row with one thing wrong."""
    row.trap = trap
    if trap == "null_watermark":
        row.watermark = None
    elif trap == "null_aesthetic":
        row.aesthetic = None
    elif trap == "wrong_size":
        row.width, row.height = row.width * 2, row.height * 2
    elif trap == "duplicate_url":
        row = replace(original, text=row.text, trap=trap, image={}, long_caption="")
        row.aesthetic = max(4.55, (original.aesthetic or 5.0) - 0.05)
    elif trap == "duplicate_image":
        url = f"http://{HOSTS[2]}/copies/{index:07d}.{original.image['format']}"
        row = replace(original, url=url, trap=trap, text=row.text)
        row.aesthetic = max(4.55, (original.aesthetic or 5.0) - 0.05)
    elif trap == "watermarked":
        row.watermark = float(np.round(rng.uniform(0.81, 0.99), 4))
        row.image["watermark"] = True
    elif trap == "low_resolution":
        row.width, row.height = 48.0, 48.0
        row.image |= {"width": 48, "height": 48}
    elif trap == "extreme_aspect":
        row.width *= 6
        row.image["width"] = int(row.width)
    elif trap == "low_aesthetic":
        row.aesthetic = float(np.round(rng.uniform(1.0, 4.3), 3))
        row.image["noise"] = 60.0
    elif trap == "unsafe":
        row.unsafe = float(np.round(rng.uniform(0.6, 1.0), 4))
    elif trap == "short_caption":
        row.text = str(rng.choice(["", "img", "  "]))
    elif trap == "hostile_url":
        row.url = HOSTILE_URLS[index % len(HOSTILE_URLS)].format(n=index)
        row.image = {}
    elif trap == "opted_out":
        row.image["headers"] = {"X-Robots-Tag": "noai"}
    else:
        row.url = f"http://{HOSTS[0]}/fault/{_FAULTS[trap]}/{index:07d}.png"
        row.image = {}
    return row


def _write_metadata(rows: list[Row], config: WorldConfig, folder: Path) -> None:
    for part in range(config.num_parts):
        mine = list(range(part, len(rows), config.num_parts))
        chosen = [rows[i] for i in mine]
        columns = [
            [row.url for row in chosen],
            [row.text for row in chosen],
            [row.width for row in chosen],
            [row.height for row in chosen],
            [row.similarity for row in chosen],
            [row.unsafe for row in chosen],
            [row.watermark for row in chosen],
            [row.aesthetic for row in chosen],
            [row.hash for row in chosen],
            mine,
        ]
        arrays = [pa.array(c, f.type) for c, f in zip(columns, SCHEMA, strict=True)]
        pq.write_table(pa.table(arrays, schema=SCHEMA), folder / f"part-{part:05d}.snappy.parquet")


def _write_captions(rows: list[Row], path: Path) -> None:
    captions = {row.url: row.long_caption for row in rows if row.long_caption and row.image}
    table = pa.table(
        {
            "url": list(captions),
            "caption": list(captions.values()),
            "model": [CAPTIONER] * len(captions),
        }
    )
    pq.write_table(table, path)


def _write_truth(rows: list[Row], path: Path) -> None:
    table = pa.table(
        {
            "url": [row.url for row in rows],
            "text": [row.text for row in rows],
            "trap": [row.trap for row in rows],
            "expected": [EXPECTED[row.trap] for row in rows],
            "scene": [json.dumps(asdict(row.scene)) for row in rows],
        }
    )
    pq.write_table(table, path)
