"""Where a masked stage's networks come from: its parent's folder, under the stage's init policy."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from infra import storage
from infra.errors import UserError
from model import (
    CLIPTextEncoder,
    CLIPTokenizer,
    MaskedImageTransformer,
    TransformerConfig,
    VQTokenizer,
    insert_compression,
)
from training.config import NetworkConfig, StageConfig
from training.networks import new_transformer, transformer_config
from training.parts import check_part

# Published keys that change nothing.
WITHOUT_EFFECT = ("in_channels", "patch_size")


@dataclass
class Networks:
    """The parts of a model, and how its transformer started.

    ``source`` is as in ``InitConfig``; ``new_keys`` are the parameters that the parent lacked.
    """

    transformer: MaskedImageTransformer
    text_encoder: CLIPTextEncoder
    tokenizer: CLIPTokenizer
    vq: VQTokenizer
    source: str
    new_keys: list[str]

    def record(self) -> dict[str, Any]:
        """What a checkpoint remembers of the start."""
        num_inherited = len(self.transformer.state_dict()) - len(self.new_keys)
        if self.source == "fresh":
            num_inherited = 0
        return {
            "source": self.source,
            "num_inherited": num_inherited,
            "new_keys": list(self.new_keys),
        }


def initial_networks(
    folder: Path,
    network: NetworkConfig,
    config: StageConfig,
    sha256s: Mapping[str, str] | None = None,
) -> Networks:
    """All parts for a stage from its parent's folder; ``sha256s`` are published folders' digests.

    The tokenizer stage's folder has no transformer, so the first masked stage starts a fresh one.
    Raises ``UserError`` when the parent's transformer does not fit under ``config.init``.
    """
    vq = VQTokenizer.from_pretrained(folder / "vqvae")
    text_encoder = CLIPTextEncoder.from_pretrained(folder / "text_encoder")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    codebook_size = vq.config.num_vq_embeddings
    wanted = transformer_config(network, text_encoder.config, codebook_size, config.compress)
    check_grid(config, vq, wanted)
    if config.text_tokens > text_encoder.config.max_position_embeddings:
        raise UserError(
            expected=f"text_tokens of at most {text_encoder.config.max_position_embeddings}, the "
            "text encoder's positions",
            got=str(config.text_tokens),
        )
    is_first = config.init.source == "parent" and not (folder / "transformer").is_dir()
    if config.init.source == "fresh" or is_first:
        transformer = new_transformer(wanted, config.seed)
        return Networks(transformer, text_encoder, tokenizer, vq, "fresh", [])
    start = folder / "transformer"
    if config.init.pretrained is not None:
        start = part_folder(config.init.pretrained, sha256s)
    parent = MaskedImageTransformer.from_pretrained(start)
    transformer, new_keys = fit_parent(parent, wanted, config.init.new_parameters)
    return Networks(transformer, text_encoder, tokenizer, vq, config.init.source, new_keys)


def fit_parent(
    parent: MaskedImageTransformer, wanted: TransformerConfig, new_parameters: tuple[str, ...]
) -> tuple[MaskedImageTransformer, list[str]]:
    """The parent's transformer in the wanted form, and the names of parameters it lacked."""
    new_keys: list[str] = []
    if wanted.compresses and not parent.config.compresses:
        parent, new_keys = insert_compression(parent)
    have, want = asdict(parent.config), asdict(wanted)
    differing = [
        f"{name} is {have[name]}, expected {want[name]}"
        for name in want
        if name not in WITHOUT_EFFECT and have[name] != want[name]
    ]
    if differing:
        raise UserError(
            f"the parent's transformer does not fit this stage: {'; '.join(differing)}; change "
            "network or compress, or set init.source to 'fresh'"
        )
    unnamed = [name for name in new_keys if not name.startswith(new_parameters)]
    if unnamed:
        raise UserError(
            expected="every parameter of this stage to be in its parent or under a prefix in "
            "init.new_parameters",
            got=f"{len(unnamed)} that are in neither: {', '.join(unnamed)}",
            remedy="add their prefixes to init.new_parameters",
        )
    return parent, new_keys


def check_grid(config: StageConfig, vq: VQTokenizer, wanted: TransformerConfig) -> None:
    """Raise ``UserError`` unless the resolution makes a token grid that the network takes."""
    multiple_px = vq.downsample_factor * (2 if wanted.compresses else 1)
    if config.resolution_px % multiple_px:
        raise UserError(
            expected=f"a resolution_px that is a multiple of {multiple_px}",
            got=str(config.resolution_px),
            remedy="that is the tokenizer's pixels per token, times two when the stage compresses",
        )


def part_folder(address: str, sha256s: Mapping[str, str] | None = None) -> Path:
    """A local folder for a path or an address; what is fetched lies in a temporary place.

    Raises ``UserError`` when it is not what ``sha256s`` says of this address.
    """
    expected = (sha256s or {}).get(address)
    if expected is not None:
        check_part(address, expected)
    if "://" not in address:
        return Path(address)
    folder = Path(tempfile.mkdtemp(prefix="atelier-part-"))
    storage.download_folder(address, folder)
    return folder
