"""Compiling the network for sampling: one graph per grid, on a GPU replayed without launches."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from model.transformer import MaskedImageTransformer


def compile_network(
    transformer: MaskedImageTransformer, backend: str = "inductor", mode: str | None = None
) -> None:
    """Make `transformer.features` run compiled from now on; the first call per shape is slow.

    `mode` None is "reduce-overhead" (CUDA graphs) on a GPU and the compiler's default elsewhere.
    Parameters, gradients and saved folders are as before. Calling it again changes nothing.
    """
    if "features" in vars(transformer):
        return
    on_gpu = transformer.context_embedder.weight.device.type == "cuda"
    if mode is None and on_gpu:
        mode = "reduce-overhead"
    options: dict[str, Any] = {"mode": mode} if backend == "inductor" else {}
    compiled: Callable[..., Tensor] = torch.compile(
        transformer.features, fullgraph=True, dynamic=False, backend=backend, **options
    )

    def features(tokens_BHW: Tensor, text_states_BTD: Tensor, *rest: Tensor) -> Tensor:
        # Tables made inside a graph would lie in memory that the next replay writes to.
        transformer.prepare(tokens_BHW, text_states_BTD)
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]  # torch's
        return compiled(tokens_BHW, text_states_BTD, *rest)

    transformer.features = features  # type: ignore[assignment,method-assign]  # this object's
