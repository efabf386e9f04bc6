"""Tokenizer, concepts and compression with the real worker: planned, trained, handed over."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from infra import storage
from infra.cluster import ClusterConfig
from infra.manifest import load_manifest
from infra.sessions import ray_session
from infra.tracking_server import TrackingServer
from model import TextToImage
from training import publish, registry
from training.config import InitConfig, StageConfig, TokenizerConfig
from training.driver import DriverContext, run_stage
from training.plan import Pin, PlanContext, plan_chain, plan_stage
from training.stages import DatasetPin, StageSpec, stage_specs

pytestmark = [
    pytest.mark.slow,
    # ray.train imports ray.data, whose defaults warn about themselves.
    pytest.mark.filterwarnings("ignore::Warning:ray.data.context"),
]

TOKENIZER = TokenizerConfig.model_validate(
    {
        "dataset": "toy",
        "block_out_channels": [8, 8, 8],
        "latent_channels": 4,
        "codebook_size": 32,
        "bpe_vocab_size": 520,
        "training": {"resolutions_px": [16], "steps": 4, "batch_pixels": 1024, "warmup_steps": 0},
    }
)
CLUSTER = ClusterConfig(cpus_per_worker=1)


@pytest.fixture
def specs(
    small_config: Callable[..., StageConfig], network_config: Any, text_encoder_config: Any
) -> list[StageSpec]:
    new = InitConfig(new_parameters=("down_block.downsample.", "up_block.upsample."))
    stages = {
        "concepts": small_config(),
        "compression": small_config(compress=True, init=new, resolution_px=32),
    }
    return stage_specs(
        f"chain-{secrets.token_hex(4)}",
        tokenizer=TOKENIZER,
        text_encoder=text_encoder_config,
        network=network_config,
        stages=stages,
    )


def test_a_chain_from_curated_images_to_a_painter(
    server: TrackingServer,
    specs: list[StageSpec],
    curated: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ATELIER_HOME", str(tmp_path / "home"))
    manifest_uri = curated([[(48, 48)] * 9, [(64, 48)] * 7])
    dataset = DatasetPin("toy", load_manifest(manifest_uri).version, manifest_uri)
    store_uri = (tmp_path / "store").as_uri()
    context = PlanContext(server, store_uri, {"toy": dataset}, evaluation_key="e1")
    driver = DriverContext(context, CLUSTER, "chains")
    scored: list[str] = []

    def evaluate(uri: str) -> Mapping[str, float]:
        TextToImage.from_pretrained(publish.fetch_checkpoint(uri))
        scored.append(uri)
        return {"background": 0.5}

    parent: Pin | None = None
    with ray_session(CLUSTER, {}):
        for spec in specs:
            plan = plan_stage(spec, context, parent=parent)
            assert plan.decision == ("RUN" if spec.kind == "tokenizer" else "INIT")
            result = run_stage(plan, driver, evaluate=evaluate)
            print(spec.stage, result.seconds)
            assert result.step == spec.steps
            parent = result.pin
    assert len(scored) == 2
    plans = plan_chain(specs, context)
    assert [plan.decision for plan in plans] == ["SKIP"] * 3
    for plan in plans:
        assert plan.existing is not None
        assert registry.version_by_alias(server, plan.existing.name) == plan.existing
    last = plans[-1].existing
    assert last is not None
    facts = publish.read_provenance(last.uri)
    assert facts["parent"]["sha256"] == plans[1].existing.sha256  # type: ignore[union-attr]  # seen above
    assert facts["dataset"]["version"] == dataset.version
    assert facts["metrics"]["final_loss"] > 0
    assert last.tags["tokenizer_sha256"] == plans[0].existing.sha256  # type: ignore[union-attr]  # seen above
    painter = TextToImage.from_pretrained(publish.fetch_checkpoint(last.uri, tmp_path / "cache"))
    assert painter.generate(["a red square"], steps=2, guidance_scale=1.0)[0].size == (32, 32)
    assert storage.exists(storage.join(store_uri, "models", "compression", "alias_log.json"))
