"""How fast captions are cleaned, and what personal data costs beside the cleaning before."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import polars as pl
import pytest

from pipelines.caption_clean import clean_text, cleaned
from pipelines.caption_config import CaptionConfig
from pipelines.caption_personal import COULD_HOLD_ANY
from pipelines.caption_tokens import budgeted, load_tokenizer

NUM_ROWS = 500_000
TEXT = (
    "red fox in the snow vintage ceramic figurine beautiful landscape painting by artist 1950s "
    "Germany size wall art canvas print for living room &amp; kitchen | sale $19.99 12x16 photo"
)
TAILS = (
    *[""] * 17, " - stock photo", " IMG_2034.jpg", " 212-555-0187", " www.shop.example/x",
    " jane@example.com", " Item 4006381333931",
)  # fmt: skip

pytestmark = pytest.mark.bench


def captions() -> pl.Series:
    rng = random.Random(0)
    return pl.Series(
        " ".join(rng.choices(TEXT.split(), k=rng.randrange(4, 18))) + rng.choice(TAILS)
        for _ in range(NUM_ROWS)
    )


def test_rate_of_cleaning_with_and_without_each_part(capsys: pytest.CaptureFixture[str]) -> None:
    texts = captions()
    off = {"markup": False, "urls": False, "file_names": False, "boilerplate": False}
    plain = CaptionConfig.model_validate({"clean": off, "personal_data": "off"})
    personal = CaptionConfig.model_validate({"clean": off})
    full = CaptionConfig()
    rates: dict[str, float] = {}

    def measure(name: str, work: Callable[[], object]) -> None:
        started_at = time.process_time()
        work()
        rates[name] = NUM_ROWS / (time.process_time() - started_at)

    measure("normalised alone", lambda: texts.to_frame("t").select(clean_text(pl.col("t"))))
    measure("the same, by `cleaned`", lambda: cleaned(texts, plain, is_alt=True))
    measure("with personal data", lambda: cleaned(texts, personal, is_alt=True))
    measure("with all", lambda: cleaned(texts, full, is_alt=True))
    tokenizer = load_tokenizer(None)
    measure("token budget of 77", lambda: budgeted(texts, 77, tokenizer))
    share = int(texts.str.contains(COULD_HOLD_ANY).sum()) / NUM_ROWS
    with capsys.disabled():
        print(f"\n{NUM_ROWS:,} captions; {share:.1%} are looked at for personal data one by one")
        for name, rate in rates.items():
            print(f"{name:26s}{rate:12,.0f} captions per core-second")
