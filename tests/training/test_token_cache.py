from __future__ import annotations

import io
import tarfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from infra import storage
from infra.errors import UserError
from infra.storage import DigestMismatch
from model import VQTokenizer
from pipelines.buckets import buckets_of
from pipelines.config import ResizeConfig
from training import token_cache, token_encoding
from training.config import StageConfig
from training.grids import bucket_grid
from training.images import shrink, square_crop
from training.session import LocalSession
from training.token_cache import ensure_token_cache, open_tokens
from training.token_format import CacheEntry, load_cache_manifest, load_tokens

SIZES = [[(32, 32), (48, 32), (12, 40)], [(16, 24), (40, 16)]]

Curated = Callable[..., str]
SmallConfig = Callable[..., StageConfig]


def test_tokens_are_those_of_the_shrunk_square(curated: Curated, vq_folder: Path) -> None:
    uri = ensure_token_cache(curated(SIZES), str(vq_folder), 16)
    manifest = load_cache_manifest(uri)
    assert {(e.grid_height, e.grid_width) for e in manifest.shards} == {(4, 4)}
    assert manifest.num_samples == 4
    assert manifest.left_out()["smaller_than_resolution"] == 1
    shard = load_tokens(uri.rsplit("/", 2)[0], manifest.shards[0])
    assert shard.sample_ids == [f"{0:016x}", f"{1:016x}"]
    assert shard.tokens_NHW.dtype == np.uint16
    image = Image.open(_image_file(uri, manifest.shards[0].shard_sha256, shard.sample_ids[1]))
    square = square_crop(np.asarray(image.convert("RGB")), 16, "center")
    assert square is not None
    pixels = torch.tensor(square.pixels_HW3).permute(2, 0, 1)[None].float() / 255
    expected = VQTokenizer.from_pretrained(vq_folder / "vqvae").encode(pixels)[0]
    assert shard.tokens_NHW[1].tolist() == expected.tolist()


def _image_file(manifest_uri: str, shard_sha256: str, sample_id: str) -> io.BytesIO:
    """The image of a sample, read from its shard without the code under test."""
    root = manifest_uri.rsplit("/", 4)[0]
    data = storage.read_bytes(f"{root}/shards/{shard_sha256[:32]}.tar")
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        file = tar.extractfile(f"{sample_id}.png")
        assert file is not None
        return io.BytesIO(file.read())


def test_sizes_crops_scores_and_captions_come_along(curated: Curated, vq_folder: Path) -> None:
    uri = ensure_token_cache(curated(SIZES), str(vq_folder), 16)
    shard = load_tokens(uri.rsplit("/", 2)[0], load_cache_manifest(uri).shards[0])
    # 48 x 32 stored from 112 x 64: shrunk to 24 x 16, the middle 16 begin at 4; curation's own
    # offset of 8 shrinks by 16/64 to 2.
    assert shard.sizes_and_crops_N4[1].tolist() == [112, 64, 0, 6]
    assert shard.sizes_and_crops_N4[0].tolist() == [80, 64, 0, 2]
    assert np.isnan(shard.preference_score_N[0])
    assert shard.preference_score_N[1] == 5.0
    assert shard.aesthetic_score_N[1] == np.float32(5.1)
    assert [origin for origin, _ in shard.captions[1]] == ["alt", "synthetic"]
    assert shard.captions[0] == (("alt", "a rectangle number 0"),)


def test_a_cut_off_cache_goes_on_and_a_finished_one_is_left_alone(
    curated: Curated, vq_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = curated(SIZES)
    encoded: list[str] = []
    encode = token_encoding.encode_shard

    def counting(task: token_encoding.ShardTask, path: Path) -> object:
        encoded.append(task.stem)
        if len(encoded) == 2:
            raise RuntimeError("the machine went away")
        return encode(task, path)

    monkeypatch.setattr(token_encoding, "encode_shard", counting)
    with pytest.raises(RuntimeError, match="went away"):
        ensure_token_cache(dataset, str(vq_folder), 16)
    uri = ensure_token_cache(dataset, str(vq_folder), 16)
    assert len(encoded) == 3
    assert encoded[1] == encoded[2] != encoded[0]
    before = storage.read_bytes(uri)
    assert ensure_token_cache(dataset, str(vq_folder), 16) == uri
    assert len(encoded) == 3
    assert storage.read_bytes(uri) == before


def test_a_flipped_byte_in_the_tokens_is_told(curated: Curated, vq_folder: Path) -> None:
    uri = ensure_token_cache(curated(SIZES), str(vq_folder), 16)
    folder_uri = uri.rsplit("/", 2)[0]
    entry = load_cache_manifest(uri).shards[0]
    data = bytearray(storage.read_bytes(storage.join(folder_uri, entry.path)))
    data[len(data) // 2] ^= 1
    storage.write_bytes(storage.join(folder_uri, entry.path), bytes(data))
    with pytest.raises(DigestMismatch):
        load_tokens(folder_uri, entry)


@pytest.mark.parametrize("trouble", ["gone", "damaged"])
def test_tokens_lost_meanwhile_end_in_one_line_whose_remedy_works(
    curated: Curated, vq_folder: Path, small_config: Callable[..., StageConfig], trouble: str
) -> None:
    dataset = curated(SIZES)
    uri = ensure_token_cache(dataset, str(vq_folder), 16)
    tokens = open_tokens(uri, small_config())
    expected = tokens.batch_at(0).tokens_BHW
    entry = load_cache_manifest(uri).shards[0]
    file_uri = storage.join(uri.rsplit("/", 2)[0], entry.path)
    if trouble == "gone":
        storage.delete(file_uri)
    else:
        data = bytearray(storage.read_bytes(file_uri))
        data[len(data) // 2] ^= 1
        storage.write_bytes(file_uri, bytes(data))
    with pytest.raises(UserError, match=f"are {trouble} .* they are encoded anew") as caught:
        open_tokens(uri, small_config()).batch_at(0)
    assert "\n" not in str(caught.value)
    storage.delete(file_uri)  # as it says, where they are damaged
    assert ensure_token_cache(dataset, str(vq_folder), 16) == uri
    assert torch.equal(open_tokens(uri, small_config()).batch_at(0).tokens_BHW, expected)


def test_a_flipped_byte_in_a_shard_is_told(curated: Curated, vq_folder: Path) -> None:
    dataset = curated(SIZES)
    root = dataset.rsplit("/", 2)[0]
    shard = next(iter(storage.list_objects(storage.join(root, "shards"))))
    data = bytearray(storage.read_bytes(shard.uri))
    data[600] ^= 1
    storage.write_bytes(shard.uri, bytes(data))
    with pytest.raises(DigestMismatch):
        ensure_token_cache(dataset, str(vq_folder), 16)


def test_another_tokenizer_resolution_or_crop_has_its_own_cache(
    curated: Curated, vq_folder: Path
) -> None:
    dataset = curated(SIZES)
    uris = {
        ensure_token_cache(dataset, str(vq_folder), 16),
        ensure_token_cache(dataset, str(vq_folder), 8),
        ensure_token_cache(dataset, str(vq_folder), 16, "random"),
    }
    assert len({uri.rsplit("/", 2)[0] for uri in uris}) == 3


def test_a_resolution_between_tokens_is_refused(curated: Curated, vq_folder: Path) -> None:
    with pytest.raises(UserError, match="multiple of 4"):
        ensure_token_cache(curated(SIZES), str(vq_folder), 18)


class Worker:
    """One of several workers, which are threads here."""

    in_ray = False

    def __init__(self, rank: int, shared: Shared) -> None:
        self.rank, self.world_size = rank, shared.barrier.parties
        self._shared = shared

    def from_first(self, value: Any) -> Any:
        if self.rank == 0:
            self._shared.told.append(value)
        self.barrier()
        return self._shared.told[-1]

    def add(self, name: str, amount: int) -> int:
        with self._shared.lock:
            self._shared.numbers[name] += amount
            return self._shared.numbers[name]

    def barrier(self) -> None:
        self._shared.barrier.wait(timeout=60)

    def is_preempted(self) -> bool:
        return False


class Shared:
    """What they have in common."""

    def __init__(self, num_workers: int) -> None:
        self.barrier = threading.Barrier(num_workers)
        self.lock = threading.Lock()
        self.numbers: Counter[str] = Counter()
        self.told: list[Any] = []


class Others(threading.Event):
    """What one worker waits for, and whether in vain."""

    failed = False


def test_a_worker_that_is_free_takes_the_next_shard_the_largest_first(
    curated: Curated, vq_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One worker is held up by its first shard: the other does what is left, of both datasets."""
    uris = [
        curated([[(32, 32)] * n for n in (1, 6, 2, 4)]),
        curated([[(24, 24)] * n for n in (3, 5)], "more"),
    ]
    plans = [token_cache.plan_cache(uri, str(vq_folder), 16, "center") for uri in uris]
    encode, others_done = token_encoding.encode_shard, Others()
    taken: dict[str, list[int]] = {}
    told: list[tuple[int, int]] = []

    def recorded(task: token_encoding.ShardTask, path: Path) -> object:
        mine = taken.setdefault(threading.current_thread().name, [])
        mine.append(task.shard_bytes)
        if len(mine) == 1 and threading.current_thread().name == "held up":
            others_done.failed = not others_done.wait(60)
            assert not others_done.failed
        return encode(task, path)

    def work(rank: int) -> None:
        threading.current_thread().name = "held up" if rank else "free"

        def tell(done: int, total: int) -> None:
            assert not others_done.failed  # who waits for the other would wait for ever
            told.append((done, total))
            if len(taken.get("free", ())) == 4:  # two are the other's: in work, and fetched
                others_done.set()

        token_cache.fill_caches(plans, Worker(rank, shared), tell)

    shared = Shared(2)
    monkeypatch.setattr(token_encoding, "encode_shard", recorded)
    monkeypatch.setattr(token_cache, "WAIT_SECONDS", 0.01)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, range(2)))
    assert (len(taken["free"]), len(taken["held up"])) == (4, 2)
    sizes = [size for mine in taken.values() for size in mine]
    assert max(sizes) in (taken["free"][0], taken["held up"][0])
    assert all(mine == sorted(mine, reverse=True) for mine in taken.values())
    assert told[-1] == (6, 6)
    assert told == sorted(told)
    assert all(token_cache.is_complete(plan) for plan in plans)
    assert [len(load_cache_manifest(plan.manifest_uri).shards) for plan in plans] == [4, 2]


def test_the_next_shard_is_fetched_and_the_last_stored_meanwhile(
    curated: Curated, vq_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetching: dict[str, threading.Event] = {}
    fetch, encode, store = (
        token_encoding._fetch, token_encoding.encode_shard, token_encoding._store,
    )  # fmt: skip
    encoded: list[str] = []
    may_store = threading.Event()

    def recorded_fetch(task: token_encoding.ShardTask, folder: Path) -> Path:
        fetching.setdefault(task.stem, threading.Event()).set()
        return fetch(task, folder)

    def recorded_encode(task: token_encoding.ShardTask, path: Path) -> object:
        encoded.append(task.stem)
        others = [stem for stem in order if stem not in encoded][:1]
        for stem in others:  # the next one is on its way, though this one is not encoded
            assert fetching.setdefault(stem, threading.Event()).wait(60)
        if len(encoded) == 2:
            may_store.set()
        return encode(task, path)

    def recorded_store(task: token_encoding.ShardTask, entry: CacheEntry, data: bytes) -> object:
        assert may_store.wait(60)  # which the second one's encoding does
        return store(task, entry, data)

    monkeypatch.setattr(token_encoding, "_fetch", recorded_fetch)
    monkeypatch.setattr(token_encoding, "encode_shard", recorded_encode)
    monkeypatch.setattr(token_encoding, "_store", recorded_store)
    dataset = curated([[(32, 32)] * n for n in (4, 3, 2)])
    plan = token_cache.plan_cache(dataset, str(vq_folder), 16, "center")
    order = [task.stem for task in sorted(plan.tasks, key=lambda task: -task.shard_bytes)]
    token_cache.fill_caches([plan], LocalSession())
    assert encoded == order
    assert token_cache.is_complete(plan)


def test_entries_are_read_many_at_a_time_and_what_is_known_is_not_read_again(
    curated: Curated, vq_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = curated([[(32, 32)]] * 2 + [[(24, 24)]] * 2 + [[(32, 24)]])
    uri = ensure_token_cache(dataset, str(vq_folder), 16)
    plan = token_cache.plan_cache(dataset, str(vq_folder), 16, "center")
    together = threading.Barrier(len(plan.tasks))
    read, asked = storage.read_json, list[str]()

    def slow(address: str) -> object:
        if address.startswith(uri.rsplit("/", 2)[0]) and "manifest" not in address:
            asked.append(address)
            together.wait(timeout=60)  # all of them, or none
        return read(address)

    monkeypatch.setattr(storage, "read_json", slow)
    known = token_cache.read_entries(plan.tasks)
    assert None not in known
    assert len(asked) == len(plan.tasks)
    token_cache.publish_cache(plan, known)
    assert len(asked) == len(plan.tasks)


def test_a_stage_sees_what_its_filters_pass(
    curated: Curated, vq_folder: Path, small_config: SmallConfig
) -> None:
    uri = ensure_token_cache(curated(SIZES), str(vq_folder), 16)
    everything = open_tokens(uri, small_config(caption_mix={"alt": 1.0}))
    assert len(everything) == 4
    batch = everything.batch_at(0)
    assert batch.tokens_BHW.shape == (6, 4, 4)
    assert batch.micro_conditions_B5.shape == (6, 5)
    long_only = open_tokens(uri, small_config(caption_mix={"synthetic": 1.0}))
    assert len(long_only) == 2
    assert all("long text" in caption for caption in long_only.batch_at(0).captions)
    assert long_only.left_out["caption_origin"] == 2
    scored = open_tokens(uri, small_config(caption_mix={"alt": 1.0}, min_preference_score=4.5))
    assert set(scored.batch_at(0).sample_ids) == {f"{1:016x}", f"{4:016x}"}
    with pytest.raises(UserError, match="loosen"):
        open_tokens(uri, small_config(min_aesthetic_score=9.0))


def test_images_are_shrunk_by_area_and_never_enlarged() -> None:
    pixels = np.zeros((4, 8, 3), np.uint8)
    pixels[:, ::2] = 200
    assert shrink(pixels, 2).tolist() == [[[100] * 3] * 4] * 2
    assert square_crop(pixels, 5, "center") is None


def test_random_crops_reach_every_place() -> None:
    image = np.zeros((4, 8, 3), np.uint8)
    lefts = []
    for draw in (0.0, 0.5, 0.999):
        square = square_crop(image, 4, "random", (0.0, draw))
        assert square is not None
        lefts.append(square.crop_left_px)
    assert lefts == [0, 2, 4]


def test_tokens_do_not_depend_on_the_passes_they_are_made_in(
    curated: Curated, vq_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = curated([[(32, 32)] * 7, [(24, 40)] * 5])

    def made() -> dict[str, object]:
        uri = ensure_token_cache(dataset, str(vq_folder), 16)
        folder = uri.rsplit("/", 2)[0]
        found: dict[str, object] = {}
        for entry in load_cache_manifest(uri).shards:
            shard = load_tokens(folder, entry)
            found |= dict(zip(shard.sample_ids, shard.tokens_NHW.tolist(), strict=True))
        storage.delete_prefix(folder)
        return found

    expected = made()
    assert len(expected) == 12
    monkeypatch.setattr(token_encoding, "ENCODED_PIXELS", 3 * 16 * 16)
    assert made() == expected


# --- aspect buckets ------------------------------------------------------------------------------


@given(
    side=st.sampled_from([256, 512, 1024]),
    resolution=st.sampled_from([128, 256, 512, 1024]),
    factor=st.sampled_from([4, 8, 16]),
)
def test_a_buckets_grid_fits_it_and_keeps_its_shape(
    side: int, resolution: int, factor: int
) -> None:
    for width, height in buckets_of(ResizeConfig(crop="bucket", image_size_px=side)):
        grid_height, grid_width = bucket_grid(width, height, resolution, factor)
        assert grid_height % 2 == grid_width % 2 == 0
        assert grid_height * factor <= height
        assert grid_width * factor <= width
        assert grid_height * grid_width * factor**2 <= resolution**2
        if resolution == side:  # nothing is cut or shrunk
            assert (grid_height * factor, grid_width * factor) == (height, width)
        if resolution >= 256:  # a larger one of the same shape would not fit
            bound = min(1.0, resolution / (width * height) ** 0.5)
            assert grid_height > height * bound / factor - 2
            assert grid_width > width * bound / factor - 2


def test_tokens_of_buckets_have_the_shape_of_their_images(
    curated: Curated, vq_folder: Path
) -> None:
    sizes = [[(48, 24)] * 2, [(32, 32)] * 3]
    uri = ensure_token_cache(curated(sizes, in_buckets=True), str(vq_folder), 32, "bucket")
    manifest = load_cache_manifest(uri)
    assert [(e.grid_height, e.grid_width) for e in manifest.shards] == [(4, 10), (8, 8)]
    shard = load_tokens(uri.rsplit("/", 2)[0], manifest.shards[0])
    image = Image.open(_image_file(uri, manifest.shards[0].shard_sha256, shard.sample_ids[1]))
    # 48 x 24 fills 40 x 16 when it is shrunk to 40 x 20; two rows above and two below go.
    cut = image.convert("RGB").resize((40, 20), Image.Resampling.BOX).crop((0, 2, 40, 18))
    pixels = torch.tensor(np.asarray(cut)).permute(2, 0, 1)[None].float() / 255
    expected = VQTokenizer.from_pretrained(vq_folder / "vqvae").encode(pixels)[0]
    assert shard.tokens_NHW[1].tolist() == expected.tolist()
    # Stored from 112 x 48, of which curation cut 8 px at the left: 40/112 and 16/48 px a px.
    assert shard.sizes_and_crops_N4[1].tolist() == [112, 48, 2, 3]


def test_a_batch_has_tokens_of_one_shape(
    curated: Curated, vq_folder: Path, small_config: SmallConfig
) -> None:
    sizes = [[(48, 24)] * 7, [(32, 32)] * 9, [(24, 48)] * 2, [(32, 32)] * 4]
    uri = ensure_token_cache(curated(sizes, in_buckets=True), str(vq_folder), 32, "bucket")
    config = small_config(crop="bucket", resolution_px=32)
    dataset = open_tokens(uri, config)
    grids = {name: grid for grid, name in _grids_by_sample(uri)}
    shapes = []
    for number in range(12):
        batch = dataset.batch_at(number)
        shape = tuple(batch.tokens_BHW.shape[1:])
        assert {grids[name] for name in batch.sample_ids} == {shape}
        assert len(batch.sample_ids) == config.global_batch_size
        shapes.append(shape)
    assert len(set(shapes)) == 3
    assert shapes.count((8, 8)) == max(shapes.count(shape) for shape in set(shapes))


def _grids_by_sample(manifest_uri: str) -> Iterator[tuple[tuple[int, int], str]]:
    for entry in load_cache_manifest(manifest_uri).shards:
        shard = load_tokens(manifest_uri.rsplit("/", 2)[0], entry)
        yield from ((shard.grid, name) for name in shard.sample_ids)


def test_buckets_are_not_made_up(curated: Curated, vq_folder: Path) -> None:
    with pytest.raises(UserError, match=r"2 of 2 shards without.*resize\.crop: bucket"):
        ensure_token_cache(curated(SIZES), str(vq_folder), 16, "bucket")
