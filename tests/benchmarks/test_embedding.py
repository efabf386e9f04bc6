"""Images per second of our embedding and of plain `clip_inference`, on the same shards."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.bench

ROOT = Path(__file__).resolve().parent.parent.parent
NUM_IMAGES, NUM_SHARDS, SIDE_PX, BATCH = 1024, 4, 256, 64
MODEL_CFG = {
    "embed_dim": 256,
    "vision_cfg": {"image_size": 224, "layers": 6, "width": 384, "patch_size": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 256, "heads": 4, "layers": 3},
}

# Both say how long they took from the first call to the last byte, model and imports included.
OURS = """
import sys, time
started = time.perf_counter()
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from pipelines.clip_model import publish_weights
from pipelines.embed import embed_shard
from pipelines.embeddings import finished_units, plan_embeddings, publish_embeddings, store_of
from pipelines.scoring_config import ClipConfig
uri, model, precision, batch = sys.argv[1:]
config = ClipConfig(folder=model, precision=precision, batch_size=int(batch), num_threads=2)
job = plan_embeddings(uri, config)
weights = publish_weights(job.weights, job.unit.identity.weights_sha256, store_of(uri))
unit = replace(job.unit, weights_uri=weights)
for number, shard in enumerate(job.manifest.shards):
    with TemporaryDirectory() as folder:
        embed_shard(unit, shard, Path(folder))
    if number == 0:
        first = time.perf_counter()
publish_embeddings(job, finished_units(job))
ended = time.perf_counter()
print("SECONDS", ended - started, ended - first)
"""
THEIRS = """
import os, sys, time
def main():
    started = time.perf_counter()
    import open_clip
    from clip_retrieval import clip_inference
    shards, model, out, batch = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
    open_clip.add_model_config(os.path.join(model, "named"))
    clip_inference(
        input_dataset=shards, output_folder=out, input_format="webdataset", enable_metadata=False,
        batch_size=batch, num_prepro_workers=2, distribution_strategy="sequential", use_jit=False,
        output_partition_count=1, enable_wandb=False, wds_image_key="jpg",
        clip_model=f"open_clip:bench/{model}/open_clip_model.safetensors",
    )
    print("SECONDS", time.perf_counter() - started)
if __name__ == "__main__":
    main()
"""


def make_model(folder: Path) -> Path:
    from safetensors.torch import save_file

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import open_clip
    (folder / "named").mkdir(parents=True)
    (folder / "named" / "bench.json").write_text(json.dumps(MODEL_CFG))
    described = {"model_cfg": MODEL_CFG, "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(described))
    tensors = {k: v.contiguous() for k, v in open_clip.CLIP(**MODEL_CFG).state_dict().items()}
    save_file(tensors, folder / "open_clip_model.safetensors")
    return folder


def make_shards(store: Path) -> tuple[str, list[str]]:
    from infra.manifest import DatasetManifest, publish_manifest
    from pipelines.columns import sample_id
    from pipelines.config import ShardConfig
    from pipelines.shards import ShardWriter

    root = (store / "datasets" / "bench").as_uri()
    rng = np.random.default_rng(0)
    samples = {}
    for number in range(NUM_IMAGES):
        tiles = rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)
        image = Image.fromarray(tiles).resize((SIDE_PX, SIDE_PX), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=95)
        caption = f"picture number {number} of many"
        key = sample_id(str(number), caption)
        known = json.dumps({"sample_id": key}).encode()
        samples[key] = {"jpg": buffer.getvalue(), "json": known, "txt": caption.encode()}
    config = ShardConfig(max_samples=NUM_IMAGES // NUM_SHARDS)
    with ShardWriter(config, root, store) as writer:
        for key in sorted(samples):
            writer.add(key, samples[key])
        shards = writer.finish()
    counts = {"rows_in": NUM_IMAGES, "committed": NUM_IMAGES, "rejected": 0, "failed": 0}
    manifest = DatasetManifest("bench", "0" * 64, shards, [], counts)
    uri = publish_manifest(root, manifest)
    return uri, [str(store / "datasets" / "bench" / shard.path) for shard in shards]


def seconds_of(script: Path, *arguments: str, home: Path) -> list[float]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), *arguments],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "ATELIER_HOME": str(home),
             "PYTHONDONTWRITEBYTECODE": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    said = done.stdout.partition("SECONDS")[2].splitlines()[0]
    return [float(each) for each in said.split()]


@pytest.mark.timeout(1800)
def test_embedding_beside_plain_clip_inference(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    (tmp_path / "store").mkdir()
    uri, shards = make_shards(tmp_path / "store")
    for name, code in (("ours", OURS), ("theirs", THEIRS)):
        (tmp_path / f"{name}.py").write_text(code)
    braces = "{" + ",".join(shards) + "}"
    (theirs,) = seconds_of(
        tmp_path / "theirs.py", braces, str(model), str(tmp_path / "out"), str(BATCH), home=tmp_path
    )
    rates = {"clip_inference, with its start": NUM_IMAGES / theirs}
    for precision in ("fp32", "bf16"):
        whole, rest = seconds_of(
            tmp_path / "ours.py", uri, str(model), precision, str(BATCH), home=tmp_path
        )
        rates[f"ours in {precision}, with its start"] = NUM_IMAGES / whole
        rates[f"ours in {precision}, once started"] = NUM_IMAGES * (1 - 1 / NUM_SHARDS) / rest
    for name, rate in rates.items():
        print(f"\nbench  {name:<44} {rate:.0f} images/s")
    ratio = rates["ours in fp32, with its start"] / rates["clip_inference, with its start"]
    print(f"\nbench  {'ours / clip_inference, fp32':<44} {ratio:.2f}")
