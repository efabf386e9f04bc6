"""A version of a dataset with long captions: answers judged, taken, and one chosen for `.txt`."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import polars as pl

from infra import storage
from infra.config import semantic_part
from infra.digests import canonical_json, sha256_bytes
from infra.environment import applied
from infra.lease import Lease
from infra.manifest import DatasetManifest, ShardEntry, dataset_root, load_manifest
from pipelines.caption_answers import (
    AnswersManifest,
    CaptionedShard,
    CaptionTask,
    ask,
    caption_shard,
    finished_shards,
    identity_of,
    known_answers,
    read_answers,
    refuse_empty,
    samples_of,
)
from pipelines.caption_config import CaptionConfig
from pipelines.caption_engines import api_key
from pipelines.caption_local import identify_local
from pipelines.captioning_config import CaptioningConfig, TakeConfig
from pipelines.captions import choose_caption, within_budget
from pipelines.derive import Derivation, Members
from pipelines.embed_parts import forget_parts
from pipelines.exclusive import refuse_while_removing
from pipelines.units import ProgressCallback, run_units, watching
from pipelines.workspace import Workspace

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

CAPTION_VERSION = 1
TAKEN = "taken"
_READ_THREADS = 8
_NOT = (
    r"(?:can(?:no|['\u2019])t|could not|couldn['\u2019]t|(?:am|['\u2019]m) unable to|won['\u2019]t)"
)
_REFUSALS = (
    r"^(?:i['\u2019]?m |i am )?(?:very )?sorry\b",
    rf"\b(?:i|we) ?{_NOT} (?:\w+ ){{0,3}}(?:help|assist|describe|provide|see|view|identify|fulfil)",
    rf"\b(?:i|we) ?{_NOT} (?:\w+ ){{0,3}}(?:comply|caption|access|process|analy[sz]e)",
    r"\bas an ai\b|\bas a (?:large )?language model\b",
    r"\bi (?:do not|don['\u2019]t) see (?:an|any|the) image\b",
    r"\bno image (?:was|has been|is) (?:provided|attached|uploaded|visible)",
    r"\b(?:against|violates?) (?:my|our|the) (?:\w+ )?(?:policy|policies|guidelines)\b",
)
_SENTENCE_END = re.compile(r"[.!?\u2026\u3002\uff01\uff1f][\"'\u201d\u2019)]*(?=\s|$)")


def judged(answers: pl.DataFrame, config: TakeConfig, prompt: str) -> pl.DataFrame:
    """``answers`` with ``text`` as it would be taken, and ``problem``: why it is not, or null.

    An answer that was cut off by the token limit is taken up to its last whole sentence.
    """
    texts, problems = [], []
    for text, error, finish_reason in answers.select("text", "error", "finish_reason").iter_rows():
        taken, problem = _judge(text or "", error, finish_reason, config, prompt)
        texts.append(taken)
        problems.append(problem)
    return answers.with_columns(
        pl.Series("text", texts, dtype=pl.String), pl.Series("problem", problems, dtype=pl.String)
    )


def _judge(
    text: str, error: str | None, finish_reason: str | None, config: TakeConfig, prompt: str
) -> tuple[str, str | None]:
    if error is not None:
        return "", f"failed_{error}"
    if finish_reason in ("content_filter", "refusal"):
        return "", "refusal"
    if not text:
        return "", "empty"
    phrases = [re.escape(phrase) for phrase in config.refusals if phrase.strip()]
    if re.search("|".join([*_REFUSALS, *phrases]), text, re.IGNORECASE):
        return "", "refusal"
    if _echoes(text, prompt):
        return "", "prompt_echo"
    if _loops(text, config.max_repeats):
        return "", "repetition"
    num_plain = sum(sign.isalpha() or sign.isspace() for sign in text)
    if num_plain < config.min_letter_ratio * len(text):
        return "", "no_language"
    if finish_reason == "length":
        ends = [match.end() for match in _SENTENCE_END.finditer(text)]
        if not ends:
            return "", "truncated"
        text = text[: ends[-1]]
    if len(text.split()) < config.min_words:
        return "", "too_short"
    return text, None


def _echoes(text: str, prompt: str) -> bool:
    """Whether eight words of the prompt come back in a row."""
    words, asked = (re.findall(r"\w+", each.lower()) for each in (text, prompt))
    size = min(8, len(asked))
    if size < 4:
        return False
    runs = {tuple(asked[i : i + size]) for i in range(len(asked) - size + 1)}
    return any(tuple(words[i : i + size]) in runs for i in range(len(words) - size + 1))


def _loops(text: str, max_repeats: int) -> bool:
    words = re.findall(r"\w+", text.lower())
    threes = Counter(zip(words, words[1:], words[2:], strict=False))
    longest = run = 1
    for before, word in pairwise(words):
        run = run + 1 if word == before else 1
        longest = max(longest, run)
    return max(threes.values(), default=0) > max_repeats or longest > 2 * max_repeats


@dataclass(frozen=True)
class CaptionJob(Derivation):
    """One version with the answers of one captioner; travels to the workers."""

    kind: ClassVar[str] = "caption"

    dataset_root: str
    manifest: DatasetManifest
    answers: AnswersManifest
    take: TakeConfig
    prompt: str
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def key(self) -> str:
        """The sha256 over everything that decides the new version."""
        identity = {
            "take": semantic_part(self.take),
            "dataset": self.manifest.version,
            "answers": self.answers.sha256,
            "version": CAPTION_VERSION,
        }
        return sha256_bytes(canonical_json(identity))

    @property
    def captions(self) -> CaptionConfig:
        """How the dataset's recipe chooses the caption to train on."""
        recipe = self.manifest.attributes.get("recipe", {})
        return CaptionConfig.model_validate(recipe.get("captions", {}))

    def decide(self, index: int, folder: Path) -> pl.DataFrame:
        """The samples that take a caption."""
        rows = read_answers(self.dataset_root, self.answers.answers[index])
        made = judged(rows, self.take, self.prompt).filter(pl.col("problem").is_null())
        if made.is_empty():
            return pl.DataFrame(schema={"sample_id": pl.String, "reason": pl.String})
        lists = [
            self._with(json.loads(has), text, model)
            for has, text, model in made.select("captions", "text", "model").iter_rows()
        ]
        alt = [next((c["text"] for c in each if c["origin"] == "alt"), "") for each in lists]
        frame = made.select("sample_id").with_columns(
            pl.Series("alt", alt, dtype=pl.String),
            pl.Series("texts", [_ranked(each) for each in lists], dtype=pl.List(pl.String)),
            pl.Series("first", [_first(each) for each in lists], dtype=pl.String),
        )
        chosen = choose_caption(frame, made["sample_id"], self.captions)
        text, _ = within_budget(chosen["train_caption"], self.captions)
        return pl.DataFrame(
            {
                "sample_id": made["sample_id"],
                "reason": pl.Series([None] * made.height, dtype=pl.String),
                "train_caption": text,
                "all_captions": [canonical_json(each).decode() for each in lists],
            }
        )

    def _with(self, has: list[dict[str, Any]], text: str, model: str | None) -> list[Any]:
        """A sample's captions with the new one, whose provenance is in it."""
        identity = self.answers.identity
        others = [
            each
            for each in has
            if each["text"] != text and not (self.take.replace and each["origin"] != "alt")
        ]
        new = {
            "origin": "synthetic",
            "text": text,
            "model": model or identity["model"],
            "engine": identity["engine"],
            "model_sha256": identity["model_sha256"],
            "prompt_sha256": identity["prompt_sha256"],
        }
        return [*others, new]

    def rewrite(self, members: Members, decided: Mapping[str, Any]) -> Members:
        """The sample with its captions, and the one to train on."""
        known = json.loads(members["json"])
        known["captions"] = json.loads(decided["all_captions"])
        known["caption"] = decided["train_caption"]
        return members | {
            "json": canonical_json(known),
            "txt": decided["train_caption"].encode("utf-8"),
        }

    def choices(self) -> dict[str, Any]:
        """The captioner, and what is taken of it."""
        return {"captioner": self.answers.identity, "take": semantic_part(self.take)}

    def record(self) -> dict[str, Any]:
        """The choices, the prompt's words, and how many answers were taken and why not."""
        return {**self.choices(), "answers": self.answers.sha256, "counts": counts_of(self)}

    def parents(self) -> list[dict[str, Any]]:
        """The version, and the answers."""
        return [*super().parents(), {"answers": self.answers.sha256}]


def _ranked(captions: list[dict[str, Any]]) -> list[str]:
    texts = [each["text"] for each in captions if each["origin"] != "alt"]
    return sorted(texts, key=lambda text: (-len(text), text))


def _first(captions: list[dict[str, Any]]) -> str | None:
    known = [(c.get("model") or "\uffff", c["text"]) for c in captions if c["origin"] != "alt"]
    return min(known)[1] if known else None


def counts_of(job: CaptionJob) -> dict[str, int]:
    """``taken``, and each reason why an answer was not; reads the answers, and no shard."""

    def count(index: int) -> Counter[str]:
        rows = read_answers(job.dataset_root, job.answers.answers[index])
        problems = judged(rows, job.take, job.prompt)["problem"].fill_null(TAKEN)
        return Counter(problems.to_list())

    with ThreadPoolExecutor(_READ_THREADS) as pool:
        counts: Counter[str] = sum(pool.map(count, range(len(job.answers.answers))), Counter())
    return dict(sorted(counts.items()))


@dataclass(frozen=True)
class AskingJob(Workspace):
    """One dataset version and one captioner; travels to the workers."""

    manifest: DatasetManifest
    unit: CaptionTask
    retry_failed: bool = False
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def folder(self) -> str:
        """Where this captioner's answers lie."""
        return storage.join(self.unit.dataset_root, self.unit.folder)

    def run(self, shard: ShardEntry) -> None:
        """The Spark task of a shard."""
        with self.task(f"caption-{shard.sha256[:32]}") as folder:
            caption_shard(self.unit, shard, folder, retry_failed=self.retry_failed)


def plan_captions(
    manifest_uri: str,
    config: CaptioningConfig,
    environment: Mapping[str, str] | None = None,
    *,
    retry_failed: bool = False,
) -> AskingJob:
    """What there is to ask, and of whom; reads a local model's files, and no shard.

    The key of an endpoint travels in the tasks' environment; it is in no recipe, file or digest.
    """
    manifest = load_manifest(manifest_uri)
    refuse_empty(manifest.counts["committed"], manifest.name)
    model_sha256 = identify_local(config.local) if config.local is not None else None
    secrets: dict[str, str] = {}
    if config.endpoint is not None and config.endpoint.api_key_env is not None:
        secrets[config.endpoint.api_key_env] = api_key(config.endpoint) or ""
    recipe = manifest.attributes.get("recipe", {})
    captions = CaptionConfig.model_validate(recipe.get("captions", {}))
    task = CaptionTask(
        dataset_root=dataset_root(manifest_uri),
        config=config,
        identity=identity_of(config, model_sha256),
        redacts=captions.personal_data != "off",
    )
    return AskingJob(manifest, task, retry_failed, {**(environment or {}), **secrets})


def ask_captions(
    job: AskingJob,
    spark: Callable[[], SparkSession],
    progress: ProgressCallback | None = None,
) -> tuple[AnswersManifest, list[CaptionedShard]]:
    """Ask for every image with Spark, a shard a task. Killed at any moment, a second call asks
    for what is missing. Two drivers cannot ask one captioner for one dataset at once."""
    shards = job.manifest.shards
    with (
        applied(job.environment),
        Lease(storage.join(job.folder, "lease.json"), f"captions of {job.manifest.name}") as lease,
    ):
        refuse_while_removing(job.unit.dataset_root)
        done = finished_shards(job.unit, shards, retry_failed=job.retry_failed)
        missing = [shard for shard in shards if shard.sha256 not in done]
        if missing:
            sizes = {job.unit.marker_uri(s.sha256): s.num_samples for s in missing}
            total = job.manifest.counts["committed"]
            with watching(sizes, total, progress):
                run_units(spark(), job, len(missing), lambda i: job.run(missing[i]))
            done = finished_shards(job.unit, shards)
        # Of the others, a retry that was killed may have left answers that the next one takes.
        forget_parts(job.folder, [s for s, marker in done.items() if not marker.num_retryable])
        job.forget("failures")
        lease.check()
        markers = [replace(done[shard.sha256], shard=shard.path) for shard in shards]
        answers = AnswersManifest(
            dataset=job.manifest.name,
            dataset_version=job.manifest.version,
            identity=job.unit.identity,
            shards=[shard.sha256 for shard in shards],
            answers=[marker.answers for marker in markers],
        )
        uri = storage.join(job.folder, job.manifest.version, "manifest.json")
        storage.write_bytes(uri, canonical_json(asdict(answers)))
    return answers, markers


def version_job(job: AskingJob, answers: AnswersManifest) -> CaptionJob:
    """The derivation that takes these answers."""
    root, config = job.unit.dataset_root, job.unit.config
    environment = dict(job.environment)
    if config.endpoint is not None and config.endpoint.api_key_env is not None:
        environment.pop(config.endpoint.api_key_env, None)
    return CaptionJob(root, job.manifest, answers, config.take, config.prompt, environment)


def trial(job: AskingJob, limit: int, folder: Path) -> pl.DataFrame:
    """Ask for the first ``limit`` samples in this process; answers are kept for the whole run.

    Rows of ``ANSWERS_SCHEMA`` with ``problem``, and ``text`` as it would be taken.
    """
    frames: list[pl.DataFrame] = []
    with applied(job.environment):
        engine = job.unit.engine()
        for shard in job.manifest.shards:
            left = limit - sum(frame.height for frame in frames)
            if left <= 0:
                break
            known = known_answers(job.unit, shard)
            first = [
                sample for _, sample in zip(range(left), samples_of(job.unit, shard), strict=False)
            ]
            unknown = [s for s in first if s[0] not in set(known["sample_id"])]
            if unknown:
                made = ask(job.unit, engine, shard, unknown, folder)
                known = pl.concat([known, made])
            wanted = [sample_id for sample_id, _, _ in first]
            frames.append(known.filter(pl.col("sample_id").is_in(wanted)))
    return judged(pl.concat(frames), job.unit.config.take, job.unit.config.prompt)
