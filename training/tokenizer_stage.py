"""Training the image tokenizer, the caption vocabulary and the text encoder's start (stage 0).

The image tokenizer learns in three parts: first as a plain auto-encoder; then its codebook is made
by k-means on its latents; then it trains through the codebook, whose entries follow the running
mean of the latents they stand for, and entries that nothing uses are moved to where latents are.

Shape suffixes: B images, 3 colours in [0, 1], H/W pixels, C latent channels, K codes, N latents.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model import CLIPTokenizer, VQTokenizer
from training.config import OptimizerConfig, TokenizerConfig, TokenizerTrainingConfig
from training.images import Pixels, shrink
from training.masked_stage import TrainingDiverged
from training.networks import new_vq
from training.optim import (
    build_optimizer,
    clip_gradients,
    learning_rate_scale,
    parameter_groups,
    set_learning_rate,
    trained_parameters,
)
from training.randomness import permutation, torch_generator, uniforms

KMEANS_BATCHES = 4  # batches whose latents the codebook is made from
KMEANS_ROUNDS = 10
KMEANS_DRAWS = 8  # in which the first codes are drawn
REVIVE_INTERVAL_STEPS = 5
REVIVE_UNTIL = 0.8  # share of all steps after which codes are left where they are


@dataclass
class TokenizerStage:
    """Everything that a step reads and changes. ``step`` counts finished optimizer steps."""

    config: TokenizerConfig
    vq: VQTokenizer
    optimizer: torch.optim.AdamW
    code_uses_K: Tensor
    code_sums_KC: Tensor
    step: int = 0

    @property
    def codebook_step(self) -> int:
        """The first step that trains through the codebook."""
        training = self.config.training
        return round(training.steps * training.warmup_share)


@dataclass(frozen=True)
class TokenizerResult:
    """``error`` is the mean absolute error in [0, 1]; ``code_share`` the share of codes in use."""

    loss: float
    error: float
    code_share: float
    learning_rate: float
    grad_norm: float


def start_tokenizer(config: TokenizerConfig, device: torch.device | str = "cpu") -> TokenizerStage:
    """A fresh tokenizer on ``device``, with its optimizer."""
    vq = new_vq(config).train().to(device)
    weight = vq.quantize.embedding.weight.requires_grad_(False)  # it follows the latents instead
    training = config.training
    chosen = OptimizerConfig(name=training.optimizer, learning_rate=training.learning_rate)
    groups = parameter_groups(vq, "", training.learning_rate, weight_decay=0.0)
    optimizer = build_optimizer(groups, chosen)
    uses_K = torch.ones(len(weight), device=weight.device)
    return TokenizerStage(config, vq, optimizer, uses_K, weight.detach().clone())


def tokenizer_batch(images: Sequence[Pixels], config: TokenizerConfig, step: int) -> Tensor:
    """images_B3HW of a step: random square crops at one of the resolutions, from random images.

    An image is shrunk so that its short side is 1 to ``max_zoom`` times the crop, never enlarged;
    an image smaller than the crop is passed over.
    """
    training = config.training
    side_px = training.resolutions_px[step % len(training.resolutions_px)]
    wanted = max(1, training.batch_pixels // side_px**2)
    usable = [number for number, image in enumerate(images) if min(image.shape[:2]) >= side_px]
    if not usable:
        raise ValueError(f"no image has both sides of at least {side_px} px")
    draws_B4 = uniforms(np.arange(wanted * 4), config.seed, "tokenizer crop", step).reshape(-1, 4)
    crops = [_random_crop(images[usable[int(d[0] * len(usable))]], side_px, d, training.max_zoom)
             for d in draws_B4]  # fmt: skip
    pixels = np.stack(crops).astype(np.float32) / 255.0
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def _random_crop(
    image: Pixels, side_px: int, draws: NDArray[np.float64], max_zoom: float
) -> Pixels:
    longest_px = min(min(image.shape[:2]), int(side_px * max_zoom))
    short_px = side_px + int(draws[1] * (longest_px - side_px + 1))
    shrunk = shrink(image, short_px)
    top = int(draws[2] * (shrunk.shape[0] - side_px + 1))
    left = int(draws[3] * (shrunk.shape[1] - side_px + 1))
    return shrunk[top : top + side_px, left : left + side_px]


def reconstruction_loss(
    output_B3HW: Tensor, images_B3HW: Tensor, training: TokenizerTrainingConfig
) -> tuple[Tensor, Tensor]:
    """(weighted loss, mean absolute error): pixels, their squares, and neighbour differences."""
    difference = output_B3HW.float() - images_B3HW
    error = difference.abs().mean()
    edges = difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()
    loss = training.l1_weight * error + training.l2_weight * difference.square().mean()
    return loss + training.edge_weight * edges, error


def train_step(stage: TokenizerStage, images_B3HW: Tensor) -> TokenizerResult:
    """One optimizer step; call ``start_codebook`` once before step ``codebook_step``."""
    training = stage.config.training
    device = images_B3HW.device
    uses_codes = stage.step >= stage.codebook_step
    with torch.autocast(device.type, torch.bfloat16, enabled=stage.config.precision == "bf16"):
        latents_BCHW, context = _encode(stage, images_B3HW)
        commitment = torch.zeros((), device=device)
        quantized_BCHW = latents_BCHW
        if uses_codes:
            found = stage.vq.quantize(latents_BCHW)
            quantized_BCHW, commitment = found.quantized_BCHW, found.commitment_loss
        output_B3HW = stage.vq.decode_latents(quantized_BCHW)
    loss, error = reconstruction_loss(output_B3HW, images_B3HW, training)
    loss = loss + training.commitment_weight * commitment + training.locality_weight * context
    loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    result = _update(stage, loss.detach(), error.detach())
    if uses_codes:
        move_codes(stage, _rows(latents_BCHW), found.tokens_BHW.flatten())
    stage.step += 1
    return result


def _encode(stage: TokenizerStage, images_B3HW: Tensor) -> tuple[Tensor, Tensor]:
    """latents_BCHW, and how much of them is owed to what surrounds their patches."""
    if stage.config.training.locality_weight == 0:
        return stage.vq.encode_latents(images_B3HW), torch.zeros((), device=images_B3HW.device)
    side_px = stage.vq.downsample_factor
    num_patches = images_B3HW.numel() // (3 * side_px**2)
    order = permutation(num_patches, stage.config.seed, "locality", stage.step)
    order_N = torch.from_numpy(order).to(images_B3HW.device)
    both = torch.cat((images_B3HW, rearranged(images_B3HW, order_N, side_px)))
    latents_BCHW, elsewhere_BCHW = stage.vq.encode_latents(both).chunk(2)
    return latents_BCHW, context_share(latents_BCHW, elsewhere_BCHW, order_N)


def rearranged(images_BCHW: Tensor, order_N: Tensor, side: int) -> Tensor:
    """The batch with its N square patches (images, then rows, then columns) in another order."""
    batch, channels, height, width = images_BCHW.shape
    rows, columns = height // side, width // side
    cut = images_BCHW.reshape(batch, channels, rows, side, columns, side)
    patches_NCSS = cut.permute(0, 2, 4, 1, 3, 5).reshape(-1, channels, side, side)[order_N]
    joined = patches_NCSS.view(batch, rows, columns, channels, side, side)
    return joined.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, height, width)


def context_share(latents_BCHW: Tensor, elsewhere_BCHW: Tensor, order_N: Tensor) -> Tensor:
    """Mean square of what latents change when their patches stand elsewhere, per variance.

    Then a patch has one token wherever it stands. Else the codebook is spent on shades of the same
    patch, which no prompt can tell apart.
    """
    latents_BCHW = latents_BCHW.float()
    change_BCHW = elsewhere_BCHW.float() - rearranged(latents_BCHW, order_N, side=1)
    variance = latents_BCHW.detach().var(dim=(0, 2, 3), correction=0).mean()
    return change_BCHW.square().mean() / variance.clamp(min=1e-12)


def _update(stage: TokenizerStage, loss: Tensor, error: Tensor) -> TokenizerResult:
    training = stage.config.training
    norm = clip_gradients(trained_parameters(stage.optimizer), training.max_grad_norm)
    loss_value, error_value, norm_value = torch.stack((loss, error, norm)).tolist()
    if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
        raise TrainingDiverged(
            f"tokenizer step {stage.step} has loss {loss_value} and gradient norm {norm_value}; "
            "lower tokenizer.training.learning_rate"
        )
    scale = learning_rate_scale(stage.step, training.steps, training.warmup_steps, "cosine")
    set_learning_rate(stage.optimizer, scale)
    stage.optimizer.step()
    stage.optimizer.zero_grad(set_to_none=True)
    used = (stage.code_uses_K > training.min_code_share * stage.code_uses_K.mean()).float().mean()
    return TokenizerResult(
        loss_value, error_value, float(used), training.learning_rate * scale, norm_value
    )


def _rows(latents_BCHW: Tensor) -> Tensor:
    """latents_NC in float32, out of the graph."""
    return latents_BCHW.detach().float().permute(0, 2, 3, 1).reshape(-1, latents_BCHW.shape[1])


@torch.no_grad()
def start_codebook(stage: TokenizerStage, batches: Iterable[Tensor]) -> None:
    """Make the codebook by k-means on the latents of these image batches."""
    precision = stage.config.precision == "bf16"
    parts = []
    for images_B3HW in batches:
        with torch.autocast(images_B3HW.device.type, torch.bfloat16, enabled=precision):
            parts.append(_rows(stage.vq.encode_latents(images_B3HW)))
    latents_NC = torch.cat(parts)
    codes_KC = kmeans(latents_NC, stage.config.codebook_size, KMEANS_ROUNDS, stage.config.seed)
    stage.vq.reset_codebook(codes_KC)
    stage.code_uses_K = torch.ones(len(codes_KC), device=codes_KC.device)
    stage.code_sums_KC = codes_KC.clone()


def kmeans(latents_NC: Tensor, num_codes: int, num_rounds: int, seed: int) -> Tensor:
    """codes_KC: Lloyd's rounds; codes start, and start again when they win nothing, at latents
    drawn by their squared distance from the nearest code (k-means++ in a few large draws).

    Flat pictures hold the same latent thousands of times: a uniform sample would repeat it.
    """
    codes_KC = latents_NC.new_zeros(num_codes, latents_NC.shape[1])
    first = permutation(len(latents_NC), seed, "kmeans")[:1]
    codes_KC[:] = latents_NC[torch.from_numpy(first).to(latents_NC.device)]
    settled = 1
    for number in range(KMEANS_DRAWS):
        wanted = -(-(num_codes - settled) // (KMEANS_DRAWS - number))
        far = far_latents(latents_NC, codes_KC[:settled], wanted, seed, "kmeans start", number)
        codes_KC[settled : settled + len(far)] = far
        settled += len(far)
    codes_KC = codes_KC[: max(settled, 1)]
    for number in range(num_rounds):
        nearest_N = _nearest(latents_NC, codes_KC)
        uses_K, sums_KC = code_statistics(latents_NC, nearest_N, len(codes_KC))
        won = uses_K > 0
        codes_KC[won] = sums_KC[won] / uses_K[won, None]
        lost = torch.nonzero(~won)[:, 0]
        far = far_latents(latents_NC, codes_KC[won], len(lost), seed, "kmeans lost", number)
        codes_KC[lost[: len(far)]] = far
    spare = num_codes - len(codes_KC)
    return torch.cat((codes_KC, codes_KC[:1].expand(spare, -1))) if spare else codes_KC


def far_latents(
    latents_NC: Tensor, codes_KC: Tensor, wanted: int, seed: int, purpose: str, *counters: int
) -> Tensor:
    """Up to ``wanted`` latents, drawn by their squared distance from the nearest code."""
    distance_N = (latents_NC - codes_KC[_nearest(latents_NC, codes_KC)]).square().sum(1).cpu()
    wanted = min(wanted, int((distance_N > 1e-12).sum()))
    if wanted == 0:
        return latents_NC[:0]
    generator = torch_generator(seed, purpose, *counters)
    chosen = torch.multinomial(distance_N, wanted, generator=generator)
    return latents_NC[chosen.to(latents_NC.device)]


def _nearest(latents_NC: Tensor, codes_KC: Tensor) -> Tensor:
    squares_K = codes_KC.square().sum(1)
    parts = torch.split(latents_NC, 4096)
    return torch.cat([torch.addmm(squares_K, p, codes_KC.T, alpha=-2).argmin(1) for p in parts])


def code_statistics(latents_NC: Tensor, nearest_N: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """(uses_K, sums_KC): how many latents each code stands for, and their sum."""
    uses_K = torch.bincount(nearest_N, minlength=num_codes).to(latents_NC.dtype)
    sums_KC = latents_NC.new_zeros(num_codes, latents_NC.shape[1])
    return uses_K, sums_KC.index_add_(0, nearest_N, latents_NC)


@torch.no_grad()
def move_codes(stage: TokenizerStage, latents_NC: Tensor, nearest_N: Tensor) -> None:
    """Move every code towards the running mean of its latents, and unused ones to latents."""
    training = stage.config.training
    uses_K, sums_KC = code_statistics(latents_NC, nearest_N, len(stage.code_uses_K))
    stage.code_uses_K.lerp_(uses_K, 1.0 - training.codebook_decay)
    stage.code_sums_KC.lerp_(sums_KC, 1.0 - training.codebook_decay)
    may_revive = stage.step < REVIVE_UNTIL * training.steps
    if may_revive and stage.step % REVIVE_INTERVAL_STEPS == 0:
        _revive(stage, latents_NC)
    codes_KC = stage.code_sums_KC / stage.code_uses_K.clamp(min=1e-6)[:, None]
    weight = stage.vq.quantize.embedding.weight
    weight.copy_(torch.where((stage.code_uses_K > 1e-6)[:, None], codes_KC, weight))


def _revive(stage: TokenizerStage, latents_NC: Tensor) -> None:
    mean_use = stage.code_uses_K.mean()
    dead = torch.nonzero(stage.code_uses_K < stage.config.training.min_code_share * mean_use)[:, 0]
    alive = stage.vq.quantize.embedding.weight.detach()
    seed = stage.config.seed
    far = far_latents(latents_NC, alive, len(dead), seed, "revive", stage.step)
    dead = dead[: len(far)]
    stage.code_uses_K[dead] = mean_use
    stage.code_sums_KC[dead] = far * mean_use


def run_step(stage: TokenizerStage, batch_at: Callable[[int], Tensor]) -> TokenizerResult:
    """The next step on ``batch_at(step)``; makes the codebook first when its turn has come."""
    if stage.step == stage.codebook_step:
        start_codebook(stage, (batch_at(stage.step + i) for i in range(KMEANS_BATCHES)))
    return train_step(stage, batch_at(stage.step))


@torch.no_grad()
def reconstruction_error(vq: VQTokenizer, images_B3HW: Tensor) -> float:
    """Mean absolute error in [0, 1] of encoding and decoding these images."""
    return float((vq.decode(vq.encode(images_B3HW)) - images_B3HW).abs().mean())


def train_bpe(captions: Iterable[str], config: TokenizerConfig) -> CLIPTokenizer:
    """The caption vocabulary; the same captions in any order give the same one."""
    return CLIPTokenizer.train(sorted(captions), config.bpe_vocab_size)
