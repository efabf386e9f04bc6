from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from training.token_format import CachedSample, write_tokens

CODE = """
import sys
from training.lean_imports import UNUSED, import_lightning
lightning = import_lightning()
present = sorted(name for name in UNUSED if name in sys.modules)
assert not present, present
assert import_lightning() is lightning is sys.modules["lightning.pytorch"]

# Questions asked afterwards are answered truthfully, and the packages import.
from lightning_utilities.core import imports
assert imports._version("pillow")
import importlib.metadata, importlib.util
for name in ("scipy", "matplotlib"):
    found = importlib.util.find_spec(name) is not None
    assert bool(imports.RequirementCache(name)) == found, name
    assert imports.package_available(name) == imports.module_available(name) == found, name

# What training uses works.
import torch
from torchmetrics import MeanMetric
metric = MeanMetric()
metric.update(torch.tensor([1.0, 3.0]))
assert metric.compute() == 2.0
class Line(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
    def training_step(self, batch, batch_idx):
        return ((self.weight - batch) ** 2).mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)
line = Line()
quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False)
lightning.Trainer(max_epochs=1, accelerator="cpu", enable_model_summary=False, **quiet).fit(
    line, torch.utils.data.DataLoader(torch.ones(20), batch_size=1)
)
assert 0.9 < float(line.weight) < 1.0
print("lean")
"""


@pytest.mark.slow
def test_lightning_works_without_what_training_never_uses() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CODE], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "lean"


TOKENS = """
import sys
from training.token_format import read_tokens
shard = read_tokens(open(sys.argv[1], "rb").read())
assert shard.tokens_NHW.tolist() == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]
assert shard.sizes_and_crops_N4.tolist() == [[9, 8, 1, 2]] * 2
assert str(shard.preference_score_N.tolist()) == "[nan, nan]"
assert shard.aesthetic_score_N.tolist() == [5.5, 5.5]
assert shard.captions == [(("alt", "a fox"), ("synthetic", "a red fox"))] * 2
print([name for name in ("pandas", "scipy", "transformers") if name in sys.modules])
"""


def test_reading_tokens_imports_no_pandas(tmp_path: Path) -> None:
    captions = (("alt", "a fox"), ("synthetic", "a red fox"))
    sample = CachedSample("a", 9, 8, 1, 2, None, 5.5, captions)
    path = tmp_path / "tokens.parquet"
    path.write_bytes(write_tokens([sample] * 2, np.arange(8, dtype=np.uint16).reshape(2, 2, 2)))
    command = [sys.executable, "-c", TOKENS, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr
