"""Every fragment that the guide shows is one that a recipe takes; no option is left out."""

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
from pipelines.captioning_config import CaptioningConfig
from pipelines.config import CurationConfig
from pipelines.scoring_config import DerivedConfig, ScoringConfig
from pipelines.sources import SOURCE_FORMATS

PAGE = Path(__file__).resolve().parent.parent / "docs" / "curation.md"
OPTIONS_PAGE = PAGE.with_name("curation-options.md")
OPTIONS: dict[str, type[BaseModel]] = {
    "`datasets.NAME`": CurationConfig,
    "`scoring`": ScoringConfig,
    "`derived.NAME`": DerivedConfig,
    "`captioning`": CaptioningConfig,
}
BLOCKS = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.split("\n")[0][:30])
def test_a_fragment_is_a_recipe_s(block: str) -> None:
    given = {"metadata": ["x"]} | yaml.safe_load(block)
    asked = CurationConfig.model_validate(given)
    for name in given:
        assert name in asked.model_fields_set


def test_the_guide_shows_what_it_can() -> None:
    assert len(BLOCKS) >= 6
    verbs = {
        command.name or command.callback.__name__
        for command in app.registered_commands
        if command.callback
    }
    named = set(re.findall(r"`atelier ([a-z]+)", PAGE.read_text(encoding="utf-8")))
    assert named <= verbs


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


def options_page() -> str:
    parts = [
        "# Every option of a curation\n\nMade from the code by `ATELIER_RENEW=1 pytest "
        "tests/test_curation_docs.py`; a test compares. What they are for is in "
        "[curation.md](curation.md).\n"
    ]
    for title, model in OPTIONS.items():
        head = "| key | default | what it says |\n|---|---|---|"
        parts.append(f"\n## {title}\n\n{head}\n" + "\n".join(options(model)) + "\n")
    return "".join(parts)


def test_every_option_is_in_its_table() -> None:
    if os.environ.get("ATELIER_RENEW"):
        OPTIONS_PAGE.write_text(options_page(), encoding="utf-8")
    is_current = OPTIONS_PAGE.read_text(encoding="utf-8") == options_page()
    assert is_current, "options changed: ATELIER_RENEW=1 pytest tests/test_curation_docs.py"


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
