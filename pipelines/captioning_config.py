"""Captions to ask for: of which model, in which words, and which answers are taken."""

from __future__ import annotations

from pydantic import model_validator

from infra.config import StrictModel, operational, semantic

PROMPT = (
    "Describe this image in one paragraph of 60 to 120 words: what is shown, how many, which "
    "colours, where things are, the background, the light and the style. Do not guess names of "
    "people, and begin with the description itself."
)


class EndpointConfig(StrictModel):
    """A server that answers OpenAI's chat completions with images (vLLM, SGLang, a provider)."""

    url: str = operational(
        description="address up to the version: http://gpu-1:8000/v1",
        pattern=r"^https?://[^\s/?#@]+(/[^\s?#]*)?$",
    )
    model: str = semantic(description="the model's name as the server knows it", min_length=1)
    temperature: float = semantic(0.0, "of sampling; 0 is greedy", ge=0, le=2)
    seed: int = semantic(0, "sent with every request, for servers that heed it", ge=0)
    api_key_env: str | None = operational(
        None,
        "name of the environment variable with the key; it is read where it is used, never stored",
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
    )
    concurrency: int = operational(8, "requests at once per Spark task", ge=1, le=1024)
    deadline_seconds: float = operational(120.0, "one request with its answer, seconds", gt=0)
    retries: int = operational(5, "further attempts after a passing failure", ge=0, le=50)
    backoff_seconds: float = operational(
        1.0, "wait before the first retry; doubles; a server's Retry-After is heeded", ge=0
    )
    max_wait_seconds: float = operational(60.0, "longest wait before a retry, seconds", ge=0)
    max_failures_in_a_row: int = operational(
        20, "the run is given up when so many images in a row got no answer", ge=1
    )


class LocalConfig(StrictModel):
    """A vision-to-text model on this machine, as transformers saves them; nothing is downloaded."""

    folder: str = operational(
        description="path or URI of a folder with config.json, a processor and .safetensors "
        "(known by its bytes); every worker has to reach it",
        min_length=1,
    )
    batch_size: int = operational(8, "images captioned at a time", ge=1, le=4096)
    num_threads: int | None = operational(
        None, "torch threads per Spark task; null: what Spark gives a task, one", ge=1
    )


class TakeConfig(StrictModel):
    """Which answers become captions. Another one is counted; the sample keeps what it had."""

    min_words: int = semantic(20, "fewest words of an answer", ge=1)
    max_repeats: int = semantic(
        4,
        "a run of three words that comes more often is a loop; one of a word, twice as often",
        ge=1,
    )
    min_letter_ratio: float = semantic(
        0.6, "letters and spaces among the characters, in [0, 1]; less is no language", ge=0, le=1
    )
    refusals: list[str] = semantic(
        default_factory=list, description="further phrases of refusal, whatever their case"
    )
    replace: bool = semantic(
        False, "the sample's other synthetic captions go; false: they stay beside the new one"
    )


class CaptioningConfig(StrictModel):
    """Long captions for the images of curated datasets (`atelier caption`)."""

    endpoint: EndpointConfig | None = semantic(None, "a server to ask")
    local: LocalConfig | None = semantic(None, "a model to load")
    prompt: str = semantic(
        PROMPT, "what is asked of the model; a local model without a chat template is not asked"
    )
    max_tokens: int = semantic(256, "longest answer, tokens", ge=1, le=8192)
    take: TakeConfig = semantic(default_factory=TakeConfig, description="which answers are taken")
    checkpoint_samples: int = operational(
        64, "answers stored at a time: what a kill may cost per Spark task", ge=1
    )

    @model_validator(mode="after")
    def _one_engine(self) -> CaptioningConfig:
        if (self.endpoint is None) == (self.local is None):
            raise ValueError("expected one of endpoint and local")
        return self
