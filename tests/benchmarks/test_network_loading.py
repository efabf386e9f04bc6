"""What loading a network of about 1 GB costs in memory, beside reading the file the plain way."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from model.checkpoint import DIFFUSERS_STEM, write_json
from model.transformer import MaskedImageTransformer, TransformerConfig

pytestmark = pytest.mark.bench

# Four and seven blocks of the released width: 1.1 GB in float32.
CONFIG = TransformerConfig(
    num_layers=4,
    num_single_layers=7,
    num_attention_heads=8,
    joint_attention_dim=1024,
    pooled_projection_dim=1024,
    downsample=True,
    upsample=True,
)
PEAK = """
import json, sys
from pathlib import Path
import torch
from model.transformer import MaskedImageTransformer, TransformerConfig
from model.checkpoint import read_json, parse_config

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

folder, way, dtype = Path(sys.argv[1]), sys.argv[2], getattr(torch, sys.argv[3])
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
if way == "ours":
    network = MaskedImageTransformer.from_pretrained(folder, dtype)
else:
    from safetensors.torch import load_file
    config = parse_config(TransformerConfig, read_json(folder / "config.json"), "")
    network = MaskedImageTransformer(config).to(dtype)
    for path in sorted(folder.glob("*.safetensors")):
        network.load_state_dict(load_file(path), strict=False)
touched = sum(float(p.detach().sum()) for p in network.parameters())
print(json.dumps({"peak": status("VmHWM") - before, "kept": status("VmRSS") - before}))
"""


def write_network(folder: Path, dtype: torch.dtype, num_shards: int) -> int:
    """A network's folder; returns the bytes of its weights."""
    with torch.device("meta"):
        shapes = MaskedImageTransformer(CONFIG).state_dict()
    folder.mkdir()
    write_json(folder / "config.json", CONFIG.to_json())
    tensors = {key: torch.full(value.shape, 0.01, dtype=dtype) for key, value in shapes.items()}
    names, weight_map = sorted(tensors), dict[str, str]()
    for shard in range(num_shards):
        part = {name: tensors[name] for name in names[shard::num_shards]}
        name = f"{DIFFUSERS_STEM}-{shard:05d}.safetensors" if num_shards > 1 else ""
        save_file(part, folder / (name or f"{DIFFUSERS_STEM}.safetensors"))
        weight_map |= dict.fromkeys(part, name)
    if num_shards > 1:
        index = folder / f"{DIFFUSERS_STEM}.safetensors.index.json"
        write_json(index, {"weight_map": weight_map})
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("stored", "loaded", "num_shards"),
    [
        (torch.float32, torch.float32, 1),
        (torch.float32, torch.float32, 3),
        (torch.bfloat16, torch.bfloat16, 1),
        (torch.float32, torch.bfloat16, 1),
        (torch.bfloat16, torch.float32, 1),
    ],
)
def test_peak_memory(
    stored: torch.dtype, loaded: torch.dtype, num_shards: int, tmp_path: Path
) -> None:
    folder = tmp_path / "transformer"
    num_bytes = write_network(folder, stored, num_shards)
    needed = num_bytes * max(1, loaded.itemsize // stored.itemsize)
    peaks = {}
    for way in ("ours", "load_file"):
        command = [sys.executable, "-c", PEAK, str(folder), way, str(loaded)[6:]]
        result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
        peaks[way] = json.loads(result.stdout)["peak"] / needed
    print(
        f"\nbench  loading {str(stored)[6:]} as {str(loaded)[6:]}, {num_shards} files of "
        f"{num_bytes / 1e9:.2f} GB in all: peak {peaks['ours']:.2f} of the files or the "
        f"weights, whichever is more; built first and copied into {peaks['load_file']:.2f}"
    )
    for path in folder.glob("*.safetensors"):
        path.unlink()
