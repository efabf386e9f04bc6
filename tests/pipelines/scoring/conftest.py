"""Small CLIPs with random weights, and small published datasets, made on the spot."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import pytest
from PIL import Image

from infra import storage
from infra.manifest import DatasetManifest, publish_manifest
from pipelines.columns import CANONICAL_SCHEMA, sample_id
from pipelines.config import CurationConfig, ShardConfig
from pipelines.ledger import LedgerFile, count
from pipelines.shards import ShardWriter, sample_members

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

MODEL_CFG = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8, "head_width": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
PREPROCESS_CFG = {"mean": [0.5, 0.4, 0.3], "std": [0.25, 0.25, 0.3], "interpolation": "bicubic"}


def quiet_open_clip() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import open_clip
    return open_clip


def make_clip(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A folder as open_clip publishes models, with random weights."""
    import torch
    from safetensors.torch import save_file

    open_clip = quiet_open_clip()
    model_cfg = MODEL_CFG | changes
    torch.manual_seed(seed)
    network = open_clip.CLIP(**model_cfg)
    folder.mkdir(parents=True)
    described = {"model_cfg": model_cfg, "preprocess_cfg": PREPROCESS_CFG}
    (folder / "open_clip_config.json").write_text(json.dumps(described))
    tensors = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    save_file(tensors, folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clip(tmp_path_factory.mktemp("clip") / "model")


@pytest.fixture(scope="session")
def new_clip() -> Callable[..., Path]:
    return make_clip


@dataclass
class SmallDataset:
    """A published dataset and the raw images and captions in it, by sample id."""

    manifest_uri: str
    manifest: DatasetManifest
    images: dict[str, bytes]
    captions: dict[str, str]
    scores: dict[str, dict[str, Any]]

    @property
    def root(self) -> str:
        return self.manifest_uri.rsplit("/", 2)[0]


def picture(seed: int, size_px: int = 48) -> bytes:
    rng = np.random.default_rng(seed)
    tiles = rng.integers(0, 255, (4, 4, 3), dtype=np.uint8)
    image = Image.fromarray(tiles).resize((size_px, size_px), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def make_dataset(
    store_uri: str,
    num_samples: int = 20,
    per_shard: int = 6,
    *,
    name: str = "small",
    broken: Sequence[int] = (),
    copies: Sequence[tuple[int, int]] = (),
    unknown: Sequence[int] = (),
    num_ledgers: int = 2,
) -> SmallDataset:
    """Publish ``num_samples`` pictures, and as many rejected rows in the ledger.

    Sample ``broken[i]`` has bytes that are no image; of ``copies`` (a, b), b has a's picture with
    one pixel changed; ``unknown`` ones have no scores.
    """
    from tempfile import TemporaryDirectory

    root = storage.join(store_uri, "datasets", name)
    picture_of = {b: a for a, b in copies}
    rows: list[dict[str, Any]] = []
    for number in range(num_samples):
        url, caption = f"http://x.example/{number}.png", f"a picture of thing number {number}"
        known = number not in unknown
        rows.append(
            {
                "sample_id": sample_id(url, caption), "url": url, "caption": caption,
                "train_caption": caption, "captions": [{"text": caption, "origin": "alt"}],
                "original_width_px": 48, "original_height_px": 48, "image_width_px": 48,
                "image_height_px": 48, "crop_left_px": 0, "crop_top_px": 0, "width_px": 48,
                "height_px": 48, "clip_similarity": 0.3 if known else None,
                "aesthetic_score": 4.0 + number % 7 / 2 if known else None,
                "watermark_prob": number % 10 / 10 if known else None,
                "unsafe_prob": number % 5 / 10 if known else None, "aesthetic_scale": "v2",
                "sha256": f"{number:064x}", "language": None, "source": "test", "number": number,
            }
        )  # fmt: skip
    rows.sort(key=lambda row: str(row["sample_id"]))
    recipe = CurationConfig(metadata=["x"])
    images = {}
    shards, ledgers = [], []
    num_each = -(-num_samples // num_ledgers)
    with TemporaryDirectory() as folder:
        for start in range(0, num_samples, num_each):
            part = rows[start : start + num_each]
            config = ShardConfig(max_samples=per_shard)
            with ShardWriter(config, root, Path(folder)) as writer:
                for row in part:
                    number = row["number"]
                    data = picture(picture_of.get(number, number))
                    if number in picture_of:
                        data = _nudged(data)
                    if number in broken:
                        data = b"no image at all"
                    images[row["sample_id"]] = data
                    writer.add(
                        row["sample_id"], sample_members(row, data, "png", recipe.preference)
                    )
                shards += writer.finish()
            ledgers.append(_ledger(part, writer.shard_of, root, Path(folder)))
    manifest = DatasetManifest(
        name=name,
        recipe_fingerprint="0" * 64,
        shards=shards,
        ledger=sorted(ledgers, key=lambda entry: entry.path),
        counts={
            "rows_in": 2 * num_samples,
            "committed": num_samples,
            "rejected": num_samples,
            "failed": 0,
        },
        rejected={"too_small": num_samples},
        attributes={"recipe": {"preference": recipe.preference.model_dump()}},
    )
    uri = publish_manifest(root, manifest)
    captions = {row["sample_id"]: row["caption"] for row in rows}
    return SmallDataset(uri, manifest, images, captions, {row["sample_id"]: row for row in rows})


def _nudged(data: bytes) -> bytes:
    with Image.open(io.BytesIO(data)) as image:
        image.putpixel((0, 0), (1, 2, 3))
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
    return buffer.getvalue()


def _ledger(rows: list[dict[str, Any]], shard_of: dict[str, str], root: str, folder: Path) -> Any:
    names = [name for name in CANONICAL_SCHEMA.names if name != "caption"]
    schema = dict(pl.Schema(CANONICAL_SCHEMA))
    kept = [
        {name: row.get(name) for name in names}
        | {"disposition": "committed", "sha256": row["sha256"], "shard": shard_of[row["sample_id"]]}
        for row in rows
    ]
    gone = [
        {name: row.get(name) for name in names}
        | {
            "sample_id": sample_id("gone", str(row["url"])),
            "disposition": "rejected",
            "reason": "too_small",
        }
        for row in rows
    ]
    types: dict[str, Any] = {name: schema[name] for name in names} | dict.fromkeys(
        ("disposition", "reason", "sha256", "shard"), pl.String
    )
    frame = pl.DataFrame(kept + gone, schema=types)
    assert count(frame).num_rows == len(kept) + len(gone)
    with LedgerFile(folder, "test") as ledger:
        ledger.add(frame)
        return ledger.publish(root)


@pytest.fixture
def new_dataset() -> Callable[..., SmallDataset]:
    return make_dataset


@pytest.fixture(scope="module")
def spark(
    tmp_path_factory: pytest.TempPathFactory, _session_s3_server: Any
) -> Iterator[Callable[[], SparkSession]]:
    from infra.sessions import ClusterConfig, spark_session, stop_spark

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATELIER_HOME", str(tmp_path_factory.mktemp("home")))
        session = spark_session("scoring", ClusterConfig(), _session_s3_server.environment)
        yield lambda: session
        stop_spark(session)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ATELIER_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def brute_force(folder: Path, images: Sequence[bytes], captions: Sequence[str]) -> Any:
    """Image and text embeddings straight from open_clip, float64 of length one."""
    import torch

    open_clip = quiet_open_clip()
    network, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    network.eval()
    tokenize = open_clip.get_tokenizer("ViT-B-32")
    with torch.no_grad():
        batch = torch.stack([transform(Image.open(io.BytesIO(data))) for data in images])
        made = [network.encode_image(batch), network.encode_text(tokenize(list(captions)))]
    return [torch.nn.functional.normalize(each.double(), dim=-1).numpy() for each in made]


@pytest.fixture(scope="session")
def direct() -> Callable[..., Any]:
    return brute_force
