"""Networks of which every worker holds a part: weights, gradients, moments and average (FSDP2).

A block's weights are put together for its turn and let go again. Checkpoints stay what they are
with one worker: whole tensors by name, gathered where they are saved and cut where they are
loaded, so that any number of workers goes on from them, sharded or not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from infra.errors import UserError
from model import CLIPTextEncoder, MaskedImageTransformer
from training.devices import own_device

ENTRY = "features"  # what the loss calls of a transformer, before its head


def shard_networks(
    transformer: MaskedImageTransformer, text_encoder: CLIPTextEncoder | None, world_size: int
) -> None:
    """Cut them over all workers, block by block; all workers call it with equal weights.

    ``text_encoder`` is None when it does not learn: then every worker keeps it whole. Build the
    optimizer afterwards: parameters are new objects.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(own_device().type, (world_size,))
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    for block in blocks:
        fully_shard(block, mesh=mesh)
    # The head stays together from the forward pass to the end of the backward pass: the loss calls
    # it once for each chunk of masked tokens, of which workers have different numbers.
    fully_shard(transformer, mesh=mesh, reshard_after_forward=False)
    register_fsdp_forward_method(transformer, ENTRY)
    if text_encoder is not None:
        fully_shard(text_encoder, mesh=mesh)


def whole(tensor: Tensor) -> Tensor:
    """The tensor, put together if it is a part; then all workers call it."""
    part: Any = tensor
    complete: Tensor = part.full_tensor() if is_part(tensor) else tensor
    return complete


def is_part(tensor: Tensor) -> bool:
    """Whether this worker holds a part of it (a ``DTensor``, whose import takes a while)."""
    return hasattr(tensor, "device_mesh")


def own_part(tensor: Tensor) -> Tensor:
    """What this worker holds of it, in its place: a change there is a change of the tensor."""
    part: Any = tensor
    mine: Tensor = part.to_local() if is_part(tensor) else tensor
    return mine


def whole_on_cpu(tensors: Mapping[str, Tensor], keeps: bool) -> dict[str, Tensor]:
    """Copies of whole tensors on the CPU, one after the other; all workers call it, and those that
    do not ``keep`` them get none."""
    kept: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        complete = whole(tensor.detach())
        if keeps:
            kept[name] = complete.to("cpu", copy=True)
    return kept


def like(value: Tensor, model: Tensor) -> Tensor:
    """A copy of a whole tensor where and as ``model`` lies: this worker's part, if it is cut."""
    if not is_part(model):
        return value.to(model.device, copy=True)
    from torch.distributed.tensor import distribute_tensor

    part: Any = model
    mesh = part.device_mesh
    placed = value.to(mesh.device_type)
    cut: Tensor = distribute_tensor(placed, mesh, part.placements, src_data_rank=None)
    return cut


def check_shardable(global_batch_size: int, world_size: int) -> None:
    """Raise ``UserError`` unless all workers make equally many passes: they wait for each other in
    every block."""
    if global_batch_size % world_size:
        raise UserError(
            expected=f"a global_batch_size that {world_size} workers share equally (strategy fsdp)",
            got=str(global_batch_size),
            remedy="change num_workers or the batch, or set strategy to 'ddp'",
        )
