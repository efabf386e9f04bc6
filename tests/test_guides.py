"""Every fragment that a guide shows is one that a recipe takes; no option is left out."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from app.cli import app
from app.recipe import EvaluationConfig, ServicesConfig
from infra.cluster import ClusterConfig
from pipelines.captioning_config import CaptioningConfig
from pipelines.config import CurationConfig
from pipelines.scoring_config import DerivedConfig, ScoringConfig
from pipelines.sources import SOURCE_FORMATS
from training.config import NetworkConfig, StageConfig, TextEncoderConfig, TokenizerConfig

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE = DOCS / "curation.md"
OPTIONS: dict[str, dict[str, type[BaseModel]]] = {
    "curation": {
        "`datasets.NAME`": CurationConfig,
        "`scoring`": ScoringConfig,
        "`derived.NAME`": DerivedConfig,
        "`captioning`": CaptioningConfig,
    },
    "training": {
        "`tokenizer`": TokenizerConfig,
        "`text_encoder`": TextEncoderConfig,
        "`network`": NetworkConfig,
        "`stages.NAME`": StageConfig,
        "`evaluation`": EvaluationConfig,
        "`services`": ServicesConfig,
        "`cluster`": ClusterConfig,
    },
}
NEEDED: dict[str, tuple[type[BaseModel], dict[str, Any]]] = {
    "curation": (CurationConfig, {"metadata": ["x"]}),
    "training": (
        StageConfig,
        {"dataset": "x", "resolution_px": 256, "steps": 1000, "global_batch_size": 8},
    ),
}


def fragments(guide: str) -> list[str]:
    page = (DOCS / f"{guide}.md").read_text(encoding="utf-8")
    return re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)


@pytest.mark.parametrize(
    ("guide", "block"),
    [(guide, block) for guide in NEEDED for block in fragments(guide)],
    ids=lambda text: text.split("\n")[0][:30],
)
def test_a_fragment_is_a_recipe_s(guide: str, block: str) -> None:
    model, needed = NEEDED[guide]
    given = needed | yaml.safe_load(block)
    asked = model.model_validate(given)
    for name in given:
        assert name in asked.model_fields_set


@pytest.mark.parametrize(("guide", "least"), [("curation", 6), ("training", 4)])
def test_the_guide_shows_what_it_can(guide: str, least: int) -> None:
    assert len(fragments(guide)) >= least
    verbs = {
        command.name or command.callback.__name__
        for command in app.registered_commands
        if command.callback
    }
    page = (DOCS / f"{guide}.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`atelier ([a-z]+)", page)) <= verbs


def default_of(field: FieldInfo) -> str:
    """As a recipe would write it; nothing where the recipe has to say it."""
    if field.is_required():
        return ""
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return ""
    return f"`{json.dumps(value)}`"


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from models_in(inner)


def options(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        text = (field.description or "").replace("|", "\\|").replace("<", "&lt;")
        yield f"| `{prefix}{name}` | {default_of(field)} | {text} |"
        for inner in models_in(field.annotation):
            is_list = get_origin(field.annotation) is list
            yield from options(inner, f"{prefix}{name}{'[]' if is_list else ''}.")


def options_page(guide: str) -> str:
    parts = [
        f"# Every option of a {guide}\n\nMade from the code by `ATELIER_RENEW=1 pytest "
        "tests/test_guides.py`; a test compares. What they are for is in "
        f"[{guide}.md]({guide}.md).\n"
    ]
    for title, model in OPTIONS[guide].items():
        head = "| key | default | what it says |\n|---|---|---|"
        parts.append(f"\n## {title}\n\n{head}\n" + "\n".join(options(model)) + "\n")
    return "".join(parts)


@pytest.mark.parametrize("guide", OPTIONS)
def test_every_option_is_in_its_table(guide: str) -> None:
    page = DOCS / f"{guide}-options.md"
    if os.environ.get("ATELIER_RENEW"):
        page.write_text(options_page(guide), encoding="utf-8")
    is_current = page.read_text(encoding="utf-8") == options_page(guide)
    assert is_current, "options changed: ATELIER_RENEW=1 pytest tests/test_guides.py"


def test_the_guide_names_every_published_set() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert [name for name in SOURCE_FORMATS if f"`{name}`" not in page] == []
    assert f"one of {len(SOURCE_FORMATS)} published schemas" in page


def test_a_fragment_of_other_sections_is_a_recipe_s() -> None:
    (block,) = re.findall(r"\n\n((?:    .*\n)+)", PAGE.read_text(encoding="utf-8"))
    sections = yaml.safe_load(block)
    ScoringConfig.model_validate(sections["scoring"])
    CaptioningConfig.model_validate(sections["captioning"])
    for derived in sections["derived"].values():
        DerivedConfig.model_validate(derived)
