"""Parts that rest elsewhere than they work, and work in tiles."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from model.errors import ModelError
from model.lora import LoRA, LoRAConfig
from model.memory import at_work_on, decode_in_tiles, encode_in_tiles
from model.text_to_image import TextToImage

META = torch.device("meta")


def coloured_blocks(tokens_BHW: Tensor, factor: int) -> Tensor:
    """A decoder that looks at one token at a time: its value, in three shades, as a block."""
    shades = torch.stack([(tokens_BHW * k % 97) / 97 for k in (1, 5, 11)], dim=1)
    return shades.repeat_interleave(factor, 2).repeat_interleave(factor, 3)


@given(
    height=st.integers(1, 21),
    width=st.integers(1, 21),
    tile=st.integers(4, 9),
    factor=st.sampled_from([1, 4]),
)
def test_tiles_put_every_pixel_where_it_belongs(
    height: int, width: int, tile: int, factor: int
) -> None:
    tokens = torch.randint(0, 97, (2, height, width), generator=torch.Generator().manual_seed(0))
    seen = []

    def decode(part_BHW: Tensor) -> Tensor:
        seen.append(part_BHW.shape[1:])
        return coloured_blocks(part_BHW, factor)

    whole = coloured_blocks(tokens, factor)
    assert torch.allclose(decode_in_tiles(decode, tokens, tile, factor), whole, atol=1e-6)
    assert max(max(shape) for shape in seen) <= tile
    assert len(seen) == 1 or max(height, width) > tile


@given(
    height=st.integers(1, 21),
    width=st.integers(1, 21),
    tile=st.integers(4, 9),
    factor=st.sampled_from([1, 4]),
)
def test_encoding_in_tiles_puts_every_latent_where_it_belongs(
    height: int, width: int, tile: int, factor: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, height * factor, width * factor, generator=generator)
    seen = []

    def encode(part_B3HW: Tensor) -> Tensor:
        seen.append(max(part_B3HW.shape[2:]))
        return torch.nn.functional.avg_pool2d(part_B3HW, factor)

    whole = torch.nn.functional.avg_pool2d(images, factor)
    assert torch.allclose(encode_in_tiles(encode, images, tile, factor), whole, atol=1e-6)
    assert max(seen) <= tile * factor


def test_neither_encoder_nor_decoder_sees_more_than_a_tile(painter: TextToImage) -> None:
    seen = []
    for part in (painter.vq.encoder, painter.vq.post_quant_conv):
        part.register_forward_pre_hook(
            lambda part, inputs: seen.append(max(inputs[0].shape[2:]))  # px, or tokens of 4 px
        )
    pixels = torch.rand(1, 3, 96, 64, generator=torch.Generator().manual_seed(0))
    whole = painter.encode_pixels(pixels)
    assert torch.equal(painter.save_memory(tile_px=96).encode_pixels(pixels), whole)
    seen.clear()
    tokens = painter.save_memory(tile_px=16).encode_pixels(pixels)
    assert tokens.shape == (1, 24, 16)
    assert not torch.equal(tokens, whole)
    assert set(seen) == {16}
    seen.clear()
    painter.decode_pixels(tokens)
    assert set(seen) == {4}


def test_neighbours_fade_into_each_other_evenly() -> None:
    """One tile says 0, the next 1: from left to right it rises in equal steps, nowhere a seam."""
    tokens, answers = torch.zeros(1, 8, 13, dtype=torch.int64), iter([0.0, 1.0])

    def decode(part_BHW: Tensor) -> Tensor:
        return torch.full((1, 3, part_BHW.shape[1] * 4, part_BHW.shape[2] * 4), next(answers))

    row = decode_in_tiles(decode, tokens, 8, 4)[0, 0, 7]
    assert bool((row[:20] == 0).all())
    assert bool((row[32:] == 1).all())
    assert torch.allclose(row[19:33].diff()[1:-1], torch.full((11,), 1 / 12), atol=1e-6)


def test_a_small_picture_is_decoded_as_a_whole(painter: TextToImage) -> None:
    tokens = painter.generate_tokens(["a star"], steps=2)
    whole = painter.decode_pixels(tokens)
    assert torch.equal(painter.save_memory(tile_px=24).decode_pixels(tokens), whole)
    tiled = painter.save_memory(tile_px=16).decode_pixels(tokens)
    assert tiled.shape == whole.shape
    assert not torch.equal(tiled, whole)
    assert 0 <= float(tiled.min()) <= float(tiled.max()) <= 1


def test_tiles_too_small_to_see_anything_are_refused(painter: TextToImage) -> None:
    for tile_px in (-1, 0, 15):
        with pytest.raises(ModelError, match="expected at least 16 px"):
            painter.save_memory(tile_px=tile_px)


def test_a_part_has_its_own_tensors_again(painter: TextToImage) -> None:
    encoder = painter.save_memory(quantize_to="int8").text_encoder  # buffers, not only parameters
    before = {**dict(encoder.named_parameters()), **dict(encoder.named_buffers())}
    with at_work_on(META, encoder):
        assert {t.device for t in encoder.parameters()} == {META}
        assert {t.device for t in encoder.buffers()} == {META}
    after = {**dict(encoder.named_parameters()), **dict(encoder.named_buffers())}
    assert before.keys() == after.keys()
    assert all(after[name] is tensor for name, tensor in before.items())


def test_an_offloaded_painter_works_where_its_network_is(
    painter: TextToImage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The meta device stands for a GPU; every part is asked where its tensors are at work."""
    lora = LoRA.start({"text_encoder": painter.text_encoder}, LoRAConfig(1, targets=".*fc1"))
    lora.save_pretrained(tmp_path / "style")
    lora.detach()
    painter.save_memory(offload=True).to(META)
    painter.load_lora(tmp_path / "style")
    assert painter.device == META
    at_work: list[set[torch.device]] = []
    painter.text_encoder.register_forward_pre_hook(
        lambda part, ids: at_work.append({t.device for t in part.parameters()})
    )
    features = painter.encode_prompts(["a star"])
    assert at_work == [{META}]
    assert {t.device for t in painter.loras[0].parameters()} == {META}
    assert (features.hidden_BTD.device, features.pooled_BP.device) == (META, META)
    seen: list[set[torch.device]] = []
    for name in ("encode", "decode"):  # torch cannot run these two themselves on that device
        monkeypatch.setattr(
            painter.vq, name, lambda x: seen.append({t.device for t in painter.vq.parameters()})
        )
    painter.encode_pixels(torch.zeros(1, 3, 24, 24))
    painter.decode_pixels(torch.zeros(1, 6, 6, dtype=torch.int64))
    assert seen == [{META}, {META}]
    for part in (painter.text_encoder, painter.vq):
        assert {t.device.type for t in part.parameters()} == {"cpu"}


def test_offloading_changes_no_pixel(painter: TextToImage) -> None:
    before = painter.generate_tokens(["a star", ""], steps=3)
    painter.save_memory(offload=True).to("cpu")
    assert torch.equal(painter.generate_tokens(["a star", ""], steps=3), before)
