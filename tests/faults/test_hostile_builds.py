"""A9, B22, B24, B25, B32, B35: copies, changed bytes, lost names, through a whole curation."""

from __future__ import annotations

import io
import json
import socket
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from infra import storage
from infra.errors import UserError
from infra.manifest import DatasetManifest, verify_dataset
from infra.sessions import ClusterConfig, spark_session, stop_spark
from pipelines.build import StagedMarker
from pipelines.config import CurationConfig
from pipelines.curate import curate
from pipelines.diff import diff_datasets
from pipelines.ledger import LEDGER_SCHEMA
from pipelines.ledger_counts import LedgerCounts, counts_of_rows
from pipelines.plan import plan_curation
from pipelines.report_page import _copies
from tests.conftest import run_python
from tests.pipelines.alike import KINDS, altered, scene
from tests.pipelines.conftest import EvilWeb, encoded, picture, response
from tests.pipelines.test_build import ledger, run, samples

PARKED = "parked.example"


def metadata(folder: Path, urls: list[str], captions: list[str] | None = None) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    texts = captions or [f"picture number {number}" for number in range(len(urls))]
    path = folder / "part.parquet"
    pq.write_table(pa.table({"URL": urls, "TEXT": texts}), path)
    return str(path)


def config(web: EvilWeb, uri: str, *hosts: str, **changes: Any) -> CurationConfig:
    place = f"127.0.0.1:{web.port}"
    fetch = web.config(
        connect_to={f"{host}:80": place for host in ("evil.example", *hosts)},
        total_deadline_seconds=20,
    )
    known: dict[str, Any] = {
        "metadata": [uri], "partitions": 2, "fetch": fetch, "resize": {"image_size_px": 64},
    }  # fmt: skip
    return CurationConfig.model_validate(known | changes)


def page_of(root: str, manifest: DatasetManifest) -> str:
    return storage.read_bytes(storage.join(root, manifest.version, "report.html")).decode()


def test_a_parked_domain_keeps_one_picture_and_is_named(evil_web: EvilWeb, tmp_path: Path) -> None:
    """500 addresses of one host that all answer with the same picture."""
    evil_web.route("/p", response(encoded(picture(1))))
    for number in range(8):
        evil_web.route(f"/good/{number}.jpg", response(encoded(picture(100 + number))))
    urls = [f"http://{PARKED}/p?{number}" for number in range(500)]
    urls += [f"http://evil.example/good/{number}.jpg" for number in range(8)]
    asked = config(evil_web, metadata(tmp_path / "in", urls), PARKED)
    plan = plan_curation("parked", asked, (tmp_path / "store").as_uri())
    manifest = run(plan)
    assert manifest.counts["committed"] == 9
    assert manifest.rejected == {"duplicate_image": 499}
    rows = ledger(plan.build, manifest)
    assert rows.filter(pl.col("reason") == "duplicate_image")["url"].str.contains(PARKED).all()
    page = page_of(plan.build.dataset_root, manifest)
    assert f"{PARKED} 499" in page


def test_a_second_view_of_an_address_is_another_version(evil_web: EvilWeb, tmp_path: Path) -> None:
    """The first digest is pinned: the same command keeps it, another recipe tells of the change."""
    for number in range(6):
        evil_web.route(f"/{number}.jpg", response(encoded(picture(number))))
    uri = metadata(tmp_path / "in", [f"http://evil.example/{number}.jpg" for number in range(6)])
    store = (tmp_path / "store").as_uri()
    first_plan = plan_curation("views", config(evil_web, uri), store)
    first = run(first_plan)
    before = samples(first_plan.build, first)
    evil_web.route("/3.jpg", response(encoded(picture(999))))
    evil_web.requests.clear()
    again = plan_curation("views", config(evil_web, uri), store)
    assert (again.decision, again.version) == ("SKIP", first.version)
    assert evil_web.requests == []
    later_plan = plan_curation("views", config(evil_web, uri, resize={"image_size_px": 48}), store)
    later = run(later_plan)
    root = first_plan.build.dataset_root
    first_uri = storage.join(root, first.version, "manifest.json")
    assert verify_dataset(first_uri) == []
    assert samples(first_plan.build, first) == before  # the old sample is kept
    digests = {
        version: dict(ledger(plan.build, manifest).select("url", "sha256").iter_rows())
        for version, plan, manifest in (("old", first_plan, first), ("new", later_plan, later))
    }
    changed = [url for url in digests["old"] if digests["old"][url] != digests["new"][url]]
    assert changed == ["http://evil.example/3.jpg"]
    found = diff_datasets(first_uri, storage.join(root, later.version, "manifest.json"))
    assert (found.added, found.removed) == (0, 0)
    assert found.changed == 1


def test_when_no_name_resolves_nothing_is_committed_and_later_all_is(
    evil_web: EvilWeb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resolver that answers NXDOMAIN for everything says nothing about the addresses."""
    urls = [f"http://host{number}.example/{number}.jpg" for number in range(30)]
    for number in range(30):
        evil_web.route(f"/{number}.jpg", response(encoded(picture(number))))
    uri = metadata(tmp_path / "in", urls)
    store = (tmp_path / "store").as_uri()

    def nobody(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    broken = config(evil_web, uri, partitions=1, fetch=evil_web.config(total_deadline_seconds=20))
    plan = plan_curation("dns", broken, store)
    with monkeypatch.context() as patch:
        patch.setattr("pipelines.hosts.socket.getaddrinfo", nobody)
        with pytest.raises(UserError, match=r"30 of 30 \(dns_no_such_host 30\).*DNS"):
            run(plan)
    assert plan.build.read_all(StagedMarker, 1) == {}
    hosts = [f"host{number}.example" for number in range(30)]
    whole = config(evil_web, uri, *hosts, partitions=1)
    again = plan_curation("dns", whole, store)
    assert again.build_key == plan.build_key
    assert run(again).counts["committed"] == 30


NOFILE = """
import json, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
from pipelines.config import FetchConfig
from pipelines.fetch import Fetcher
from concurrent.futures import ThreadPoolExecutor
from pipelines.arrivals import fetch_body

port = sys.argv[1]
hosts = {f"h{number}.example:80": f"127.0.0.1:{port}" for number in range(300)}
fetcher = Fetcher(FetchConfig(
    connect_to=hosts, num_threads=200, retries=0, total_deadline_seconds=60,
    opt_outs={"robots_txt": False, "tdm_reservation": False},
))
urls = [f"http://h{number}.example/a.jpg" for number in range(300)]
with ThreadPoolExecutor(200) as pool:
    found = list(pool.map(lambda url: fetch_body(url, fetcher), urls))
ended = ["body" if isinstance(each, bytes) else [each.reason, each.retryable] for each in found]
again = fetch_body("http://h0.example/a.jpg", fetcher)
print(json.dumps([ended, isinstance(again, bytes)]))
"""


def test_sixty_four_descriptors_for_three_hundred_hosts(evil_web: EvilWeb) -> None:
    """Every row ends, those without a descriptor as worth a retry; then there are some again."""
    evil_web.route("/a.jpg", response(encoded(picture(1))), pause_seconds=0.02)
    done = run_python(NOFILE, str(evil_web.port))
    assert done.returncode == 0, done.stderr
    ended, works_again = json.loads(done.stdout)
    assert len(ended) == 300
    assert "body" in ended
    assert all(each[1] for each in ended if each != "body")
    assert works_again


def test_no_stored_byte_says_where_a_picture_was_taken(evil_web: EvilWeb, tmp_path: Path) -> None:
    """EXIF and comments: not in shards, ledger, report, pictures of what was rejected, or work."""
    exif = Image.Exif()
    exif[0x010F], exif[0x013B] = "CanaryCamera", "Canary Jane"
    exif.get_ifd(0x8825).update({1: "N", 2: (48.0, 8.0, 0.0)})
    body = encoded(picture(1), exif=exif, comment=b"Canary Jane")
    small = encoded(picture(2, 40, 40), exif=exif, comment=b"Canary Jane")
    evil_web.route("/0.jpg", response(body))
    evil_web.route("/1.jpg", response(small))
    uri = metadata(tmp_path / "in", [f"http://evil.example/{n}.jpg" for n in range(2)])
    asked = config(evil_web, uri, resize={"image_size_px": 64, "if_smaller": "reject"})
    plan = plan_curation("private", asked, (tmp_path / "store").as_uri())
    manifest = run(plan)
    assert manifest.counts["committed"] == 1
    assert manifest.rejected == {"image_too_small": 1}
    for path in (tmp_path / "store").rglob("*"):
        if path.is_file():
            assert b"Canary" not in readable(path.read_bytes()), path


def readable(data: bytes) -> bytes:
    """A stored file's bytes; of a parquet file, which is compressed, its values."""
    if data[:4] != b"PAR1":
        return data
    rows = pl.read_parquet(io.BytesIO(data))
    binary = pl.selectors.binary()
    texts = rows.drop(binary).write_json().encode()
    return texts + b"".join(value or b"" for column in rows.select(binary) for value in column)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_thousand_copies_of_one_picture_leave_one_and_are_told(
    evil_web: EvilWeb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By bytes, by crops, sizes, encodings and colours; beside pictures that nobody copied."""
    monkeypatch.setenv("ATELIER_HOME", str(tmp_path / "home"))
    rng = np.random.default_rng(2)
    original = scene(11)
    num_altered, num_same, num_others = 800, 200, 40
    bodies = [encoded(Image.fromarray(original), "PNG")] * num_same
    for number in range(num_altered):
        copy = Image.fromarray(altered(original, rng, KINDS[number % len(KINDS)]))
        bodies.append(encoded(copy, "PNG"))
    bodies += [encoded(Image.fromarray(scene(5000 + n)), "PNG") for n in range(num_others)]
    for number, body in enumerate(bodies):
        evil_web.route(f"/{number}.png", response(body))
    uri = metadata(tmp_path / "in", [f"http://evil.example/{n}.png" for n in range(len(bodies))])
    asked = config(
        evil_web, uri, partitions=3, duplicates={"perceptual": {}},
        resize={"image_size_px": 64, "crop": "none"},
    )  # fmt: skip
    spark = spark_session("copies", ClusterConfig(), {})
    try:
        result = curate("copies", asked, (tmp_path / "store").as_uri(), lambda: spark)
    finally:
        stop_spark(spark)
    left = result.counts["committed"] - num_others
    print(f"\n{num_altered + num_same} copies: {left} left")
    assert 1 <= left <= 0.02 * (num_altered + num_same)
    page = storage.read_bytes(result.manifest_uri.replace("manifest.json", "report.html")).decode()
    told = page.partition("Images that many others copy")[2].partition("<h2>")[0]
    assert told
    assert "images that stayed" in told


def test_groups_of_copies_are_counted_and_bounded() -> None:
    blank = pl.DataFrame(pl.from_arrow(LEDGER_SCHEMA.empty_table()))
    rows = blank.clear(70).with_columns(
        pl.lit("rejected").alias("disposition"),
        pl.Series("reason", ["near_duplicate"] * 40 + ["duplicate_image"] * 20
                  + ["duplicate_of_other"] * 10),
        pl.Series("detail", ["like aa"] * 50 + ["like bb"] * 8 + [None] * 2 + ["like cc"] * 10),
    )  # fmt: skip
    found = counts_of_rows(rows)
    assert found.copies == {"aa": 50, "bb": 8}
    total = LedgerCounts()
    for _ in range(3):
        total.add(found, hosts=1)
    assert total.copies == {"aa": 150}
    page = _copies(found)
    for told in ("<td>5 to 9</td>", "<td>30 to 99</td>", "<td>aa</td>"):
        assert told in page, told
