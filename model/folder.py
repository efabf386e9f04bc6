"""The parts of a model folder that are no network: model_index.json and scheduler/."""

from dataclasses import dataclass
from pathlib import Path

from model.checkpoint import parse_config, read_json, write_json
from model.errors import ModelError
from model.schedule import mask_schedule
from model.transformer import TransformerConfig

_PARTS = {
    "scheduler": ["scheduler", "Scheduler"],
    "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "transformer": ["transformer", "Transformer2DModel"],
    "vqvae": ["diffusers", "VQModel"],
}
_OWN_KEYS = ("text_tokens", "preference_score", "resolution_px", "negative_prompt")
# Published weights never met an empty prompt in training: their scripts guide away from this one.
_PUBLISHED_NEGATIVE = (
    "worst quality, low quality, low res, blurry, distortion, watermark, logo, signature, text, "
    "jpeg artifacts, signature, sketch, duplicate, ugly, identifying mark"
)
# The published network that compresses was made for the one side, those that do not for the other.
_PUBLISHED_SIDE_PX = {True: 1024, False: 512}


@dataclass(frozen=True)
class PainterDefaults:
    """What model_index.json may say beyond the published keys, with what is used otherwise."""

    text_tokens: int = 77  # length that prompts are cut or padded to
    preference_score: float = 6.0  # the last micro-condition
    resolution_px: int = 1024  # height and width when none is given
    negative_prompt: str = ""  # what guidance leads away from when nothing else is said
    masking_schedule: str = "cosine"  # from scheduler_config.json

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {getattr(self, name)}: expected at least {least}"
            for name, least in (("text_tokens", 2), ("resolution_px", 1))
            if getattr(self, name) < least
        ]
        if problems:
            raise ModelError("model_index.json: " + "; ".join(problems))


def read_defaults(folder: Path, config: TransformerConfig) -> PainterDefaults:
    """What the folder says about painting with the network of `config`.

    Raises ModelError where that is impossible, or where its scheduler is another network's.
    """
    index_file = folder / "model_index.json"
    index = read_json(index_file)
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    if scheduler.get("mask_token_id") != config.mask_token_id:
        raise ModelError(
            f"{folder}: the scheduler's mask_token_id is {scheduler.get('mask_token_id')}: "
            f"expected {config.mask_token_id}, the transformer's last token"
        )
    schedule = scheduler.get("masking_schedule", "cosine")
    mask_schedule(schedule)
    published = {
        "negative_prompt": _PUBLISHED_NEGATIVE,
        "resolution_px": _PUBLISHED_SIDE_PX[config.compresses],
    }
    ours = {key: index[key] for key in _OWN_KEYS if key in index} or published
    return parse_config(PainterDefaults, {**ours, "masking_schedule": schedule}, str(index_file))


def write_index(folder: str | Path, defaults: PainterDefaults, mask_token_id: int) -> None:
    """model_index.json and scheduler/ of a folder whose other parts are written one by one."""
    folder = Path(folder)
    (folder / "scheduler").mkdir(parents=True, exist_ok=True)
    schedule = {
        "_class_name": "Scheduler",
        "mask_token_id": mask_token_id,
        "masking_schedule": defaults.masking_schedule,
    }
    write_json(folder / "scheduler" / "scheduler_config.json", schedule)
    ours = {key: getattr(defaults, key) for key in _OWN_KEYS}
    write_json(folder / "model_index.json", {"_class_name": "Pipeline", **_PARTS, **ours})
