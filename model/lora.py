"""LoRA: small trained additions to chosen linear layers (Hu et al., arXiv:2106.09685).

A layer y = W x becomes y = W x + weight · alpha / rank · B A x: A is (rank, in), B (out, rank).
W is not touched, so adapters can be trained on frozen (also quantised) weights, stacked with a
weight each, and merged for speed.

A folder holds `adapter_config.json` and `pytorch_lora_weights.safetensors` with the keys that
diffusers and PEFT write: `transformer.<layer>.lora_A.weight` and `….lora_B.weight`, or
`text_encoder.…`. kohya's spelling (`lora_transformer_<layer>.lora_down.weight`, `….lora_up.weight`,
`….alpha`, with underscores for dots) is read as well.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from model.checkpoint import read_json, write_json, write_whole
from model.errors import ModelError
from model.quantize import QuantizedLinear

WEIGHTS_NAME, CONFIG_NAME = "pytorch_lora_weights.safetensors", "adapter_config.json"
DEFAULT_TARGETS = (
    r"(single_)?transformer_blocks\..*"
    r"\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out|proj_mlp|proj_out|net\.0\.proj|net\.2)"
)
_SPELLINGS = {  # suffix -> which half
    ".lora_A.weight": "down", ".lora_B.weight": "up",
    ".lora_down.weight": "down", ".lora_up.weight": "up",
    ".lora.down.weight": "down", ".lora.up.weight": "up",
    ".alpha": "alpha",
}  # fmt: skip
_KOHYA_PREFIXES = {
    "transformer": ("lora_transformer_", "lora_unet_"),
    "text_encoder": ("lora_te_",),
}


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
        self._layers = {a.name: _layers_of(self._parts)[a.name] for a in adapters}
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
                self._layers[adapter.name].register_forward_hook(self._hook(adapter))
                for adapter in self._each()
            ]

    def detach(self) -> None:
        """Take the adapters out: the parts are as they were."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _each(self) -> list[Adapter]:
        return [adapter for adapter in self.adapters if isinstance(adapter, Adapter)]

    def _hook(self, adapter: Adapter) -> Any:
        def add(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            added: Tensor = (adapter(inputs[0]) * self.weight).to(output.dtype)
            return output + added

        return add

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the folder whole."""
        tensors = {}
        for adapter in self._each():
            tensors[f"{adapter.name}.lora_A.weight"] = adapter.lora_A.detach().cpu().contiguous()
            tensors[f"{adapter.name}.lora_B.weight"] = adapter.lora_B.detach().cpu().contiguous()
        first = self._each()[0]
        config = {
            "peft_type": "LORA",
            "r": len(first.lora_A),
            "lora_alpha": first.alpha,
            "lora_dropout": first.dropout,
            "target_modules": sorted(adapter.name for adapter in self._each()),
        }

        def fill(staging: Path) -> None:
            write_json(staging / CONFIG_NAME, config)
            save_file(tensors, staging / WEIGHTS_NAME, metadata={"format": "pt"})

        write_whole(folder, fill)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, parts: Mapping[str, nn.Module], weight: float = 1.0
    ) -> "LoRA":
        """Read a folder, or a single .safetensors file; ModelError names what does not fit."""
        folder = Path(folder)
        file = folder if folder.suffix == ".safetensors" else folder / WEIGHTS_NAME
        config_file = file.with_name(CONFIG_NAME)
        config = read_json(config_file) if config_file.is_file() else {}
        try:
            tensors = load_file(file)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file} does not read as adapters ({error})") from None
        alpha = config.get("lora_alpha")
        if alpha is not None and not isinstance(alpha, int | float):
            raise ModelError(f"{config_file}: lora_alpha is {alpha!r}: expected a number")
        adapters = _adapters_of(tensors, _layers_of(parts), alpha, str(file))
        return cls(parts, adapters, weight).eval().requires_grad_(False)


def _layers_of(parts: Mapping[str, nn.Module]) -> dict[str, nn.Linear | QuantizedLinear]:
    """Every linear layer as part.layer."""
    return {
        f"{part}.{name}": layer
        for part, module in parts.items()
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear | QuantizedLinear)
    }


def _adapters_of(
    tensors: Mapping[str, Tensor],
    layers: Mapping[str, nn.Linear | QuantizedLinear],
    alpha: float | None,
    source: str,
) -> list[Adapter]:
    spelt = {name: name for name in layers}
    for name in layers:
        part, _, own_name = name.partition(".")
        for prefix in _KOHYA_PREFIXES.get(part, ()):
            spelt[prefix + own_name.replace(".", "_")] = name
    halves: dict[str, dict[str, Tensor]] = {}
    problems = []
    for key, tensor in tensors.items():
        suffix = next((s for s in _SPELLINGS if key.endswith(s)), None)
        found = spelt.get(key.removesuffix(suffix)) if suffix else None
        if suffix is None or found is None:
            problems.append(f"{key} is of no linear layer here")
        elif not torch.isfinite(tensor).all():
            problems.append(f"{key} has NaN or infinite values")
        else:
            halves.setdefault(found, {})[_SPELLINGS[suffix]] = tensor.float().clone()
    adapters = []
    for name, half in sorted(halves.items()):
        layer, down, up = layers[name], half.get("down"), half.get("up")
        if down is None or up is None:
            problems.append(f"{name} has one half only")
        elif (
            down.ndim != 2
            or down.shape[1] != layer.in_features
            or not len(down)
            or up.shape != (layer.out_features, len(down))
        ):
            problems.append(
                f"{name} has A {tuple(down.shape)} and B {tuple(up.shape)}: expected (rank, "
                f"{layer.in_features}) and ({layer.out_features}, rank)"
            )
        else:
            own = float(half["alpha"]) if "alpha" in half else float(alpha or len(down))
            device = layer.weight.device
            adapters.append(Adapter(name, down.to(device), up.to(device), own, 0.0))
    if problems or not adapters:
        said = "; ".join(problems[:3]) or "it holds none"
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ModelError(f"{source} does not fit this model's layers: {said}{more}")
    return adapters


class Merged:
    """Adapters added into their layers' weights, with what these were kept on the CPU."""

    def __init__(self, loras: Sequence[LoRA]) -> None:
        """Merge all of `loras`, each with its weight, and detach them.

        Raises ModelError for a quantised layer, which has no room for the addition.
        """
        self._loras = list(loras)
        self._kept: dict[int, tuple[nn.Linear, Tensor]] = {}
        deltas: dict[int, Tensor] = {}
        layers: dict[int, nn.Linear] = {}
        for lora in self._loras:
            for adapter in lora._each():
                layer = lora._layers[adapter.name]
                if not isinstance(layer, nn.Linear):
                    raise ModelError(f"{adapter.name} is quantised: attach adapters, do not merge")
                delta = adapter.delta().detach() * lora.weight
                deltas[id(layer)] = deltas[id(layer)] + delta if id(layer) in deltas else delta
                layers[id(layer)] = layer
        with torch.no_grad():
            for key, layer in layers.items():
                self._kept[key] = (layer, layer.weight.detach().cpu().clone())
                layer.weight.copy_(layer.weight.to(deltas[key].dtype) + deltas[key])
        for lora in self._loras:
            lora.detach()

    @torch.no_grad()
    def undo(self) -> None:
        """Put the weights back to the bit and attach the adapters again."""
        for layer, weight in self._kept.values():
            layer.weight.copy_(weight)
        self._kept = {}
        for lora in self._loras:
            lora.attach()
        self._loras = []
