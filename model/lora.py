"""LoRA: small trained additions to chosen linear layers (Hu et al., arXiv:2106.09685).

A layer y = W x becomes y = W x + weight · alpha / rank · B A x: A is (rank, in), B (out, rank).
W is not touched, so adapters can be trained on frozen (also quantised) weights, stacked with a
weight each, and merged for speed.

Folders are written as diffusers writes them; PEFT's and kohya's are read as well
(`model.lora_files`).
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from model.checkpoint import write_whole
from model.errors import ModelError
from model.lora_files import StoredAdapter, read_adapters, write_adapters
from model.quantize import QuantizedLinear

DEFAULT_TARGETS = (
    r"(single_)?transformer_blocks\..*"
    r"\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out|proj_mlp|proj_out|net\.0\.proj|net\.2)"
)


@dataclass(frozen=True)
class LoRAConfig:
    """Where adapters go and how large they are."""

    rank: int = 8
    alpha: float | None = None  # B A is scaled by alpha / rank; None is rank
    dropout: float = 0.0  # of A's input, in training
    targets: str = DEFAULT_TARGETS  # a regular expression for layers' dotted names

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ModelError(f"the rank of an adapter is {self.rank}: expected at least 1")
        if not 0 <= self.dropout < 1:
            raise ModelError(f"dropout is {self.dropout}: expected 0 or more, below 1")
        try:
            re.compile(self.targets)
        except re.error as error:
            raise ModelError(
                f"targets {self.targets!r} is no regular expression: {error}"
            ) from None


class Adapter(nn.Module):
    """The addition to one linear layer: A and B, in float32."""

    def __init__(self, name: str, down: Tensor, up: Tensor, alpha: float, dropout: float) -> None:
        super().__init__()
        self.name = name  # part.layer
        self.alpha = alpha
        self.scale = alpha / len(down)
        self.dropout = dropout
        self.lora_A = nn.Parameter(down)
        self.lora_B = nn.Parameter(up)

    def forward(self, x: Tensor) -> Tensor:
        """What is added to the layer's output for input x, before the adapter's weight."""
        x = F.dropout(x.to(self.lora_A.dtype), self.dropout, self.training)
        out: Tensor = F.linear(F.linear(x, self.lora_A), self.lora_B) * self.scale
        return out

    def delta(self) -> Tensor:
        """(out, in): what merging adds to the layer's weight."""
        return (self.lora_B @ self.lora_A) * self.scale


class LoRA(nn.Module):
    """Adapters on the linear layers of some parts, at work from the start until `detach`."""

    def __init__(
        self, parts: Mapping[str, nn.Module], adapters: Sequence[Adapter], weight: float = 1.0
    ) -> None:
        """parts: "transformer" and so on. See `start` and `from_pretrained`."""
        super().__init__()
        self.adapters = nn.ModuleList(adapters)
        self.weight = weight
        self._parts = dict(parts)
        self._hooks: list[RemovableHandle] = []
        self.attach()

    @classmethod
    def start(cls, parts: Mapping[str, nn.Module], config: LoRAConfig) -> "LoRA":
        """Fresh adapters for training: they add nothing yet (B is zero), and the parts are frozen.

        Draws from torch's generator. Raises ModelError when no layer matches.
        """
        pattern = re.compile(config.targets)
        chosen = {
            name: layer
            for name, layer in _layers_of(parts).items()
            if pattern.fullmatch(name.partition(".")[2])
        }
        if not chosen:
            raise ModelError(f"no linear layer is called like {config.targets!r}")
        alpha = float(config.rank if config.alpha is None else config.alpha)
        adapters = []
        for name, layer in chosen.items():
            down = torch.empty(config.rank, layer.in_features, device=layer.weight.device)
            nn.init.kaiming_uniform_(down, a=math.sqrt(5))
            up = torch.zeros(layer.out_features, config.rank, device=layer.weight.device)
            adapters.append(Adapter(name, down, up, alpha, config.dropout))
        for part in parts.values():
            part.requires_grad_(False)
        return cls(parts, adapters)

    def attach(self) -> None:
        """Let the adapters add to their layers' outputs; again is as once."""
        if not self._hooks:
            self._hooks = [
                self.layer_of(adapter).register_forward_hook(self._hook(adapter))
                for adapter in self._each()
            ]

    def detach(self) -> None:
        """Take the adapters out: the parts are as they were."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def layer_of(self, adapter: Adapter) -> nn.Linear | QuantizedLinear:
        """The adapter's layer as it is now: quantising puts another in its place."""
        part, _, own_name = adapter.name.partition(".")
        layer = self._parts[part].get_submodule(own_name)
        assert isinstance(layer, nn.Linear | QuantizedLinear)  # no other has adapters
        return layer

    def _each(self) -> list[Adapter]:
        return [adapter for adapter in self.adapters if isinstance(adapter, Adapter)]

    def _hook(self, adapter: Adapter) -> Any:
        def add(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            added: Tensor = (adapter(inputs[0]) * self.weight).to(output.dtype)
            return output + added

        return add

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the folder whole."""
        stored = [
            StoredAdapter(a.name, a.lora_A, a.lora_B, a.alpha, a.dropout) for a in self._each()
        ]
        write_whole(folder, lambda staging: write_adapters(staging, stored))

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, parts: Mapping[str, nn.Module], weight: float = 1.0
    ) -> "LoRA":
        """Read a folder, or a single .safetensors file; ModelError names what does not fit."""
        layers = _layers_of(parts)
        sizes = {name: (layer.in_features, layer.out_features) for name, layer in layers.items()}
        adapters = []
        for stored in read_adapters(folder, sizes):
            device = layers[stored.name].weight.device
            down, up = stored.down.to(device), stored.up.to(device)
            adapters.append(Adapter(stored.name, down, up, stored.alpha, stored.dropout))
        return cls(parts, adapters, weight).eval().requires_grad_(False)


def _layers_of(parts: Mapping[str, nn.Module]) -> dict[str, nn.Linear | QuantizedLinear]:
    """Every linear layer as part.layer."""
    return {
        f"{part}.{name}": layer
        for part, module in parts.items()
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear | QuantizedLinear)
    }


class Merged:
    """Adapters added into their layers' weights, with what these were kept on the CPU."""

    def __init__(self, loras: Sequence[LoRA]) -> None:
        """Merge all of `loras`, each with its weight, and detach them.

        Raises ModelError for a quantised layer, which has no room for the addition.
        """
        self._loras = list(loras)
        self._kept: dict[int, tuple[nn.Linear, Tensor]] = {}
        self._places: list[tuple[LoRA, Adapter, nn.Linear]] = []
        deltas: dict[int, Tensor] = {}
        layers: dict[int, nn.Linear] = {}
        for lora in self._loras:
            for adapter in lora._each():
                layer = lora.layer_of(adapter)
                if not isinstance(layer, nn.Linear):
                    raise ModelError(f"{adapter.name} is quantised: attach adapters, do not merge")
                delta = adapter.delta().detach() * lora.weight
                deltas[id(layer)] = deltas[id(layer)] + delta if id(layer) in deltas else delta
                layers[id(layer)] = layer
                self._places.append((lora, adapter, layer))
        with torch.no_grad():
            for key, layer in layers.items():
                self._kept[key] = (layer, layer.weight.detach().cpu().clone())
                layer.weight.copy_(layer.weight.to(deltas[key].dtype) + deltas[key])
        for lora in self._loras:
            lora.detach()

    @torch.no_grad()
    def undo(self) -> None:
        """Put the weights back to the bit and attach the adapters again.

        Raises ModelError when a layer has been replaced meanwhile, as quantising does.
        """
        for lora, adapter, layer in self._places:
            if lora.layer_of(adapter) is not layer:
                raise ModelError(
                    f"{adapter.name} was replaced after merging: its adapters cannot be taken out "
                    "again; undo before quantising"
                )
        for layer, weight in self._kept.values():
            layer.weight.copy_(weight)
        self._kept, self._places = {}, []
        for lora in self._loras:
            lora.attach()
        self._loras = []
