"""One partition's fetch: the order of asking, and what is in memory meanwhile."""

from __future__ import annotations

import random
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pytest

from pipelines.columns import DIGESTS, sample_id
from pipelines.config import CurationConfig
from pipelines.read_rows import TRAVEL_SCHEMA
from pipelines.stage_images import fetch_rows, prepared_rows, spread_by_host


def frame(urls: list[str], reasons: list[str | None] | None = None) -> pl.DataFrame:
    known = {"url": urls, "reason": reasons or [None] * len(urls)}
    known |= {name: [None] * len(urls) for name in DIGESTS}
    return pl.DataFrame(known, schema=dict.fromkeys(known, pl.String))


def test_every_host_is_spread_over_the_whole_partition() -> None:
    urls = [f"http://big.example/{n}" for n in range(60)]
    urls += [f"http://mid.example:81/{n}?http://x" for n in range(30)]
    urls += [f"http://small-{n}.example" for n in range(10)]
    random.Random(0).shuffle(urls)  # as digests order them
    found = spread_by_host(frame(urls))
    assert sorted(found) == list(enumerate(urls))
    for start in range(0, 100, 20):
        kinds = Counter(url.split("/")[2].split("-")[0] for _, url in found[start : start + 20])
        assert 10 <= kinds["big.example"] <= 14
        assert 5 <= kinds["mid.example:81"] <= 7
    assert spread_by_host(frame(urls)) == found


def test_rows_with_a_reason_and_odd_urls_do_not_upset_the_order() -> None:
    urls = ["http://a.example/1", "nonsense", "", "http://a.example/2"]
    assert spread_by_host(frame(urls, [None, None, None, "too_small"])) == [
        (0, "http://a.example/1"), (1, "nonsense"), (2, ""),
    ]  # fmt: skip
    assert spread_by_host(frame([])) == []


def test_bodies_in_memory_are_bounded_while_the_decoder_is_slow(
    tmp_path: Path, monkeypatch: Any
) -> None:
    """However fast the network: ``num_threads`` bodies wait, and one is decoded."""
    lock = threading.Lock()
    held, most = 0, 0

    class Network:
        def fetch(self, url: str) -> bytes:
            nonlocal held, most
            with lock:
                held += 1
                most = max(most, held)
            return url.encode()

    def slow(_: Any, body: bytes) -> Any:
        nonlocal held
        threading.Event().wait(0.005)
        with lock:
            held -= 1
        raise ValueError(body.decode())

    monkeypatch.setattr("pipelines.decoder.Decoder.store", slow)
    config = CurationConfig.model_validate({"metadata": ["x"], "fetch": {"num_threads": 4}})
    urls = [f"http://a.example/{n}" for n in range(60)]
    (rows,) = fetch_rows(frame(urls), [config], Network(), tmp_path)
    assert rows["url"].to_list() == urls
    assert set(rows["reason"]) == {"internal_error"}
    assert 4 <= most <= 5


@pytest.mark.parametrize("is_reversed", [False, True])
def test_an_image_of_many_comparisons_keeps_the_share_it_won(is_reversed: bool) -> None:
    """Pick-a-Pic: the row that stays is one of several, and its own label says little."""
    won: dict[str, list[float | None]] = {
        "http://a.example/1": [1.0, 0.0, 1.0, 0.5],
        "http://a.example/2": [None],
    }
    rows = [
        {"url": url, "caption": "a fox", "sample_id": sample_id(url, "a fox"),
         "human_preference": label, "is_caption": False}
        for url, labels in won.items() for label in labels
    ]  # fmt: skip
    table = pa.Table.from_pylist(rows[:: -1 if is_reversed else 1], TRAVEL_SCHEMA)
    found = prepared_rows(table, CurationConfig(metadata=["x"]))
    kept = found.filter(pl.col("reason").is_null()).sort("url")
    assert kept["human_preference"].to_list() == [0.625, None]
    assert found["reason"].drop_nulls().to_list() == ["duplicate_row"] * 3
