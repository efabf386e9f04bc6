"""Reads one dataset with one loader: ``loader_readers.py <reader> <what> <job.json>``.

Prints a JSON line with the samples per second of two epochs, the first from empty caches, and the
seconds to the first batch of a new process that goes on in the middle of an epoch. Imports are not
counted; workers' starts are, because a training pays them.
"""

from __future__ import annotations

import gc
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import boto3  # noqa: F401  (all read through it: none pays for its import)
import numpy as np
import torch

BATCH = 64
WORKERS = 2


def consume(batches: Iterable[Any], wanted: int) -> int:
    """How many samples were taken until ``wanted`` were there or the loader ended."""
    taken = 0
    for batch in batches:
        pixels_or_tokens = batch[0]
        assert len(pixels_or_tokens) == len(batch[1])
        assert int(pixels_or_tokens.reshape(-1)[0]) >= 0
        taken += len(batch[1])
        if taken >= wanted:
            break
    return taken


def measured(epoch: Callable[[], Iterable[Any]], num_samples: int) -> dict[str, float]:
    rates, began, all_taken = {}, cpu_seconds(), 0
    for name in ("first", "second"):
        started = time.perf_counter()
        taken = consume(epoch(), num_samples)
        rates[name] = taken / (time.perf_counter() - started)
        all_taken += taken
    gc.collect()  # workers end, and their times are known
    time.sleep(1.0)
    rates["per_cpu_second"] = all_taken / (cpu_seconds() - began)
    return rates


def cpu_seconds() -> float:
    """Of this process and of those that it waited for: what a busy machine does not change."""
    return sum(os.times()[:4])


def resumed(make: Callable[[], Iterable[Any]]) -> float:
    """Seconds to the first batch."""
    started = time.perf_counter()
    consume(make(), 1)
    return time.perf_counter() - started


def decode(data: bytes) -> torch.Tensor:
    """What every reader does with an image: Pillow to RGB, uint8 (3, H, W)."""
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        return torch.from_numpy(np.asarray(image.convert("RGB")).copy()).permute(2, 0, 1)


# --- ours ----------------------------------------------------------------------------------------


def ours_images(job: dict[str, Any]) -> dict[str, float]:
    from training.image_data import ImageBatches, ImageOrder

    def reader() -> ImageBatches:
        order = ImageOrder(resolution_px=256, global_batch_size=BATCH)
        return ImageBatches(job["manifest_uri"], order)

    state: dict[str, Any] = {}
    saving = 0.0

    def epoch() -> Iterator[Any]:
        nonlocal saving
        batches = reader()
        if state:
            batches.load_state_dict(state)
        for batch in batches:
            started = time.perf_counter()
            state.update(json.loads(json.dumps(batches.state_dict())))
            saving += time.perf_counter() - started
            yield batch.images_B3HW, batch.known

    rates = measured(epoch, job["num_samples"])
    seconds = sum(job["num_samples"] / rate for rate in rates.values())
    rates["position_share"] = saving / seconds
    rates["resume"] = resumed(epoch)
    return rates


def ours_tokens(job: dict[str, Any]) -> dict[str, float]:
    from training.config import StageConfig
    from training.token_cache import open_tokens

    config = StageConfig(
        dataset="bench",
        resolution_px=256,
        steps=10,
        global_batch_size=BATCH,
        caption_mix={"alt": 0.5, "synthetic": 0.5},
    )
    number = 0

    def epoch() -> Iterator[Any]:
        nonlocal number
        dataset = open_tokens(job["tokens_uri"], config)
        while True:
            batch = dataset.batch_at(number)
            number += 1
            yield batch.tokens_BHW, batch.captions

    rates = measured(epoch, job["num_samples"])
    number = number // 2 + 1
    rates["position_share"] = 0.0
    rates["resume"] = resumed(epoch)
    return rates


# --- the others ----------------------------------------------------------------------------------


def loader(dataset: Any, **options: Any) -> Any:
    return torch.utils.data.DataLoader(dataset, num_workers=WORKERS, **options)


def webdataset(job: dict[str, Any], what: str) -> dict[str, float]:
    import webdataset as wds

    urls = [f"pipe:curl -s -f '{url}'" for url in job[f"{what}_urls"]]

    def sample(each: dict[str, Any]) -> tuple[torch.Tensor, str]:
        known = json.loads(each["json"])
        if what == "images":
            return decode(each["jpg"]), known["caption"]
        tokens = np.load(io.BytesIO(each["npy"])).astype(np.int64)
        return torch.from_numpy(tokens), known["caption"]

    def epoch() -> Iterable[Any]:
        source = wds.WebDataset(urls, shardshuffle=len(urls), seed=0).shuffle(2048)
        batches: Iterable[Any] = loader(source.map(sample).batched(BATCH), batch_size=None)
        return batches

    return measured(epoch, job["num_samples"])


def litdata(job: dict[str, Any], what: str) -> dict[str, float]:
    import litdata.streaming.downloader as downloader
    from litdata import StreamingDataLoader, StreamingDataset

    downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = "true"  # the server is on loopback
    cache = tempfile.mkdtemp(prefix="litdata-", dir=job["scratch"])

    def sample(each: dict[str, Any]) -> tuple[torch.Tensor, str]:
        if what == "images":
            return decode(each["jpg"]), each["caption"]
        return torch.from_numpy(np.asarray(each["tokens"]).astype(np.int64)), each["caption"]

    def make() -> Any:
        dataset = StreamingDataset(
            job[f"litdata_{what}"],
            cache_dir=cache,
            shuffle=True,
            transform=sample,
            storage_options={"endpoint_url": os.environ["AWS_ENDPOINT_URL_S3"]},
        )
        return StreamingDataLoader(dataset, batch_size=BATCH, num_workers=WORKERS)

    rates = measured(make, job["num_samples"])
    half = make()
    consume(half, job["num_samples"] // 2)
    state = half.state_dict()

    def going_on() -> Any:
        again = make()
        again.load_state_dict(state)
        return again

    rates["resume"] = resumed(going_on)
    return rates


def streaming(job: dict[str, Any], what: str) -> dict[str, float]:
    from streaming import StreamingDataLoader, StreamingDataset

    os.environ["S3_ENDPOINT_URL"] = os.environ["AWS_ENDPOINT_URL_S3"]

    class Samples(StreamingDataset):  # type: ignore[misc, unused-ignore]
        def __getitem__(self, at: Any) -> Any:
            each = super().__getitem__(at)
            if what == "images":
                return decode(each["jpg"]), each["caption"]
            return torch.from_numpy(each["tokens"].astype(np.int64)), each["caption"]

    local = tempfile.mkdtemp(prefix="mds-", dir=job["scratch"])
    options = {"remote": job[f"mds_{what}"], "local": local, "shuffle": True, "batch_size": BATCH}
    opened: list[Any] = []  # one for all epochs, opened in the first as everybody's is

    def make() -> Any:
        if not opened:
            opened.append(Samples(**options))
        return StreamingDataLoader(opened[0], batch_size=BATCH, num_workers=WORKERS)

    rates = measured(make, job["num_samples"])
    half = make()
    consume(half, job["num_samples"] // 2)
    state = half.state_dict()

    def going_on() -> Any:
        again = make()
        again.load_state_dict(state)
        return again

    rates["resume"] = resumed(going_on)
    return rates


def main() -> None:
    reader, what, path = sys.argv[1:]
    with open(path, encoding="utf-8") as file:
        job = json.load(file)
    sys.path.extend(job["peers"])
    own: dict[str, Callable[[dict[str, Any]], dict[str, float]]] = {
        "images": ours_images,
        "tokens": ours_tokens,
    }
    others = {"webdataset": webdataset, "litdata": litdata, "mosaicml-streaming": streaming}
    rates = own[what](job) if reader == "ours" else others[reader](job, what)
    print("RATES", json.dumps(rates))
    sys.stdout.flush()
    os._exit(0)  # whatever threads a loader left behind


if __name__ == "__main__":
    main()
