"""Adapters' files: how strong each layer's is, in every layout, and what none may say."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from model.errors import ModelError
from model.lora_files import (
    CONFIG_NAME,
    PEFT_WEIGHTS_NAME,
    WEIGHTS_NAME,
    StoredAdapter,
    read_adapters,
    write_adapters,
)

SIZES = {
    "transformer.transformer_blocks.0.attn.to_q": (6, 4),
    "transformer.transformer_blocks.0.attn.to_k": (6, 4),
    "transformer.single_transformer_blocks.0.attn.to_q": (6, 4),
    "text_encoder.layers.0.q_proj": (6, 4),
    "transformer.shared": (6, 4),
    "text_encoder.shared": (6, 4),
}
TO_Q, TO_K, SINGLE_Q, Q_PROJ = list(SIZES)[:4]


def halves(rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    down, up = ((rank, 6), (4, rank))
    return torch.randn(down, generator=generator), torch.randn(up, generator=generator)


def save(file: Path, ranks: dict[str, int], said: object = None) -> Path:
    """A file of adapters under these names; `said` goes into its header."""
    tensors = {}
    for name, rank in ranks.items():
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = halves(rank)
    header = {} if said is None else {"lora_adapter_metadata": json.dumps(said)}
    save_file(tensors, file, metadata=header)
    return file


def factors(path: Path) -> dict[str, float]:
    """What B A is multiplied by."""
    return {a.name: a.alpha / len(a.down) for a in read_adapters(path, SIZES)}


def one_line(path: Path) -> str:
    with pytest.raises(ModelError) as error:
        read_adapters(path, SIZES)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_ranks_and_alphas_of_each_layer_come_back(tmp_path: Path) -> None:
    stored = [
        StoredAdapter(TO_Q, *halves(2), alpha=4.5),
        StoredAdapter(TO_K, *halves(3), alpha=5.0),
        StoredAdapter(SINGLE_Q, *halves(2), alpha=0.0),
        StoredAdapter(Q_PROJ, *halves(9), alpha=math.pi, dropout=0.25),
    ]
    write_adapters(tmp_path, stored)
    alone = tmp_path / "elsewhere" / "style.safetensors"
    alone.parent.mkdir()
    alone.write_bytes((tmp_path / WEIGHTS_NAME).read_bytes())
    for path in (tmp_path, alone):
        read = {adapter.name: adapter for adapter in read_adapters(path, SIZES)}
        assert set(read) == {adapter.name for adapter in stored}
        for adapter in stored:
            assert read[adapter.name].alpha == adapter.alpha
            assert torch.equal(read[adapter.name].down, adapter.down)
            assert torch.equal(read[adapter.name].up, adapter.up)


def test_the_header_is_what_diffusers_reads(tmp_path: Path) -> None:
    """Settings of PEFT's `LoraConfig` for each part, whose layers are named inside it."""
    write_adapters(
        tmp_path,
        [
            StoredAdapter(TO_Q, *halves(2), alpha=4.0),
            StoredAdapter(TO_K, *halves(2), alpha=4.0),
            StoredAdapter(SINGLE_Q, *halves(3), alpha=1.0),
            StoredAdapter(Q_PROJ, *halves(2), alpha=2.0),
        ],
    )
    with safe_open(tmp_path / WEIGHTS_NAME, framework="pt") as file:
        said = json.loads(file.metadata()["lora_adapter_metadata"])
    assert (said["transformer.r"], said["transformer.lora_alpha"]) == (2, 4.0)
    single = SINGLE_Q.partition(".")[2]
    assert said["transformer.rank_pattern"] == {single: 3}
    assert said["transformer.alpha_pattern"] == {single: 1.0}
    assert said["text_encoder.lora_alpha"] == 2.0
    assert said["text_encoder.target_modules"] == [Q_PROJ.partition(".")[2]]


@pytest.mark.parametrize(
    ("settings", "factor"),
    [
        ({}, 1.0),
        ({"lora_alpha": 6}, 1.5),
        ({"lora_alpha": 0}, 0.0),
        ({"lora_alpha": -2.0}, -0.5),
        ({"lora_alpha": 6, "use_rslora": True}, 3.0),
        ({"lora_alpha": 6, "use_rslora": False, "use_dora": False}, 1.5),
        ({"lora_alpha": 6, "alpha_pattern": {"to_q": 8}}, 2.0),
        ({"lora_alpha": 6, "alpha_pattern": {"^transformer_blocks.0.attn.to_q": 8}}, 2.0),
        ({"lora_alpha": 6, "alpha_pattern": {"o_q": 8, "attn": 8}}, 1.5),
        ({"alpha_pattern": {"to_[qk]": 8}, "use_rslora": True}, 4.0),
        ({"init_lora_weights": "gaussian", "rank_pattern": {"to_q": 4}, "r": 8}, 1.0),
    ],
)
def test_peft_s_settings_are_taken_as_peft_takes_them(
    tmp_path: Path, settings: dict[str, object], factor: float
) -> None:
    """Rank 4, so alpha / 4, or alpha / 2 with rsLoRA; in its own folder or in the header."""
    name = f"base_model.model.{TO_Q.partition('.')[2]}"
    save(tmp_path / PEFT_WEIGHTS_NAME, {name: 4})
    (tmp_path / CONFIG_NAME).write_text(json.dumps({"peft_type": "LORA", **settings}))
    assert factors(tmp_path) == {TO_Q: factor}
    for prefix in ("", "transformer."):
        said = {prefix + key: value for key, value in settings.items()}
        file = save(tmp_path / f"{prefix}x.safetensors", {TO_Q: 4}, said)
        (tmp_path / CONFIG_NAME).unlink(missing_ok=True)
        assert factors(file) == {TO_Q: factor}


def test_a_header_speaks_of_its_own_part(tmp_path: Path) -> None:
    said = {"transformer.lora_alpha": 8, "text_encoder.lora_alpha": 2}
    file = save(tmp_path / "both.safetensors", {TO_Q: 4, Q_PROJ: 4}, said)
    assert factors(file) == {TO_Q: 2.0, Q_PROJ: 0.5}
    file = save(tmp_path / "one.safetensors", {TO_Q: 4, Q_PROJ: 4}, {"transformer.lora_alpha": 8})
    assert factors(file) == {TO_Q: 2.0, Q_PROJ: 1.0}


def test_a_layer_s_own_alpha_outranks_the_settings(tmp_path: Path) -> None:
    name = "lora_transformer_transformer_blocks_0_attn_to_q"
    down, up = halves(4)
    tensors = {
        f"{name}.lora_down.weight": down,
        f"{name}.lora_up.weight": up,
        f"{name}.alpha": torch.tensor([9]),
    }
    save_file(tensors, tmp_path / "k.safetensors")
    (tmp_path / CONFIG_NAME).write_text('{"lora_alpha": 1, "use_rslora": true}')
    assert factors(tmp_path / "k.safetensors") == {TO_Q: 2.25}


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"use_dora": True}, "use_dora is True: expected it off"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is [[0, 2]]"),
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA': expected LORA"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the layers' own weights"),
        ({"init_lora_weights": ["pissa"]}, "changes the layers' own weights"),
        ({"lora_alpha": "8"}, "lora_alpha is '8': expected a number"),
        ({"lora_alpha": True}, "lora_alpha is True: expected a number"),
        ({"lora_alpha": math.nan}, "lora_alpha is nan: expected a number"),
        ({"alpha_pattern": {"to_q": None}}, "alpha_pattern is {'to_q': None}"),
        ({"alpha_pattern": ["to_q"]}, "expected a number for each name"),
        ({"alpha_pattern": {"(": 1}}, "alpha_pattern has '(': expected regular expressions"),
        ({"use_rslora": "yes"}, "use_rslora is 'yes'"),
    ],
)
def test_settings_of_another_formula_are_refused(
    tmp_path: Path, settings: dict[str, object], line: str
) -> None:
    save(tmp_path / PEFT_WEIGHTS_NAME, {TO_Q: 4})
    (tmp_path / CONFIG_NAME).write_text(json.dumps(settings))
    assert line in one_line(tmp_path)
    (tmp_path / "x").mkdir()
    file = save(tmp_path / "x" / "x.safetensors", {TO_Q: 4}, settings)
    assert line in one_line(file)


@pytest.mark.parametrize("header", ["{", "[1]", "null", "[" * 100_000])
def test_headers_that_are_none(tmp_path: Path, header: str) -> None:
    down, up = halves(2)
    tensors = {f"{TO_Q}.lora_A.weight": down, f"{TO_Q}.lora_B.weight": up}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"lora_adapter_metadata": header})
    assert "lora_adapter_metadata in its header is no JSON" in one_line(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda a, b: {f"{TO_Q}.alpha": torch.ones(2)}, "has shape (2,): expected one number"),
        (lambda a, b: {f"{TO_Q}.alpha": torch.ones(0)}, "has shape (0,): expected one number"),
        (lambda a, b: {f"{TO_Q}.alpha": torch.ones(1) * 1j}, "expected one number"),
        (lambda a, b: {f"{TO_Q}.alpha": torch.tensor(math.inf)}, "NaN or infinite"),
        (lambda a, b: {f"{TO_Q}.lora_A.weight": a.long()}, "is int64: expected a floating type"),
        (lambda a, b: {f"{TO_Q}.lora_A.weight": a + 0j}, "is complex64: expected a floating type"),
        (lambda a, b: {f"{TO_Q}.lora_down.weight": a}, "says again what another key says"),
        (lambda a, b: {"shared.lora_A.weight": a}, "shared.lora_A.weight is of no linear layer"),
        (lambda a, b: {f"{TO_Q}.lora_magnitude_vector": b}, "is of no linear layer"),
    ],
)
def test_tensors_that_cannot_be_are_one_line(
    tmp_path: Path, change: Callable[[Tensor, Tensor], dict[str, Tensor]], line: str
) -> None:
    down, up = halves(2)
    tensors = {f"{TO_Q}.lora_A.weight": down, f"{TO_Q}.lora_B.weight": up}
    changed = {key: value.clone() for key, value in change(down, up).items()}
    save_file({**tensors, **changed}, tmp_path / WEIGHTS_NAME)
    assert line in one_line(tmp_path)


def test_other_floating_types_become_float32(tmp_path: Path) -> None:
    down, up = (half.bfloat16() for half in halves(2))
    tensors = {f"{TO_Q}.lora_A.weight": down, f"{TO_Q}.lora_B.weight": up}
    save_file(tensors, tmp_path / WEIGHTS_NAME)
    (read,) = read_adapters(tmp_path, SIZES)
    assert torch.equal(read.down, down.float())
    assert {read.down.dtype, read.up.dtype} == {torch.float32}
