"""Muon against a singular value decomposition and against torch's own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from training.config import OptimizerConfig, StageConfig
from training.masked_stage import MaskedStage
from training.optim import MUON_MOMENTUM, MuonAdamW, build_optimizer, orthogonal, parameter_groups

MUON = OptimizerConfig(name="muon", learning_rate=0.02, weight_decay=0.1)


@pytest.mark.parametrize("shape", [(8, 8), (6, 24), (1, 9)])
def test_an_update_has_the_singular_vectors_of_its_matrix(shape: tuple[int, int]) -> None:
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(sum(shape)))
    for matrix, found in zip(matrices, orthogonal(matrices), strict=True):
        u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
        in_its_basis = u.T @ found.float() @ vt.T
        values = in_its_basis.diagonal()
        assert 0.6 < values.min() <= values.max() < 1.3
        assert (in_its_basis - values.diag()).abs().max() < 0.06  # bfloat16


def test_a_gradient_of_zeros_moves_nothing() -> None:
    assert not orthogonal(torch.zeros(1, 3, 5)).any()


class _TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(12, 20)
        self.second = nn.Linear(20, 3)

    def forward(self, inputs_BC: Tensor) -> Tensor:
        out: Tensor = self.second(torch.tanh(self.first(inputs_BC)))
        return out


def _train(net: nn.Module, steps: list[Callable[[], object]], inputs_BC: Tensor) -> None:
    for _ in range(6):
        net.zero_grad()
        loss: Tensor = net(inputs_BC).square().mean() * 3
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        for step in steps:
            step()


def test_matrices_move_as_with_torchs_muon_and_biases_as_with_adamw(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Torch's has its own bfloat16 iteration, on any processor, and the same rule for a step."""
    monkeypatch.setattr("training.optim._rounding", lambda _: torch.bfloat16)
    ours, theirs = _TwoLayers(), _TwoLayers()
    inputs_BC = torch.randn(16, 12, generator=torch.Generator().manual_seed(5))
    optimizer = build_optimizer(parameter_groups(ours, "", 0.02, 0.1), MUON)
    matrices = [theirs.first.weight, theirs.second.weight]
    muon = torch.optim.Muon(
        matrices,
        lr=0.02,
        weight_decay=0.1,
        momentum=MUON_MOMENTUM,
        adjust_lr_fn="match_rms_adamw",
    )
    adamw = torch.optim.AdamW(
        [theirs.first.bias, theirs.second.bias], lr=0.02, betas=(0.9, 0.99), weight_decay=0.0
    )
    _train(ours, [optimizer.step], inputs_BC)
    _train(theirs, [muon.step, adamw.step], inputs_BC)
    start = dict(_TwoLayers().named_parameters())
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        moved = (other - start[name]).norm()
        assert moved > 0.01, name
        assert (mine - other).norm() < 0.02 * moved, name


def test_a_kernel_moves_as_the_matrix_of_its_rows() -> None:
    torch.manual_seed(0)
    kernel = nn.Conv2d(4, 6, 3, bias=False)
    matrix = nn.Linear(36, 6, bias=False)
    matrix.weight.data.copy_(kernel.weight.flatten(1))
    for module in (kernel, matrix):
        gradient = torch.arange(216.0).reshape(6, 36).cos()
        module.weight.grad = gradient.view_as(module.weight)
        build_optimizer(parameter_groups(module, "", 0.02, 0.1), MUON).step()
    torch.testing.assert_close(kernel.weight.flatten(1), matrix.weight, rtol=0, atol=0)


def test_what_has_no_gradient_stays() -> None:
    net = _TwoLayers()
    before = {name: parameter.clone() for name, parameter in net.named_parameters()}
    optimizer = build_optimizer(parameter_groups(net, "", 0.02, 0.1), MUON)
    net.first.weight.grad = torch.ones_like(net.first.weight)
    optimizer.step()
    still = [name for name, p in net.named_parameters() if torch.equal(p, before[name])]
    assert still == ["first.bias", "second.weight", "second.bias"]


def test_a_stage_that_stops_and_goes_on_ends_where_an_unbroken_one_does(
    new_stage: Callable[[StageConfig], MaskedStage],
    small_config: Callable[..., StageConfig],
    carried_over: Callable[[StageConfig], dict[str, Tensor]],
) -> None:
    config = small_config(optimizer=MUON, train_text_encoder=True, text_encoder_learning_rate=1e-3)
    assert isinstance(new_stage(config).optimizer, MuonAdamW)
    assert any(name.endswith("/momentum") for name in carried_over(config))
