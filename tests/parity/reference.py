"""The published network written down a second time: plain functions over a dictionary of tensors.

Nothing of `model/` is used, so an error there has no twin here. It computes in whatever type its
tensors have; position tables are made on every call and the head runs everywhere, as published.
Shapes: B batch, S sequence, C channels, H/W grid.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = Mapping[str, Tensor]
EPS = 1e-6


def linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))


def rms(weights: Weights, name: str, x: Tensor) -> Tensor:
    scale = torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + EPS)
    return x * scale * weights[f"{name}.weight"]


def sinusoid(values: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, 256): cosines, then sines. The frequencies are those of a float32 exp, as published."""
    frequencies = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32) / 128)
    angles = (values.float()[:, None] * frequencies).to(dtype)
    return torch.cat((angles.cos(), angles.sin()), dim=1)


def embedder(weights: Weights, name: str, x: Tensor) -> Tensor:
    return linear(weights, f"{name}.linear_2", F.silu(linear(weights, f"{name}.linear_1", x)))


def angles(num_text: int, height: int, width: int, axes: list[int]) -> Tensor:
    """(S, half the head's channels): text is at (0, 0, 0), row r and column c at (0, r, c)."""
    rows = []
    places = [(0, 0, 0)] * num_text + [(0, r, c) for r in range(height) for c in range(width)]
    frequencies = [10000.0 ** -(torch.arange(0, dim, 2).double() / dim) for dim in axes]
    for place in places:
        rows.append(torch.cat([at * f for at, f in zip(place, frequencies, strict=True)]))
    return torch.stack(rows)


def turn(x: Tensor, angle: Tensor) -> Tensor:
    """Rotary positions: channels (2i, 2i + 1) turned by angle i."""
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def heads(x: Tensor, count: int) -> Tensor:
    return x.view(*x.shape[:-1], count, -1).transpose(1, 2)


def attention(query: Tensor, key: Tensor, value: Tensor, angle: Tensor) -> Tensor:
    query, key = turn(query, angle), turn(key, angle)
    weights = (query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])).softmax(dim=-1)
    return (weights @ value).transpose(1, 2).flatten(2)


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale[:, None]) + shift[:, None]


def joint_block(
    w: Weights, name: str, text: Tensor, image: Tensor, condition: Tensor, angle: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    queries, keys, values, chunks = [], [], [], []
    streams = (
        (text, "norm1_context", ("add_q_proj", "add_k_proj", "add_v_proj"), "norm_added"),
        (image, "norm1", ("to_q", "to_k", "to_v"), "norm"),
    )
    for stream, norm, projections, qk_norm in streams:
        chunk = linear(w, f"{name}.{norm}.linear", F.silu(condition)).chunk(6, dim=1)
        normed = modulated(stream, chunk[0], chunk[1])
        q, k, v = (heads(linear(w, f"{name}.attn.{p}", normed), count) for p in projections)
        queries.append(rms(w, f"{name}.attn.{qk_norm}_q", q))
        keys.append(rms(w, f"{name}.attn.{qk_norm}_k", k))
        values.append(v)
        chunks.append(chunk)
    mixed = attention(torch.cat(queries, 2), torch.cat(keys, 2), torch.cat(values, 2), angle)
    parts = (mixed[:, : text.shape[1]], mixed[:, text.shape[1] :])
    results = []
    for stream, part, chunk, out, ff in zip(
        (text, image), parts, chunks, ("to_add_out", "to_out.0"), ("ff_context", "ff"), strict=True
    ):
        middle = stream + chunk[2][:, None] * linear(w, f"{name}.attn.{out}", part)
        wide = linear(w, f"{name}.{ff}.net.0.proj", modulated(middle, chunk[3], chunk[4]))
        wide = F.gelu(wide, approximate="tanh")
        results.append(middle + chunk[5][:, None] * linear(w, f"{name}.{ff}.net.2", wide))
    return results[0], results[1]


def single_block(
    w: Weights, name: str, x: Tensor, condition: Tensor, angle: Tensor, count: int
) -> Tensor:
    shift, scale, gate = linear(w, f"{name}.norm.linear", F.silu(condition)).chunk(3, dim=1)
    normed = modulated(x, shift, scale)
    q, k, v = (heads(linear(w, f"{name}.attn.to_{p}", normed), count) for p in "qkv")
    q, k = rms(w, f"{name}.attn.norm_q", q), rms(w, f"{name}.attn.norm_k", k)
    wide = F.gelu(linear(w, f"{name}.proj_mlp", normed), approximate="tanh")
    both = torch.cat((attention(q, k, v, angle), wide), dim=2)
    return x + gate[:, None] * linear(w, f"{name}.proj_out", both)


def logits_of(
    w: Weights,
    config: Mapping[str, Any],
    tokens_BHW: Tensor,
    text_states: Tensor,
    pooled: Tensor,
    micro_conditions: Tensor,
    timestep: Tensor,
) -> Tensor:
    """logits_BVHW; `config` is a published config.json, `w` its tensors."""
    count, dtype = config["num_attention_heads"], text_states.dtype
    micro = sinusoid(micro_conditions.flatten(), dtype).view(len(pooled), -1)
    given = embedder(w, "cond_embed", torch.cat((pooled, micro), dim=1))
    time = sinusoid(timestep.float() * 1000, dtype)
    condition = embedder(w, "time_text_embed.timestep_embedder", time)
    condition = condition + embedder(w, "time_text_embed.text_embedder", given)

    grid = rms(w, "embed.layer_norm", F.embedding(tokens_BHW, w["embed.embeddings.weight"]))
    grid = F.conv2d(grid.permute(0, 3, 1, 2), w["embed.conv.weight"])
    if config["downsample"]:
        grid = rms(w, "down_block.downsample.norm", grid.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        grid = F.conv2d(grid, w["down_block.downsample.conv.weight"], stride=2)
    height, width = grid.shape[2:]
    image = rms(w, "project_to_hidden_norm", grid.flatten(2).transpose(1, 2))
    image = linear(w, "project_to_hidden", image)
    text = rms(w, "encoder_proj_layer_norm", linear(w, "context_embedder", text_states))
    angle = angles(text.shape[1], height, width, list(config["axes_dims_rope"]))

    for i in range(config["num_layers"]):
        name = f"transformer_blocks.{i}"
        text, image = joint_block(w, name, text, image, condition, angle, count)
    joint = torch.cat((text, image), dim=1)
    for i in range(config["num_single_layers"]):
        joint = single_block(w, f"single_transformer_blocks.{i}", joint, condition, angle, count)

    image = rms(w, "project_from_hidden_norm", joint[:, text.shape[1] :])
    image = linear(w, "project_from_hidden", image)
    grid = image.transpose(1, 2).reshape(len(image), -1, height, width)
    if config["upsample"]:
        grid = rms(w, "up_block.upsample.norm", grid.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        grid = F.conv_transpose2d(grid, w["up_block.upsample.conv.weight"], stride=2)
    grid = F.conv2d(grid, w["mlm_layer.conv1.weight"])
    grid = rms(w, "mlm_layer.layer_norm", grid.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return F.conv2d(grid, w["mlm_layer.conv2.weight"])
