"""Model folders: what is written comes back, and whatever does not fit is told in one line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.checkpoint import write_whole
from model.errors import ModelError
from model.lora import LoRA, LoRAConfig
from model.text import CLIPTextConfig, CLIPTextEncoder
from model.text_to_image import TextToImage
from model.transformer import MaskedImageTransformer
from model.vq import VQConfig, VQTokenizer

WEIGHTS = "diffusion_pytorch_model.safetensors"
MakeTransformer = Callable[..., MaskedImageTransformer]


@pytest.fixture
def folder(tmp_path: Path, make_transformer: MakeTransformer) -> Path:
    """A transformer's folder."""
    make_transformer().save_pretrained(tmp_path / "transformer")
    return tmp_path / "transformer"


def change_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    weights = load_file(folder / WEIGHTS)
    for key, value in changes.items():
        name = key.replace("__", ".")
        if value is None:
            del weights[name]
        else:
            weights[name] = value
    save_file(weights, folder / WEIGHTS)


def one_line(error: pytest.ExceptionInfo[ModelError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def test_round_trip(folder: Path, make_transformer: MakeTransformer) -> None:
    loaded = MaskedImageTransformer.from_pretrained(folder)
    assert loaded.config == make_transformer().config
    assert same_weights(loaded, make_transformer())
    assert all(p.requires_grad for p in loaded.parameters())
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", WEIGHTS]
    config = json.loads((folder / "config.json").read_text())
    assert config["_class_name"] == "Transformer2DModel"
    assert config["timestep_convention"] == "mask_ratio"


def test_published_config_means_step_indices(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["timestep_convention"]
    (folder / "config.json").write_text(json.dumps(config))
    assert MaskedImageTransformer.from_pretrained(folder).config.timestep_convention == "step_index"


def test_vq_and_text_round_trip(tmp_path: Path) -> None:
    vq = VQTokenizer(VQConfig.small((8, 8), 16, 4))
    vq.save_pretrained(tmp_path / "vqvae")
    assert same_weights(VQTokenizer.from_pretrained(tmp_path / "vqvae"), vq)
    assert VQTokenizer.from_pretrained(tmp_path / "vqvae").config == vq.config
    text = CLIPTextEncoder(
        CLIPTextConfig(
            vocab_size=20,
            hidden_size=8,
            intermediate_size=16,
            projection_dim=6,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=7,
        )
    )
    text.save_pretrained(tmp_path / "text_encoder")
    assert same_weights(CLIPTextEncoder.from_pretrained(tmp_path / "text_encoder"), text)
    assert (tmp_path / "text_encoder" / "model.safetensors").is_file()


def test_text_encoder_skips_the_position_counter_and_foreign_keys(tmp_path: Path) -> None:
    config = CLIPTextConfig(20, 8, 16, 6, 1, 2, 7)
    CLIPTextEncoder(config).save_pretrained(tmp_path / "t")
    weights = load_file(tmp_path / "t" / "model.safetensors")
    weights["text_model.embeddings.position_ids"] = torch.arange(7)[None]
    save_file(weights, tmp_path / "t" / "model.safetensors")
    values = json.loads((tmp_path / "t" / "config.json").read_text())
    (tmp_path / "t" / "config.json").write_text(json.dumps({**values, "top_p": 1.0}))
    assert CLIPTextEncoder.from_pretrained(tmp_path / "t").config == config


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("asked", [torch.float32, torch.bfloat16])
def test_any_stored_type_becomes_the_asked_one(
    folder: Path, stored: torch.dtype, asked: torch.dtype
) -> None:
    weights = {key: value.to(stored) for key, value in load_file(folder / WEIGHTS).items()}
    save_file(weights, folder / WEIGHTS)
    loaded = MaskedImageTransformer.from_pretrained(folder, dtype=asked)
    assert {p.dtype for p in loaded.parameters()} == {asked}


def test_shards(folder: Path, make_transformer: MakeTransformer) -> None:
    weights = load_file(folder / WEIGHTS)
    names = sorted(weights)
    index = {}
    for number, part in enumerate((names[::2], names[1::2])):
        shard = f"diffusion_pytorch_model-{number + 1:05}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, folder / shard)
        index.update(dict.fromkeys(part, shard))
    (folder / WEIGHTS).unlink()
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": index}))
    assert same_weights(MaskedImageTransformer.from_pretrained(folder), make_transformer())

    (folder / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelError, match=r"names no usable shards: missing .*00002-of-00002"):
        MaskedImageTransformer.from_pretrained(folder)


def test_shard_outside_the_folder_is_refused(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder.parent / "elsewhere.safetensors")
    index = {"weight_map": {"a": "../elsewhere.safetensors"}}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="outside the folder"):
        MaskedImageTransformer.from_pretrained(folder)


def test_all_that_does_not_fit_is_told_at_once(folder: Path) -> None:
    change_weights(
        folder,
        context_embedder__bias=None,
        mlm_layer__conv2__weight=None,
        surplus=torch.ones(1),
        project_to_hidden__weight=torch.ones(3, 3),
        embed__layer_norm__weight=torch.ones(5),
    )
    with pytest.raises(ModelError) as error:
        MaskedImageTransformer.from_pretrained(folder)
    message = one_line(error)
    assert "2 missing: context_embedder.bias, mlm_layer.conv2.weight" in message
    assert "1 unexpected: surplus" in message
    assert "2 misshapen: embed.layer_norm.weight is (5,), expected (16,)" in message
    assert "project_to_hidden.weight is (3, 3), expected (16, 16)" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(folder: Path, value: float) -> None:
    broken = load_file(folder / WEIGHTS)["context_embedder.bias"]
    broken[0] = value
    change_weights(folder, context_embedder__bias=broken)
    with pytest.raises(ModelError) as error:
        MaskedImageTransformer.from_pretrained(folder)
    assert "NaN or infinite values in 1 tensors (context_embedder.bias)" in one_line(error)


@pytest.mark.parametrize(
    "dtype", ["int8", "int64", "bool", "uint8", "complex64", "float4_e2m1fn_x2"]
)
def test_weights_of_another_kind_are_refused(folder: Path, dtype: str) -> None:
    kind = getattr(torch, dtype)
    bias = load_file(folder / WEIGHTS)["context_embedder.bias"]
    packed = torch.zeros(len(bias), dtype=torch.uint8).view(kind) if "x2" in dtype else None
    change_weights(folder, context_embedder__bias=bias.to(kind) if packed is None else packed)
    with pytest.raises(ModelError) as error:
        MaskedImageTransformer.from_pretrained(folder)
    assert f"context_embedder.bias is {dtype}, expected a floating type" in one_line(error)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_weights_of_eight_bits_are_read(folder: Path, dtype: torch.dtype) -> None:
    change_weights(folder, context_embedder__bias=torch.ones(16).to(dtype))
    loaded = MaskedImageTransformer.from_pretrained(folder)
    assert torch.equal(loaded.context_embedder.bias.detach(), torch.ones(16))


def test_pickles_are_refused(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save({}, folder / "diffusion_pytorch_model.bin")
    with pytest.raises(ModelError) as error:
        MaskedImageTransformer.from_pretrained(folder)
    assert "pickled weights (diffusion_pytorch_model.bin), which can run code" in one_line(error)


@pytest.mark.parametrize("kept_bytes", [0, 4, 1000])
def test_cut_off_weights_are_refused(folder: Path, kept_bytes: int) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:kept_bytes])
    with pytest.raises(ModelError) as error:
        MaskedImageTransformer.from_pretrained(folder)
    assert f"{WEIGHTS} is damaged" in one_line(error)


def test_missing_parts_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"nowhere/config.json is missing"):
        MaskedImageTransformer.from_pretrained(tmp_path / "nowhere")
    (folder / WEIGHTS).unlink()
    with pytest.raises(ModelError, match="has no weights: expected diffusion_pytorch_model"):
        MaskedImageTransformer.from_pretrained(folder)


@pytest.mark.parametrize("text", ["{", "[1]", "\udcff"])
def test_broken_config_is_told(folder: Path, text: str) -> None:
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ModelError, match=r"config.json (is not valid JSON|holds a list)"):
        MaskedImageTransformer.from_pretrained(folder)


def test_unknown_config_keys_are_told_with_the_nearest(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["num_layer"] = config.pop("num_layers")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"unknown key 'num_layer' .did you mean 'num_layers'"):
        MaskedImageTransformer.from_pretrained(folder)


def test_saving_again_replaces_the_whole_folder(
    folder: Path, make_transformer: MakeTransformer
) -> None:
    make_transformer(num_layers=2).save_pretrained(folder)
    assert MaskedImageTransformer.from_pretrained(folder).config.num_layers == 2
    assert sorted(p.name for p in folder.parent.iterdir()) == ["transformer"]


@pytest.mark.parametrize("part", ["painter", "transformer", "vq", "text", "tokenizer", "lora"])
@pytest.mark.parametrize("other", ["events.log", "samples/1.png", "link"])
def test_a_folder_that_holds_anything_else_is_left_alone(
    painter: TextToImage, tmp_path: Path, part: str, other: str
) -> None:
    """As it was before, whether a model lies there already or not, and down to the last folder."""
    parts: dict[str, Any] = {
        "painter": painter,
        "transformer": painter.transformer,
        "vq": painter.vq,
        "text": painter.text_encoder,
        "tokenizer": painter.tokenizer,
        "lora": LoRA.start({"transformer": painter.transformer}, LoRAConfig(rank=1)),
    }
    (tmp_path / "runs").mkdir()
    folder = tmp_path / "runs" / "mine"
    folder.mkdir()
    for is_saved in (False, True):
        if is_saved:
            parts[part].save_pretrained(folder)  # an empty folder is nobody's
        place = max((p for p in (folder, *folder.rglob("*")) if p.is_dir()), key=str) / other
        place.parent.mkdir(exist_ok=True)
        if other == "link":
            place.symlink_to(tmp_path / "nowhere")
        else:
            place.write_bytes(b"kept")
        before = {p: p.is_file() and p.read_bytes() for p in folder.rglob("*")}
        with pytest.raises(ModelError) as error:
            parts[part].save_pretrained(folder)
        assert f"would be lost ({place.relative_to(folder)})" in one_line(error)
        assert {p: p.is_file() and p.read_bytes() for p in folder.rglob("*")} == before
        assert [p.name for p in folder.parent.iterdir()] == ["mine"]
        place.unlink()


def test_what_no_folder_can_replace_is_left_alone(
    tmp_path: Path, make_transformer: MakeTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "keep.bin").write_bytes(b"kept")
    with pytest.raises(ModelError) as error:
        make_transformer().save_pretrained(tmp_path / "keep.bin")
    assert "keep.bin is a file: expected a folder" in one_line(error)
    assert (tmp_path / "keep.bin").read_bytes() == b"kept"
    (tmp_path / "here" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "below")
    for place in (".", "..", tmp_path / "here"):
        with pytest.raises(ModelError, match="the folder that this process works in"):
            make_transformer().save_pretrained(place)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["here", "keep.bin"]


def test_a_link_to_a_folder_stays_one(tmp_path: Path, make_transformer: MakeTransformer) -> None:
    make_transformer().save_pretrained(tmp_path / "models" / "v1")
    (tmp_path / "latest").symlink_to(tmp_path / "models" / "v1")
    make_transformer(num_layers=2).save_pretrained(tmp_path / "latest")
    assert (tmp_path / "latest").is_symlink()
    assert MaskedImageTransformer.from_pretrained(tmp_path / "models" / "v1").config.num_layers == 2
    assert [p.name for p in (tmp_path / "models").iterdir()] == ["v1"]


def test_an_exchange_that_stops_halfway_is_undone(
    folder: Path, make_transformer: MakeTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, rename = (folder / WEIGHTS).read_bytes(), Path.rename

    def stop(self: Path, target: Path) -> Path:
        if target == folder and self.name != "old":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", stop)
    with pytest.raises(KeyboardInterrupt):
        make_transformer(num_layers=2).save_pretrained(folder)
    assert (folder / WEIGHTS).read_bytes() == before
    assert [p.name for p in folder.parent.iterdir()] == ["transformer"]


def test_a_crash_while_saving_keeps_the_old_folder(folder: Path) -> None:
    def crash(staging: Path) -> None:
        (staging / "config.json").write_text("half")
        raise OSError("disk full")

    before = (folder / "config.json").read_bytes()
    with pytest.raises(OSError, match="disk full"):
        write_whole(folder, crash)
    assert (folder / "config.json").read_bytes() == before
    assert sorted(p.name for p in folder.parent.iterdir()) == ["transformer"]
