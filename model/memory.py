"""Fitting into small memories: parts that work on another device than they rest, tiles.

Shape suffixes: B images, 3 colours, H/W pixels or token rows and columns.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from model.errors import ModelError

# Of a tile's side: what neighbouring tiles share, and fade into each other over.
OVERLAP_SHARE = 0.25
MIN_TILE_TOKENS = 4


@contextmanager
def at_work_on(device: torch.device, part: nn.Module) -> Iterator[None]:
    """Inside the block `part` is on `device`; afterwards it has its own tensors again.

    Nothing is copied back, so a part that rests in CPU memory (or in a mapped file) costs the
    device's memory only while it works. For inference: what changes inside the block is lost.
    """
    kept: list[tuple[dict[str, Tensor | None], str, Tensor]] = []
    for module in part.modules():
        for owner in (module._parameters, module._buffers):
            tensors: dict[str, Tensor | None] = owner  # type: ignore[assignment]  # either kind
            kept += [
                (tensors, name, value)
                for name, value in owner.items()
                if value is not None and value.device != device
            ]
    try:
        for tensors, name, value in kept:
            moved = value.to(device)
            is_parameter = isinstance(value, nn.Parameter)
            tensors[name] = nn.Parameter(moved, value.requires_grad) if is_parameter else moved
        yield
    finally:
        for tensors, name, value in kept:
            tensors[name] = value


def tile_tokens(tile_px: int, factor: int) -> int:
    """Tokens along the side of a tile of `tile_px`, for `factor` px a token."""
    tokens = tile_px // factor
    if tokens < MIN_TILE_TOKENS:
        raise ModelError(
            f"tile_px is {tile_px}: expected at least {MIN_TILE_TOKENS * factor} px, "
            f"{MIN_TILE_TOKENS} tokens of {factor} px"
        )
    return tokens


def decode_in_tiles(
    decode: Callable[[Tensor], Tensor], tokens_BHW: Tensor, tile: int, factor: int
) -> Tensor:
    """decode(tokens_BHW) as images_B3HW, at most `tile` x `tile` tokens at a time.

    `factor`: pixels per token. Tiles overlap by a quarter or more and fade into each other there. A
    grid no larger than a tile is decoded as a whole; in a larger one each tile has its own norms
    and sees nothing of the others, so colours may drift between them.
    """
    return _in_tiles(decode, tokens_BHW, tile, 1, factor)


def encode_in_tiles(
    encode: Callable[[Tensor], Tensor], images_B3HW: Tensor, tile: int, factor: int
) -> Tensor:
    """encode(images_B3HW) as latents_BCHW, with tiles as `decode_in_tiles` has them.

    Latents, unlike tokens, can fade into each other; both sides of the images are multiples of
    `factor`.
    """
    return _in_tiles(encode, images_B3HW, tile, factor, 1)


def _in_tiles(
    work: Callable[[Tensor], Tensor], x: Tensor, tile: int, scale_in: int, scale_out: int
) -> Tensor:
    """work(x) in tiles of the last two axes; scales are what a token measures there and in x."""
    height, width = x.shape[-2] // scale_in, x.shape[-1] // scale_in
    rows, columns = _starts(height, tile), _starts(width, tile)
    if len(rows) == len(columns) == 1:
        return work(x)
    row_fades = _fades(rows, height, tile, scale_out)
    column_fades = _fades(columns, width, tile, scale_out)
    sums_BCHW, weights_HW = None, torch.zeros(height * scale_out, width * scale_out)
    for top, row_fade in zip(rows, row_fades, strict=True):
        down = slice(top * scale_out, top * scale_out + len(row_fade))
        from_rows = x[..., top * scale_in : (top + tile) * scale_in, :]
        for left, column_fade in zip(columns, column_fades, strict=True):
            across = slice(left * scale_out, left * scale_out + len(column_fade))
            part_BCHW = work(from_rows[..., left * scale_in : (left + tile) * scale_in]).float()
            if sums_BCHW is None:
                sums_BCHW = part_BCHW.new_zeros(*part_BCHW.shape[:2], *weights_HW.shape)
                weights_HW = weights_HW.to(part_BCHW)
            fade_HW = torch.outer(row_fade, column_fade).to(weights_HW)
            sums_BCHW[:, :, down, across] += part_BCHW * fade_HW
            weights_HW[down, across] += fade_HW
    assert sums_BCHW is not None
    return sums_BCHW / weights_HW


def _starts(size: int, tile: int) -> list[int]:
    """Where the tiles of an axis begin: evenly spread, overlapping by a quarter or more."""
    if size <= tile:
        return [0]
    step = tile - max(1, round(tile * OVERLAP_SHARE))
    count = 1 + -(-(size - tile) // step)
    return [round(index * (size - tile) / (count - 1)) for index in range(count)]


def _fades(starts: list[int], size: int, tile: int, factor: int) -> list[Tensor]:
    """Weights in (0, 1] per pixel of each tile: rising where a tile is before it, then falling."""
    fades = []
    for number, start in enumerate(starts):
        end = min(start + tile, size)
        places = torch.arange(start * factor, end * factor) + 0.5
        fade = torch.ones(len(places))
        if number > 0:
            shared = (starts[number - 1] + tile - start) * factor
            fade = fade.minimum((places - start * factor) / shared)
        if number + 1 < len(starts):
            shared = (end - starts[number + 1]) * factor
            fade = fade.minimum((end * factor - places) / shared)
        fades.append(fade)
    return fades
