"""An exponential moving average of weights, for training and for whatever is exported from it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from model.errors import ModelError


def decay_at(step: int, decay: float) -> float:
    """The decay of the update after `step` finished steps: it warms up as (1 + step) / (10 + step).

    Without the warm-up the random start would still weigh decay^step.
    """
    return min(decay, (1 + step) / (10 + step))


class WeightAverage(Mapping[str, Tensor]):
    """average ← decay · average + (1 - decay) · weight, after every step, by name.

    Averages are float32 (or float64) whatever the weights are: in bfloat16 a step of 1 - 0.9999
    would be lost in rounding. They lie beside the weights, or on the CPU, which costs a transfer
    per update and no memory on the device. Reading `average[name]` gives the tensor itself.
    """

    def __init__(self, weights: Mapping[str, Tensor], decay: float, on_cpu: bool = False) -> None:
        """Begin with the weights as they are. Raises ModelError unless 0 ≤ decay < 1."""
        if not 0 <= decay < 1:
            raise ModelError(f"the decay of an average is {decay}: expected 0 or more, below 1")
        self.decay = decay
        self.on_cpu = on_cpu
        self._weights = dict(weights)
        self._averages = {
            name: self._wide(weight.detach()).clone() for name, weight in self._weights.items()
        }

    def _wide(self, weight: Tensor) -> Tensor:
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        return weight.to("cpu" if self.on_cpu else weight.device, dtype)

    def __getitem__(self, name: str) -> Tensor:
        return self._averages[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._averages)

    def __len__(self) -> int:
        return len(self._averages)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights as they are after `step` finished steps."""
        weights = [self._wide(weight) for weight in self._weights.values()]
        if weights:
            share = 1.0 - decay_at(step, self.decay)
            torch._foreach_lerp_(list(self._averages.values()), weights, share)

    @torch.no_grad()
    def copy_to_weights(self) -> None:
        """Replace the weights by their averages."""
        for name, weight in self._weights.items():
            weight.copy_(self._averages[name])

    @contextmanager
    def as_weights(self) -> Iterator[None]:
        """The weights are their averages inside the block, and what they were after it.

        Holds one more copy of the weights meanwhile.
        """
        kept = {name: weight.detach().clone() for name, weight in self._weights.items()}
        self.copy_to_weights()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, weight in self._weights.items():
                    weight.copy_(kept[name])

    def to(self, device: torch.device | str) -> None:
        """Move the averages, unless they are kept on the CPU."""
        if not self.on_cpu:
            self._averages = {name: value.to(device) for name, value in self._averages.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by name, as safetensors takes them."""
        return dict(self._averages)

    @torch.no_grad()
    def load_state_dict(self, averages: Mapping[str, Tensor]) -> None:
        """Take over saved averages; ModelError when names or shapes are others."""
        odd = sorted(set(averages) ^ set(self._averages)) or [
            name for name, value in self._averages.items() if averages[name].shape != value.shape
        ]
        if odd:
            raise ModelError(
                f"saved averages do not fit the weights: {len(odd)} differ, such as {odd[0]}"
            )
        for name, value in self._averages.items():
            value.copy_(averages[name])
