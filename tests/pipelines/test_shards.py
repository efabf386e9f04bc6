"""Tars: the same samples give the same bytes, and odd keys never get in."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra import storage
from infra.manifest import ShardEntry
from pipelines.config import PreferenceConfig, ShardConfig
from pipelines.shards import ShardWriter, preference_score, read_shard, sample_members

MEMBERS = st.dictionaries(
    st.sampled_from(["jpg", "txt", "json", "webp"]), st.binary(max_size=2000), min_size=1
)
SAMPLES = st.dictionaries(st.integers(0, 2**128 - 1), MEMBERS, max_size=12)


def written(
    folder: Path, samples: dict[str, dict[str, bytes]], config: ShardConfig
) -> tuple[str, list[ShardEntry], dict[str, str]]:
    root = (folder / "root").as_uri()
    with ShardWriter(config, root, folder) as writer:
        for key in sorted(samples):
            writer.add(key, samples[key])
        return root, writer.finish(), writer.shard_of


@settings(deadline=None, max_examples=40)
@given(SAMPLES, st.integers(1, 5), st.integers(1, 5000))
def test_samples_come_back_as_they_went_in(
    tmp_path_factory: pytest.TempPathFactory,
    numbered: dict[int, dict[str, bytes]],
    max_samples: int,
    max_bytes: int,
) -> None:
    samples = {f"{number:032x}": members for number, members in numbered.items()}
    config = ShardConfig(max_samples=max_samples, max_bytes=max_bytes)
    root, shards, shard_of = written(tmp_path_factory.mktemp("a"), samples, config)
    found: dict[str, dict[str, bytes]] = {}
    for shard in shards:
        uri = storage.join(root, shard.path)
        inside = dict(read_shard(storage.read_bytes(uri)))
        assert len(inside) == shard.num_samples <= max_samples
        assert len(inside) == 1 or sum(len(d) for m in inside.values() for d in m.values()) <= (
            max_bytes
        )
        assert all(shard_of[key] == shard.path for key in inside)
        assert storage.stat(uri).num_bytes == shard.num_bytes
        found |= inside
    assert found == samples
    assert written(tmp_path_factory.mktemp("b"), samples, config)[1] == shards


def test_headers_say_nothing_of_when_where_and_who(tmp_path: Path) -> None:
    root, shards, _ = written(tmp_path, {"0" * 32: {"jpg": b"x", "txt": b"y"}}, ShardConfig())
    path = tmp_path / "root" / shards[0].path
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    assert [member.name for member in members] == ["0" * 32 + ".jpg", "0" * 32 + ".txt"]
    for member in members:
        assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (
            0,
            0,
            0,
            "",
            "",
        )
        assert member.isreg()
    assert shards[0].path == f"shards/{shards[0].sha256[:32]}.tar"
    assert root.endswith("/root")


@pytest.mark.parametrize("key", ["", "x" * 32, "0" * 31, "../../etc/passwd", "A" * 32, "0" * 33])
def test_odd_keys_are_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match="sample key"):
        ShardWriter(ShardConfig(), tmp_path.as_uri(), tmp_path).add(key, {"jpg": b""})


def test_keys_rise(tmp_path: Path) -> None:
    with ShardWriter(ShardConfig(), tmp_path.as_uri(), tmp_path) as writer:
        writer.add("1" * 32, {"jpg": b""})
        for key in ("1" * 32, "0" * 32):
            with pytest.raises(ValueError, match="after"):
                writer.add(key, {"jpg": b""})
    assert not list(tmp_path.rglob("shards/*"))


@pytest.mark.parametrize("extension", ["", "../x", "a.b", "JPG", "x" * 9])
def test_odd_extensions_are_refused(tmp_path: Path, extension: str) -> None:
    writer = ShardWriter(ShardConfig(), tmp_path.as_uri(), tmp_path)
    with pytest.raises(ValueError, match="extensions"):
        writer.add("1" * 32, {extension: b""})


def test_no_samples_make_no_shard(tmp_path: Path) -> None:
    assert ShardWriter(ShardConfig(), tmp_path.as_uri(), tmp_path).finish() == []


def test_the_preference_score_follows_its_rule() -> None:
    rule = PreferenceConfig(scale=0.5, offset=1.0, unknown=3.0)
    assert preference_score({"aesthetic_score": 6.0}, rule) == 4.0
    assert preference_score({"aesthetic_score": None}, rule) == 3.0
    assert preference_score({}, PreferenceConfig()) is None
    assert preference_score({"aesthetic_score": 5.199999809265137}, PreferenceConfig()) == 5.2
    chosen = PreferenceConfig(score="human_preference", scale=10.0)
    assert preference_score({"human_preference": 0.75, "aesthetic_score": 4.0}, chosen) == 7.5
    assert preference_score({"aesthetic_score": 4.0}, chosen) is None


@pytest.mark.parametrize("preference", [None, 0.75])
def test_what_few_sets_know_is_written_where_it_is_known(preference: float | None) -> None:
    names = ("sample_id", "url", "aesthetic_scale", "language", "source", "sha256", "captions",
             "original_width_px", "original_height_px", "image_width_px", "image_height_px",
             "crop_left_px", "crop_top_px", "clip_similarity", "aesthetic_score",
             "watermark_prob", "unsafe_prob", "recorded_sha256", "recorded_md5")  # fmt: skip
    row: dict[str, Any] = dict.fromkeys(names)
    row |= {"train_caption": "a fox", "human_preference": preference}
    members = sample_members(row, b"image", "jpg", PreferenceConfig())
    known = json.loads(members["json"])
    assert known.get("human_preference") == preference
    assert ("human_preference" in known) == (preference is not None)
    assert not {"recorded_sha256", "recorded_md5"} & known.keys()
