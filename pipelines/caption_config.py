"""What captions are cleaned of, which one is trained on, and how long it may be."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from infra.config import StrictModel, operational, semantic

PersonalData = Literal["redact", "drop", "off"]
TrainOn = Literal["synthetic", "alt", "mix"]
SyntheticChoice = Literal["longest", "first", "hash"]


class CleanConfig(StrictModel):
    """What is cut from captions. What a row loses by each step is counted in the manifest."""

    markup: bool = semantic(
        True,
        "every caption: HTML tags, scripts and entities, control tokens of encoders "
        "(<|startoftext|>), spreadsheet formulas",
    )
    urls: bool = semantic(True, "alt text: web addresses")
    file_names: bool = semantic(
        True, "alt text: IMG_1234.jpg is cut; red-fox-in-snow.jpg becomes words"
    )
    boilerplate: bool = semantic(
        True, "alt text: click to enlarge, stock photo, | Online Shop and their like"
    )
    phrases: list[str] = semantic(
        default_factory=list,
        description="alt text: further phrases that are cut, whatever their case",
    )

    @model_validator(mode="after")
    def _phrases_say_something(self) -> CleanConfig:
        if not all(phrase.strip() for phrase in self.phrases):
            raise ValueError("an empty phrase cannot be cut")
        return self


class CaptionConfig(StrictModel):
    """Captions: alt text cleaned, long synthetic ones joined by URL, one chosen for `.txt`."""

    files: list[str] = operational(
        default_factory=list,
        description="parquet files (url, caption[, model]): URIs, paths or globs",
    )
    train_on: TrainOn = semantic(
        "synthetic",
        "which origin `.txt` holds when a sample has both; mix: synthetic_ratio of them synthetic",
    )
    synthetic_ratio: float = semantic(
        0.5, "of samples with both, how many have the synthetic one in `.txt`, in [0, 1]; for mix",
        ge=0, le=1,
    )  # fmt: skip
    mix_seed: int = semantic(0, "another one draws another mix, by a hash of the sample id", ge=0)
    synthetic_choice: SyntheticChoice = semantic(
        "longest",
        "of several synthetic captions: the longest, the first by model and text, or one by hash",
    )
    min_synthetic_words: int | None = semantic(
        None, "synthetic captions of fewer words are left out, and counted; null: none are", ge=1
    )
    token_budget: int | None = semantic(
        None,
        "most tokens of `.txt` for the text encoder, begin and end included (77 for CLIP): whole "
        "sentences that fit, else up to a clause, else up to a word; null: no bound",
        ge=4,
        le=100_000,
    )
    tokenizer: str | None = operational(
        None,
        "folder of the text encoder's tokenizer (vocab.json and merges.txt, or tokenizer.json), "
        "known by its bytes; null: CLIP's own vocabulary",
        min_length=1,
    )
    clean: CleanConfig = semantic(default_factory=CleanConfig, description="what is cut")
    personal_data: PersonalData = semantic(
        "redact",
        "e-mail addresses, phone, payment card and national id numbers, IBANs, IP addresses, keys "
        "and passwords in captions. redact: cut; drop: the row is rejected (personal_data); off",
    )
    personal_data_word: str = semantic(
        "",
        "what stands in place of personal data, letters and brackets; empty: nothing",
        max_length=32,
        pattern=r"^([A-Za-z\[(][A-Za-z \])]*)?$",
    )

    @model_validator(mode="after")
    def _fields_are_used(self) -> CaptionConfig:
        if self.tokenizer is not None and self.token_budget is None:
            raise ValueError("a tokenizer without a token_budget has no use; set token_budget")
        return self
