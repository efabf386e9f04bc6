"""A local vision-to-text model, made on the spot with random weights."""

from __future__ import annotations

import io
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from infra.errors import UserError
from pipelines.caption_local import LocalCaptioner, identify_local
from pipelines.captioning_config import CaptioningConfig

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "[DEC]",
    "[ENC]",
    *["a", "red", "fox", "in", "snow"],
]


def make_blip(folder: Path) -> Path:
    """A BLIP of a few thousand weights, as transformers saves it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch
        from transformers import (
            BertTokenizer,
            BlipConfig,
            BlipForConditionalGeneration,
            BlipImageProcessor,
            BlipProcessor,
        )

        small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
        small |= {"num_attention_heads": 2}
        vocabulary = folder.with_name("vocab.txt")
        vocabulary.write_text("\n".join(WORDS))
        tokenizer: Any = BertTokenizer(vocab=str(vocabulary))
        text = {**small, "vocab_size": len(WORDS), "bos_token_id": 5, "eos_token_id": 3,
                "sep_token_id": 3, "pad_token_id": 0, "encoder_hidden_size": 16,
                "max_position_embeddings": 64, "projection_dim": 16}  # fmt: skip
        vision = {**small, "image_size": 32, "patch_size": 16, "projection_dim": 16}
        config = BlipConfig(text_config=text, vision_config=vision, projection_dim=16)
        torch.manual_seed(0)
        model = BlipForConditionalGeneration(config)
        model.save_pretrained(folder)
        images: Any = BlipImageProcessor(size={"height": 32, "width": 32})
        make: Any = BlipProcessor
        make(images, tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_blip(tmp_path_factory.mktemp("blip") / "model")


def config_for(folder: Path) -> CaptioningConfig:
    return CaptioningConfig.model_validate(
        {"local": {"folder": str(folder), "batch_size": 2}, "max_tokens": 6}
    )


def picture(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), colour).save(buffer, "PNG")
    return buffer.getvalue()


def test_images_are_captioned_alike_every_time_and_a_broken_one_fails_alone(blip: Path) -> None:
    config = config_for(blip)
    assert config.local is not None
    captioner = LocalCaptioner(config, config.local, identify_local(config.local))
    images = [picture("red"), b"no image", picture("blue")]
    answers = list(captioner.answers(images))
    assert [answer.error for answer in answers] == [None, "decode", None]
    assert answers == list(captioner.answers(images))
    assert {type(answer.text) for answer in answers} == {str}
    words = set(" ".join(answer.text for answer in answers).split())
    assert words <= set(WORDS)
    assert words


def test_a_model_is_known_by_its_bytes(blip: Path, tmp_path: Path) -> None:
    import shutil

    config = config_for(shutil.copytree(blip, tmp_path / "copy"))
    assert config.local is not None
    sha256 = identify_local(config.local)
    assert sha256 == identify_local(config_for(blip).local)  # type: ignore[arg-type]  # it is local
    (tmp_path / "copy" / "README.md").write_text("hello")
    assert identify_local(config.local) == sha256
    weights = tmp_path / "copy" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert identify_local(config.local) != sha256
    with pytest.raises(UserError, match="got another one"):
        LocalCaptioner(config, config.local, sha256)


def test_pickles_and_code_are_refused(tmp_path: Path) -> None:
    config = config_for(tmp_path)
    assert config.local is not None
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match="a pickle can run code"):
        identify_local(config.local)
    (tmp_path / "model.safetensors").write_bytes(b"x")
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": {"AutoModel": "evil.Model"}}))
    with pytest.raises(UserError, match="its own code"):
        identify_local(config.local)
