"""Compiling the network for sampling: two graphs per grid, or on a GPU one that is replayed."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from model.transformer import MaskedImageTransformer

# Images of how many shapes (batch, rows, columns; guided ones are twice the batch) run compiled.
MAX_SHAPES = 64


def compile_network(
    transformer: MaskedImageTransformer,
    backend: str = "inductor",
    mode: str | None = None,
    as_one: bool | None = None,
) -> None:
    """Make `transformer.features` run compiled from now on; the first call per shape is slow.

    `mode` None is "reduce-overhead" (CUDA graphs) on a GPU and the compiler's default elsewhere.
    as_one: one graph of the whole network, in place of one for each kind of block; None is on a
    GPU. Shapes after the first `MAX_SHAPES` run as they are. Parameters, gradients and saved
    folders are as before. Calling it again changes nothing.
    """
    from torch._dynamo.exc import FailOnRecompileLimitHit  # seconds, of those who compile

    if "features" in vars(transformer):
        return
    on_gpu = transformer.context_embedder.weight.device.type == "cuda"
    as_one = on_gpu if as_one is None else as_one
    if mode is None and on_gpu:
        mode = "reduce-overhead"
    options: dict[str, Any] = {"fullgraph": True, "dynamic": False, "backend": backend}
    if backend == "inductor":
        options["mode"] = mode
    if as_one:
        run = torch.compile(transformer.features, **options)
    else:
        run = transformer.features
        for block in _blocks(transformer):
            block.compile(**options)
    uncompiled: set[tuple[torch.Size, ...]] = set()

    def features(tokens_BHW: Tensor, text_states_BTD: Tensor, *rest: Tensor) -> Tensor:
        # Tables made inside a graph would lie in memory that the next replay writes to.
        transformer.prepare(tokens_BHW, text_states_BTD)
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]  # torch's
        shapes = (tokens_BHW.shape, text_states_BTD.shape)
        if shapes not in uncompiled:
            try:
                with _room_for_shapes():
                    return run(tokens_BHW, text_states_BTD, *rest)
            except FailOnRecompileLimitHit:
                uncompiled.add(shapes)
        with torch.compiler.set_stance("eager_on_recompile"):
            return run(tokens_BHW, text_states_BTD, *rest)

    transformer.features = features  # type: ignore[assignment,method-assign]  # this object's


def _blocks(transformer: MaskedImageTransformer) -> list[nn.Module]:
    return [*transformer.transformer_blocks, *transformer.single_transformer_blocks]


def _room_for_shapes() -> AbstractContextManager[None]:
    """Inside it the compiler keeps graphs of MAX_SHAPES shapes; its own limit is 8."""
    patched: AbstractContextManager[None] = torch._dynamo.config.patch(
        recompile_limit=MAX_SHAPES, accumulated_recompile_limit=8 * MAX_SHAPES
    )
    return patched
