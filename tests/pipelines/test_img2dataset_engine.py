"""img2dataset as the engine: its pixels, our guard, and every row accounted for."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from PIL import Image
from pydantic import ValidationError

from pipelines.columns import DIGESTS
from pipelines.config import CurationConfig
from pipelines.fetch import Fetcher
from pipelines.stage_images import fetch_rows, images_path

HOST = "http://evil.example"


def config(web: Any, **changes: Any) -> CurationConfig:
    fetch = changes.pop("fetch", {})
    known: dict[str, Any] = {
        "metadata": ["x"],
        "filters": {"min_width_px": 128, "min_height_px": 128, "max_aspect_ratio": 3.0},
        "resize": {"image_size_px": 64, "crop": "none"},
    }
    ours = {"engine": "img2dataset", "max_bytes": 200_000, "total_deadline_seconds": 5.0}
    asked = web.config(**(ours | fetch))
    return CurationConfig.model_validate(known | changes | {"fetch": asked})


def rows_of(urls: list[str | None], **recorded: list[str | None]) -> pl.DataFrame:
    known = {"url": urls} | {name: [None] * len(urls) for name in ("reason", *DIGESTS)} | recorded
    return pl.DataFrame(known, schema=dict.fromkeys(known, pl.String))


def run(asked: CurationConfig, rows: pl.DataFrame, folder: Path) -> pl.DataFrame:
    fetcher = Fetcher(asked.fetch)
    try:
        (found,) = fetch_rows(rows, [asked], fetcher, folder)
    finally:
        fetcher.close()
    return found


def test_every_trap_ends_as_with_our_own_engine(trap_world: Any, tmp_path: Path) -> None:
    limits = {"total_deadline_seconds": 0.6, "retries": 1, "opt_outs": {}}
    asked = config(trap_world.web, fetch=limits)
    urls = [url for url in trap_world.expected if url is not None and "/f/" not in url]
    found = run(asked, rows_of(urls), tmp_path)
    by_ours = asked.model_copy(
        update={"fetch": asked.fetch.model_copy(update={"engine": "atelier"})}
    )
    (tmp_path / "ours").mkdir()
    ours = run(by_ours, rows_of(urls), tmp_path / "ours")
    columns = ["url", "disposition", "reason", "retryable"]
    different = found.select(columns).filter(
        pl.struct(columns).is_in(ours.select(pl.struct(columns)).to_series().implode()).not_()
    )
    assert different.is_empty(), different
    assert found["offset"].count() > 30
    assert not list(tmp_path.glob("*.arrow"))


def test_its_bytes_are_those_of_our_engine_where_both_see_the_same_pixels(
    evil_web: Any, encode: Any, http_response: Any, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    for number, size in enumerate([(300, 200), (200, 300), (128, 128), (64, 64)]):
        pixels = rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
        body = encode(Image.fromarray(pixels), "PNG")
        evil_web.route(f"/{number}.png", http_response(body))
    urls: list[str | None] = [f"{HOST}/{number}.png" for number in range(4)]
    made = {}
    for engine in ("img2dataset", "atelier"):
        folder = tmp_path / engine
        folder.mkdir()
        asked = config(evil_web, fetch={"engine": engine}, filters={})
        rows = run(asked, rows_of(urls), folder)
        data = images_path(folder, 0).read_bytes()
        parts = rows.select("offset", "num_bytes").rows()
        made[engine] = [data[start : start + length] for start, length in parts], rows
    assert made["img2dataset"][0] == made["atelier"][0]
    drops = ["offset", "retryable"]
    assert made["img2dataset"][1].drop(drops).equals(made["atelier"][1].drop(drops))


def test_a_square_is_cut_from_the_middle_and_smaller_images_are_refused(
    evil_web: Any, encode: Any, make_picture: Any, http_response: Any, tmp_path: Path
) -> None:
    evil_web.route("/wide.png", http_response(encode(make_picture(1, 320, 160), "PNG")))
    evil_web.route("/small.png", http_response(encode(make_picture(2, 60, 60), "PNG")))
    square = {"image_size_px": 64, "if_smaller": "reject"}
    asked = config(evil_web, resize=square, filters={})
    rows = run(asked, rows_of([f"{HOST}/wide.png", f"{HOST}/small.png"]), tmp_path)
    wide, small = rows.to_dicts()
    assert (wide["image_width_px"], wide["image_height_px"]) == (64, 64)
    assert (wide["crop_left_px"], wide["crop_top_px"]) == (80, 0)
    stored = np.asarray(Image.open(io.BytesIO(images_path(tmp_path, 0).read_bytes())))
    assert stored.shape == (64, 64, 3)
    assert small["reason"] == "image_too_small"


@pytest.mark.parametrize("engine", ["img2dataset", "atelier"])
@pytest.mark.parametrize("policy", ["keep", "reject"])
def test_recorded_digests_are_compared_with_the_bytes_as_fetched(
    engine: str,
    policy: str,
    evil_web: Any,
    encode: Any,
    make_picture: Any,
    http_response: Any,
    tmp_path: Path,
) -> None:
    """Of one address, too, that stands in many rows with different digests."""
    body = encode(make_picture(1), "PNG")
    evil_web.route("/a.png", http_response(body))
    sha256, md5 = hashlib.sha256(body).hexdigest(), hashlib.md5(body).hexdigest()
    digests: list[tuple[str | None, str | None]] = [
        (None, None), (sha256, None), (None, md5), (sha256, md5),
        ("0" * 64, None), (None, "0" * 32), (sha256, "0" * 32), ("0" * 64, md5),
    ]  # fmt: skip
    asked = config(evil_web, fetch={"on_hash_mismatch": policy, "engine": engine})
    rows = rows_of(
        [f"{HOST}/a.png"] * len(digests),
        recorded_sha256=[each[0] for each in digests],
        recorded_md5=[each[1] for each in digests],
    )
    found = run(asked, rows, tmp_path)
    md5s = [known and md5 for _, known in digests]
    if policy == "keep":
        assert found["reason"].null_count() == len(digests)
        assert found["sha256"].to_list() == [sha256] * len(digests)
        assert found["md5"].to_list() == md5s
        return
    assert found["reason"].to_list() == [None] * 4 + ["hash_mismatch"] * 4
    assert found["md5"].to_list() == md5s[:4] + [None] * 4
    assert found["detail"].to_list()[4:] == [
        f"sha256 {sha256}", f"md5 {md5}", f"md5 {md5}", f"sha256 {sha256}"
    ]  # fmt: skip
    assert not found["retryable"].any()


def test_a_row_it_forgets_fails(
    evil_web: Any,
    encode: Any,
    make_picture: Any,
    http_response: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: Any,
) -> None:
    """Its downloader prints what it did not foresee, and goes on without the row."""
    for name in "ab":
        evil_web.route(f"/{name}.png", http_response(encode(make_picture(1), "PNG")))
    from pipelines import img2dataset_engine

    writes = img2dataset_engine._Writer.write

    def upset(self: Any, image: Any, key: str, caption: object, meta: Any) -> None:
        if meta["url"] == "1":
            raise MemoryError
        writes(self, image, key, caption, meta)

    monkeypatch.setattr(img2dataset_engine._Writer, "write", upset)
    rows = run(config(evil_web), rows_of([f"{HOST}/a.png", f"{HOST}/b.png"]), tmp_path)
    assert rows["reason"].to_list() == [None, "internal_error"]
    assert rows["retryable"].to_list() == [None, True]


def test_an_error_outside_ends_its_threads(
    evil_web: Any, encode: Any, make_picture: Any, http_response: Any, tmp_path: Path
) -> None:
    """The disk is full, say: the task fails, and nothing is left running."""
    import threading

    from pipelines.img2dataset_engine import outcomes_by_img2dataset
    from pipelines.stage_images import bounds_of

    for number in range(200):
        body = encode(make_picture(number, 128, 128), "PNG")
        evil_web.route(f"/{number}.png", http_response(body))
    asked = config(evil_web)
    fetcher = Fetcher(asked.fetch)

    def fetch(number: int) -> bytes:
        return fetcher.fetch(f"{HOST}/{number}.png")

    ended = outcomes_by_img2dataset(range(200), asked, bounds_of(asked), fetch, tmp_path)
    next(ended)
    ended.close()  # type: ignore[attr-defined]
    fetcher.close()
    assert not [each for each in threading.enumerate() if each.name == "img2dataset"]


def test_nothing_to_fetch(evil_web: Any, tmp_path: Path) -> None:
    assert run(config(evil_web), rows_of([]), tmp_path).height == 0


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"resize": {"crop": "bucket"}}, "resize.crop: bucket"),
        ({"also_sizes_px": [64]}, "also_sizes_px"),
        ({"duplicates": {"perceptual": {}}}, "duplicates.perceptual"),
        ({"resize": {"crop": "square"}}, "if_smaller: reject"),
    ],
)
def test_what_it_cannot_do_is_told_before_any_work(
    evil_web: Any, changes: dict[str, Any], told: str
) -> None:
    with pytest.raises(ValidationError, match=told):
        config(evil_web, **changes)
