"""The optimizer, its parameter groups and its schedule."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from model.machine import computes_in_bfloat16
from training.config import OptimizerConfig, OptimizerName, Schedule
from training.optim_8bit import AdamW8bit
from training.sharding import is_part, like, whole

MUON_MOMENTUM = 0.95
MUON_ROOT_MEAN_SQUARE = 0.2  # of an update's entries, about what AdamW's have
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_ROUNDS = 5


def learning_rate_scale(step: int, num_steps: int, warmup_steps: int, schedule: Schedule) -> float:
    """The factor in (0, 1] on the peak step size for ``step`` (0 … num_steps - 1).

    It rises as (step + 1) / warmup_steps, and then is 1, cos or a line that would reach 0 at
    ``num_steps``.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    progress = (step - warmup_steps) / max(num_steps - warmup_steps, 1)
    if schedule == "linear":
        return 1.0 - progress
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def decayed_names(module: nn.Module) -> set[str]:
    """Names of the parameters that weight decay applies to.

    These are the matrices and kernels; norms, biases and embedding tables are left out.
    """
    tables = {
        f"{name}.weight" if name else "weight"
        for name, part in module.named_modules()
        if isinstance(part, nn.Embedding)
    }
    return {
        name
        for name, parameter in module.named_parameters()
        if parameter.ndim >= 2 and name not in tables
    }


def parameter_groups(
    module: nn.Module, prefix: str, learning_rate: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Two groups of a module's trainable parameters: matrices and kernels, and what has no decay.

    Each group carries ``names`` (``prefix`` plus the parameter's name) and its ``peak``.
    """
    decayed = decayed_names(module)
    groups: list[dict[str, Any]] = []
    for is_decayed in (True, False):
        named = [
            (prefix + name, parameter)
            for name, parameter in module.named_parameters()
            if parameter.requires_grad and (name in decayed) == is_decayed
        ]
        if named:
            groups.append(
                {
                    "params": [parameter for _, parameter in named],
                    "names": [name for name, _ in named],
                    "peak": learning_rate,
                    "lr": learning_rate,
                    "weight_decay": weight_decay if is_decayed else 0.0,
                    "is_matrices": is_decayed,
                }
            )
    return groups


def build_optimizer(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.AdamW:
    """The configured optimizer over ``parameter_groups``."""
    kinds: dict[OptimizerName, type[torch.optim.AdamW]] = {
        "adamw": torch.optim.AdamW,
        "adamw_8bit": AdamW8bit,
        "muon": MuonAdamW,
    }
    return kinds[config.name](
        groups,
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        fused=True,
    )


class MuonAdamW(torch.optim.AdamW):
    """Muon for groups marked ``is_matrices``, AdamW for the others; both take AdamW's step size.

    A kernel counts as a matrix of outputs by everything else. The result for matrices is that of
    ``torch.optim.Muon(adjust_lr_fn="match_rms_adamw")``, which takes no kernels. Sources: Jordan et
    al. (2024), "Muon"; Liu et al. (2025), arXiv:2502.16982, for the step size.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # the closure is AdamW's; nothing here gives one
        """Move the matrices, then let AdamW move what still has a gradient."""
        for group in self.param_groups:
            if group["is_matrices"]:
                moving = [parameter for parameter in group["params"] if parameter.grad is not None]
                for parameters in _together(moving):
                    self._move(parameters, group["lr"], group["weight_decay"])
        return super().step(closure)

    def _move(self, parameters: list[nn.Parameter], step_size: float, weight_decay: float) -> None:
        """Move parameters that are equally large as matrices, all in one iteration."""
        updates = []
        for parameter in parameters:
            gradient, state = parameter.grad, self.state[parameter]
            assert gradient is not None  # the caller chose these
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(gradient)
            state["momentum"].lerp_(gradient, 1.0 - MUON_MOMENTUM)
            updates.append(_wide(whole(gradient.lerp(state["momentum"], MUON_MOMENTUM))))
            parameter.grad = None
        moves_NRC = orthogonal(torch.stack(updates))
        scale = step_size * MUON_ROOT_MEAN_SQUARE * math.sqrt(moves_NRC.shape[-1])
        for parameter, move_RC in zip(parameters, moves_NRC, strict=True):
            move = (move_RC.T if _is_tall(parameter) else move_RC).reshape(parameter.shape)
            part = like(move, parameter) if is_part(parameter) else move
            parameter.mul_(1.0 - step_size * weight_decay).add_(part, alpha=-scale)


def _is_tall(parameter: Tensor) -> bool:
    return len(parameter) > math.prod(parameter.shape[1:])


def _wide(parameter: Tensor) -> Tensor:
    """A matrix or kernel as a matrix with at least as many columns as rows."""
    matrix = parameter.flatten(1)
    return matrix.T if _is_tall(parameter) else matrix


def _together(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Those that are equally large as matrices; of those in parts each alone, as all workers put
    together what they iterate on."""
    shapes: dict[tuple[int, ...], list[nn.Parameter]] = {}
    for place, parameter in enumerate(parameters):
        sides = sorted((len(parameter), math.prod(parameter.shape[1:])))
        alone = (place,) if is_part(parameter) else ()
        shapes.setdefault((*sides, *alone), []).append(parameter)
    return list(shapes.values())


def orthogonal(wide_NRC: Tensor) -> Tensor:
    """About U Vᵀ of each matrix U S Vᵀ, R ≤ C: five rounds of a quintic iteration, in bfloat16
    where the device multiplies that itself, else in float32.

    Singular values end between about 0.7 and 1.2 (those near zero lower), which is near enough.
    Small matrices cost more calls than arithmetic, so that many at once take half the time.
    """
    x_NRC = wide_NRC.to(_rounding(wide_NRC.device))
    x_NRC = x_NRC / x_NRC.flatten(1).norm(dim=1).clamp(min=1e-7)[:, None, None]
    linear, cubic, quintic = NEWTON_SCHULZ
    for _ in range(NEWTON_SCHULZ_ROUNDS):
        gram_NRR = x_NRC @ x_NRC.mT
        mixed_NRR = torch.baddbmm(gram_NRR, gram_NRR, gram_NRR, beta=cubic, alpha=quintic)
        x_NRC = torch.baddbmm(x_NRC, mixed_NRR, x_NRC, beta=linear)
    return x_NRC


@functools.cache
def _rounding(device: torch.device) -> torch.dtype:
    """On AVX2 bfloat16 would take twenty times as long."""
    return torch.bfloat16 if computes_in_bfloat16(device) else torch.float32


def set_learning_rate(optimizer: torch.optim.Optimizer, scale: float) -> None:
    """Give every group ``scale`` times its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * scale


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
    """Shorten all gradients together to ``max_norm``; returns the norm before (0-d tensor)."""
    limit = math.inf if max_norm is None else max_norm
    return nn.utils.clip_grad_norm_(list(parameters), limit, foreach=True)


def trained_parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Every parameter the optimizer changes, in group order."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
