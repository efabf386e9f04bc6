"""WebDataset tars as a source: what a row is, where its image lies, and what is refused."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from PIL import Image

import pipelines.clusters
import pipelines.tar_samples
from infra import storage
from infra.errors import UserError
from pipelines.bodies import ListedBodies
from pipelines.columns import canonical_rows, sample_ids
from pipelines.config import CurationConfig, FetchConfig
from pipelines.connection import Failed
from pipelines.guard import Rejected
from pipelines.image_size import HEAD_BYTES, size_of
from pipelines.inputs import check_inputs, find_inputs, metadata_batches, tars_of, units_of
from pipelines.metadata_sample import sample_metadata
from pipelines.tar_samples import tar_name
from pipelines.tombstones import Tombstones
from tests.pipelines.conftest import encoded, picture

Members = list[tuple[str, bytes]]


def write_tar(path: Path, members: Members) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def sample(key: str, seed: int = 0, extension: str = "jpg", **fields: Any) -> Members:
    kind = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP"}[extension]
    known = {"prompt": f"picture number {seed}"} | fields
    return [
        (f"{key}.{extension}", encoded(picture(seed, 64 + seed, 48), kind)),
        (f"{key}.json", json.dumps(known).encode()),
    ]


def samples(num: int, first: int = 0) -> Members:
    return [each for n in range(first, first + num) for each in sample(f"{n:09d}", n)]


def config(*metadata: Path | str, **changes: Any) -> CurationConfig:
    return CurationConfig.model_validate({"metadata": [str(each) for each in metadata]} | changes)


def rows_of(asked: CurationConfig) -> pl.DataFrame:
    files = find_inputs(asked)
    batches = [batch for unit in units_of(files) for batch in metadata_batches(unit, asked)]
    rows = pl.concat(canonical_rows(raw, layout, "t2i") for raw, layout in batches)
    assert rows.height == sum(file.num_rows for file in files)
    return rows.with_columns(sample_ids(rows))


def bodies_of(asked: CurationConfig) -> ListedBodies:
    return ListedBodies(FetchConfig(), tars_of(find_inputs(asked)), Tombstones())


def test_samples_become_rows_whose_images_are_where_they_say(tmp_path: Path) -> None:
    members = [each for n, extension in enumerate(["jpg", "png", "webp", "jpeg"])
               for each in sample(f"k{n}", n, extension)]  # fmt: skip
    asked = config(write_tar(tmp_path / "data 512" / "a b.tar", members))
    ((_, _, layout),) = check_inputs(asked)
    assert layout is not None
    assert layout.format == "text-to-image-2m"
    rows = rows_of(asked)
    assert rows["caption"].to_list() == [f"picture number {n}" for n in range(4)]
    assert rows["width_px"].to_list() == [64, 65, 66, 67]
    assert rows["height_px"].to_list() == [48] * 4
    assert all(url.startswith("tar://data%20512/a%20b.tar/k") for url in rows["url"])
    with bodies_of(asked) as bodies:
        found = [bodies.fetch(url) for url in rows["url"]]
    assert found == [data for name, data in members if not name.endswith(".json")]


def test_ids_do_not_depend_on_where_a_tar_lies_or_when_it_is_listed(
    tmp_path: Path, s3_server: Any
) -> None:
    first = write_tar(tmp_path / "in" / "set" / "a.tar", samples(3))
    second = write_tar(tmp_path / "in" / "set" / "b.tar", samples(3, 10))
    here = rows_of(config(first, second))
    storage.upload(second, f"{s3_server.store_uri}/{tmp_path.name}/0/set/b.tar")
    storage.upload(first, f"{s3_server.store_uri}/{tmp_path.name}/1/set/a.tar")
    there = config(f"{s3_server.store_uri}/{tmp_path.name}/*.tar")
    found = rows_of(there)
    assert sorted(found["sample_id"]) == sorted(here["sample_id"])
    assert here["sample_id"].n_unique() == 6
    assert [file.identity() for file in find_inputs(there)] == [
        file.identity() for file in find_inputs(config(first, second))
    ]
    with bodies_of(there) as far, bodies_of(config(first, second)) as near:
        assert [far.fetch(url) for url in found["url"]] == [near.fetch(u) for u in found["url"]]


def test_a_tar_is_cut_into_units_of_whole_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = config(write_tar(tmp_path / "s" / "a.tar", samples(23)))
    whole = rows_of(asked)
    monkeypatch.setattr(pipelines.tar_samples, "ROWS_PER_BLOCK", 5)
    (file,) = find_inputs(asked)
    assert file.row_groups == (5, 5, 5, 5, 3)
    assert len(units_of([file])) == 5
    assert rows_of(asked).equals(whole)
    monkeypatch.setattr(pipelines.tar_samples, "BLOCK_BYTES", 5000)
    assert len(find_inputs(asked)[0].row_groups) > 5
    monkeypatch.setattr(pipelines.tar_samples, "_TABLE_ROWS", 2)
    assert rows_of(asked).equals(whole)


def test_what_a_sample_lacks_is_a_row_all_the_same(tmp_path: Path) -> None:
    members = [
        *samples(1),
        ("bad.jpg", b"x"), ("bad.json", b"{not json"),
        ("list.jpg", b"x"), ("list.json", b'["prompt"]'),
        ("number.jpg", b"x"), ("number.json", b'{"prompt": 5, "__image__": "http://a/"}'),
        ("alone.jpg", b"x"),
        ("blind.json", b'{"prompt": "a text"}'),
        ("long.jpg", b"x"), ("long.json", json.dumps({"prompt": "x" * (1 << 20)}).encode()),
    ]  # fmt: skip
    asked = config(write_tar(tmp_path / "s" / "a.tar", members))
    rows = rows_of(asked)
    texts = ["picture number 0", "", "", "", "", "a text", ""]
    assert rows["caption"].to_list() == texts
    assert rows["width_px"].to_list() == [64] + [None] * 6
    assert rows["url"][5] == "tar://s/a.tar/blind"
    assert "?offset=" in rows["url"][3]
    with bodies_of(asked) as bodies, pytest.raises(Rejected, match="url: a sample without"):
        bodies.fetch(rows["url"][5])


def test_a_plain_webdataset_trains_on_its_txt(tmp_path: Path) -> None:
    members = [("a.txt", b"ein Fuchs\n"), *sample("a")[:1], ("a.json", b'{"txt": 1}')]
    members += [("b.jpg", b"x"), ("b.txt", b"x" * ((1 << 20) + 1))]  # a text that is not held
    rows = rows_of(config(write_tar(tmp_path / "s" / "a.tar", members)))
    assert rows["caption"].to_list() == ["ein Fuchs", ""]
    both = [*sample("a"), ("a.txt", b"other")]
    path = write_tar(tmp_path / "s" / "b.tar", both)
    with pytest.raises(UserError, match="what fits text-to-image-2m and webdataset; set `format`"):
        check_inputs(config(path))
    (row,) = rows_of(config(path, format="webdataset")).rows(named=True)
    assert row["caption"] == "other"


def hostile(name: str, kind: bytes = tarfile.REGTYPE, **changes: Any) -> bytes:
    info = tarfile.TarInfo(name)
    info.type = kind
    for field, value in changes.items():
        setattr(info, field, value)
    return info.tobuf(tarfile.USTAR_FORMAT)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(
    ("header", "told"),
    [
        (hostile("../../etc/passwd"), "is not a plain sample file"),
        (hostile("/etc/passwd.jpg"), "is not a plain sample file"),
        (hostile("./a.jpg"), "is not a plain sample file"),
        (hostile("folder/a.jpg"), "is not a plain sample file"),
        (hostile("a.jpg", tarfile.SYMTYPE, linkname="/etc/passwd"), "is not a plain sample file"),
        (hostile("a.jpg", tarfile.LNKTYPE, linkname="b.jpg"), "is not a plain sample file"),
        (hostile("a.jpg", tarfile.CHRTYPE), "is not a plain sample file"),
        (hostile("a.jpg", tarfile.FIFOTYPE), "is not a plain sample file"),
        (hostile("a.jpg", tarfile.DIRTYPE), "is not a plain sample file"),
        (hostile("a.jpg", tarfile.GNUTYPE_SPARSE), "is not a plain sample file"),
        (hostile("a.jpg", tarfile.GNUTYPE_LONGNAME), "is not a plain sample file"),
        (hostile("a.pickle"), "is none of jpeg, jpg"),
        (hostile("a.seg.png"), "is none of jpeg, jpg"),
        (hostile("a.jpg", size=8**11 - 1), "cut at byte"),
        (hostile("z.jpg") + hostile("z.png"), "sample 'z' has two images"),
        (hostile("z.jpg") + hostile("z.jpg"), "member 'z.jpg' is there twice"),
        (hostile("z.jpg") + hostile("y.jpg") + hostile("z.json"), "sample 'z' is in two places"),
        (b"no header".ljust(512, b"."), "no header at byte"),
    ],
)
def test_a_hostile_tar_is_one_line_that_names_it(
    tmp_path: Path, header: bytes, told: str, late: bool
) -> None:
    path = write_tar(tmp_path / "s" / "evil.tar", samples(20))
    good = path.read_bytes()
    with tarfile.open(path) as tar:
        at = (tar.getmembers()[-1].offset_data + 512) if late else 0
    path.write_bytes(good[:at] + header + (bytes(1024) if "cut" not in told else b""))
    with pytest.raises(UserError) as caught:
        find_inputs(config(path, format="text-to-image-2m" if late else None))
    assert told in str(caught.value) or not late
    assert "evil.tar" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_cut_tar_is_named(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s" / "cut.tar", samples(4))
    good = path.read_bytes()
    for keep in (0, 100, 512, 3000, len(good) // 2, len(good.rstrip(b"\0"))):
        path.write_bytes(good[:keep])
        with pytest.raises(UserError, match=r"a whole WebDataset tar at file://.*/cut\.tar"):
            find_inputs(config(path))


def test_a_tar_that_changed_since_it_was_planned_is_named(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s" / "a.tar", samples(4))
    asked = config(path)
    files = find_inputs(asked)
    write_tar(path, samples(3))
    with pytest.raises(UserError, match=r"a\.tar.*; got (another file|no header)"):
        list(metadata_batches(units_of(files)[0], asked))


def test_tars_of_one_name_are_refused(tmp_path: Path) -> None:
    tars = [write_tar(tmp_path / n / "set" / "a.tar", samples(1)) for n in "12"]
    with pytest.raises(UserError, match="tars that differ in their own name or their folder's"):
        find_inputs(config(*tars))
    assert len(find_inputs(config(tars[0], tars[0]))) == 1
    assert tar_name("s3://bucket/x/set/a.tar") == tar_name(tars[0].as_uri()) == "set/a.tar"


def test_bodies_come_from_listed_tars_alone_and_are_bounded(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    path = write_tar(tmp_path / "s" / "a.tar", samples(2))
    url = rows_of(config(path))["url"][0]
    place = url.partition("?")[2]
    with ListedBodies(
        FetchConfig(max_bytes=500), {"s/a.tar": path.as_uri()}, Tombstones()
    ) as bodies:
        for other, reason in {
            f"tar://s/b.tar/000000000.jpg?{place}": "scheme",
            f"tar://s/../secret/x.jpg?{place}": "url",
            "tar://s/a.tar/x.jpg?offset=-1&bytes=9": "url",
            "tar://s/a.tar/x.jpg?offset=0": "url",
            f"TAR://s/a.tar/x.jpg?{place}": "scheme",
            f" {url}": "scheme",
            path.as_uri(): "scheme",
        }.items():
            with pytest.raises(Rejected) as rejected:
                bodies.fetch(other)
            assert rejected.value.reason == reason, other
        with pytest.raises(Failed, match="too_big"):
            bodies.fetch(url)
        with pytest.raises(Failed, match="short_body: 400 bytes missing") as failed:
            bodies.fetch(f"tar://s/a.tar/x.jpg?offset={path.stat().st_size}&bytes=400")
        assert failed.value.retryable
    with ListedBodies(
        FetchConfig(), {"s/a.tar": (tmp_path / "gone.tar").as_uri()}, Tombstones()
    ) as bodies:
        with pytest.raises(Failed, match="storage") as failed:
            bodies.fetch(url)
        assert failed.value.retryable


@pytest.mark.parametrize("stretch_bytes", [1 << 30, 10_240, 512])
def test_a_sample_of_a_tar_counts_every_row_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stretch_bytes: int
) -> None:
    monkeypatch.setattr(pipelines.clusters, "STRETCH_BYTES", stretch_bytes)
    monkeypatch.setattr(pipelines.clusters, "_SAMPLE_BYTES", 8_192)
    path = write_tar(tmp_path / "s" / "a.tar", samples(30))
    asked = config(path, filters={"min_width_px": 80}, estimate={"row_groups": 10_000})
    found = sample_metadata(asked, Tombstones())
    assert found.rows_in == found.rows_sampled == 30
    assert found.funnel["too_small"].rows == 16
    assert not found.on_web


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "RGBA", "P"])
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "lossless", "progressive", "exif"])
def test_sides_are_read_off_the_head(form: str, mode: str) -> None:
    options: dict[str, Any] = {}
    kind = {"lossless": "WEBP", "progressive": "JPEG", "exif": "JPEG"}.get(form, form)
    if form == "lossless":
        options["lossless"] = True
    if form == "progressive":
        options["progressive"] = True
    if form == "exif":
        exif = Image.Exif()
        exif[0x010E] = "x" * 40_000
        options["exif"] = exif
    image = picture(1, 123, 77).convert(mode)
    if kind != "PNG" and mode in ("RGBA", "P") and kind == "JPEG":
        image = image.convert("RGB")
    if kind != "JPEG" and mode == "CMYK":
        image = image.convert("RGBA")
    data = encoded(image, kind, **options)
    assert size_of(data[:HEAD_BYTES]) == (123, 77)
    for keep in range(0, 40):
        assert size_of(data[:keep]) in (None, (123, 77))


def test_a_head_that_is_no_image_tells_no_sides() -> None:
    for head in (b"", b"GIF89a" + bytes(50), b"\xff\xd8" + b"\xff\xfe\x00\x00" * 50, b"RIFF"):
        assert size_of(head) is None
    filled = (
        b"\xff\xd8\xff\xff\xff\xc0\x00\x11\x08\x00\x4d\x00\x7b"  # before a marker may be more FF
    )
    assert size_of(filled) == (123, 77)
