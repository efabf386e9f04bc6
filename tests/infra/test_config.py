from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from infra.config import StrictModel, atelier_home, operational, semantic, semantic_part


class Filter(StrictModel):
    min_size_px: int = semantic(256, "smallest side, pixels", ge=1)
    threads: int = operational(2, "decoding threads")


class Recipe(StrictModel):
    name: str = semantic(description="what it is called")
    main: Filter = semantic(Filter(), "the filter")
    others: dict[str, Filter] = semantic(default_factory=dict, description="more filters")
    chain: tuple[Filter, ...] = semantic((), "filters in a row")
    folder: Path = operational(Path("/tmp"), "where to work")
    plain: int = 3


def test_operational_fields_do_not_reach_the_semantic_part_at_any_depth() -> None:
    one = Filter(min_size_px=64, threads=7)
    recipe = Recipe(name="x", main=one, others={"a": one}, chain=(one,), folder=Path("/else"))
    kept = {"min_size_px": 64}
    assert semantic_part(recipe) == {
        "name": "x",
        "main": kept,
        "others": {"a": kept},
        "chain": [kept],
        "plain": 3,
    }


def test_constraints_and_required_fields_hold() -> None:
    with pytest.raises(ValidationError):
        Filter(min_size_px=0)
    with pytest.raises(ValidationError):
        Recipe.model_validate({})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_number_without_a_json_form_is_refused_at_any_depth(value: float) -> None:
    class Numbers(StrictModel):
        number: float | None = semantic(None, "any")
        named: dict[str, float | str | bool] = semantic(default_factory=dict, description="any")

    for given in ({"number": value}, {"named": {"a": value}}):
        with pytest.raises(ValidationError, match="finite"):
            Numbers.model_validate(given)


def test_unknown_keys_and_changes_are_refused() -> None:
    with pytest.raises(ValidationError):
        Filter.model_validate({"min_size": 3})
    with pytest.raises(ValidationError):
        Filter().threads = 3


def test_every_field_says_what_it_is() -> None:
    assert Filter.model_fields["min_size_px"].description == "smallest side, pixels"


def test_home_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ATELIER_HOME", str(tmp_path))
    assert atelier_home() == tmp_path
    monkeypatch.delenv("ATELIER_HOME")
    assert atelier_home().name == ".atelier"
