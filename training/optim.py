"""The optimizer, its parameter groups and its schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from training.config import OptimizerConfig, Schedule


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
) -> list[dict[str, object]]:
    """Two AdamW groups of a module's trainable parameters, with and without decay.

    Each group carries ``names`` (``prefix`` plus the parameter's name) and its ``peak``.
    """
    decayed = decayed_names(module)
    groups: list[dict[str, object]] = []
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
                }
            )
    return groups


def build_optimizer(groups: list[dict[str, object]], config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over ``parameter_groups``."""
    return torch.optim.AdamW(
        groups,
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        fused=True,
    )


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
