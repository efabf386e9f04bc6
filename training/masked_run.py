"""A masked-token stage as something that ``training.fit`` can run."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed
from PIL import Image
from torch import Tensor, nn

from infra.errors import UserError
from model import PainterDefaults, TextToImage
from training import token_cache
from training.checkpoint import Checkpoint, optimizer_tensors, restore_optimizer
from training.checkpoint_store import CheckpointDamaged
from training.compiled import compile_blocks
from training.config import NetworkConfig, StageConfig
from training.coverage import Coverage, Tally, signed, unsigned
from training.data import TokenDataset
from training.devices import own_device
from training.fit import Measured
from training.guard import Guard, WentBack
from training.initial import Networks, initial_networks
from training.job import Job
from training.masked_stage import (
    TEXT_PREFIX,
    TRANSFORMER_PREFIX,
    StepInputs,
    StepResult,
    apply_update,
    backward,
    diverged,
    gradient_norm,
    merge_adapters,
    named_trained,
    start_stage,
    step_inputs,
    use_averaged_weights,
)
from training.mixing import Part, mixture
from training.order import rank_slice
from training.previews import paint_grid, paint_now
from training.publish import fetch_checkpoint
from training.session import Session
from training.sharding import check_shardable, like, shard_networks, whole_on_cpu
from training.utilisation import training_flops_per_image

EMA_PREFIX = "ema/"
ADAPTERS_FOLDER = "lora"
SCORED_SHARDS = 8  # shards whose preference scores decide the painter's default
GOOD_SCORE_QUANTILE = 0.9


class MaskedRun:
    """A stage's networks, its data and its place in both."""

    def __init__(
        self, config: StageConfig, networks: Networks, dataset: TokenDataset, session: Session
    ) -> None:
        self.config = config
        self.networks = networks
        self.dataset = dataset
        self.num_steps = config.steps
        if config.compile:
            compile_blocks(networks.transformer)
        self.is_sharded = config.strategy == "fsdp" and session.world_size > 1
        if self.is_sharded:
            check_shardable(config.global_batch_size, session.world_size)
            text_encoder = networks.text_encoder if config.train_text_encoder else None
            shard_networks(networks.transformer, text_encoder, session.world_size)
        self.device = own_device()
        for part in (networks.transformer, networks.text_encoder):
            part.to(self.device)
        self.stage = start_stage(
            config, networks.transformer, networks.text_encoder, networks.tokenizer
        )
        self.network: nn.Module = nn.ModuleDict(
            {"transformer": networks.transformer, "text_encoder": networks.text_encoder}
            | ({} if self.stage.lora is None else {"lora": self.stage.lora})
        )
        self.optimizer = self.stage.optimizer
        self.init_record = networks.record()
        if self.stage.lora is not None:
            self.init_record["num_adapters"] = len(self.stage.lora.adapters)
        self.guard = Guard(config.guard)
        self.coverage = Coverage(len(dataset), config.seed)
        self.batch = 0
        self._rows = rank_slice(config.global_batch_size, session.rank, session.world_size)
        self._rank, self._world_size = session.rank, session.world_size

    @classmethod
    def build(
        cls,
        job: Job,
        session: Session,
        tell: token_cache.Tell = lambda done, total: None,
    ) -> MaskedRun:
        """Fetch the parent, encode what is not encoded yet, and put everything together. ``tell``
        learns how many shards are encoded, of how many."""
        config = StageConfig.model_validate(job.configs["stage"])
        network = NetworkConfig.model_validate(job.configs["network"])
        if job.init_uri is None or job.manifest_uri is None:
            raise ValueError("a masked stage needs init_uri and manifest_uri")
        folder = fetch_checkpoint(job.init_uri)
        if job.init_sha256 is not None and folder.name != job.init_sha256:
            raise UserError(expected=f"checkpoint {job.init_sha256}", got=folder.name)
        networks = initial_networks(folder, network, config, job.parts)
        return cls(config, networks, _open_dataset(job, config, folder, session, tell), session)

    @property
    def step(self) -> int:
        """Finished optimizer steps."""
        return self.stage.step

    @property
    def max_passed_by(self) -> int:
        """Batches that may yet be passed by."""
        return self.config.guard.max_bad_batches - self.guard.num_passed_by

    def flops_per_image(self) -> float:
        """The work of training on one image."""
        side = self.config.resolution_px // self.networks.vq.downsample_factor
        return training_flops_per_image(
            self.networks.transformer,
            side * side,
            self.config.text_tokens,
            learns=self.config.lora is None,
        )

    def prepare(self, number: int) -> StepInputs:
        """This worker's part of a global batch."""
        batch = self.dataset.batch_at(number, self._rows)
        return step_inputs(batch, self.config, self.stage.tokenizer, number, self._rows)

    def train(
        self,
        inputs: StepInputs,
        run_backward: Callable[[Tensor], None],
        without_sync: Callable[[], AbstractContextManager[object]],
    ) -> Measured | None:
        """One optimizer step, or a batch passed by; the same verdict on every worker.

        Raises ``TrainingDiverged``, or ``WentBack`` when an earlier checkpoint is to be loaded.
        """
        if self.is_sharded:  # parts of gradients add up; whole ones would not fit
            without_sync = nullcontext
        local = backward(self.stage, inputs, self._world_size, run_backward, without_sync)
        norm = gradient_norm(self.stage)
        tallies = self.coverage.tallies(inputs.visit)
        if self._world_size > 1:
            local, tallies = self._add_up(local, tallies)
        loss, grad_norm = torch.stack((local, norm.to(local.dtype))).tolist()
        verdict = self.guard.judge(self.step, self.batch, loss, grad_norm, inputs.sample_ids)
        if verdict == "good":
            self.coverage.add(tallies)
            self.batch += 1
            return self._measured(apply_update(self.stage, loss, grad_norm), inputs)
        self.optimizer.zero_grad(set_to_none=True)
        if verdict == "give up":
            raise diverged(self.step, loss, grad_norm, inputs.sample_ids)
        if verdict == "go back":
            raise WentBack(int(self.guard.events[-1]["back_to"]), self.batch + 1)
        self.coverage.add(tallies, passed_by=True)
        self.batch += 1
        return None

    def _add_up(self, loss: Tensor, tallies: dict[int, Tally]) -> tuple[Tensor, dict[int, Tally]]:
        """The loss of the global batch and the samples of all workers."""
        size = self.config.global_batch_size
        epochs = self.dataset.order.epochs(self.batch * size, (self.batch + 1) * size)
        parts = [tallies.get(epoch, Tally()) for epoch in epochs]
        numbers = [[part.count, signed(part.bits)] for part in parts]
        sums = torch.tensor(numbers, dtype=torch.int64, device=loss.device)
        mean = loss.double()
        torch.distributed.all_reduce(sums)
        torch.distributed.all_reduce(mean)
        found = [Tally(int(count), unsigned(int(bits))) for count, bits in sums.tolist()]
        return mean / self._world_size, dict(zip(epochs, found, strict=True))

    def _measured(self, result: StepResult, inputs: StepInputs) -> Measured:
        num_images = self.config.global_batch_size
        return Measured(
            loss=result.loss,
            num_images=num_images,
            num_tokens=num_images * inputs.tokens_BHW[0].numel(),
            values={
                "learning_rate": result.learning_rate,
                "grad_norm": result.grad_norm,
                "epoch": self.batch * num_images / len(self.dataset),
            },
        )

    def weights(self) -> dict[str, Tensor]:
        """Every trained parameter, and its average."""
        tensors = {name: p.detach() for name, p in named_trained(self.optimizer)}
        averages = {f"{EMA_PREFIX}{name}": value for name, value in (self.stage.ema or {}).items()}
        return {**tensors, **averages}

    def optimizer_state(self) -> dict[str, Tensor]:
        """The optimizer's moments by name."""
        return optimizer_tensors(self.optimizer)

    def state(self) -> dict[str, Any]:
        """What else ``restore`` needs, as JSON values."""
        return {
            "batch": self.batch,
            "guard": self.guard.to_json(),
            "coverage": self.coverage.to_json(),
        }

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go back to where a checkpoint was taken."""
        self._restore_tensors(checkpoint)
        self.batch = checkpoint.state.batch
        self.init_record = checkpoint.state.init
        self.guard.restore(checkpoint.state.guard)
        self.coverage.restore(checkpoint.state.coverage)

    def go_back(self, checkpoint: Checkpoint, to_batch: int) -> None:
        """Take up an earlier checkpoint, and pass by all batches before ``to_batch``."""
        self._restore_tensors(checkpoint)
        self.guard.rewound(checkpoint.state.guard)
        self.coverage.restore(checkpoint.state.coverage)
        size = self.config.global_batch_size
        for number in range(checkpoint.state.batch, to_batch):
            visit = self.dataset.order.visit(number * size, (number + 1) * size)
            self.coverage.add(self.coverage.tallies(visit), passed_by=True)
        self.batch = to_batch

    @torch.no_grad()
    def _restore_tensors(self, checkpoint: Checkpoint) -> None:
        expected, weights = self.weights(), checkpoint.weights
        if set(expected) != set(weights):
            odd = sorted(set(expected) ^ set(weights))
            raise CheckpointDamaged(f"the run's checkpoint differs in {len(odd)} weights: {odd[0]}")
        for name, parameter in named_trained(self.optimizer):
            parameter.copy_(like(weights[name], parameter))
        if self.stage.ema is not None:
            for name, average in self.stage.ema.items():
                average.copy_(like(weights[EMA_PREFIX + name], average))
        if checkpoint.state.step:
            restore_optimizer(self.optimizer, checkpoint.optimizer)
        else:
            self.optimizer.state.clear()
        self.stage.step = checkpoint.state.step

    @torch.no_grad()
    def put_together(self, keeps: bool) -> None:
        """Give a worker that ``keeps`` them whole networks, averaged if they are; ends the
        training. All workers call it together."""
        if not self.is_sharded:
            return
        exported = self.stage.ema or {name: p for name, p in named_trained(self.optimizer)}
        found = whole_on_cpu(exported, keeps)
        if not keeps:
            return
        parts = {
            TRANSFORMER_PREFIX: self.networks.transformer,
            TEXT_PREFIX: self.networks.text_encoder,
        }
        made: dict[str, Any] = {}
        for prefix, module in parts.items():
            made[prefix] = type(module)(module.config).to(torch.float32)
            rest = {k: v for k, v in module.state_dict().items() if prefix + k not in found}
            ours = {k.removeprefix(prefix): v for k, v in found.items() if k.startswith(prefix)}
            made[prefix].load_state_dict({**rest, **ours}, strict=True)
        self.networks = replace(
            self.networks, transformer=made[TRANSFORMER_PREFIX], text_encoder=made[TEXT_PREFIX]
        )
        self.stage.ema = None

    def export(self, folder: Path) -> dict[str, float]:
        """Write the model as it is published, with averaged weights if they are kept and adapters
        both in the weights and beside them; ends the training. Returns what is known about it."""
        use_averaged_weights(self.stage)
        lora = self.stage.lora
        if lora is not None:
            merge_adapters(lora)
        self._painter().save_pretrained(folder)
        if lora is not None:
            lora.save_pretrained(folder / ADAPTERS_FOLDER)
        return {"num_samples": float(len(self.dataset))}

    def _painter(self) -> TextToImage:
        for part in (self.networks.transformer, self.networks.text_encoder, self.networks.vq):
            part.to("cpu").eval().requires_grad_(False)
        networks = self.networks
        return TextToImage(
            networks.transformer,
            networks.vq,
            networks.text_encoder,
            networks.tokenizer,
            self._defaults,
        )

    @functools.cached_property
    def _defaults(self) -> PainterDefaults:
        return PainterDefaults(
            text_tokens=self.config.text_tokens,
            preference_score=self._painting_score(),
            resolution_px=self.config.resolution_px,
        )

    def _painting_score(self) -> float:
        if self.config.sample_preference_score is not None:
            return self.config.sample_preference_score
        scores = self.dataset.preference_scores(SCORED_SHARDS)
        return round(float(np.quantile(scores, GOOD_SCORE_QUANTILE)), 3)

    def samples(self, folder: Path) -> list[Image.Image]:
        """The grid's prompts painted by the exported model; none when there are none."""
        grid = self.config.sample_grid
        if not grid.prompts:
            return []
        painter = TextToImage.from_pretrained(folder, device=self.device)
        return paint_grid(painter, grid, range(len(grid.prompts)), in_bf16=False)

    def samples_now(self) -> list[Image.Image]:
        """The same by the networks as they are; none when it is not the time. Workers call it
        together, between two steps."""
        grid = self.config.sample_grid
        if not grid.prompts or not grid.interval_steps or self.step % grid.interval_steps:
            return []
        rank, size = self._rank, self._world_size
        return paint_now(
            self.stage, self.networks, self._defaults, rank, size, is_sharded=self.is_sharded
        )


def _open_dataset(
    job: Job, config: StageConfig, folder: Path, session: Session, tell: token_cache.Tell
) -> TokenDataset:
    """The stage's tokens, those of datasets that are mixed in among them; the workers share the
    shards that have none yet."""
    pins = [(config.dataset, str(job.manifest_uri), job.manifest_sha256)]
    pins += [(pin["name"], pin["manifest_uri"], pin["version"]) for pin in job.mixed_in]
    plans = [
        token_cache.plan_cache(uri, str(folder), config.resolution_px, config.crop, sha256)
        for _, uri, sha256 in pins
    ]
    token_cache.fill_caches(plans, session, tell)
    datasets = [token_cache.open_tokens(plan.manifest_uri, config) for plan in plans]
    if len(datasets) == 1:
        return datasets[0]
    weights = [1.0, *(config.mixed_in[name] for name, _, _ in pins[1:])]
    names = [name for name, _, _ in pins]
    return mixture([Part(*each) for each in zip(names, datasets, weights, strict=True)], config)


__all__: list[Any] = ["MaskedRun"]
