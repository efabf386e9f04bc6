"""Where networks, averages and moments lie: on the worker's device, from their start to the end.

No machine here has a GPU. "meta" stands in for one: torch keeps apart what lies there as it does on
a GPU, and refuses to bring any of it back. CUDA's current device is stood in for by a number of
each thread, which is what it is.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import ray.train
import torch
import torch.distributed
from lightning.fabric.utilities import optimizer as lightning_optimizer
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn

from infra import storage
from training import fit, group, masked_run, tokenizer_run
from training.checkpoint import Checkpoint, TrainingState
from training.config import (
    OptimizerConfig,
    SavingConfig,
    StageConfig,
    TextEncoderConfig,
    TokenizerConfig,
    TokenizerTrainingConfig,
)
from training.data import TokenShard, in_memory
from training.devices import own_device
from training.group import TorchGroupConfig
from training.initial import Networks
from training.job import Job
from training.keeper import Keeper
from training.masked_run import MaskedRun
from training.masked_stage import MaskedStage
from training.networks import new_vq
from training.optim_8bit import SCALES
from training.session import LocalSession
from training.tokenizer_run import CuratedSamples, TokenizerRun
from training.worker import train

META = torch.device("meta")
SMALL_VQ = TokenizerConfig(
    block_out_channels=(8, 8, 8),
    latent_channels=4,
    codebook_size=32,
    bpe_vocab_size=520,
    precision="fp32",
    training=TokenizerTrainingConfig(
        resolutions_px=(16,), steps=8, batch_pixels=1024, warmup_steps=2
    ),
)


@pytest.fixture
def new_run(
    new_stage: Callable[[StageConfig], MaskedStage], token_shard: Callable[..., TokenShard]
) -> Callable[[StageConfig], MaskedRun]:
    """A stage that no step was made of."""

    def build(config: StageConfig) -> MaskedRun:
        stage = new_stage(config)
        networks = Networks(
            stage.transformer, stage.text_encoder, stage.tokenizer, new_vq(SMALL_VQ), "fresh", []
        )
        return MaskedRun(config, networks, in_memory([token_shard(12)], config), LocalSession())

    return build


def _checkpoint_of(run: Any) -> Checkpoint:
    state = TrainingState(step=run.step, config_sha256="k" * 64, **run.state())
    return Checkpoint(run.weights(), run.optimizer_state(), state)


def _backward(loss: Tensor) -> None:
    loss.backward()  # type: ignore[no-untyped-call]


def _step(run: Any) -> None:
    run.train(run.prepare(run.batch).to("cpu"), _backward, nullcontext)


def _odd_ones(tensors: dict[str, Tensor], expected: torch.device) -> list[str]:
    return [name for name, tensor in tensors.items() if tensor.device.type != expected.type]


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "muon"])
def test_a_checkpoint_is_loaded_to_where_the_networks_are(
    new_run: Callable[[StageConfig], MaskedRun],
    small_config: Callable[..., StageConfig],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    """Also what counts steps, which Lightning never moves and AdamW's kernels want beside the
    weights; that of 8-bit moments is Python's."""
    config = small_config(
        optimizer=OptimizerConfig.model_validate({"name": name, "warmup_steps": 2}),
        train_text_encoder=True,
        ema_decay=0.9,
    )
    run = new_run(config)
    for _ in range(2):
        _step(run)
    checkpoint = _checkpoint_of(run)
    monkeypatch.setattr(masked_run, "own_device", lambda: META)
    elsewhere = new_run(config)
    assert not _odd_ones(elsewhere.weights(), META)
    elsewhere.restore(checkpoint)
    for _ in range(2):
        assert not _odd_ones(elsewhere.weights(), META)
        odd = _odd_ones(elsewhere.optimizer_state(), META)
        in_8_bits = {key.rpartition("/")[0] for key in checkpoint.optimizer if key.endswith(SCALES)}
        assert set(odd) == {f"{parameter}/step" for parameter in in_8_bits}
        assert bool(in_8_bits) == (name == "adamw_8bit")
        elsewhere.go_back(checkpoint, to_batch=2)


@pytest.mark.filterwarnings("ignore:for .* which is a no-op")
def test_a_tokenizers_checkpoint_is_loaded_to_where_it_is(
    text_encoder_config: TextEncoderConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = CuratedSamples([torch.zeros(20, 20, 3, dtype=torch.uint8).numpy()] * 4, ["a"])
    run = TokenizerRun(SMALL_VQ, text_encoder_config, samples)
    _step(run)
    checkpoint = _checkpoint_of(run)
    monkeypatch.setattr(tokenizer_run, "own_device", lambda: META)
    elsewhere = TokenizerRun(SMALL_VQ, text_encoder_config, samples)
    elsewhere.restore(checkpoint)
    assert not _odd_ones(elsewhere.weights(), META)
    assert not _odd_ones(elsewhere.optimizer_state(), META)


def test_lightning_leaves_everything_where_it_is(
    new_run: Callable[[StageConfig], MaskedRun],
    small_config: Callable[..., StageConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At the end of a fit its strategies bring the module and the moments to the CPU."""
    config = small_config(ema_decay=0.9)
    run = new_run(config)
    _step(run)
    checkpoint = _checkpoint_of(run)
    monkeypatch.setattr(masked_run, "own_device", lambda: META)
    elsewhere = new_run(config)
    elsewhere.restore(checkpoint)
    watcher: Any = None
    module = fit.StageModule(elsewhere, watcher)
    strategy = SingleDeviceStrategy("cpu")
    strategy.accelerator = _NoAccelerator()  # type: ignore[assignment]
    strategy.connect(module)
    strategy.optimizers = module.configure_optimizers()
    strategy.teardown()
    assert not _odd_ones(elsewhere.weights(), META)
    assert not _odd_ones(elsewhere.optimizer_state(), META)


class _NoAccelerator:
    def teardown(self) -> None:
        """Nothing to let go of."""


def test_nothing_moves_between_the_last_step_and_the_last_checkpoint(
    tmp_path: Path,
    raw_job: Callable[[StageConfig], dict[str, Any]],
    small_config: Callable[..., StageConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It puts together parts that lie on GPUs, over a group that knows only these."""
    order: list[str] = []
    apply: Any = nn.Module._apply
    checkpoint, step = Keeper._checkpoint, MaskedRun.train

    def recorded_apply(self: nn.Module, *arguments: Any) -> Any:
        order.append("moved")
        return apply(self, *arguments)

    def recorded_checkpoint(self: Keeper) -> Checkpoint | None:
        order.append("checkpoint")
        return checkpoint(self)

    def recorded_step(self: MaskedRun, *arguments: Any) -> Any:
        order.append("step")
        return step(self, *arguments)

    def recorded_move(value: Any, device: Any) -> Any:
        order.append("moved")
        return value

    monkeypatch.setattr(nn.Module, "_apply", recorded_apply)
    monkeypatch.setattr(Keeper, "_checkpoint", recorded_checkpoint)
    monkeypatch.setattr(MaskedRun, "train", recorded_step)
    monkeypatch.setattr(lightning_optimizer, "move_data_to_device", recorded_move)
    raw = raw_job(small_config(steps=3, ema_decay=0.9))
    run_uri = storage.file_uri(tmp_path / "run")
    train(Job.parse({**raw, "cpus": 1, "run_uri": run_uri}), LocalSession())
    first, last = order.index("step"), order.index("checkpoint")
    assert order[first:last] == ["step"] * 3


# --- which device --------------------------------------------------------------------------------


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of four GPUs whose worker was given the last; the current one is a thread's own."""
    import ray.train.torch

    current = threading.local()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: getattr(current, "index", 0))
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda device: setattr(current, "index", device.index)
    )
    monkeypatch.setattr(ray.train.torch, "get_device", lambda: torch.device("cuda", 3))


@pytest.mark.filterwarnings("ignore::Warning:ray.data.context")
@pytest.mark.usefixtures("gpus")
def test_the_thread_that_trains_has_the_gpu_that_the_worker_was_given() -> None:
    from ray.train.v2._internal.execution.worker_group import thread_runner
    from ray.train.v2._internal.util import construct_train_func

    found = [own_device()]
    context: Any = TorchGroupConfig().train_func_context

    def work(job: dict[str, Any]) -> None:
        found.append(own_device())

    runners: Any = thread_runner
    runner = runners.ThreadRunner()
    runner.run(construct_train_func(work, {}, context))
    while runner.is_running():
        time.sleep(0.01)
    assert runner.get_error() is None
    assert found == [torch.device("cuda", 0), torch.device("cuda", 3)]


@pytest.mark.filterwarnings("ignore::Warning:ray.data.context")
def test_the_group_is_joined_on_the_gpu_that_the_worker_was_given(
    gpus: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not on that of its number on the machine: Ray deals them out as it likes."""
    joined: list[tuple[str, torch.device, str | None]] = []

    def join(backend: str, **options: Any) -> None:
        joined.append((backend, own_device(), os.environ.get("CUDA_VISIBLE_DEVICES")))
        assert options["timeout"] > timedelta(minutes=SavingConfig().max_step_minutes or 0)

    for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "")
    monkeypatch.setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    monkeypatch.setattr(ray.train, "get_context", _Context)
    monkeypatch.setattr(torch.distributed, "init_process_group", join)
    group._join_group({}, "127.0.0.1", 1, 5, 8, "nccl")
    assert joined == [("nccl", torch.device("cuda", 3), "0,1,2,3")]
    # A worker that asked for no GPU sees none, though Ray leaves them in sight.
    group._join_group({}, "127.0.0.1", 1, 5, 8, "gloo")
    assert joined[1][2] == ""


class _Context:
    def get_local_rank(self) -> int:
        return 1

    def get_local_world_size(self) -> int:
        return 4

    def get_node_rank(self) -> int:
        return 1
