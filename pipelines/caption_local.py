"""A vision-to-text model from a folder: safetensors alone, no code of its own, no network."""

from __future__ import annotations

import functools
import hashlib
import io
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from infra import storage
from infra.config import atelier_home
from infra.digests import canonical_json, sha256_file
from infra.errors import UserError
from pipelines.caption_engines import Answer
from pipelines.captioning_config import CaptioningConfig, LocalConfig
from pipelines.clip_model import CONVERT, as_uri

_IGNORED = (".pt", ".pth", ".bin", ".msgpack", ".h5", ".onnx", ".md", ".py", ".gitattributes")


def identify_local(local: LocalConfig) -> str:
    """The sha256 over the folder's files that decide its captions; reads every byte of them.

    Raises ``UserError`` for a folder without config.json or safetensors, and for a model that
    comes with code.
    """
    uri = as_uri(local.folder)
    names = sorted(info.uri for info in storage.list_objects(uri))
    short = [name.removeprefix(uri.rstrip("/") + "/") for name in names]
    if "config.json" not in short or not any(name.endswith(".safetensors") for name in short):
        pickles = [name for name in short if name.endswith((".pt", ".pth", ".bin"))]
        raise UserError(
            expected=f"config.json and .safetensors of a vision-to-text model in {uri}",
            got=", ".join(short)[:200] or "no such folder, or an empty one",
            remedy="a pickle can run code: " + CONVERT.format(name=pickles[0])
            if pickles
            else "save it with save_pretrained(safe_serialization=True)",
        )
    described = storage.read_json(storage.join(uri, "config.json"))
    if not isinstance(described, dict) or "auto_map" in described:
        raise UserError(
            expected=f"a model that transformers knows in {uri}",
            got="one that brings its own code (auto_map)",
            remedy="take one without; code of strangers is not run",
        )
    digests = {}
    for name, at in zip(short, names, strict=True):
        if not name.endswith(_IGNORED):
            digest = hashlib.sha256()
            with storage.open_stream(at) as stream:
                while chunk := stream.read(1 << 20):
                    digest.update(chunk)
            digests[name] = digest.hexdigest()
    return hashlib.sha256(canonical_json(digests)).hexdigest()


@functools.lru_cache(maxsize=1)
def local_captioner(config_json: str, sha256: str) -> LocalCaptioner:
    """The model of a recipe's captioning section; one is kept per process."""
    config = CaptioningConfig.model_validate_json(config_json)
    if config.local is None:
        raise ValueError("the section has no local model")
    return LocalCaptioner(config, config.local, sha256)


class LocalCaptioner:
    """Captions by greedy decoding, in fp32 on a CPU and bf16 on a GPU."""

    def __init__(self, config: CaptioningConfig, local: LocalConfig, sha256: str) -> None:
        import torch

        if local.num_threads is not None:
            torch.set_num_threads(local.num_threads)
        os.environ["HF_HUB_OFFLINE"] = "1"
        self._config, self._local, self._sha256 = config, local, sha256
        if identify_local(local) != sha256:
            raise UserError(
                expected=f"the model of this run ({sha256[:12]}) in {local.folder}",
                got="another one",
                remedy="put the same files on every worker",
            )
        folder = _folder_of(local, sha256)
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.bfloat16 if self._device == "cuda" else torch.float32
        options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what transformers imports
            from transformers import AutoModelForImageTextToText, AutoProcessor
            from transformers.utils import logging

            quiet: Any = logging.disable_progress_bar
            quiet()

            try:
                load: Any = AutoProcessor.from_pretrained
                self._processor: Any = load(folder, **options)
                model: Any = AutoModelForImageTextToText.from_pretrained(
                    folder, use_safetensors=True, dtype=dtype, **options
                )
            except (OSError, ValueError, KeyError, RuntimeError) as error:
                raise UserError(
                    expected=f"a vision-to-text model and its processor in {local.folder}",
                    got=str(error)[:300],
                ) from error
        self._model = model.to(self._device).eval()

    def answers(self, images: Sequence[bytes]) -> Iterator[Answer]:
        """An image that cannot be decoded is an error of its own."""
        for first in range(0, len(images), self._local.batch_size):
            yield from self._batch(images[first : first + self._local.batch_size])

    def _batch(self, images: Sequence[bytes]) -> list[Answer]:
        from PIL import Image

        decoded: dict[int, Image.Image] = {}
        for index, data in enumerate(images):
            try:
                with Image.open(io.BytesIO(data)) as image:
                    decoded[index] = image.convert("RGB")
            except (OSError, ValueError, SyntaxError):  # what Pillow raises for bad bytes
                continue
        found = dict(zip(decoded, self._captions(list(decoded.values())), strict=True))
        return [found.get(index, Answer(error="decode")) for index in range(len(images))]

    def _captions(self, images: Sequence[Any]) -> list[Answer]:
        import torch

        if not images:
            return []
        inputs = self._inputs(images).to(self._device)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(self._model.dtype)
        with torch.no_grad():
            made = self._model.generate(
                **inputs, max_new_tokens=self._config.max_tokens, do_sample=False, num_beams=1
            )
        asked = inputs.get("input_ids")
        if asked is not None and made.shape[1] >= asked.shape[1]:
            head = made[:, : asked.shape[1]]
            if torch.equal(head, asked.to(head.dtype)):
                made = made[:, asked.shape[1] :]
        texts = self._processor.batch_decode(made, skip_special_tokens=True)
        return [Answer(text=text, model=None, finish_reason="stop") for text in texts]

    def _inputs(self, images: Sequence[Any]) -> Any:
        if not getattr(self._processor, "chat_template", None):
            return self._processor(images=list(images), return_tensors="pt")
        content = [{"type": "image"}, {"type": "text", "text": self._config.prompt}]
        prompt = self._processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        return self._processor(
            images=list(images), text=[prompt] * len(images), return_tensors="pt", padding=True
        )


def _folder_of(local: LocalConfig, sha256: str) -> Path:
    """The model's files on this machine; those of a store are copied once."""
    if "://" not in local.folder:
        return Path(local.folder).expanduser()
    if local.folder.startswith("file://"):
        return Path(local.folder.removeprefix("file://"))
    folder = atelier_home() / "cache" / "captioners" / sha256[:32]
    if not (folder / "whole").is_file():
        storage.download_folder(local.folder, folder)
        (folder / "whole").write_text(sha256_file(folder / "config.json"))
    return folder
