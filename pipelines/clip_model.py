"""A CLIP from local files: who it is, where workers find it, and what it makes of images and text.

A model is known by its configuration, the sha256 of its weights, how images are prepared, and its
compute type; together they are its identity, and the identity's sha256 is the key under which
embeddings lie. Weights are safetensors, copied once into the store, so that workers and later
searches need nothing but the store. Nothing is ever downloaded from a model hub.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from infra import storage
from infra.config import atelier_home
from infra.digests import READ_CHUNK_BYTES, canonical_json, sha256_bytes, sha256_file
from infra.errors import UserError
from pipelines.scoring_config import ClipConfig

if TYPE_CHECKING:
    import torch
    from PIL import Image

# A number for all that changes embeddings and is neither configuration nor weights: the order of
# preparing an image, the normalisation, the stored type. Raise it when one of them changes.
PREPROCESSING_VERSION = 1
BF16_MAX_COSINE_LOSS = 1e-3
CONFIG_NAME = "open_clip_config.json"
_CHECKED_AT_ONCE = 4
_LENGTH_TOLERANCE = 0.01  # float16 rounds each number by 0.05 % at most
LIBRARIES = "pipelines.clip_model:import_libraries"


@dataclass(frozen=True)
class ClipIdentity:
    """A model's identity; equal identities give equal embeddings on one kind of machine."""

    model_cfg: dict[str, Any]
    preprocess_cfg: dict[str, Any]
    weights_sha256: str
    precision: str
    preprocessing_version: int = PREPROCESSING_VERSION

    @property
    def key(self) -> str:
        """The sha256 over all of it, 64 hex digits."""
        return sha256_bytes(canonical_json(self.__dict__))

    @property
    def dim(self) -> int:
        """Numbers per embedding."""
        return int(self.model_cfg["embed_dim"])


def identify(config: ClipConfig) -> tuple[ClipIdentity, str]:
    """The identity of the model in ``config.folder``, and the address of its weights.

    Reads every byte of the weights. Raises ``UserError`` for a folder that is not a whole model,
    for weights that are not safetensors, and for a model that would ask the network for parts.
    """
    folder = as_uri(config.folder)
    weights = _one_safetensors(folder)
    try:
        described = storage.read_json(storage.join(folder, CONFIG_NAME))
    except storage.ObjectMissing:
        raise UserError(
            expected=f"{CONFIG_NAME} (model_cfg, preprocess_cfg) in {folder}",
            got="no such file",
            remedy="publish the model with open_clip's push_to_hf_hub layout, or write the file",
        ) from None
    model_cfg = described.get("model_cfg") if isinstance(described, dict) else None
    if not isinstance(model_cfg, dict) or not {"embed_dim", "vision_cfg", "text_cfg"} <= set(
        model_cfg
    ):
        raise UserError(
            expected=f"model_cfg with embed_dim, vision_cfg and text_cfg in {folder}/{CONFIG_NAME}",
            got=f"keys {sorted(model_cfg) if isinstance(model_cfg, dict) else model_cfg!r}",
        )
    _refuse_remote_parts(model_cfg, folder)
    with storage.open_stream(weights) as stream:
        sha256 = _sha256_of(stream)
    preprocess_cfg = described.get("preprocess_cfg") or {}
    return ClipIdentity(model_cfg, preprocess_cfg, sha256, config.precision), weights


def as_uri(place: str) -> str:
    """A path or address of the recipe as an address."""
    return place if "://" in place else storage.file_uri(Path(place).expanduser())


def _one_safetensors(folder: str) -> str:
    names = [info.uri for info in storage.list_objects(folder)]
    if not names:
        raise UserError(expected=f"a CLIP model in {folder}", got="no such folder, or an empty one")
    found = [uri for uri in names if uri.endswith(".safetensors")]
    if len(found) == 1:
        return found[0]
    other = [uri.rpartition("/")[2] for uri in names if uri.endswith((".pt", ".pth", ".bin"))]
    remedy = "keep one .safetensors file there"
    if not found and other:
        remedy = "a pickle can run code: " + CONVERT.format(name=other[0])
    raise UserError(
        expected=f"one .safetensors file in {folder}",
        got=f"{len(found)}" + (f" and {', '.join(other)}" if other else ""),
        remedy=remedy,
    )


CONVERT = (
    "convert {name} once, where you trust it, with torch.load(..., weights_only=True) and "
    "safetensors.torch.save_file(state_dict, ...)"
)


def _refuse_remote_parts(model_cfg: dict[str, Any], folder: str) -> None:
    text_cfg = model_cfg["text_cfg"]
    for part in ("hf_tokenizer_name", "hf_model_name"):
        if text_cfg.get(part):
            raise UserError(
                expected=f"a text tower with CLIP's own vocabulary in {folder}",
                got=f"text_cfg.{part} {text_cfg[part]!r}, which is fetched from a model hub",
                remedy="use a CLIP that was trained with open_clip's BPE tokenizer",
            )


def _sha256_of(stream: Any) -> str:
    digest = hashlib.sha256()
    while chunk := stream.read(READ_CHUNK_BYTES):
        digest.update(chunk)
    return digest.hexdigest()


def weights_uri(store_uri: str, sha256: str) -> str:
    """Where the store keeps weights of this digest."""
    return storage.join(store_uri, "models", "clip", f"{sha256[:32]}.safetensors")


def publish_weights(source: str, sha256: str, store_uri: str) -> str:
    """Copy weights into the store, when they are not there yet; returns their address there."""
    target = weights_uri(store_uri, sha256)
    with contextlib.suppress(storage.ObjectMissing):
        if storage.stat(target).num_bytes == storage.stat(source).num_bytes:
            return target
    with TemporaryDirectory(prefix="atelier-clip-") as folder:
        path = Path(folder, "weights")
        storage.download(source, path, sha256)
        storage.upload(path, target)
    return target


def local_copy(uri: str, sha256: str) -> Path:
    """A file on this machine with these bytes: a cached copy, checked every time it is asked for.

    Raises ``DigestMismatch`` when the stored object has other bytes.
    """
    path = atelier_home() / "cache" / "objects" / sha256[:32] / uri.rpartition("/")[2]
    if not path.is_file() or sha256_file(path) != sha256:
        storage.download(uri, path, sha256)
    return path


class ClipEncoder:
    """Embeds images and text in fp32 or bf16; embeddings have length one."""

    def __init__(self, identity: ClipIdentity, weights: Path) -> None:
        import torch

        load_clip, open_clip = _imports()
        self.identity = identity
        self.dim = identity.dim
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        # clip-retrieval's mapper asks all_clip for a model by such a name; it gets this very one.
        name = f"atelier-{identity.key[:16]}"
        self.clip_model = f"open_clip:{name}/{weights}"
        with TemporaryDirectory(prefix="atelier-clip-") as folder:
            Path(folder, f"{name}.json").write_text(json.dumps(identity.model_cfg))
            open_clip.add_model_config(folder)
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    wrapper, _, self.tokenize = load_clip(
                        clip_model=self.clip_model,
                        use_jit=False,
                        warmup_batch_size=1,
                        clip_cache_path=None,
                    )
            except (RuntimeError, TypeError) as error:  # torch's and open_clip's for a misfit
                raise UserError(
                    expected=f"weights that fit {CONFIG_NAME}", got=str(error)[:300]
                ) from error
        self._model = wrapper.inner_model.eval()
        self._autocast = identity.precision == "bf16"
        self._is_checked = not self._autocast
        known = open_clip.transform.PreprocessCfg.__dataclass_fields__
        wanted = {k: v for k, v in identity.preprocess_cfg.items() if k in known}
        wanted.setdefault("size", self._model.visual.image_size)
        cfg = open_clip.transform.PreprocessCfg(**wanted)
        self._transform = open_clip.transform.image_transform_v2(cfg, is_train=False)

    def prepare(self, image: Image.Image) -> torch.Tensor:
        """The model's input for one image: float32 of (3, height, width)."""
        return self._transform(image)  # type: ignore[no-any-return]

    def encode_image(self, images_B3HW: torch.Tensor) -> torch.Tensor:
        """Embeddings (B, dim) in float32, of length one."""
        self._check_bf16(images_B3HW)
        return self._encode(self._model.encode_image, images_B3HW, self._autocast)

    def encode_text(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        """Embeddings (B, dim) in float32, of length one."""
        return self._encode(self._model.encode_text, tokens_BT, self._autocast)

    def _encode(self, tower: Any, batch: torch.Tensor, autocast: bool) -> torch.Tensor:
        import torch

        with (
            torch.no_grad(),
            torch.autocast(self.device, torch.bfloat16, enabled=autocast),
        ):
            features = tower(batch.to(self.device)).float()
        return torch.nn.functional.normalize(features, dim=-1)

    def _check_bf16(self, images_B3HW: torch.Tensor) -> None:
        """Once per process: bf16 may not turn an embedding by more than the stated tolerance."""
        if self._is_checked:
            return
        few = images_B3HW[:_CHECKED_AT_ONCE]
        exact, fast = (self._encode(self._model.encode_image, few, bf16) for bf16 in (False, True))
        loss = float((1 - (exact * fast).sum(-1)).max())
        if not loss <= BF16_MAX_COSINE_LOSS:
            raise UserError(
                expected=f"bf16 embeddings within {BF16_MAX_COSINE_LOSS} of fp32 (1 - cosine)",
                got=f"{loss:.2g}",
                remedy="set scoring.clip.precision to fp32",
            )
        self._is_checked = True


def _imports() -> tuple[Any, Any]:
    """all_clip and open_clip, offline and without the deprecations of what they import."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import open_clip
        from all_clip import load_clip
    return load_clip, open_clip


def runner_and_mapper() -> tuple[Any, Any]:
    """clip-retrieval's ``Runner`` and ``ClipMapper``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what clip-retrieval imports
        from clip_retrieval.clip_inference.mapper import ClipMapper
        from clip_retrieval.clip_inference.runner import Runner
    return Runner, ClipMapper


def import_libraries() -> None:
    """All that embedding imports of others: 10 s of a core, once for all workers of a machine."""
    _imports()
    runner_and_mapper()


@functools.lru_cache(maxsize=1)
def _encoder(identity_json: bytes, uri: str, num_threads: int | None) -> ClipEncoder:
    import torch

    if num_threads is not None:
        torch.set_num_threads(num_threads)
    identity = ClipIdentity(**json.loads(identity_json))
    return ClipEncoder(identity, local_copy(uri, identity.weights_sha256))


def encoder_of(identity: ClipIdentity, uri: str, num_threads: int | None = None) -> ClipEncoder:
    """The encoder with the weights at ``uri``; one is kept per process."""
    return _encoder(canonical_json(identity.__dict__), uri, num_threads)


def prepared(encoder: ClipEncoder, data: bytes) -> torch.Tensor:
    """The model's input for an encoded image; Pillow's errors for bytes that are none."""
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        return encoder.prepare(image)


def problem_with(*vectors: npt.NDArray[np.float16]) -> str | None:
    """Why embeddings of a sample are of no use: NaN, infinite or overflown, or of no length."""
    for vector in vectors:
        if not np.isfinite(vector).all():
            return "not finite"
        if abs(float(np.linalg.norm(vector.astype(np.float64))) - 1.0) > _LENGTH_TOLERANCE:
            return "not of length one"
    return None
