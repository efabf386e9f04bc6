"""The masked image transformer, its tokenizers and text encoder, and sampling.

Needs torch, safetensors, tokenizers, numpy and pillow only. Folders are in the published Meissonic
layout.
"""

from model.compiled import compile_network
from model.compression import insert_compression
from model.errors import ModelError
from model.hub import model_folder
from model.loss import masked_token_loss
from model.paint_options import PaintOptions
from model.sampler import Condition, SamplingOptions, unmask
from model.schedule import cosine_schedule, linear_schedule, sample_mask, training_timestep
from model.stream import Preview, stream
from model.text import CLIPTextConfig, CLIPTextEncoder, TextFeatures
from model.text_to_image import PainterDefaults, TextToImage, write_index
from model.text_tokenizer import CLIPTokenizer
from model.transformer import MaskedImageTransformer, TransformerConfig
from model.vq import Quantized, VQConfig, VQTokenizer

__all__ = [
    "CLIPTextConfig",
    "CLIPTextEncoder",
    "CLIPTokenizer",
    "Condition",
    "MaskedImageTransformer",
    "ModelError",
    "PaintOptions",
    "PainterDefaults",
    "Preview",
    "Quantized",
    "SamplingOptions",
    "TextFeatures",
    "TextToImage",
    "TransformerConfig",
    "VQConfig",
    "VQTokenizer",
    "compile_network",
    "cosine_schedule",
    "insert_compression",
    "linear_schedule",
    "masked_token_loss",
    "model_folder",
    "sample_mask",
    "stream",
    "training_timestep",
    "unmask",
    "write_index",
]
