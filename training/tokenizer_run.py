"""The tokenizer stage as something that ``training.fit`` can run."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from infra import storage
from infra.errors import UserError
from infra.manifest import dataset_root, load_whole
from model import CLIPTextEncoder, CLIPTokenizer, VQTokenizer
from training.checkpoint import Checkpoint, optimizer_tensors, restore_optimizer
from training.checkpoint_store import CheckpointDamaged
from training.config import TextEncoderConfig, TokenizerConfig
from training.devices import own_device
from training.fit import Measured
from training.images import Pixels, decode_image, shrink, square_crop
from training.initial import part_folder
from training.job import Job
from training.networks import new_text_encoder
from training.randomness import permutation
from training.shards import read_samples
from training.tokenizer_stage import (
    KMEANS_BATCHES,
    reconstruction_error,
    start_codebook,
    start_tokenizer,
    tokenizer_batch,
    train_bpe,
    train_step,
)

VQ_PREFIX = "vq."
CODE_USES = "code_uses"
CODE_SUMS = "code_sums"
MAX_HELD_OUT = 64
HELD_OUT_SHARE = 0.1


@dataclass(frozen=True)
class CuratedSamples:
    """Images (no larger than needed) and all their captions."""

    images: list[Pixels]
    captions: list[str]


@dataclass(frozen=True)
class ImageBatches:
    """A step's images, and those that the codebook is made from when it is its turn."""

    batches: list[Tensor]

    def to(self, device: torch.device) -> ImageBatches:
        """The same on ``device``."""
        return ImageBatches([batch.to(device) for batch in self.batches])


class TokenizerRun:
    """The image tokenizer in training, with what goes beside it."""

    def __init__(
        self,
        config: TokenizerConfig,
        text_config: TextEncoderConfig,
        samples: CuratedSamples,
        pretrained: VQTokenizer | None = None,
        bpe: CLIPTokenizer | None = None,
        sha256s: Mapping[str, str] | None = None,
    ) -> None:
        self.config = config
        self._text_config, self._sha256s = text_config, sha256s
        self._bpe = bpe or train_bpe(samples.captions, config)
        self.device = own_device()
        self.stage = start_tokenizer(config, self.device)
        self._is_trained = pretrained is None
        if pretrained is not None:
            self.stage.vq = pretrained
        self.num_steps = config.training.steps if self._is_trained else 0
        self.network: nn.Module = self.stage.vq
        self.optimizer = self.stage.optimizer
        self.init_record: dict[str, Any] = {"source": "fresh" if self._is_trained else "pretrained"}
        num_held_out = min(MAX_HELD_OUT, int(len(samples.images) * HELD_OUT_SHARE))
        self._held_out = samples.images[:num_held_out]
        self._images = samples.images[num_held_out:]

    @classmethod
    def build(cls, job: Job) -> TokenizerRun:
        """Read the curated samples and whatever is pretrained."""
        config = TokenizerConfig.model_validate(job.configs["tokenizer"])
        text_config = TextEncoderConfig.model_validate(job.configs["text_encoder"])
        samples = CuratedSamples([], [])
        if job.manifest_uri is not None:
            samples = read_curated(job.manifest_uri, job.manifest_sha256, config)
        vq, bpe = None, None
        if config.pretrained is not None:
            vq = VQTokenizer.from_pretrained(part_folder(config.pretrained, job.parts))
        if config.pretrained_bpe is not None:
            bpe = CLIPTokenizer.from_pretrained(part_folder(config.pretrained_bpe, job.parts))
        if (vq is None and not samples.images) or (bpe is None and not samples.captions):
            raise UserError(
                expected="curated images and captions to train the tokenizer on",
                got="none",
                remedy="name a dataset in tokenizer.dataset, or pretrained folders",
            )
        return cls(config, text_config, samples, vq, bpe, job.parts)

    @property
    def step(self) -> int:
        """Finished optimizer steps."""
        return self.stage.step

    @property
    def batch(self) -> int:
        """The next batch: one for each step."""
        return self.stage.step

    @property
    def is_sharded(self) -> bool:
        """Never: it trains on one worker."""
        return False

    @property
    def max_passed_by(self) -> int:
        """None: a bad step ends it."""
        return 0

    def flops_per_image(self) -> float:
        """Not known: its work is in convolutions."""
        return 0.0

    def prepare(self, number: int) -> ImageBatches:
        """A step's images."""
        num_batches = KMEANS_BATCHES if number == self.stage.codebook_step else 1
        steps = range(number, number + num_batches)
        return ImageBatches([tokenizer_batch(self._images, self.config, s) for s in steps])

    def train(
        self,
        inputs: ImageBatches,
        run_backward: Callable[[Tensor], None],
        without_sync: Callable[[], AbstractContextManager[object]],
    ) -> Measured:
        """One optimizer step of a single worker."""
        if self.stage.step == self.stage.codebook_step:
            start_codebook(self.stage, inputs.batches)
        images_B3HW = inputs.batches[0]
        result = train_step(self.stage, images_B3HW)
        return Measured(
            loss=result.loss,
            num_images=len(images_B3HW),
            num_tokens=images_B3HW[:, 0].numel() // self.stage.vq.downsample_factor**2,
            values={
                "learning_rate": result.learning_rate,
                "grad_norm": result.grad_norm,
                "error": result.error,
                "code_share": result.code_share,
            },
        )

    def weights(self) -> dict[str, Tensor]:
        """The tokenizer's weights and its codes' statistics."""
        named = {f"{VQ_PREFIX}{name}": value for name, value in self.stage.vq.state_dict().items()}
        return {
            **named,
            CODE_USES: self.stage.code_uses_K,
            CODE_SUMS: self.stage.code_sums_KC,
        }

    def optimizer_state(self) -> dict[str, Tensor]:
        """The optimizer's moments by name."""
        return optimizer_tensors(self.optimizer)

    def state(self) -> dict[str, Any]:
        """What else ``restore`` needs: nothing."""
        return {"batch": self.batch}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go back to where a checkpoint was taken."""
        expected, weights = self.weights(), checkpoint.weights
        if {n: v.shape for n, v in expected.items()} != {n: v.shape for n, v in weights.items()}:
            raise CheckpointDamaged("the run's checkpoint holds other weights than the tokenizer's")
        named = {
            n.removeprefix(VQ_PREFIX): v for n, v in weights.items() if n.startswith(VQ_PREFIX)
        }
        self.stage.vq.load_state_dict(named, strict=True)
        self.stage.code_uses_K = weights[CODE_USES].to(self.device, copy=True)
        self.stage.code_sums_KC = weights[CODE_SUMS].to(self.device, copy=True)
        if checkpoint.state.step:
            restore_optimizer(self.optimizer, checkpoint.optimizer)
        self.stage.step = checkpoint.state.step
        self.init_record = checkpoint.state.init

    def put_together(self, keeps: bool) -> None:
        """Nothing to do: its networks are whole."""

    def export(self, folder: Path) -> dict[str, float]:
        """Write ``vqvae/``, ``tokenizer/`` and ``text_encoder/``; returns what was measured."""
        vq = self.stage.vq.to("cpu").eval()
        vq.save_pretrained(folder / "vqvae")
        self._bpe.save_pretrained(folder / "tokenizer")
        self._text_encoder().save_pretrained(folder / "text_encoder")
        metrics = {"bpe_vocab_size": float(self._bpe.vocab_size)}
        if self._held_out:
            metrics["reconstruction_error"] = self._held_out_error(vq)
        return metrics

    def samples(self, folder: Path) -> list[Any]:
        """A tokenizer alone cannot paint."""
        return []

    def _text_encoder(self) -> CLIPTextEncoder:
        if self._text_config.pretrained is None:
            return new_text_encoder(self._text_config, self._bpe, self.config.seed)
        encoder = CLIPTextEncoder.from_pretrained(
            part_folder(self._text_config.pretrained, self._sha256s)
        )
        if encoder.config.vocab_size < self._bpe.vocab_size:
            raise UserError(
                expected=f"a vocabulary of at most {encoder.config.vocab_size} tokens for the "
                "pretrained text encoder",
                got=str(self._bpe.vocab_size),
                remedy="set tokenizer.pretrained_bpe to the text encoder's own vocabulary",
            )
        return encoder

    def _held_out_error(self, vq: VQTokenizer) -> float:
        """The mean over resolutions of the error on whole held-out images."""
        errors = []
        for side_px in self.config.training.resolutions_px:
            squares = [square_crop(i, side_px, "center") for i in self._held_out]
            pixels = [square.pixels_HW3 for square in squares if square is not None]
            if pixels:
                stacked = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255.0
                errors.append(reconstruction_error(vq, stacked))
        return sum(errors) / len(errors) if errors else float("inf")


def read_curated(
    manifest_uri: str, manifest_sha256: str | None, config: TokenizerConfig
) -> CuratedSamples:
    """The first ``max_images`` samples in a seeded order of shards; shards are verified."""
    training = config.training
    longest_px = int(max(training.resolutions_px) * training.max_zoom)
    images: list[Pixels] = []
    captions: list[str] = []
    for known, data in _samples(manifest_uri, manifest_sha256, config.seed):
        captions.extend(str(c["text"]) for c in known.get("captions") or () if c["text"])
        if known.get("caption"):
            captions.append(str(known["caption"]))
        try:
            pixels = decode_image(data)
        except (OSError, ValueError):
            continue  # counted where tokens are made
        images.append(shrink(pixels, min(longest_px, *pixels.shape[:2])))
        if len(images) == training.max_images:
            break
    return CuratedSamples(images, captions)


def _samples(
    manifest_uri: str, manifest_sha256: str | None, seed: int
) -> Iterator[tuple[dict[str, Any], bytes]]:
    manifest = load_whole(manifest_uri, manifest_sha256)
    root = dataset_root(manifest_uri)
    for number in permutation(len(manifest.shards), seed, "tokenizer shards"):
        shard = manifest.shards[number]
        with tempfile.TemporaryDirectory(prefix="atelier-images-") as scratch:
            path = Path(scratch) / "shard.tar"
            storage.download(storage.join(root, shard.path), path, sha256=shard.sha256)
            yield from read_samples(path)
