"""Stages that start from a published transformer, in full or by adapters, and compiled blocks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from infra import storage
from infra.errors import UserError
from model import CLIPTextEncoder, LoRA, MaskedImageTransformer, TextToImage
from training.checkpoint import Checkpoint, TrainingState
from training.checkpoint_store import CheckpointDamaged, CheckpointStore
from training.compiled import compile_blocks
from training.config import AdaptersConfig, InitConfig, StageConfig
from training.data import TokenShard, in_memory
from training.gate import gate
from training.job import Job
from training.keeper import Keeper
from training.masked_run import MaskedRun
from training.masked_stage import MaskedStage, backward, step_inputs
from training.masking import EMPTY_PROMPT
from training.session import LocalSession
from training.waste import read_starts
from training.worker import build_run, train

# torch.compile looks for gradients of what is no leaf, and hides what torch says of that.
COMPILES = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
RawJob = Callable[[StageConfig], dict[str, Any]]


@pytest.fixture
def run(tmp_path: Path, raw_job: RawJob) -> Callable[[StageConfig, str], Path]:
    """Train a stage to its end (or to where it dies); returns its newest checkpoint's folder."""

    def train_it(config: StageConfig, name: str) -> Path:
        uri = storage.file_uri(tmp_path / "runs" / name)
        train(Job.parse({**raw_job(config), "run_uri": uri, "cpus": 1}), LocalSession())
        return Path(CheckpointStore(uri).complete()[0].uri.removeprefix("file://"))

    return train_it


@pytest.fixture
def base(run: Any, small_config: Callable[..., StageConfig]) -> Path:
    """A transformer's folder, as it is published."""
    folder: Path = run(small_config(steps=3), "base") / "export" / "transformer"
    return folder


def _from(folder: Path) -> InitConfig:
    return InitConfig(source="pretrained", pretrained=str(folder))


def test_adapters_learn_alone_and_are_handed_over_twice(
    run: Any, base: Path, small_config: Callable[..., StageConfig], tmp_path: Path
) -> None:
    lora = AdaptersConfig(rank=2, targets=r"(single_)?transformer_blocks\..*\.to_[qkv]")
    folder = run(small_config(lora=lora, ema_decay=0.5, init=_from(base)), "tuned")
    names = {name.removeprefix("ema/") for name in load_file(folder / "weights.safetensors")}
    assert len(names) == 2 * 6  # A and B of three layers in each of two blocks
    assert all(name.startswith("lora.adapters.") for name in names)
    assert json.loads((folder / "state.json").read_bytes())["init"]["num_adapters"] == 6
    (start,) = read_starts(storage.file_uri(tmp_path / "runs" / "tuned"))
    assert "parameters of a published folder and 0 new" in start.how
    before = MaskedImageTransformer.from_pretrained(base)
    after = MaskedImageTransformer.from_pretrained(folder / "export" / "transformer")
    changed = {
        name for name, value in after.state_dict().items()
        if not torch.equal(value, before.state_dict()[name])
    }  # fmt: skip
    assert len(changed) == 6
    assert all(".to_" in name for name in changed)
    adapters = LoRA.from_pretrained(folder / "export" / "lora", {"transformer": before})
    tokens_BHW = torch.randint(0, 32, (2, 4, 4), generator=torch.Generator().manual_seed(0))
    inputs = (
        tokens_BHW, torch.randn(2, 5, 16), torch.randn(2, 12), torch.rand(2, 5), torch.rand(2)
    )  # fmt: skip
    with torch.no_grad():
        torch.testing.assert_close(before(*inputs), after(*inputs), atol=1e-5, rtol=1e-5)
        adapters.detach()
        assert not torch.allclose(before(*inputs), after(*inputs), atol=1e-4)
    assert gate(folder / "export").problems == ()


@pytest.mark.parametrize(
    "changes",
    [
        {"lora": AdaptersConfig(rank=2, dropout=0.3)},
        {"crop": "bucket"},
        {"train_text_encoder": True, "text_encoder_learning_rate": 1e-2, "ema_decay": 0.5},
    ],
)
def test_a_killed_run_comes_to_the_same_weights(
    run: Any,
    base: Path,
    small_config: Callable[..., StageConfig],
    changes: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Adapters with dropout, steps of several shapes in turn, a text encoder that learns."""
    config = small_config(
        init=_from(base), checkpoint_interval_steps=3, max_microbatch_size=4, **changes
    )
    straight = load_file(run(config, "straight") / "weights.safetensors")

    def die(keeper: Keeper) -> None:
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(Keeper, "finish", die)
        with pytest.raises(RuntimeError, match="killed"):
            run(config, "killed")
    torch.manual_seed(99)  # wherever torch's own generator stands
    resumed = load_file(run(config, "killed") / "weights.safetensors")
    torch.testing.assert_close(resumed, straight, rtol=0, atol=0)


def test_what_is_exported_is_what_was_trained(
    run: Any, base: Path, small_config: Callable[..., StageConfig], vq_folder: Path
) -> None:
    """The averages of both networks, by name; and the frozen encoder as it was."""
    parent = CLIPTextEncoder.from_pretrained(vq_folder / "text_encoder").state_dict()
    for trains in (True, False):
        config = small_config(
            init=_from(base), train_text_encoder=trains, text_encoder_learning_rate=1e-2,
            ema_decay=0.5,
        )  # fmt: skip
        folder = run(config, f"text-{trains}")
        averages = {
            name.removeprefix("ema/"): value
            for name, value in load_file(folder / "weights.safetensors").items()
            if name.startswith("ema/")
        }
        painter = TextToImage.from_pretrained(folder / "export")
        assert painter.defaults.negative_prompt == EMPTY_PROMPT  # as training drops prompts
        exported = {
            f"{part}.{name}": value
            for part in ("transformer", "text_encoder")
            for name, value in getattr(painter, part).state_dict().items()
        }
        assert all(torch.equal(exported[name], value) for name, value in averages.items())
        moved = [n for n, v in parent.items() if not torch.equal(v, exported[f"text_encoder.{n}"])]
        assert len(moved) > 0.9 * len(parent) if trains else moved == []


def test_a_checkpoint_without_a_trained_parameter_is_damaged(
    base: Path, small_config: Callable[..., StageConfig], raw_job: RawJob
) -> None:
    config = small_config(train_text_encoder=True, init=_from(base))
    made = build_run(Job.parse({**raw_job(config), "cpus": 1}), LocalSession())
    assert isinstance(made, MaskedRun)
    state = TrainingState(step=0, config_sha256="k" * 64)
    weights = {name: value.clone() for name, value in made.weights().items()}
    name = next(name for name in weights if name.startswith("text_encoder."))
    del weights[name]
    with pytest.raises(CheckpointDamaged, match=f"differs in 1 weights: {name}"):
        made.restore(Checkpoint(weights, {}, state))


def test_full_fine_tuning_changes_everything(
    run: Any, base: Path, small_config: Callable[..., StageConfig]
) -> None:
    folder = run(small_config(init=_from(base)), "tuned")
    before = MaskedImageTransformer.from_pretrained(base).state_dict()
    after = MaskedImageTransformer.from_pretrained(folder / "export" / "transformer").state_dict()
    same = [name for name, value in after.items() if torch.equal(value, before[name])]
    assert len(same) < 0.2 * len(after)


def test_a_target_that_no_layer_has_is_one_line(
    run: Any, base: Path, small_config: Callable[..., StageConfig]
) -> None:
    config = small_config(lora=AdaptersConfig(targets="nothing"), init=_from(base))
    with pytest.raises(UserError, match="no linear layer is called like 'nothing'"):
        run(config, "tuned")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"lora": {}, "init": {"source": "fresh"}}, "lora trains no new weights"),
        ({"lora": {}, "init": {"new_parameters": ["up_block."]}}, "lora trains no new weights"),
        ({"lora": {}, "strategy": "fsdp"}, "use ddp"),
        ({"init": {"source": "pretrained"}}, "need each other"),
        ({"init": {"pretrained": "/somewhere"}}, "need each other"),
    ],
)
def test_what_does_not_go_together(
    changes: dict[str, Any], expected: str, small_config: Callable[..., StageConfig]
) -> None:
    with pytest.raises(ValueError, match=expected):
        small_config(**changes)


def _gradients(stage: MaskedStage, inputs: Any) -> dict[str, Any]:
    loss = backward(stage, inputs)
    grads = {name: p.grad for name, p in stage.transformer.named_parameters()}
    return {"loss": loss, **grads}


@COMPILES
@pytest.mark.slow
def test_compiled_blocks_compute_the_same(
    new_stage: Callable[[StageConfig], MaskedStage],
    small_config: Callable[..., StageConfig],
    token_shard: Callable[..., TokenShard],
) -> None:
    config = small_config()
    plain, compiled = new_stage(config), new_stage(config)
    names = set(compiled.transformer.state_dict())
    torch.compiler.reset()
    compile_blocks(compiled.transformer, "aot_eager")
    assert set(compiled.transformer.state_dict()) == names
    batch = in_memory([token_shard(12)], config).batch_at(0)
    inputs = step_inputs(batch, config, plain.tokenizer, 0, slice(None))
    expected, found = _gradients(plain, inputs), _gradients(compiled, inputs)
    assert torch._dynamo.utils.counters["frames"]["ok"] >= 2
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@COMPILES
@pytest.mark.slow
def test_a_compiled_stage_trains_to_its_end(
    run: Any, small_config: Callable[..., StageConfig]
) -> None:
    plain = json.loads((run(small_config(), "plain") / "state.json").read_bytes())
    compiled = json.loads((run(small_config(compile=True), "c") / "state.json").read_bytes())
    assert compiled["losses"] == pytest.approx(plain["losses"], rel=1e-4)
    assert compiled["losses"] != plain["losses"]  # rounding differs: it was compiled
