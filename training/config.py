"""What a recipe says about training: the network, the tokenizer stage and the masked stages.

Sizes of the text encoder and the codebook are given once; whatever has to agree with them is
derived (``training.networks``), so that two fields cannot contradict each other.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from infra.config import StrictModel, operational, semantic
from infra.processor import resolve_precision

# ``auto`` is decided when a recipe is read, so that a key says what was computed in.
Precision = Annotated[Literal["fp32", "bf16"], BeforeValidator(resolve_precision)]
Schedule = Literal["constant", "cosine", "linear"]
OptimizerName = Literal["adamw", "adamw_8bit", "muon"]
SquareCrop = Literal["center", "random"]
CropPolicy = Literal["center", "random", "bucket"]
Probability = Annotated[float, Field(ge=0.0, le=1.0)]


class NetworkConfig(StrictModel):
    """The masked image transformer. The defaults are the published 1 B network."""

    num_layers: int = semantic(14, "two-stream blocks", ge=0)
    num_single_layers: int = semantic(28, "one-stream blocks", ge=1)
    attention_head_dim: int = semantic(128, "channels per attention head", ge=2)
    num_attention_heads: int = semantic(8, "attention heads", ge=1)
    axes_dims_rope: tuple[int, int, int] = semantic(
        (16, 56, 56), "channels of a head per position axis: text, row, column; they add up to it"
    )
    num_special_tokens: int = semantic(
        64, "ids after the codebook; the last one is the mask token", ge=1
    )
    timestep_convention: Literal["mask_ratio", "step_index"] = semantic(
        "mask_ratio", "what the network is told: the masked share, or the published step index"
    )

    @model_validator(mode="after")
    def _check_axes(self) -> Self:
        if sum(self.axes_dims_rope) != self.attention_head_dim:
            raise ValueError(
                f"axes_dims_rope adds up to {sum(self.axes_dims_rope)}: "
                f"expected attention_head_dim, {self.attention_head_dim}"
            )
        if any(dim % 2 for dim in self.axes_dims_rope):
            raise ValueError(f"axes_dims_rope is {self.axes_dims_rope}: expected even numbers")
        return self


class TextEncoderConfig(StrictModel):
    """CLIP's text tower: published weights, or a seeded start that training fills."""

    pretrained: str | None = semantic(
        None, "folder (path or URI) with config.json and model.safetensors; None starts fresh"
    )
    hidden_size: int = semantic(1024, "channels of the text states", ge=2)
    num_hidden_layers: int = semantic(24, "layers; the states come from before the last one", ge=2)
    num_attention_heads: int = semantic(16, "attention heads", ge=1)
    intermediate_ratio: int = semantic(4, "feed-forward width over hidden_size", ge=1)
    projection_dim: int = semantic(1024, "channels of the pooled vector", ge=1)
    max_position_embeddings: int = semantic(77, "longest prompt, tokens with begin and end", ge=2)
    hidden_act: Literal["gelu", "quick_gelu"] = semantic("gelu", "activation of the feed-forward")


class OptimizerConfig(StrictModel):
    """The optimizer with a warm-up and a schedule."""

    name: OptimizerName = semantic(
        "adamw",
        "muon: orthogonal steps for matrices and kernels, AdamW for the rest; adamw_8bit: moments "
        "of a byte each",
    )
    learning_rate: float = semantic(1e-4, "peak step size", gt=0.0)
    betas: tuple[Probability, Probability] = semantic((0.9, 0.99), "decay of the two moments")
    epsilon: float = semantic(1e-8, "added to the root of the second moment", gt=0.0)
    weight_decay: float = semantic(
        0.01, "pull to zero of matrices; norms, biases and embeddings have none", ge=0.0
    )
    warmup_steps: int = semantic(0, "steps over which the step size rises linearly", ge=0)
    schedule: Schedule = semantic("constant", "after the warm-up: keep, or fall to zero at the end")
    max_grad_norm: float | None = semantic(1.0, "longer gradients are shortened; None is off")


class GuardConfig(StrictModel):
    """What is done about a step whose loss is not finite, or jumps."""

    max_bad_batches: int = semantic(
        8, "batches with a loss or gradient that is not finite to pass by; then it ends", ge=0
    )
    max_bad_in_a_row: int = semantic(
        3, "such batches in a row after which training goes back instead", ge=1
    )
    rewind_steps: int | None = semantic(
        None, "steps between checkpoints to go back to, kept for that; None never goes back", ge=1
    )
    max_times_back: int = semantic(3, "times that training goes back; then it ends", ge=0)
    window_steps: int = semantic(50, "last steps whose median loss is the usual one", ge=2)
    max_loss_ratio: float | None = semantic(
        None, "a loss above this times the usual one is a spike, which goes back; None is off",
        gt=1.0,
    )  # fmt: skip

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.max_loss_ratio is not None and self.rewind_steps is None:
            raise ValueError("max_loss_ratio needs rewind_steps, to have somewhere to go back to")
        return self


class SavingConfig(StrictModel):
    """When a run saves, and how much it keeps."""

    checkpoint_interval_seconds: float = operational(45.0, "time between checkpoints", gt=0.0)
    checkpoint_interval_steps: int | None = operational(
        None, "steps between checkpoints, besides the time; None is off", ge=1
    )
    checkpoints_kept: int = operational(2, "newest checkpoints of a run that stay", ge=1)
    checkpoint_patience_seconds: float = operational(
        120.0, "how long storage may refuse a checkpoint while training goes on", ge=0.0
    )
    max_step_minutes: float | None = operational(
        20.0, "a worker that makes no step for so long is ended and starts again; None is off",
        gt=0.0,
    )  # fmt: skip
    compare_workers: bool = operational(
        True,
        "whether workers that hold all weights compare their bits every ten steps; off where their "
        "GPUs are of several kinds, which round differently",
    )
    log_interval_steps: int = operational(10, "steps averaged into one logged point", ge=1)


class TokenizerTrainingConfig(StrictModel):
    """How the image tokenizer is trained from scratch on curated images."""

    resolutions_px: tuple[int, ...] = semantic(
        (64, 128), "sides of the square training crops; steps take turns", min_length=1
    )
    steps: int = semantic(600, "optimizer steps", ge=1)
    warmup_share: Probability = semantic(
        0.25, "share of the steps as a plain auto-encoder, before the codebook is made"
    )
    batch_pixels: int = semantic(
        262_144, "pixels in a batch; a crop of side s is drawn batch_pixels / s² times", ge=1
    )
    optimizer: OptimizerName = semantic("muon", "as in a stage's optimizer.name")
    learning_rate: float = semantic(2e-3, "peak step size; falls to zero along a cosine", gt=0.0)
    warmup_steps: int = semantic(20, "steps over which the step size rises linearly", ge=0)
    max_grad_norm: float = semantic(1.0, "longer gradients are shortened", gt=0.0)
    l1_weight: float = semantic(1.0, "weight of the mean absolute error", ge=0.0)
    l2_weight: float = semantic(1.0, "weight of the mean squared error", ge=0.0)
    edge_weight: float = semantic(
        1.0, "weight of the mean absolute error of neighbour differences", ge=0.0
    )
    commitment_weight: float = semantic(0.25, "weight of the latents' pull to their codes", ge=0.0)
    locality_weight: float = semantic(
        0.0, "weight of what a patch's latents owe to its surroundings; 1 gives a patch one token",
        ge=0.0,
    )  # fmt: skip
    codebook_decay: float = semantic(
        0.98, "how slowly codes follow the mean of their latents", ge=0.0, lt=1.0
    )
    min_code_share: float = semantic(
        0.02, "a code used less than this share of the mean use is moved to a latent", ge=0.0
    )
    max_images: int = semantic(4096, "images read from the dataset, in planned order", ge=1)
    max_zoom: float = semantic(
        1.5,
        "crops of side s are cut from images shrunk to a short side of s to max_zoom * s",
        ge=1.0,
    )


class TokenizerConfig(SavingConfig):
    """Stage 0: the image tokenizer (VQ) and the caption vocabulary (BPE)."""

    dataset: str = semantic("", "curated dataset to train on; unused when both are pretrained")
    pretrained: str | None = semantic(
        None, "folder (path or URI) of a published vqvae; None trains one"
    )
    pretrained_bpe: str | None = semantic(
        None, "folder (path or URI) of a published CLIP vocabulary; None trains one"
    )
    block_out_channels: tuple[int, ...] = semantic(
        (16, 32, 64, 96), "channels per level; each level after the first halves the image"
    )
    latent_channels: int = semantic(16, "channels of a code", ge=1)
    codebook_size: int = semantic(1024, "codes", ge=2, le=65_536)
    bpe_vocab_size: int = semantic(1024, "caption vocabulary with begin and end", ge=514)
    training: TokenizerTrainingConfig = semantic(
        default_factory=TokenizerTrainingConfig, description="used when nothing is pretrained"
    )
    max_reconstruction_error: float | None = semantic(
        None, "gate: largest mean absolute error in [0, 1] on held-out images; None is off"
    )
    seed: int = semantic(0, "start of all randomness", ge=0)
    precision: Precision = semantic("bf16", "compute type of the convolutions; auto as for a stage")


class InitConfig(StrictModel):
    """Where a stage's transformer starts, when it has no checkpoint of its own."""

    source: Literal["parent", "fresh", "pretrained"] = semantic(
        "parent", "the previous stage's weights, random ones, or those of a published folder"
    )
    pretrained: str | None = semantic(
        None, "folder (path or URI) of a published transformer; for source: pretrained"
    )
    new_parameters: tuple[str, ...] = semantic(
        (), "name prefixes that may be absent from the parent; any other absence is an error"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.source == "pretrained") != (self.pretrained is not None):
            raise ValueError("source: pretrained and a folder in pretrained need each other")
        return self


class AdaptersConfig(StrictModel):
    """LoRA: small matrices beside the transformer's linear layers learn, and nothing else of it."""

    rank: int = semantic(16, "rows of A and columns of B", ge=1)
    alpha: float | None = semantic(None, "B A is scaled by alpha / rank; None is rank", gt=0.0)
    dropout: float = semantic(0.0, "share of A's input that is left out", ge=0.0, lt=1.0)
    targets: str | None = semantic(
        None, "regular expression for layers' dotted names; None is every block's linear layers"
    )


class SampleGridConfig(StrictModel):
    """The pictures that are painted at the end of a stage and on the way there."""

    prompts: tuple[str, ...] = operational((), "fixed prompts, one image each; none paints nothing")
    interval_steps: int | None = operational(
        None, "also painted each so many steps, while training waits; None only at the end", ge=1
    )
    steps: int = operational(16, "unmasking steps", ge=1)
    guidance_scale: float = operational(3.0, "uncond + scale * (cond - uncond); 1.0 is off", ge=0.0)
    temperature: float = operational(1.0, "noise on the confidences at the first step", ge=0.0)
    seed: int = operational(0, "seed of the first image", ge=0)


class StageConfig(SavingConfig):
    """One masked-token stage."""

    dataset: str = semantic(description="curated dataset to train on")
    mixed_in: dict[str, Annotated[float, Field(gt=0.0)]] = semantic(
        {}, "further datasets, and how often a sample of each comes in an epoch, in which one of "
        "`dataset` comes once; a fraction takes that share of them",
    )  # fmt: skip
    resolution_px: int = semantic(
        description="side of the square images, or the root of a bucket's area", ge=8
    )
    steps: int = semantic(description="optimizer steps", ge=1)
    global_batch_size: int = semantic(description="samples per step, over all workers", ge=1)
    optimizer: OptimizerConfig = semantic(
        default_factory=OptimizerConfig, description="of the transformer"
    )
    lora: AdaptersConfig | None = semantic(
        None, "adapters to train in place of the transformer's weights; None trains these"
    )
    train_text_encoder: bool = semantic(False, "whether the text encoder learns too")
    text_encoder_learning_rate: float = semantic(1e-5, "its peak step size when it learns", gt=0.0)
    prompt_dropout_prob: Probability = semantic(
        0.1, "probability of dropping a prompt: training sees an empty one instead"
    )
    caption_mix: dict[Literal["alt", "synthetic"], float] = semantic(
        {"alt": 1.0}, "weight of each caption origin; what a sample lacks is left out"
    )
    text_tokens: int = semantic(77, "length that prompts are cut or padded to, tokens", ge=2)
    min_aesthetic_score: float | None = semantic(
        None, "samples below it, or without one, are left out; None is off"
    )
    min_preference_score: float | None = semantic(
        None, "samples below it, or without one, are left out; None is off"
    )
    unknown_preference_score: float = semantic(
        6.0, "micro-condition of a sample that has no preference score"
    )
    crop: CropPolicy = semantic(
        "center",
        "where the square is cut from the image; bucket: none is, a step sees images of one of the "
        "aspect ratios that the dataset's resize.crop: bucket made",
    )
    shuffle_window_shards: int = semantic(8, "shards whose samples are shuffled together", ge=1)
    guard: GuardConfig = semantic(
        default_factory=GuardConfig, description="what is done about a loss that is not finite"
    )
    compress: bool = semantic(False, "whether the blocks see a grid of half the height and width")
    init: InitConfig = semantic(default_factory=InitConfig, description="where the weights start")
    ema_decay: float | None = semantic(
        None, "average of the weights that is exported; None exports the last ones", gt=0.0, lt=1.0
    )
    precision: Precision = semantic(
        "bf16",
        "compute type of the networks, whose weights are fp32; auto is bf16 where the machine that "
        "reads the recipe multiplies it itself, else fp32",
    )
    seed: int = semantic(0, "start of all randomness", ge=0)
    sample_preference_score: float | None = semantic(
        None, "micro-condition when painting; None is the 0.9 quantile of the training samples"
    )
    max_final_loss: float | None = semantic(
        None, "gate: largest mean loss of the last 50 steps, nats; None is off"
    )
    num_workers: int = operational(1, "worker processes", ge=1)
    strategy: Literal["ddp", "fsdp"] = operational(
        "ddp",
        "whether each of several workers holds all weights and moments (ddp) or a part (fsdp)",
    )
    max_microbatch_size: int | None = operational(
        None, "samples a worker holds at a time; None is its whole share of the batch", ge=1
    )
    gradient_checkpointing: bool = operational(False, "recompute blocks on the way back")
    compile: bool = operational(
        False, "whether blocks run compiled; faster after minutes, other in rounding"
    )
    max_resident_bytes: int = operational(1 << 30, "token shards kept in memory, bytes", ge=1)
    sample_grid: SampleGridConfig = operational(
        default_factory=SampleGridConfig, description="what is painted to look at"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        problems = []
        if self.dataset in self.mixed_in:
            problems.append(f"mixed_in names {self.dataset}, which is the stage's dataset already")
        if not self.caption_mix or any(weight < 0 for weight in self.caption_mix.values()):
            problems.append("caption_mix needs weights of 0 or more")
        elif sum(self.caption_mix.values()) <= 0:
            problems.append("caption_mix needs one weight above 0")
        if self.compress and self.init.source == "fresh" and self.init.new_parameters:
            problems.append("init.new_parameters means nothing when init.source is 'fresh'")
        if self.lora is not None and (self.init.source == "fresh" or self.init.new_parameters):
            problems.append("lora trains no new weights of the network; let another stage do that")
        if self.lora is not None and self.strategy == "fsdp":
            problems.append("lora has few weights to learn, and strategy fsdp parts them; use ddp")
        if self.optimizer.warmup_steps >= self.steps and self.optimizer.warmup_steps:
            problems.append(
                f"optimizer.warmup_steps is {self.optimizer.warmup_steps}: "
                f"expected less than steps, {self.steps}"
            )
        if problems:
            raise ValueError("; ".join(problems))
        return self
