"""A real MLflow server, a small exported model, and a chain of stages to plan and run."""

from __future__ import annotations

import secrets
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest

from infra import storage
from infra.cluster import ClusterConfig
from infra.local.processes import free_port
from infra.local.programs import PROGRAMS
from infra.tracking_server import TrackingServer
from model import CLIPTokenizer, TextToImage, VQConfig, VQTokenizer
from training import publish
from training.config import (
    NetworkConfig,
    OptimizerConfig,
    StageConfig,
    TextEncoderConfig,
    TokenizerConfig,
)
from training.driver import DriverContext, run_stage
from training.networks import new_text_encoder, new_transformer, transformer_config
from training.plan import PUBLISHED_NAME, PlanContext, StagePlan, plan_stage
from training.stages import DatasetPin, StageSpec, stage_specs

CODEBOOK_SIZE = 32
NETWORK = NetworkConfig(
    num_layers=1,
    num_single_layers=2,
    attention_head_dim=8,
    num_attention_heads=2,
    axes_dims_rope=(2, 2, 4),
    num_special_tokens=1,
)
TEXT = TextEncoderConfig(
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    projection_dim=12,
    max_position_embeddings=16,
)
START_SECONDS = 300.0  # it takes ten on an idle machine


@pytest.fixture(autouse=True)
def _fixed_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys stay what they are when somebody saves a module of ``training`` during a test."""
    monkeypatch.setattr("training.keys.result_code_digest", lambda: "c" * 64)


@contextmanager
def mlflow_server(home: Path) -> Iterator[str]:
    """The address of a server with its database in ``home``, while it is needed."""
    program = next(each for each in PROGRAMS if each.name == "mlflow")
    port = free_port()
    program.prepare(home, print)
    process = subprocess.Popen(
        program.command(home, port),
        env=program.environment(("", "")),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + START_SECONDS
    try:
        while not program.answers(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("the MLflow server did not start")
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def mlflow_uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an MLflow server of this session."""
    with mlflow_server(tmp_path_factory.mktemp("mlflow-home")) as uri:
        yield uri


@pytest.fixture
def empty_server(tmp_path: Path) -> Iterator[TrackingServer]:
    """A server that knows nothing, as after its database was lost."""
    with mlflow_server(tmp_path / "empty-mlflow") as uri:
        yield TrackingServer(uri)


@pytest.fixture
def server(mlflow_uri: str) -> TrackingServer:
    """A client of it."""
    return TrackingServer(mlflow_uri)


def build_model(folder: Path, seed: int = 2) -> Path:
    """A whole small model, as a stage exports it."""
    tokenizer = CLIPTokenizer.train(["a red circle", "two blue squares"], 520)
    encoder = new_text_encoder(TEXT, tokenizer, seed=1)
    sizes = transformer_config(NETWORK, encoder.config, CODEBOOK_SIZE, compress=False)
    vq = VQTokenizer(VQConfig.small((32, 32), CODEBOOK_SIZE, 4))
    painter = TextToImage(new_transformer(sizes, seed=seed), vq, encoder, tokenizer)
    painter.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole small model; copy it before you change it."""
    return build_model(tmp_path_factory.mktemp("model") / "export")


@pytest.fixture(scope="session")
def other_export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with other weights."""
    return build_model(tmp_path_factory.mktemp("other-model") / "export", seed=3)


@dataclass
class House:
    """A recipe of its own with two stages, an empty store, and the session's MLflow server."""

    server: TrackingServer
    store_uri: str
    recipe: str
    tokenizer: TokenizerConfig = field(
        default_factory=lambda: TokenizerConfig(dataset="toy", codebook_size=CODEBOOK_SIZE)
    )
    evaluation_key: str = ""
    min_scores: dict[str, float] = field(default_factory=dict)
    dataset_version: str = "d" * 64
    cluster: ClusterConfig = field(default_factory=lambda: ClusterConfig(cpus_per_worker=1))

    def specs(self, **changes: Any) -> list[StageSpec]:
        """tokenizer, concepts, alignment; ``changes`` are fields of concepts."""
        values: dict[str, Any] = {
            "dataset": "toy",
            "resolution_px": 32,
            "steps": 3,
            "global_batch_size": 2,
            "optimizer": OptimizerConfig(learning_rate=1e-3),
        }
        fresh = {"source": "fresh"}
        return stage_specs(
            self.recipe,
            tokenizer=self.tokenizer,
            text_encoder=TEXT,
            network=NETWORK,
            stages={
                "concepts": StageConfig(**{**values, "init": fresh, **changes}),
                "alignment": StageConfig(**values),
            },
            min_scores=self.min_scores,
        )

    def context(self) -> PlanContext:
        """Where plans look."""
        manifest_uri = f"{self.store_uri}/datasets/toy/{self.dataset_version}/manifest.json"
        dataset = DatasetPin("toy", self.dataset_version, manifest_uri)
        return PlanContext(
            self.server, self.store_uri, {"toy": dataset}, evaluation_key=self.evaluation_key
        )


@pytest.fixture
def house(server: TrackingServer, store_uri: str) -> House:
    """A recipe nobody else uses; once with a folder as store and once with S3."""
    return House(server, store_uri, f"toy-{secrets.token_hex(4)}")


@pytest.fixture
def local_house(server: TrackingServer, tmp_path: Path) -> House:
    """As ``house``, in a folder."""
    return House(server, (tmp_path / "store").as_uri(), f"toy-{secrets.token_hex(4)}")


@pytest.fixture
def local_store(tmp_path: Path) -> str:
    """An empty store in a folder."""
    return (tmp_path / "store").as_uri()


@pytest.fixture
def finish_training() -> Callable[[House, StagePlan, Path], str]:
    """Leave behind what a driver leaves that was killed right after publishing a checkpoint."""

    def finish(house: House, plan: StagePlan, exported: Path) -> str:
        provenance = {
            "stage": plan.spec.stage,
            "parent": None if plan.parent is None else asdict(plan.parent),
            "stage_key": plan.key,
            "key_parts": plan.key_parts,
            "step": plan.spec.steps,
            "metrics": {"final_loss": 2.0, "images_per_second": 8.0, "num_workers": 2.0},
        }
        folder = publish.publish_folder(exported, house.store_uri, plan.spec.stage, provenance)
        run_uri = storage.join(house.store_uri, "runs", plan.run_name or "")
        storage.write_json(storage.join(run_uri, PUBLISHED_NAME), {"uri": folder.uri})
        return folder.uri

    return finish


@pytest.fixture
def finish(exported: Path, finish_training: Callable[..., str]) -> Callable[..., StagePlan]:
    """Plan a stage, put a finished training in place, hand it over; returns its SKIP plan."""

    def run(
        house: House, stage: str = "tokenizer", model: Path = exported, **changes: Any
    ) -> StagePlan:
        specs = {spec.stage: spec for spec in house.specs(**changes)}
        plan = plan_stage(specs[stage], house.context())
        finish_training(house, plan, model)
        plan = plan_stage(specs[stage], house.context())
        assert (plan.decision, plan.needs_training) == ("RESUME", False)
        run_stage(plan, DriverContext(house.context(), house.cluster, "plan tests"))
        return plan_stage(specs[stage], house.context())

    return run
