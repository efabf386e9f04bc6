"""The average of weights: the closed form, warm-up, swapping, half precision, saving."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.ema import WeightAverage, decay_at
from model.errors import ModelError


def test_it_is_the_closed_form() -> None:
    """Σ (1 - d_i) Π_{j > i} d_j w_i, in double precision."""
    torch.manual_seed(0)
    path = torch.randn(30, 5, dtype=torch.float64)
    weight = torch.nn.Parameter(path[0].clone())
    average = WeightAverage({"w": weight}, 0.9)
    for step in range(1, 30):
        with torch.no_grad():
            weight.copy_(path[step])
        average.update(step)
    shares = [1.0] + [1 - min(0.9, (1 + n) / (10 + n)) for n in range(1, 30)]
    want = torch.zeros(5, dtype=torch.float64)
    for n, value in enumerate(path):
        left = 1.0
        for share in shares[n + 1 :]:
            left *= 1 - share
        want += shares[n] * left * value
    torch.testing.assert_close(average["w"], want, rtol=1e-12, atol=1e-14)


def test_the_decay_warms_up() -> None:
    assert [decay_at(n, 0.99) for n in (0, 1, 90, 10_000)] == [0.1, 2 / 11, 0.91, 0.99]


def test_many_tensors_at_once_are_as_one_by_one() -> None:
    torch.manual_seed(1)
    weights = {f"w{n}": torch.randn(n + 1, 7) for n in range(20)}
    average = WeightAverage(weights, 0.98)
    alone = {name: weight.clone() for name, weight in weights.items()}
    for step in range(5):
        for name, weight in weights.items():
            weight.add_(torch.randn_like(weight))
            alone[name].lerp_(weight, 1.0 - decay_at(step, 0.98))
        average.update(step)
    assert all(torch.equal(average[name], alone[name]) for name in weights)


def test_half_weights_are_averaged_in_float32() -> None:
    weight = torch.ones(3, dtype=torch.bfloat16)
    average = WeightAverage({"w": weight}, 0.9999)
    weight.add_(1)
    for _ in range(100):
        average.update(10**9)
    assert average["w"].dtype == torch.float32
    assert float(average["w"][0]) == pytest.approx(2 - 0.9999**100, rel=1e-4)
    average.copy_to_weights()
    assert weight.dtype == torch.bfloat16


def test_averages_serve_inside_the_block_alone() -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    average = WeightAverage({"w": weight}, 0.5, on_cpu=True)
    with torch.no_grad():
        weight.fill_(1.0)
    average.update(100)

    def fail_inside() -> None:
        with average.as_weights():
            assert weight.tolist() == [0.5, 0.5]
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail_inside()
    assert weight.tolist() == [1.0, 1.0]
    assert weight.requires_grad


def test_averages_are_saved_and_read(tmp_path: Path) -> None:
    weights = {"a.b": torch.randn(3), "c": torch.randn(2, 2)}
    first, second = WeightAverage(weights, 0.9), WeightAverage(weights, 0.9)
    weights["c"].add_(1)
    first.update(50)
    save_file(first.state_dict(), tmp_path / "ema.safetensors")
    second.load_state_dict(load_file(tmp_path / "ema.safetensors"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    for odd in ({"c": weights["c"]}, {**weights, "c": torch.zeros(3)}):
        with pytest.raises(ModelError, match="do not fit"):
            second.load_state_dict(odd)


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_decays_that_cannot_be(decay: float) -> None:
    with pytest.raises(ModelError, match="the decay of an average"):
        WeightAverage({}, decay)
