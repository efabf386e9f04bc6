"""Samples per second of our loaders and of three others, on the same samples, from S3 on loopback.

The others that are no dependency of ours are found in the folder ``ATELIER_BENCH_PEERS``, made with
``pip install --target <folder> --no-deps litdata mosaicml-streaming`` and what they import.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from infra import storage
from infra.digests import sha256_bytes
from infra.manifest import DatasetManifest, ShardEntry, publish_manifest, shard_path
from tests.conftest import S3Server
from training.token_format import CachedSample, CacheEntry, CacheManifest, write_tokens

pytestmark = pytest.mark.bench

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPT = Path(__file__).with_name("loader_readers.py")
READERS = ("ours", "webdataset", "litdata", "mosaicml-streaming")
NUM_SHARDS = int(os.environ.get("ATELIER_BENCH_SHARDS", "16"))
PER_SHARD, GRID, SIDE_PX = 512, 16, 256
TRIES = int(os.environ.get("ATELIER_BENCH_TRIES", "3"))
RATES = ("first", "second", "per_cpu_second")
CAPTION = " ".join(["a red fox that sits in deep snow below a hill with two houses"] * 4)


def _jpeg(rng: np.random.Generator) -> bytes:
    small = rng.integers(0, 255, (24, 24, 3), dtype=np.uint8)
    image = Image.fromarray(small).resize((SIDE_PX, SIDE_PX), Image.Resampling.BICUBIC)
    sink = io.BytesIO()
    image.save(sink, "JPEG", quality=92)
    return sink.getvalue()


def _known(sample_id: str) -> dict[str, Any]:
    captions = [{"origin": "alt", "text": "a fox"}, {"origin": "synthetic", "text": CAPTION}]
    return {"sample_id": sample_id, "caption": CAPTION, "captions": captions}


def _tar(members: list[tuple[str, bytes]]) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return sink.getvalue()


def _npy(array: np.ndarray[Any, Any]) -> bytes:
    sink = io.BytesIO()
    np.save(sink, array, allow_pickle=False)
    return sink.getvalue()


class _Made:
    """The same samples in every loader's own form, in one bucket."""

    def __init__(self, root: str, scratch: Path, peers: list[str]) -> None:
        self.root, self.scratch = root, scratch
        self.shards: list[ShardEntry] = []
        self.entries: list[CacheEntry] = []
        self.tokens_tars: list[str] = []
        self.images: list[dict[str, Any]] = []
        self.tokens: list[dict[str, Any]] = []
        rng = np.random.default_rng(0)
        for number in range(NUM_SHARDS):
            self._add_shard(number, rng)
        counts = {"rows_in": len(self.images), "committed": len(self.images)}
        ledger = {**counts, "rejected": 0, "failed": 0}
        manifest = DatasetManifest("bench", "0" * 64, self.shards, [], ledger)
        manifest_uri = publish_manifest(root, manifest)
        cache = CacheManifest("0" * 64, "0" * 64, SIDE_PX, "center", self.entries)
        tokens_uri = storage.join(root, "tokens", "x", "1", "manifest.json")
        storage.write_json(tokens_uri, cache.to_json())
        image_tars = [storage.join(root, shard.path) for shard in self.shards]
        self.job: dict[str, Any] = {
            "manifest_uri": manifest_uri,
            "tokens_uri": tokens_uri,
            "num_samples": len(self.images),
            "images_urls": [_presigned(uri) for uri in image_tars],
            "tokens_urls": [_presigned(uri) for uri in self.tokens_tars],
            "peers": peers,
            "scratch": str(scratch),
        }

    def _add_shard(self, number: int, rng: np.random.Generator) -> None:
        ids = [f"{number:06x}{row:010x}" for row in range(PER_SHARD)]
        pictures = [_jpeg(rng) for _ in ids]
        grids = rng.integers(0, 8192, (PER_SHARD, GRID, GRID)).astype(np.uint16)
        known = [json.dumps(_known(each)).encode() for each in ids]
        tars: dict[str, list[tuple[str, bytes]]] = {"jpg": [], "npy": []}
        for row, each in enumerate(ids):
            for kind, data in (("jpg", pictures[row]), ("npy", _npy(grids[row]))):
                tars[kind] += [(f"{each}.{kind}", data), (f"{each}.json", known[row])]
            self.images.append({"jpg": pictures[row], "caption": CAPTION})
            self.tokens.append({"tokens": grids[row], "caption": CAPTION})
        data = _tar(tars["jpg"])
        digest = sha256_bytes(data)
        storage.write_bytes(storage.join(self.root, shard_path(digest)), data)
        self.shards.append(ShardEntry(shard_path(digest), len(data), digest, PER_SHARD))
        uri = storage.join(self.root, "tars", f"tokens-{number}.tar")
        storage.write_bytes(uri, _tar(tars["npy"]))
        self.tokens_tars.append(uri)
        captions = (("alt", "a fox"), ("synthetic", CAPTION))
        samples = [CachedSample(each, 400, 300, 0, 0, 0.3, 5.5, captions) for each in ids]
        packed = write_tokens(samples, grids)
        storage.write_bytes(storage.join(self.root, "tokens", "x", f"{number}.parquet"), packed)
        self.entries.append(
            CacheEntry(
                path=f"{number}.parquet",
                num_bytes=len(packed),
                sha256=sha256_bytes(packed),
                num_samples=PER_SHARD,
                shard_sha256=digest,
                grid_height=GRID,
                grid_width=GRID,
                num_with_origin={"alt": PER_SHARD, "synthetic": PER_SHARD},
            )
        )

    def for_others(self) -> None:
        """Write what LitData and Streaming read, where they are installed."""
        sys.path.extend(self.job["peers"])
        for what, samples in (("images", self.images), ("tokens", self.tokens)):
            for name, write in (("litdata", _write_litdata), ("mds", _write_mds)):
                folder = self.scratch / f"{name}-{what}"
                try:
                    write(folder, samples, what)
                except ImportError:
                    continue
                uri = storage.join(self.root, name, what)
                for path in sorted(p for p in folder.rglob("*") if p.is_file()):
                    target = storage.join(uri, path.relative_to(folder).as_posix())
                    storage.write_bytes(target, path.read_bytes())
                self.job[f"{name}_{what}"] = uri


def _write_litdata(folder: Path, samples: list[dict[str, Any]], what: str) -> None:
    from litdata.streaming.writer import BinaryWriter

    folder.mkdir()
    writer = BinaryWriter(str(folder), chunk_size=PER_SHARD)
    for number, sample in enumerate(samples):
        writer[number] = sample
    writer.done()
    writer.merge()


def _write_mds(folder: Path, samples: list[dict[str, Any]], what: str) -> None:
    from streaming import MDSWriter

    columns = {"jpg": "bytes"} if what == "images" else {"tokens": "ndarray:uint16"}
    limit = sum(len(each["jpg"]) for each in samples[:PER_SHARD]) if what == "images" else 1 << 20
    with MDSWriter(out=str(folder), columns={**columns, "caption": "str"}, size_limit=limit) as out:
        for sample in samples:
            out.write(sample)


def _presigned(uri: str) -> str:
    import boto3
    from botocore.config import Config

    bucket, _, key = uri.removeprefix("s3://").partition("/")
    signed = Config(signature_version="s3v4")
    client = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL_S3"], config=signed)
    parameters = {"Bucket": bucket, "Key": key}
    return str(client.generate_presigned_url("get_object", Params=parameters, ExpiresIn=7200))


def _read(reader: str, what: str, job: Path) -> dict[str, float] | str:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), reader, what, str(job)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    for line in done.stdout.splitlines():
        if line.startswith("RATES "):
            rates: dict[str, float] = json.loads(line.removeprefix("RATES "))
            return rates
    if os.environ.get("ATELIER_BENCH_VERBOSE"):
        print(done.stderr[-3000:])
    return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:200]


@pytest.mark.timeout(3600)
def test_samples_per_second(own_s3_server: S3Server, tmp_path: Path) -> None:
    peers = [folder for folder in [os.environ.get("ATELIER_BENCH_PEERS")] if folder]
    made = _Made(f"{own_s3_server.store_uri}/datasets/bench", tmp_path, peers)
    made.for_others()
    path = tmp_path / "job.json"
    path.write_text(json.dumps(made.job))
    for what in ("tokens", "images"):
        found: dict[str, list[dict[str, float]]] = {reader: [] for reader in READERS}
        problems: dict[str, str] = {}
        for _ in range(TRIES):  # in turns, so that a busy moment meets all of them
            for reader in READERS:
                rates = _read(reader, what, path)
                if isinstance(rates, str):
                    problems[reader] = rates
                else:
                    found[reader].append(rates)
        print(f"\nbench  {what}: {made.job['num_samples']} samples, batches of 64, best of {TRIES}")
        assert found["ours"], problems
        best = {
            reader: {name: max(r[name] for r in all_rates) for name in RATES}
            for reader, all_rates in found.items()
            if all_rates
        }
        for reader in READERS:
            if reader not in best:
                print(f"  {reader:<20} {problems[reader]}")
                continue
            first, second, per_cpu = (best[reader][name] for name in RATES)
            resumes = [r["resume"] for r in found[reader] if "resume" in r]
            resume = f"{min(resumes):.2f} s" if resumes else "cannot"
            print(
                f"  {reader:<20} first epoch {first:7.0f}/s  second {second:7.0f}/s  both "
                f"{per_cpu:7.0f} per CPU second  ours/this "
                f"{best['ours']['first'] / first:5.2f} {best['ours']['second'] / second:5.2f} "
                f"{best['ours']['per_cpu_second'] / per_cpu:5.2f}  goes on mid-epoch in {resume}"
            )
        shares = [r["position_share"] for r in found["ours"]]
        print(f"  the position is taken at every batch: {100 * max(shares):.3f} % of the time")
