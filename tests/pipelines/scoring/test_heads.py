"""Heads in their published layouts give what the published networks give."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import nn

from infra.errors import UserError
from pipelines.heads import Affine, load_head
from pipelines.scoring_config import HeadConfig, ScoringConfig


class Standardise(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.randn(dim) / 10)
        self.register_buffer("variance", torch.rand(dim) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x - self.mean) / self.variance.sqrt()  # type: ignore[operator]


class UnsafeL14(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = Standardise(768)
        self.linear_1, self.linear_2 = nn.Linear(768, 64), nn.Linear(64, 512)
        self.linear_3, self.linear_4 = nn.Linear(512, 256), nn.Linear(256, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        for layer in (self.linear_1, self.linear_2, self.linear_3):
            x = torch.relu(layer(x))
        return torch.sigmoid(self.linear_4(x))


class Wrapped(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.layers(x)
        return found


def aesthetic_v2() -> Wrapped:
    return Wrapped(
        nn.Linear(768, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2),
        nn.Linear(128, 64), nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1),
    )  # fmt: skip


def unsafe_h14() -> Wrapped:
    widths = (1024, 1024, 2048, 1024, 256, 128)
    hidden: list[nn.Module] = []
    for before, after in pairwise(widths):
        hidden += [nn.Linear(before, after), nn.ReLU(), nn.Dropout(0.2)]
    return Wrapped(*hidden, nn.Linear(128, 16), nn.Linear(16, 1))


def saved(network: nn.Module, path: Path) -> Path:
    save_file({k: v.contiguous() for k, v in network.state_dict().items()}, path)
    return path


def unit_vectors(num: int, dim: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    vectors = torch.randn(num, dim, generator=generator, dtype=torch.float64)
    return nn.functional.normalize(vectors, dim=-1)


@pytest.mark.parametrize(
    ("layout", "network", "dim", "num_steps"),
    [
        ("laion_aesthetic_v1", lambda: nn.Linear(768, 1), 768, 1),
        ("laion_aesthetic_v2", aesthetic_v2, 768, 1),
        ("laion_unsafe_l14", UnsafeL14, 768, 8),
        ("laion_unsafe_h14", unsafe_h14, 1024, 11),
    ],
)
def test_published_layouts_load_fold_and_agree_with_the_network(
    layout: str, network: Any, dim: int, num_steps: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    made = network().eval()
    head = load_head(
        HeadConfig.model_validate(
            {"layout": layout, "weights": str(saved(made, tmp_path / "head.safetensors"))}
        )
    )
    assert head.dim == dim
    assert len(head.steps) == num_steps
    vectors = unit_vectors(50, dim)
    with torch.no_grad():
        expected = made.double()(vectors)[:, 0].numpy()
    np.testing.assert_allclose(head.raw(vectors.numpy()), expected, rtol=1e-9, atol=1e-12)
    stored = vectors.numpy().astype(np.float16)
    np.testing.assert_allclose(head.raw(stored), expected, atol=2e-3)
    assert head.scores(stored).min() >= 0


def test_the_aesthetic_mlp_folds_into_one_affine_map(tmp_path: Path) -> None:
    path = saved(aesthetic_v2(), tmp_path / "v2.safetensors")
    head = load_head(HeadConfig(layout="laion_aesthetic_v2", weights=str(path)))
    (step,) = head.steps
    assert isinstance(step, Affine)
    assert step.weight.shape == (1, 768)
    assert head.identity() == {
        "column": "aesthetic_score", "aesthetic_scale": "v2", "layout": "laion_aesthetic_v2",
        "sha256": head.sha256,
    }  # fmt: skip


def test_a_described_head_and_its_description_are_its_identity(tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = tmp_path / "watermark.safetensors"
    first, second = nn.Linear(32, 8), nn.Linear(8, 1)
    tensors = {f"fc{n}.{k}": v for n, layer in ((1, first), (2, second))
               for k, v in layer.state_dict().items()}  # fmt: skip
    save_file(tensors, path)
    config = HeadConfig(layout="described", weights=str(path), column="watermark_prob")

    def describe(*steps: Any) -> None:
        Path(f"{path}.json").write_text(json.dumps({"steps": steps}))

    describe({"affine": "fc1"}, "relu", {"affine": "fc2"}, "sigmoid")
    head = load_head(config)
    vectors = unit_vectors(9, 32)
    with torch.no_grad():
        expected = torch.sigmoid(second.double()(torch.relu(first.double()(vectors))))[:, 0]
    np.testing.assert_allclose(head.scores(vectors.numpy()), expected.numpy(), rtol=1e-9)
    describe({"affine": "fc1"}, {"affine": "fc2"}, "sigmoid")
    assert load_head(config).sha256 != head.sha256
    describe({"affine": "fc1"}, "relu")
    with pytest.raises(UserError, match=r"'fc2\.bias', 'fc2\.weight'\] left over; 8 outputs"):
        load_head(config)
    describe("softmax")
    with pytest.raises(UserError, match=r'expected \{"steps"'):
        load_head(config)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("head.pth", r"a pickle can run code: convert head\.pth once"),
        ("torn.safetensors", "expected a whole safetensors file"),
        ("other.safetensors", r"expected layers\.0\.weight, layers\.0\.bias in"),
        ("nan.safetensors", "numbers that are not finite"),
    ],
)
def test_a_file_that_is_no_such_head_is_one_line(tmp_path: Path, name: str, line: str) -> None:
    network = aesthetic_v2()
    with torch.no_grad():
        next(iter(network.parameters()))[0, 0] = float("nan")
    path = saved(network if name == "nan.safetensors" else nn.Linear(768, 1), tmp_path / name)
    if name == "torn.safetensors":
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=line):
        load_head(HeadConfig(layout="laion_aesthetic_v2", weights=str(path)))


def test_heads_say_what_they_score() -> None:
    clip = {"folder": "x"}
    head = {"layout": "laion_aesthetic_v2", "weights": "a.safetensors"}
    with pytest.raises(ValidationError, match="heads a and b both give aesthetic_score"):
        ScoringConfig.model_validate({"clip": clip, "heads": {"a": head, "b": head}})
    with pytest.raises(ValidationError, match="a described head says which column it scores"):
        HeadConfig(layout="described", weights="x")
    with pytest.raises(ValidationError, match="scores aesthetic_score, not unsafe_prob"):
        HeadConfig.model_validate(head | {"column": "unsafe_prob"})
    with pytest.raises(ValidationError, match="says its aesthetic_scale"):
        HeadConfig(layout="described", weights="x", column="aesthetic_score")


def test_tensors_of_every_number_type_are_read_exactly(tmp_path: Path) -> None:
    """As torch reads them; half precision widens without rounding."""
    generator = torch.Generator().manual_seed(2)
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        tensors = {
            "weight": torch.randn(1, 5, generator=generator).to(dtype),
            "bias": torch.randn(1, generator=generator).to(dtype),
        }
        save_file(tensors, tmp_path / "head.safetensors")
        (step,) = load_head(
            HeadConfig(layout="laion_aesthetic_v1", weights=str(tmp_path / "head.safetensors"))
        ).steps
        assert isinstance(step, Affine)
        np.testing.assert_array_equal(step.weight, tensors["weight"].double().numpy())
        np.testing.assert_array_equal(step.bias, tensors["bias"].double().numpy())


def test_numbers_that_are_no_weights_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "head.safetensors"
    save_file({"weight": torch.ones(1, 5, dtype=torch.int32), "bias": torch.ones(1)}, path)
    with pytest.raises(UserError, match=r"expected tensors of F64, F32, F16, BF16.*got I32"):
        load_head(HeadConfig(layout="laion_aesthetic_v1", weights=str(path)))


def test_a_head_is_read_without_torch(tmp_path: Path) -> None:
    """A plan of scored datasets reads heads: torch would cost it seconds and 500 MB."""
    path = saved(nn.Linear(768, 1), tmp_path / "head.safetensors")
    code = (
        "import sys\n"
        "from pipelines.derived import load_head\n"
        "from pipelines.scoring_config import HeadConfig\n"
        "load_head(HeadConfig(layout='laion_aesthetic_v1', weights=sys.argv[1]))\n"
        "print('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]
