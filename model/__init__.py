"""The masked image transformer, its tokenizers and text encoder, and sampling.

Needs torch, safetensors, tokenizers, numpy and pillow only. Folders are in the published Meissonic
layout.
"""

from model.compiled import compile_network
from model.compression import insert_compression
from model.edit_operations import OPERATIONS, Operation, operation_of
from model.edit_words import Instruction, is_instruction, read_instruction
from model.ema import WeightAverage
from model.errors import ModelError
from model.folder import PainterDefaults, write_index
from model.hub import model_folder
from model.lora import LoRA, LoRAConfig, Merged
from model.loss import masked_token_loss
from model.machine import find_device, find_dtype
from model.paint_options import PaintOptions
from model.quantize import quantize
from model.sampler import Condition, SamplingOptions, unmask
from model.schedule import cosine_schedule, linear_schedule, sample_mask, training_timestep
from model.stream import Preview, stream
from model.text import CLIPTextConfig, CLIPTextEncoder, TextFeatures
from model.text_to_image import TextToImage
from model.text_tokenizer import CLIPTokenizer
from model.transformer import MaskedImageTransformer, TransformerConfig
from model.vq import Quantized, VQConfig, VQTokenizer

__all__ = [
    "OPERATIONS",
    "CLIPTextConfig",
    "CLIPTextEncoder",
    "CLIPTokenizer",
    "Condition",
    "Instruction",
    "LoRA",
    "LoRAConfig",
    "MaskedImageTransformer",
    "Merged",
    "ModelError",
    "Operation",
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
    "WeightAverage",
    "compile_network",
    "cosine_schedule",
    "find_device",
    "find_dtype",
    "insert_compression",
    "is_instruction",
    "linear_schedule",
    "masked_token_loss",
    "model_folder",
    "operation_of",
    "quantize",
    "read_instruction",
    "sample_mask",
    "stream",
    "training_timestep",
    "unmask",
    "write_index",
]
