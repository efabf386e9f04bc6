"""What changes a stage's key, and what does not."""

from __future__ import annotations

from typing import Any

import pytest

from infra.errors import UserError
from training import keys
from training.config import (
    InitConfig,
    NetworkConfig,
    OptimizerConfig,
    SampleGridConfig,
    StageConfig,
    TextEncoderConfig,
    TokenizerConfig,
)
from training.stages import StageSpec, stage_specs

VERSIONS = {"torch": "2.15", "lightning": "2.6", "ray": "2.60"}


def _stage(**changes: Any) -> StageConfig:
    values = {"dataset": "gallery", "resolution_px": 64, "steps": 10, "global_batch_size": 4}
    return StageConfig(**{**values, **changes})


def _specs(
    *,
    tokenizer: TokenizerConfig | None = None,
    text_encoder: TextEncoderConfig | None = None,
    network: NetworkConfig | None = None,
    recipe: str = "demo",
    names: tuple[str, ...] = ("concepts", "alignment", "compression"),
    **stages: StageConfig,
) -> list[StageSpec]:
    default = {name: _stage() for name in names}
    return stage_specs(
        recipe,
        tokenizer=tokenizer or TokenizerConfig(dataset="gallery"),
        text_encoder=text_encoder or TextEncoderConfig(),
        network=network or NetworkConfig(),
        stages={**default, **stages},
    )


def _chain_keys(specs: list[StageSpec], dataset: str = "d" * 64, code: str = "c") -> list[str]:
    """The keys of a chain in which every result's digest is its own key."""
    found: list[str] = []
    for spec in specs:
        parts = keys.key_parts(
            stage=spec.stage,
            semantic=spec.semantic,
            dataset_sha256s=[dataset],
            parent_sha256=found[-1] if found else None,
            tokenizer_sha256=found[0] if found else None,
            init_policy=spec.init_policy,
            code_sha256=code,
            versions=VERSIONS,
        )
        found.append(keys.stage_key(parts))
    return found


def _changed(before: list[str], after: list[str]) -> list[bool]:
    return [old != new for old, new in zip(before, after, strict=True)]


BASE = _chain_keys(_specs())
NONE, ALL = [False] * 4, [True] * 4


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"alignment": _stage(steps=11)}, [False, False, True, True]),
        ({"alignment": _stage(optimizer=OptimizerConfig(learning_rate=1e-3))}, [0, 0, 1, 1]),
        ({"compression": _stage(init=InitConfig(new_parameters=("up.",)))}, [0, 0, 0, 1]),
        ({"concepts": _stage(seed=1)}, [False, True, True, True]),
        ({"network": NetworkConfig(num_layers=2)}, [False, True, True, True]),
        ({"tokenizer": TokenizerConfig(dataset="gallery", codebook_size=512)}, ALL),
        ({"text_encoder": TextEncoderConfig(projection_dim=8)}, ALL),
    ],
)
def test_a_semantic_change_rekeys_its_stage_and_what_follows(
    changes: dict[str, Any], expected: list[bool]
) -> None:
    assert _changed(BASE, _chain_keys(_specs(**changes))) == [bool(each) for each in expected]


@pytest.mark.parametrize(
    "changes",
    [
        {"alignment": _stage(num_workers=4)},
        {"alignment": _stage(log_interval_steps=1, checkpoint_interval_seconds=5.0)},
        {"alignment": _stage(gradient_checkpointing=True, max_microbatch_size=1)},
        {"concepts": _stage(sample_grid=SampleGridConfig(prompts=("a red circle",)))},
        {"concepts": _stage(dataset="the same bytes by another name")},
        {"concepts": _stage(max_final_loss=3.0)},
        {"tokenizer": TokenizerConfig(dataset="gallery", max_reconstruction_error=0.1)},
        {"recipe": "another"},
    ],
)
def test_an_operational_change_rekeys_nothing(changes: dict[str, Any]) -> None:
    assert _changed(BASE, _chain_keys(_specs(**changes))) == NONE


def test_new_data_and_new_code_rekey_everything() -> None:
    assert _changed(BASE, _chain_keys(_specs(), dataset="e" * 64)) == ALL
    assert _changed(BASE, _chain_keys(_specs(), code="d")) == ALL


def test_the_key_is_the_same_in_every_process() -> None:
    parts = keys.key_parts(
        stage="concepts",
        semantic={"b": 1, "a": [1.5, None]},
        dataset_sha256s=["0" * 64],
        parent_sha256=None,
        tokenizer_sha256=None,
        init_policy="fresh",
        code_sha256="0" * 64,
        versions=VERSIONS,
    )
    assert keys.stage_key(parts) == keys.stage_key(dict(reversed(parts.items())))
    assert keys.stage_key(parts) == (
        "98c72920ff7da8a17706d06c4510d60b8ee6997fb8ab66f7ce663bfc2b0c7606"
    )


def test_the_code_of_a_result_is_the_network_and_the_worker() -> None:
    modules = keys._worker_modules()
    assert "training.masked_stage" in modules
    assert "training.config" in modules
    assert not {"training.driver", "training.plan", "training.publish"} & set(modules)
    assert keys.result_code_digest() == keys.result_code_digest()


def test_names_carry_the_key() -> None:
    key = "0123456789abcdef" * 4
    assert keys.run_name("concepts", key) == "concepts-0123456789ab"
    assert keys.model_name("demo", "concepts") == "demo-concepts"


@pytest.mark.parametrize(("recipe", "stage"), [("a/b", "concepts"), ("a:b", "x"), ("demo", "A b")])
def test_names_that_mlflow_or_ray_would_refuse(recipe: str, stage: str) -> None:
    with pytest.raises(UserError, match="expected a"):
        keys.model_name(recipe, stage)


def test_a_stage_may_not_take_the_tokenizers_name() -> None:
    with pytest.raises(UserError, match="stage 0"):
        _specs(names=("concepts", "tokenizer"))


def test_changed_parts_are_named() -> None:
    before = {"config": {"stage": {"steps": 1, "seed": 0}}, "parent_sha256": "a"}
    now = {"config": {"stage": {"steps": 2, "seed": 0}}, "parent_sha256": "b"}
    assert keys.changed_parts(before, now) == ["config.stage.steps", "parent_sha256"]


def test_a_chain_knows_who_follows_and_what_bounds_it() -> None:
    specs = _specs(alignment=_stage(max_final_loss=2.5))
    assert [spec.parent for spec in specs] == [None, "tokenizer", "concepts", "alignment"]
    following = [spec.next_stage.name if spec.next_stage else None for spec in specs]
    assert following == ["concepts", "alignment", "compression", None]
    assert specs[2].bounds.problems({"final_loss": 2.4}) == []
    assert specs[2].bounds.problems({"final_loss": 2.6}) == [
        "final_loss is 2.6: expected at most 2.5"
    ]
    assert specs[2].bounds.problems({}) == ["final_loss was not measured: expected at most 2.5"]
    assert specs[2].bounds.problems({"final_loss": float("nan")})
