"""Finding input files, and one line for whatever is wrong with them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import pipelines.inputs
from infra import storage
from infra.errors import UserError
from pipelines.config import CurationConfig
from pipelines.inputs import Unit, find_inputs, metadata_batches, read_captions, units_of
from pipelines.plan import plan_curation


def config(*metadata: str, captions: tuple[str, ...] = ()) -> CurationConfig:
    return CurationConfig.model_validate(
        {"metadata": list(metadata), "captions": {"files": list(captions)}}
    )


def read_metadata(unit: Unit, config: CurationConfig) -> pl.DataFrame:
    return pl.concat(pl.DataFrame(table) for table, _ in metadata_batches(unit, config))


def parquet(path: Path, num_rows: int = 10, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    urls = [f"http://a.example/{path.stem}/{number}" for number in range(num_rows)]
    table = pa.table({"URL": urls, "TEXT": ["some text"] * num_rows})
    pq.write_table(table, path, **options)
    return path


def test_paths_folders_globs_and_addresses_all_work(tmp_path: Path) -> None:
    for name in ("a", "b", "c d"):
        parquet(tmp_path / "in" / f"{name}.parquet")
    (tmp_path / "in" / "README.txt").write_text("not parquet")
    folder = tmp_path / "in"
    for pattern in (
        str(folder),
        f"{folder}/*.parquet",
        folder.as_uri(),
        f"{folder.as_uri()}/*.parquet",
        f"{tmp_path}/**/*.parquet",
    ):
        files = find_inputs(config(pattern))
        assert len(files) == 3, pattern
        assert sum(file.num_rows for file in files) == 30
    one = find_inputs(config(str(folder / "c d.parquet"), (folder / "c d.parquet").as_uri()))
    assert len(one) == 1


def test_s3_addresses_folders_and_globs(tmp_path: Path, s3_server: Any) -> None:
    root = f"{s3_server.store_uri}/inputs-{tmp_path.name}"
    for name in ("a", "b"):
        path = parquet(tmp_path / f"{name}.parquet")
        storage.upload(path, f"{root}/part/{name}.parquet")
    storage.write_bytes(f"{root}/part/_SUCCESS", b"")
    for pattern in (f"{root}/part", f"{root}/part/*.parquet", f"{root}/*/?.parquet"):
        assert len(find_inputs(config(pattern))) == 2, pattern
    files = find_inputs(config(f"{root}/part/a.parquet"))
    local = find_inputs(config(str(tmp_path / "a.parquet")))
    assert [file.identity() for file in files] == [file.identity() for file in local]
    assert read_metadata(units_of(files)[0], config("x")).height == 10


@pytest.mark.parametrize("pattern", ["{}/nothing", "{}/*.parquet", "file://{}/x.parquet"])
def test_a_pattern_that_matches_nothing_is_one_line(tmp_path: Path, pattern: str) -> None:
    pattern = pattern.format(tmp_path)
    with pytest.raises(UserError, match="at least one parquet file at"):
        find_inputs(config(pattern))


@pytest.mark.parametrize("address", ["http://a.example/x.parquet", "pipe:ls", "gs://b/k", "s4://x"])
def test_other_addresses_are_refused(address: str) -> None:
    with pytest.raises(UserError):
        find_inputs(config(address))


def test_the_order_and_names_of_files_do_not_matter(tmp_path: Path) -> None:
    first = parquet(tmp_path / "a.parquet")
    second = parquet(tmp_path / "b.parquet")
    there = [file.identity() for file in find_inputs(config(str(first), str(second)))]
    first.rename(tmp_path / "z.parquet")
    back = [file.identity() for file in find_inputs(config(str(tmp_path)))]
    assert there == back


@pytest.mark.parametrize("keep", [0, 3, 4, 100, 0.5, 0.9, -1, -4, -8, -9])
def test_a_cut_file_is_named(tmp_path: Path, keep: float) -> None:
    path = parquet(tmp_path / "cut.parquet", 1000)
    body = path.read_bytes()
    path.write_bytes(body[: int(len(body) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(UserError, match=r"a whole parquet file at file://.*cut\.parquet") as caught:
        find_inputs(config(str(path)))
    assert "\n" not in str(caught.value)


def test_damaged_pages_are_named_when_read(tmp_path: Path) -> None:
    path = parquet(tmp_path / "bad.parquet", 5000, compression="snappy")
    body = bytearray(path.read_bytes())
    body[100:3000] = bytes(2900)
    path.write_bytes(body)
    files = find_inputs(config(str(path)))
    with pytest.raises(UserError, match=r"a whole parquet file at .*bad\.parquet"):
        read_metadata(units_of(files)[0], config("x"))


def test_text_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "latin.parquet"
    bad = pa.array([b"caf\xe9"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"URL": ["u"], "TEXT": bad}), path)
    files = find_inputs(config(str(path)))
    with pytest.raises(UserError, match=r"latin\.parquet; got .*UTF-8"):
        read_metadata(units_of(files)[0], config("x"))


def test_every_row_group_is_in_exactly_one_unit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parquet(tmp_path / "a.parquet", 100, row_group_size=7)
    parquet(tmp_path / "b.parquet", 30, row_group_size=30)
    monkeypatch.setattr(pipelines.inputs, "ROWS_PER_UNIT", 20)
    files = find_inputs(config(str(tmp_path)))
    units = units_of(files)
    assert [unit.index for unit in units] == list(range(len(units)))
    assert len(units) > 5
    rows = [url for unit in units for url in read_metadata(unit, config("x"))["URL"]]
    assert len(rows) == len(set(rows)) == 130


def test_caption_files_are_found_checked_and_read(tmp_path: Path) -> None:
    metadata = parquet(tmp_path / "m.parquet")
    captions = tmp_path / "long.parquet"
    pq.write_table(pa.table({"url": ["u"], "caption": ["c"], "other": [1]}), captions)
    files = find_inputs(config(str(metadata), captions=(str(captions),)))
    assert [file.kind for file in files] == ["captions", "metadata"]
    (batch,) = read_captions(units_of(files)[0], config("x"))
    assert batch.rows() == [("u", "c", None)]
    coded = pa.array(["c"]).dictionary_encode()
    pq.write_table(pa.table({"url": ["u"], "caption": coded, "model": coded}), captions)
    files = find_inputs(config(str(metadata), captions=(str(captions),)))
    (batch,) = read_captions(units_of(files)[0], config("x"))
    assert batch.rows() == [("u", "c", "c")]
    twice = pa.Table.from_arrays([coded, coded, coded, coded], ["url", "caption", "model", "model"])
    pq.write_table(twice, captions)
    with pytest.raises(UserError, match=r"long\.parquet once; got model more than once"):
        find_inputs(config(str(metadata), captions=(str(captions),)))
    with pytest.raises(UserError, match="text columns url, caption"):
        find_inputs(config(str(metadata), captions=(str(metadata),)))


def test_metadata_without_rows_is_no_dataset(tmp_path: Path) -> None:
    parquet(tmp_path / "empty.parquet", 0)
    with pytest.raises(UserError, match="holds no rows"):
        plan_curation("x", config(str(tmp_path / "empty.parquet")), tmp_path.as_uri())


def test_a_file_is_read_again_only_when_it_was_written(
    store_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipelines.inputs, "READ_AGAIN_BYTES", 0)
    uri, memory = f"{store_uri}/in/a.parquet", f"{store_uri}/work/inputs"
    storage.upload(parquet(tmp_path / "a.parquet", 10), uri)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("infra.storage.LOCAL_CLOCK_NS", 10**18)
        patch.setattr("infra.storage_s3.CLOCK_SECONDS", 1e9)
        find_inputs(config(uri), memory)
        assert not list(storage.list_objects(memory))  # too fresh to note
    time.sleep(2.5 if uri.startswith("s3:") else 0.1)
    first = find_inputs(config(uri), memory)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipelines.inputs, "_digested", None)  # not called
        assert find_inputs(config(uri), memory) == first
    storage.upload(parquet(tmp_path / "b" / "a.parquet", 12), uri)
    (second,) = find_inputs(config(uri), memory)
    assert second.num_rows == 12
    assert second.sha256 != first[0].sha256
    (note,) = storage.list_objects(memory)
    storage.write_bytes(note.uri, b"{")
    assert find_inputs(config(uri), memory) == [second]
