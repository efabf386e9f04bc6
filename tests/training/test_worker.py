"""Whole stages in this process, without Ray: what ``train_worker`` does inside a worker."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from infra import storage
from infra.errors import UserError
from model import MaskedImageTransformer, TextToImage
from tests.training.notes import Notes
from training import token_cache
from training.checkpoint import verify_folder
from training.checkpoint_store import CheckpointStore
from training.config import (
    GuardConfig,
    InitConfig,
    SampleGridConfig,
    StageConfig,
    TokenizerConfig,
    TokenizerTrainingConfig,
)
from training.encoding_news import METRIC, EncodingNews
from training.fit import Stopped
from training.job import Job
from training.keeper import Keeper
from training.progress import (
    StageProgress,
    parse_progress,
    read_progress,
    read_progress_json,
)
from training.publish import publish_folder
from training.session import LocalSession
from training.waste import read_starts, waste_by_cause
from training.worker import train

Curated = Callable[..., str]


@dataclass
class Runs:
    """Runs by name; calling it gives the folder of a run's newest checkpoint."""

    root: Path

    def uri(self, name: str) -> str:
        return storage.file_uri(self.root / name)

    def __call__(self, name: str) -> Path:
        return Path(CheckpointStore(self.uri(name)).complete()[0].uri.removeprefix("file://"))

    def train(self, job: Job, name: str, tracker: Notes | None = None) -> None:
        train(replace(job, run_uri=self.uri(name)), LocalSession(), tracker)


def _tokenizer_job(manifest_uri: str, text: Any) -> Job:
    config = TokenizerConfig(
        dataset="toy",
        block_out_channels=(8, 8, 8),
        latent_channels=4,
        codebook_size=32,
        bpe_vocab_size=520,
        precision="fp32",
        training=TokenizerTrainingConfig(
            resolutions_px=(16,), steps=8, batch_pixels=2048, warmup_steps=2
        ),
    )
    return Job(
        kind="tokenizer",
        stage="tokenizer",
        stage_key="a" * 64,
        configs={
            "tokenizer": config.model_dump(mode="json"),
            "text_encoder": text.model_dump(mode="json"),
        },
        run_uri="file:///chosen/by/Runs",
        manifest_uri=manifest_uri,
        cpus=1,
    )


def _masked_job(
    stage: str, config: StageConfig, network: Any, manifest_uri: str, init_uri: str
) -> Job:
    return Job(
        kind="masked",
        stage=stage,
        stage_key=(stage[0] * 64),
        configs={
            "stage": config.model_dump(mode="json"),
            "network": network.model_dump(mode="json"),
        },
        run_uri="file:///chosen/by/Runs",
        manifest_uri=manifest_uri,
        init_uri=init_uri,
        cpus=1,
    )


@pytest.fixture
def manifest_uri(curated: Curated) -> str:
    """Sixteen images in two shards."""
    return curated([[(32, 32)] * 9, [(40, 32)] * 7])


@pytest.fixture
def run_of(tmp_path: Path) -> Runs:
    """The runs of this test."""
    return Runs(tmp_path / "runs")


@pytest.fixture
def published(
    tmp_path: Path,
    manifest_uri: str,
    text_encoder_config: Any,
    run_of: Runs,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[str], str]:
    """Publishes a stage's export; the tokenizer is trained first."""
    monkeypatch.setenv("ATELIER_HOME", str(tmp_path / "home"))
    run_of.train(_tokenizer_job(manifest_uri, text_encoder_config), "tokenizer")

    def publish(stage: str) -> str:
        store_uri = (tmp_path / "store").as_uri()
        return publish_folder(run_of(stage) / "export", store_uri, stage, {"stage": stage}).uri

    return publish


def test_the_tokenizer_stage_hands_over_three_parts(
    published: Callable[[str], str], run_of: Runs
) -> None:
    folder = run_of("tokenizer")
    assert verify_folder(folder) == []
    assert {path.name for path in (folder / "export").iterdir()} == {
        "vqvae",
        "tokenizer",
        "text_encoder",
    }
    assert json.loads((folder / "state.json").read_bytes())["step"] == 8


def test_stages_start_from_each_other_and_the_last_one_paints(
    published: Callable[[str], str],
    run_of: Runs,
    manifest_uri: str,
    network_config: Any,
    small_config: Callable[..., StageConfig],
) -> None:
    notes = Notes()
    config = small_config(
        log_interval_steps=2,
        ema_decay=0.5,
        sample_grid=SampleGridConfig(prompts=("a rectangle",) * 5, steps=2),
    )
    job = _masked_job("concepts", config, network_config, manifest_uri, published("tokenizer"))
    run_of.train(job, "concepts", notes)

    points = [(step, point) for step, point in notes.points if METRIC not in point]
    assert [step for step, _ in points][:3] == [2, 4, 6]
    assert set(points[0][1]) == {
        "loss",
        "learning_rate",
        "grad_norm",
        "epoch",
        "checkpoint_seconds",
        "data_seconds",
        "step_seconds",
        "images_per_second",
        "tokens_per_second",
        "model_teraflops",
        "host/cores",
        "host/cpu_share",
        "host/memory_mb",
        "host/memory_share",
    }
    assert notes.artifacts["samples.png"].startswith(b"\x89PNG")
    assert notes.is_closed
    metrics = storage.read_json((run_of("concepts") / "result.json").as_uri())
    assert metrics["step"] == 6
    assert metrics["final_loss"] == pytest.approx(3.46, abs=0.2)
    assert all(type(value) is float for value in metrics.values())
    assert _init(run_of("concepts"))["source"] == "fresh"
    painter = TextToImage.from_pretrained(run_of("concepts") / "export")
    name = "transformer.mlm_layer.conv2.weight"
    saved = load_file(run_of("concepts") / "weights.safetensors")
    exported = painter.transformer.mlm_layer.conv2.weight
    assert torch.equal(exported, saved[f"ema/{name}"])
    assert not torch.equal(exported, saved[name])
    assert (painter.defaults.text_tokens, painter.defaults.resolution_px) == (12, 16)
    assert painter.defaults.preference_score == pytest.approx(6.0)

    bigger = small_config(
        resolution_px=32,
        compress=True,
        init=InitConfig(new_parameters=("down_block.", "up_block.")),
    )
    job = _masked_job("compression", bigger, network_config, manifest_uri, published("concepts"))
    run_of.train(job, "compression")
    start = _init(run_of("compression"))
    assert start["source"] == "parent"
    assert start["new_keys"]
    assert all(name.startswith(("down_block.", "up_block.")) for name in start["new_keys"])
    transformer = MaskedImageTransformer.from_pretrained(
        run_of("compression") / "export" / "transformer"
    )
    assert transformer.config.compresses


def _init(folder: Path) -> dict[str, Any]:
    init = json.loads((folder / "state.json").read_bytes())["init"]
    assert isinstance(init, dict)
    return init


def test_new_parameters_must_be_named(
    published: Callable[[str], str],
    run_of: Runs,
    manifest_uri: str,
    network_config: Any,
    small_config: Callable[..., StageConfig],
) -> None:
    job = _masked_job(
        "concepts", small_config(steps=3), network_config, manifest_uri, published("tokenizer")
    )
    run_of.train(job, "concepts")
    config = small_config(resolution_px=32, compress=True)
    job = _masked_job("compression", config, network_config, manifest_uri, published("concepts"))
    with pytest.raises(UserError, match=r"down_block\.downsample"):
        run_of.train(job, "compression")


def test_a_killed_run_goes_on_to_the_same_weights(
    published: Callable[[str], str],
    run_of: Runs,
    manifest_uri: str,
    network_config: Any,
    small_config: Callable[..., StageConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = small_config(ema_decay=0.9)
    job = _masked_job("concepts", config, network_config, manifest_uri, published("tokenizer"))
    run_of.train(job, "straight")

    every = small_config(ema_decay=0.9, checkpoint_interval_steps=3)
    job = replace(job, configs={**job.configs, "stage": every.model_dump(mode="json")})

    def die(keeper: Keeper) -> None:
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(Keeper, "finish", die)
        with pytest.raises(RuntimeError, match="killed"):
            run_of.train(job, "killed")
    assert json.loads((run_of("killed") / "state.json").read_bytes())["step"] == 3
    notes = Notes()
    run_of.train(job, "killed", notes)
    for name in ("weights.safetensors", "optimizer.safetensors"):
        straight, resumed = (load_file(run_of(run) / name) for run in ("straight", "killed"))
        assert all(torch.equal(straight[key], resumed[key]) for key in straight)
    states = [
        json.loads((run_of(run) / "state.json").read_bytes()) for run in ("straight", "killed")
    ]
    assert states[0] == states[1]


def test_a_run_that_is_to_go_on_never_begins_anew_without_a_word(
    published: Callable[[str], str],
    run_of: Runs,
    manifest_uri: str,
    network_config: Any,
    small_config: Callable[..., StageConfig],
) -> None:
    job = _masked_job(
        "concepts", small_config(), network_config, manifest_uri, published("tokenizer")
    )
    with pytest.raises(UserError, match=r"expected the checkpoint of step 4 .* got none"):
        run_of.train(replace(job, resume_step=4), "concepts")
    run_of.train(job, "concepts")
    assert run_of("concepts").name.startswith("000-00000006-")


def test_how_it_began_is_a_fact_of_the_run(
    published: Callable[[str], str],
    run_of: Runs,
    manifest_uri: str,
    network_config: Any,
    small_config: Callable[..., StageConfig],
) -> None:
    notes, config = Notes(), small_config(steps=3)
    job = _masked_job("concepts", config, network_config, manifest_uri, published("tokenizer"))
    run_of.train(job, "concepts", notes)
    assert notes.tags["started"] == "attempt 1: INIT with fresh weights"
    job = _masked_job("more", config, network_config, manifest_uri, published("concepts"))
    run_of.train(job, "more", notes)
    assert notes.tags["started"].startswith("attempt 1: INIT with ")
    assert notes.tags["started"].endswith(" parameters of the parent and 0 new")
    (start,) = read_starts(run_of.uri("more"))
    assert (start.step, start.cause, start.lost_steps) == (0, "", 0)


def test_a_finished_run_does_nothing(
    published: Callable[[str], str],
    run_of: Runs,
    manifest_uri: str,
    text_encoder_config: Any,
) -> None:
    before = run_of("tokenizer")
    run_of.train(_tokenizer_job(manifest_uri, text_encoder_config), "tokenizer")
    assert run_of("tokenizer") == before


def test_sigterm_saves_the_last_step(
    published: Callable[[str], str],
    run_of: Runs,
    manifest_uri: str,
    network_config: Any,
    small_config: Callable[..., StageConfig],
) -> None:
    config = small_config(steps=5000)
    job = _masked_job("concepts", config, network_config, manifest_uri, published("tokenizer"))
    timer = threading.Timer(2.0, signal.raise_signal, [signal.SIGTERM])
    before = signal.getsignal(signal.SIGTERM)
    timer.start()
    with pytest.raises(Stopped):
        run_of.train(job, "concepts")
    timer.join()
    assert signal.getsignal(signal.SIGTERM) is before
    step = json.loads((run_of("concepts") / "state.json").read_bytes())["step"]
    assert 0 < step < 5000
    assert verify_folder(run_of("concepts")) == []


def test_progress_is_written(
    published: Callable[[str], str],
    run_of: Runs,
    manifest_uri: str,
    network_config: Any,
    small_config: Callable[..., StageConfig],
    tmp_path: Path,
) -> None:
    uri = storage.file_uri(tmp_path / "progress.json")
    config = small_config()
    job = _masked_job("concepts", config, network_config, manifest_uri, published("tokenizer"))
    run_of.train(replace(job, progress_uri=uri), "concepts")
    progress = storage.read_json(uri)
    assert (progress["step"], progress["steps"], progress["eta_seconds"]) == (6, 6, 0.0)
    assert progress["loss"] > 0
    assert progress["images_per_second"] > 0
    assert progress["num_workers"] == 1


def test_a_damaged_checkpoint_is_told_and_has_its_price(
    published: Callable[[str], str],
    run_of: Runs,
    manifest_uri: str,
    network_config: Any,
    small_config: Callable[..., StageConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = small_config(guard=GuardConfig(rewind_steps=2))  # saves steps 0, 2 and 4
    job = _masked_job("concepts", config, network_config, manifest_uri, published("tokenizer"))
    progress_uri = storage.file_uri(run_of.root / "damaged" / "progress.json")
    job = replace(job, progress_uri=progress_uri)

    def die(keeper: Keeper) -> None:
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(Keeper, "finish", die)
        with pytest.raises(RuntimeError, match="killed"):
            run_of.train(job, "damaged")
    weights = run_of("damaged") / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    run_of.train(replace(job, attempt=2), "damaged")
    progress = read_progress(progress_uri)
    assert progress is not None
    told = dict(progress.notes)["checkpoint passed by"]
    assert told.startswith("step 4: ")
    assert "weights.safetensors" in told
    start = read_starts(run_of.uri("damaged"))[-1]
    assert (start.step, start.damaged_steps) == (2, 2)
    assert start.lost_steps == 2  # of the six that were made
    assert set(waste_by_cause([start])) == {"driver lost", "checkpoint damaged"}


def test_a_parent_of_another_width_is_one_line(
    published: Callable[[str], str],
    run_of: Runs,
    manifest_uri: str,
    network_config: Any,
    small_config: Callable[..., StageConfig],
) -> None:
    config = small_config(steps=3)
    job = _masked_job("concepts", config, network_config, manifest_uri, published("tokenizer"))
    run_of.train(job, "concepts")
    wide = network_config.model_copy(update={"num_attention_heads": 4})
    job = _masked_job("alignment", config, wide, manifest_uri, published("concepts"))
    with pytest.raises(UserError, match="num_attention_heads is 2, expected 4"):
        run_of.train(job, "alignment")


def test_shards_that_are_encoded_first_are_told(
    tmp_path: Path,
    raw_job: Callable[[StageConfig], dict[str, Any]],
    small_config: Callable[..., StageConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the progress that `atelier status` follows and in MLflow; what an earlier start wrote of
    its steps stays, for the account of what was lost."""
    raw = raw_job(small_config(steps=3))
    job, notes = (
        Job.parse({**raw, "cpus": 1, "run_uri": storage.file_uri(tmp_path / "run")}),
        Notes(),
    )
    seen: list[dict[str, Any]] = []
    before = {"step": 7, "steps": 9, "attempt": 0, "step_seconds": 0.5}
    storage.write_json(raw["progress_uri"], before)

    def open_tokens(uri: str, config: StageConfig) -> Any:
        news[0].close()
        seen.append(read_progress_json(raw["progress_uri"]))
        return opened(uri, config)

    news: list[EncodingNews] = []
    opened, begun = token_cache.open_tokens, EncodingNews.__init__

    def begin(self: EncodingNews, *arguments: Any) -> None:
        news.append(self)
        begun(self, *arguments)

    monkeypatch.setattr(EncodingNews, "__init__", begin)
    monkeypatch.setattr(token_cache, "open_tokens", open_tokens)
    train(job, LocalSession(), notes)
    assert seen == [{**before, "shards_encoded": 2, "shards": 2}]
    assert parse_progress({**seen[0], "shards_encoded": 1}) == StageProgress(
        step=7, steps=9, shards_encoded=1, shards=2
    )
    points = [(step, p[METRIC]) for step, p in notes.points if METRIC in p]
    assert points[-1] == (2, 2)
    last = read_progress_json(raw["progress_uri"])
    assert (last["step"], last["attempt"]) == (3, 1)
    assert "shards" not in last
    train(replace(job, run_uri=storage.file_uri(tmp_path / "again")), LocalSession(), notes)
    assert len(seen) == 2
    assert "shards" not in seen[1]  # nothing was left to encode
