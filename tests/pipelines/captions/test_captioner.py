"""Captioners: a server that misbehaves, a local model, and what is taken of their answers."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections import Counter
from datetime import UTC, datetime
from email.utils import formatdate
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import polars as pl
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from infra import storage
from infra.errors import UserError
from infra.manifest import load_manifest, verify_dataset
from pipelines import caption_answers
from pipelines.caption_answers import ANSWERS_SCHEMA
from pipelines.caption_engines import Answer, EndpointCaptioner
from pipelines.caption_version import (
    ask_captions,
    counts_of,
    judged,
    plan_captions,
    trial,
    version_job,
)
from pipelines.captioning_config import PROMPT, CaptioningConfig, TakeConfig
from pipelines.derive import derive
from pipelines.shards import read_shard
from tests.pipelines.captions.conftest import KEY, CaptionServer, caption_of, completion

if TYPE_CHECKING:
    from collections.abc import Callable

    from pyspark.sql import SparkSession

IMAGES = [bytes([0xFF, 0xD8, number]) for number in range(12)]
NAMES = [hashlib.sha256(image).hexdigest() for image in IMAGES]


def config_for(server: CaptionServer, **changes: Any) -> CaptioningConfig:
    endpoint = {
        "url": server.url, "model": "captioner", "deadline_seconds": 0.6, "retries": 2,
        "backoff_seconds": 0.01, "concurrency": 3,
    } | changes.pop("endpoint", {})  # fmt: skip
    return CaptioningConfig.model_validate(
        {"endpoint": endpoint, "take": {"min_words": 10}, "checkpoint_samples": 2} | changes
    )


def ask(server: CaptionServer, images: list[bytes], **endpoint: Any) -> list[Answer]:
    config = config_for(server, endpoint=endpoint)
    assert config.endpoint is not None
    return list(EndpointCaptioner(config, config.endpoint).answers(images))


def test_a_server_is_asked_as_openai_asks_and_answers_keep_their_order(
    caption_server: CaptionServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAPTION_KEY", KEY)
    caption_server.behaviour = lambda image, number: (
        (200, {}, completion(caption_of(IMAGES[0])), 0.2) if image == NAMES[0] else None
    )
    answers = ask(caption_server, IMAGES, api_key_env="CAPTION_KEY")
    assert [answer.text for answer in answers] == [caption_of(image) for image in IMAGES]
    assert {answer.model for answer in answers} == {"served-captioner-1"}
    assert answers[0].completion_tokens == 40
    body = caption_server.bodies[0]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("captioner", 0.0, 256)
    assert body["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/jpeg;")
    assert body["messages"][0]["content"][1]["text"] == PROMPT
    assert set(caption_server.keys) == {f"Bearer {KEY}"}
    assert 1 < caption_server.most_at_once <= 3


@pytest.mark.parametrize(
    ("reply", "error", "num_requests"),
    [
        ((429, {"Retry-After": "0"}, b"", 0.0), "http_429", 3),
        ((500, {}, b"", 0.0), "http_500", 3),
        ((200, {}, b"<html>bad gateway</html>", 0.0), "garbage", 3),
        ((200, {}, b'{"choices": []}', 0.0), "garbage", 3),
        ((200, {}, b"[1]", 0.0), "garbage", 3),
        ((200, {}, b"", 1.2), "timeout", 3),
        ((400, {}, b"", 0.0), "http_400", 1),
        ((413, {}, b"", 0.0), "http_413", 1),
    ],
)
def test_failures_are_tried_again_where_they_may_pass(
    caption_server: CaptionServer, reply: Any, error: str, num_requests: int
) -> None:
    caption_server.behaviour = lambda image, number: reply if image == NAMES[0] else None
    bad, good = ask(caption_server, IMAGES[:2])
    assert (bad.error, bad.retryable) == (error, num_requests > 1)
    assert good.text == caption_of(IMAGES[1])
    assert caption_server.requests[NAMES[0]] == num_requests
    caption_server.requests.clear()
    caption_server.behaviour = lambda image, number: reply if number == 1 else None
    if num_requests > 1:
        assert ask(caption_server, IMAGES[:1])[0].error is None


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_a_busy_server_is_waited_for_in_either_form(
    caption_server: CaptionServer, form: str
) -> None:
    """As long as it asks, up to ``max_wait_seconds``."""
    told = "3600" if form == "seconds" else formatdate(time.time() + 3600, usegmt=True)
    caption_server.behaviour = lambda _, number: (
        (503, {"Retry-After": told}, b"", 0.0) if number == 1 else None
    )
    started_at = time.monotonic()
    (answer,) = ask(caption_server, IMAGES[:1], max_wait_seconds=1.0)
    assert answer.error is None
    assert time.monotonic() - started_at >= 1


def test_a_refused_key_ends_the_run_in_a_line_without_the_key(
    caption_server: CaptionServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("CAPTION_KEY", KEY)
    caption_server.behaviour = lambda image, number: (401, {}, KEY.encode(), 0.0)
    with pytest.raises(UserError, match=r"got HTTP 401.*\$CAPTION_KEY") as caught:
        ask(caption_server, IMAGES, api_key_env="CAPTION_KEY")
    assert KEY not in str(caught.value) + caplog.text
    monkeypatch.delenv("CAPTION_KEY")
    with pytest.raises(UserError, match="environment variable CAPTION_KEY; got nothing"):
        ask(caption_server, IMAGES, api_key_env="CAPTION_KEY")


def test_a_server_that_is_down_ends_the_run(caption_server: CaptionServer) -> None:
    caption_server.is_down = True
    with pytest.raises(UserError, match="http_503, for 4 images in a row"):
        ask(caption_server, IMAGES, retries=0, max_failures_in_a_row=4)
    assert caption_server.requests.total() < 12


GOOD = "A red fox with a white tail stands in deep snow under a tall dark tree at dusk."


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ({"text": GOOD}, None),
        ({"text": "A red fox."}, "too_short"),
        ({"text": ""}, "empty"),
        ({"text": None, "error": "http_400"}, "failed_http_400"),
        ({"text": "I'm sorry, but I can't help with describing this image of people."}, "refusal"),
        (
            {"text": "As an AI language model I see nothing that I could tell you of here."},
            "refusal",
        ),
        (
            {"text": "I cannot identify the people who are in this image, so I stop here."},
            "refusal",
        ),
        ({"text": GOOD, "finish_reason": "content_filter"}, "refusal"),
        ({"text": GOOD + " No comment from me."}, "refusal"),
        ({"text": "a red fox and " * 9}, "repetition"),
        ({"text": GOOD + " very" * 12}, "repetition"),
        ({"text": "0x1f 22 // {} [] 99 == 12 ;; 0x2f 44 // {} () 77 != 31 ;;"}, "no_language"),
        ({"text": "Sure: " + PROMPT}, "prompt_echo"),
        ({"text": GOOD + " It looks at the", "finish_reason": "length"}, None),
        ({"text": GOOD[:-1], "finish_reason": "length"}, "truncated"),
    ],
)
def test_which_answers_are_taken(answer: dict[str, Any], problem: str | None) -> None:
    row = {"sample_id": "0", "captions": "[]"} | answer
    frame = pl.DataFrame([row], schema=pl.Schema(ANSWERS_SCHEMA))
    take = TakeConfig(min_words=10, refusals=["no comment"])
    made = judged(frame, take, PROMPT).row(0, named=True)
    assert made["problem"] == problem
    assert made["text"] == (GOOD if problem is None else "")


def captioned(
    uri: str, config: CaptioningConfig, spark: Callable[[], SparkSession], **options: Any
) -> tuple[Any, dict[str, int]]:
    job = plan_captions(uri, config, **options)
    answers, _ = ask_captions(job, spark)
    made = version_job(job, answers)
    return derive(made, spark), counts_of(made)


@pytest.mark.slow
def test_a_version_with_captions_is_published_and_goes_on_where_it_was(
    caption_server: CaptionServer, new_dataset: Any, spark: Any, store_uri: str,
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("CAPTION_KEY", KEY)
    small = new_dataset(store_uri, 20)
    names = {key: hashlib.sha256(data).hexdigest() for key, data in small.images.items()}
    refused, mailed, broken = sorted(names)[:3]
    texts = {
        names[refused]: "I'm sorry, but I can't help with that.",
        names[mailed]: GOOD + " A sign says jane@example.com and more.",
    }

    def behaviour(image: str, number: int) -> Any:
        if image == names[broken]:
            return (400, {}, b"", 0.0)
        return (200, {}, completion(texts[image]), 0.0) if image in texts else None

    caption_server.behaviour = behaviour
    config = config_for(
        caption_server, endpoint={"api_key_env": "CAPTION_KEY", "max_failures_in_a_row": 3}
    )
    shown = trial(plan_captions(small.manifest_uri, config), 3, tmp_path)
    assert shown["problem"].to_list().count(None) == 1
    # The server dies in the middle; what it answered is kept.
    first = caption_server.requests.total()
    asked: list[str] = []

    def dying(image: str, number: int) -> Any:
        asked.append(image)
        return (503, {}, b"", 0.0) if len(asked) > 8 else behaviour(image, number)

    caption_server.behaviour = dying
    with pytest.raises(UserError, match="images in a row"):
        captioned(small.manifest_uri, config, spark)
    caption_server.behaviour = behaviour
    result, counts = captioned(small.manifest_uri, config, spark, retry_failed=True)
    assert first == 3
    assert counts == {"failed_http_400": 1, "refusal": 1, "taken": 18}
    good = Counter(
        {name: n for name, n in caption_server.requests.items() if name not in asked[8:]}
    )
    assert set(good.values()) == {1}
    # The same again: nothing is asked, and the version is the same.
    before = caption_server.requests.total()
    again, _ = captioned(small.manifest_uri, config, spark)
    assert again.manifest.version == result.manifest.version
    assert caption_server.requests.total() == before
    # As much as a run that nothing stopped.
    other = new_dataset((tmp_path / "other").as_uri(), 20)
    undisturbed, _ = captioned(other.manifest_uri, config, spark)
    assert undisturbed.manifest.version == result.manifest.version
    _check_version(result, small, names, refused, mailed)


def _check_version(result: Any, small: Any, names: Any, refused: str, mailed: str) -> None:
    assert verify_dataset(result.manifest_uri) == []
    manifest = load_manifest(result.manifest_uri)
    assert manifest.counts == small.manifest.counts
    told = manifest.attributes["derivations"][-1]
    assert told["counts"]["taken"] == 18
    assert told["captioner"]["prompt"] == PROMPT
    assert KEY not in json.dumps(told)
    assert "127.0.0.1" not in json.dumps(told)
    samples: dict[str, dict[str, bytes]] = {}
    for shard in manifest.shards:
        samples.update(read_shard(storage.read_bytes(storage.join(small.root, shard.path))))
    assert set(samples) == set(small.images)
    for key, members in samples.items():
        known = json.loads(members["json"])
        assert members["png"] == small.images[key]
        assert known["captions"][0]["text"] == small.captions[key]
        if key == refused:
            assert members["txt"].decode() == small.captions[key]
            assert len(known["captions"]) == 1
    mail = json.loads(samples[mailed]["json"])["captions"][1]
    assert mail["text"] == GOOD + " A sign says and more."
    assert mail["model"] == "served-captioner-1"
    assert mail["engine"] == "endpoint"


@pytest.mark.slow
def test_failures_are_asked_again_when_told_to(
    caption_server: CaptionServer, new_dataset: Any, spark: Any, tmp_path: Path, home: Path
) -> None:
    small = new_dataset((tmp_path / "store").as_uri(), 12)
    bad = hashlib.sha256(small.images[min(small.images)]).hexdigest()
    caption_server.behaviour = lambda image, number: (500, {}, b"", 0.0) if image == bad else None
    config = config_for(caption_server)
    result, counts = captioned(small.manifest_uri, config, spark)
    assert counts == {"failed_http_500": 1, "taken": 11}
    caption_server.behaviour = lambda image, number: None
    same, _ = captioned(small.manifest_uri, config, spark)
    assert same.manifest.version == result.manifest.version
    caption_server.requests.clear()
    healed, counts = captioned(small.manifest_uri, config, spark, retry_failed=True)
    assert counts == {"taken": 12}
    assert caption_server.requests == {bad: 1}
    assert healed.manifest.version != result.manifest.version


def test_when_and_for_what_it_was_asked_outlives_a_kill_and_a_retry(
    caption_server: CaptionServer, new_dataset: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill that falls between the last answer and the marker; days later, a failure heals."""
    small = new_dataset((tmp_path / "store").as_uri(), 6)
    task = plan_captions(small.manifest_uri, config_for(caption_server)).unit
    shard = next(each for each in small.manifest.shards if each.num_samples > 1)
    images = [image for _, image, _ in caption_answers.samples_of(task, shard)]
    bad = hashlib.sha256(images[0]).hexdigest()
    caption_server.behaviour = lambda image, number: (500, {}, b"", 0.0) if image == bad else None

    def on(day: int) -> None:
        now = datetime(2026, 11, day, tzinfo=UTC)
        monkeypatch.setattr(caption_answers, "datetime", SimpleNamespace(now=lambda _: now))

    on(27)
    with monkeypatch.context() as patch:
        patch.setattr(caption_answers, "_finish", killed)
        with pytest.raises(KeyboardInterrupt):
            caption_answers.caption_shard(task, shard, tmp_path)
    answered = shard.num_samples - 1
    asked = caption_server.requests.total()
    on(28)
    # Nothing but the failure, which may pass, is asked again.
    first = caption_answers.caption_shard(task, shard, tmp_path)
    assert caption_server.requests.total() - asked == 3
    assert first.asked_on == ["2026-11-27", "2026-11-28"]
    on(29)
    caption_server.behaviour = lambda image, number: None
    healed = caption_answers.caption_shard(task, shard, tmp_path, retry_failed=True)
    assert healed.asked_on == ["2026-11-27", "2026-11-29"]
    each = first.completion_tokens // answered
    assert each > 0
    assert (first.completion_tokens, healed.completion_tokens) == (
        each * answered, each * shard.num_samples,
    )  # fmt: skip
    assert healed.prompt_tokens > first.prompt_tokens
    names = pq.read_schema(Path(small.root.removeprefix("file://"), healed.answers.path)).names
    assert not {"asked_on", "prompt_tokens", "completion_tokens"} & set(names)


def killed(*_: object) -> None:
    raise KeyboardInterrupt


def test_where_and_how_fast_it_is_asked_is_no_part_of_the_key(
    caption_server: CaptionServer, new_dataset: Any, tmp_path: Path
) -> None:
    small = new_dataset((tmp_path / "store").as_uri(), 6)

    def key(**changes: Any) -> str:
        return plan_captions(small.manifest_uri, config_for(caption_server, **changes)).unit.key

    same = key()
    assert key(endpoint={"url": "http://gpu-9:1/v1", "concurrency": 9}) == same
    assert key(take={"min_words": 3}) == same
    assert key(prompt="What is this?") != same
    assert key(endpoint={"model": "another"}) != same


def test_a_section_names_one_engine() -> None:
    for wrong in ({}, {"endpoint": {"url": "http://x/v1", "model": "m"}, "local": {"folder": "f"}}):
        with pytest.raises(ValidationError, match="one of endpoint and local"):
            CaptioningConfig.model_validate(wrong)
