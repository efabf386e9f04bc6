"""A painter set up as a person asked for it, and the lines for what it cannot do here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.sources import SOFTWARE, find_source
from app.verb import Output
from infra.digests import code_digest, folder_sha256, sha256_file
from infra.errors import UserError

if TYPE_CHECKING:
    from model import TextToImage
    from model.paint_options import PaintKeywords

# What of `PaintOptions` changes pixels: all of it is in an image's lineage, also what is default.
SAID = (
    "steps", "guidance_scale", "guidance_schedule", "guidance_interval", "order",
    "token_temperature", "zigzag", "temperature", "preference_score", "negative_prompt",
)  # fmt: skip
ADAPTER_FILES = ("*.safetensors", "*.json")
# torch has a type for this on a GPU's own allocator only.
_NO_MEMORY = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


@dataclass(frozen=True)
class Machine:
    """What the model runs on, in which type, and how it is fitted into less memory."""

    device: str = "auto"
    precision: str = "auto"
    quantize: str | None = None
    offload: bool = False
    tile_px: int | None = None
    compile: bool = False

    def lineage(self, precision: str) -> dict[str, str]:
        """What of this changes pixels; ``precision`` is the type that was found."""
        return {
            "precision": precision,
            **({} if self.quantize is None else {"quantize": self.quantize}),
            **({} if self.tile_px is None else {"tile_px": str(self.tile_px)}),
        }


@dataclass(frozen=True)
class Adapters:
    """A folder or file of adapters, and how much they add."""

    path: str
    weight: float = 1.0

    def __str__(self) -> str:
        return self.path if self.weight == 1 else f"{self.path}:{self.weight:g}"

    def sha256(self) -> str:
        """Of the file, or of the folder's weights and configuration."""
        path = Path(self.path)
        return sha256_file(path) if path.is_file() else folder_sha256(path, *ADAPTER_FILES)


@dataclass(frozen=True)
class Brush:
    """Which model paints, and how; ``None`` leaves it to the recipe, or to the model."""

    stage: str | None = None
    model: str | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    guidance_schedule: str | None = None
    guidance_interval: tuple[float, float] | None = None
    negative_prompt: str | None = None  # "" is an empty one
    temperature: float | None = None
    token_temperature: float | None = None
    order: str | None = None
    zigzag: float | None = None
    preference_score: float | None = None
    loras: tuple[Adapters, ...] = ()
    machine: Machine = Machine()


@dataclass(frozen=True)
class Easel:
    """A painter that is ready, the keywords of how it paints, and what its images carry."""

    painter: TextToImage
    keywords: PaintKeywords
    lineage: dict[str, str]


def set_up(brush: Brush, out: Output) -> Easel:
    """Fetch and load the model meant; which version of a stage it is, is said."""
    from model import PaintOptions

    source = find_source(brush.stage, brush.model, out)
    painter, precision = _load(source.folder, brush.machine)
    for adapters in brush.loras:
        painter.load_lora(adapters.path, adapters.weight)
    asked: dict[str, Any] = {name: getattr(brush, name) for name in SAID}
    known: dict[str, Any] = {
        "steps": source.steps,
        "guidance_scale": source.guidance_scale,
        "temperature": source.temperature,
        "negative_prompt": painter.defaults.negative_prompt,
        "preference_score": painter.defaults.preference_score,
    }
    given = {name: value for name, value in asked.items() if value is not None}
    keywords: PaintKeywords = {**known, **given}  # type: ignore[typeddict-item]  # by name
    options = PaintOptions(**keywords)
    lineage = {
        "software": SOFTWARE,
        "code": code_digest("model"),
        **{name: _said(getattr(options, name)) for name in SAID},
        **brush.machine.lineage(precision),
        **source.lineage,
    }
    if brush.loras:
        lineage["loras"] = ", ".join(map(str, brush.loras))
        lineage["loras_sha256"] = ", ".join(adapters.sha256() for adapters in brush.loras)
    return Easel(painter, keywords, lineage)


def _said(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _load(folder: Path, machine: Machine) -> tuple[TextToImage, str]:
    """The model where and as it shall run, and the name of its type."""
    from model import TextToImage, compile_network, find_device, find_dtype

    device = find_device(machine.device)
    dtype = find_dtype(machine.precision, device)
    painter = TextToImage.from_pretrained(folder, dtype)
    painter.save_memory(machine.quantize, machine.offload, machine.tile_px).to(device)
    if machine.compile:
        compile_network(painter.transformer)
    return painter, str(dtype).removeprefix("torch.")


def check_keywords(keywords: PaintKeywords, num_images: int) -> None:
    """One line for what no painter can do, before any progress is shown."""
    from model import PaintOptions

    options = PaintOptions(**keywords)
    options.sampling("cosine")
    options.image_seeds(num_images)


@contextmanager
def on_this_machine() -> Iterator[None]:
    """One line with what helps where memory runs out or a network cannot be compiled.

    Whatever else torch raises is a bug and keeps its traceback.
    """
    import torch

    try:
        yield
    except (MemoryError, RuntimeError) as error:
        got = str(error).partition("\n")[0][:160] or "none was left"
        lacking = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if lacking or any(text in str(error) for text in _NO_MEMORY):
            raise UserError(
                expected="to paint in the memory that is there",
                got=got,
                remedy="try --quantize int8, --offload, --tile 512 or a smaller batch or picture",
            ) from None
        if any(kind.__name__ == "BackendCompilerFailed" for kind in type(error).__mro__):
            raise UserError(
                expected="a compiler that works, with --compile",
                got=got,
                remedy="install one (a C++ compiler for a CPU), or leave --compile out",
            ) from None
        raise
