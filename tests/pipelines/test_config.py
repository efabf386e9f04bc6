"""Recipes are checked whole before anything runs, and only meaning goes into keys."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from infra.config import semantic_part
from pipelines.config import CurationConfig, FetchConfig, ResizeConfig

MINIMAL = {"metadata": ["metadata/*.parquet"]}


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"metadata": []}, "metadata"),
        ({"partitions": 0}, "partitions"),
        ({"surprise": 1}, "surprise"),
        ({"filters": {"max_watermark_prob": 1.5}}, "max_watermark_prob"),
        ({"filters": {"min_aestetic_score": 4.5}}, "min_aestetic_score"),
        ({"filters": {"aesthetic_scale": "v3"}}, "aesthetic_scale"),
        ({"filters": {"unknown": {"size": "perhaps"}}}, "size"),
        ({"fetch": {"allowed_ports": [0]}}, "allowed_ports"),
        ({"fetch": {"connect_to": {"gallery.example": "127.0.0.1:1"}}}, "connect_to"),
        ({"fetch": {"connect_to": {"gallery.example:80": "127.0.0.1"}}}, "connect_to"),
        ({"fetch": {"user_agent": "x\r\nHost: y"}}, "user_agent"),
        ({"resize": {"encode_format": "png", "encode_quality": 95}}, "resize"),
        ({"resize": {"image_size_px": 0}}, "image_size_px"),
        ({"shards": {"max_samples": 0}}, "max_samples"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(change: dict[str, Any], key: str) -> None:
    with pytest.raises(ValidationError, match=key):
        CurationConfig.model_validate(MINIMAL | change)


def test_all_problems_are_found_at_once() -> None:
    with pytest.raises(ValidationError) as caught:
        CurationConfig.model_validate({"partitions": 0, "surprise": 1, "source": ""})
    assert {error["loc"][0] for error in caught.value.errors()} == {
        "metadata", "partitions", "surprise", "source",
    }  # fmt: skip


def test_zero_is_a_threshold_and_none_is_off() -> None:
    config = CurationConfig.model_validate(MINIMAL | {"filters": {"max_unsafe_prob": 0}})
    assert config.filters.max_unsafe_prob == 0.0
    assert config.filters.max_watermark_prob is None


def test_places_threads_and_retries_do_not_change_the_key() -> None:
    here = CurationConfig.model_validate(MINIMAL)
    there = CurationConfig.model_validate(
        {
            "metadata": ["s3://bucket/elsewhere/*.parquet"],
            "captions": {"files": ["other.parquet"]},
            "fetch": {
                "num_threads": 3,
                "retries": 9,
                "connect_to": {"a.example:80": "127.0.0.1:9"},
            },
        }
    )
    assert semantic_part(here) == semantic_part(there)


def test_thresholds_sizes_and_formats_change_the_key() -> None:
    known = semantic_part(CurationConfig.model_validate(MINIMAL))
    for change in (
        {"source": "coyo"},
        {"filters": {"min_width_px": 1}},
        {"filters": {"unknown": {"unsafe_prob": "keep"}}},
        {"fetch": {"max_bytes": 1}},
        {"resize": {"encode_quality": 90}},
        {"shards": {"max_samples": 5}},
        {"partitions": 3},
        {"duplicates": {"same_bytes": False}},
        {"preference": {"scale": 2.0}},
        {"captions": {"train_on": "alt"}},
    ):
        assert semantic_part(CurationConfig.model_validate(MINIMAL | change)) != known


def test_every_field_says_what_it_is() -> None:
    def check(model: type[BaseModel]) -> None:
        for name, field in model.model_fields.items():
            assert field.description, f"{model.__name__}.{name}"
            extra = field.json_schema_extra
            assert isinstance(extra, dict), f"{model.__name__}.{name}"
            assert "operational" in extra, f"{model.__name__}.{name}"
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                check(field.annotation)

    check(CurationConfig)


def test_mapped_hosts_are_compared_in_lower_case() -> None:
    config = FetchConfig(connect_to={"Gallery.Example:80": "127.0.0.1:8080"})
    assert config.connect_to == {"gallery.example:80": "127.0.0.1:8080"}


def test_png_has_compression_levels() -> None:
    assert ResizeConfig(encode_format="png", encode_quality=9).encode_quality == 9
