"""Writes one GGUF file, which llama.cpp and what builds on it read."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGML_QUANT_VERSION, MODEL_ARCH_NAMES, GGMLQuantizationType, GGUFWriter, LlamaFileType
from gguf.quants import quantize
from torch import Tensor

from moeprune.export.gguf_families import add_common_settings, gguf_family, gguf_tensors
from moeprune.export.gguf_vocabulary import add_vocabulary
from moeprune.export.stock import Reader, StockModel

# What weights are stored in, and llama.cpp's name for a file that mostly holds it.
ENCODINGS = {
    "F32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "F16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "BF16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "Q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
# Small, and read by the engine in float32: routers and the gates of shared experts.
ALWAYS_FLOAT32 = ("ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight")


def write_gguf(stock: StockModel, file: Path, encoding: str, pre_tokenizer: str | None) -> None:
    """Matrices in ``encoding`` (a name of `ENCODINGS`), vectors and routers in float32.

    With Q8_0, matrices whose rows are no multiple of 32 long are F16. One layer is held at a time, and one of its
    tensors in float32. Raises InputError for what llama.cpp does not know.
    """
    family = gguf_family(stock.config)
    kind, file_type = ENCODINGS[encoding]
    writer = GGUFWriter(file, MODEL_ARCH_NAMES[family.architecture])
    writer.add_type("model")
    writer.add_name(stock.checkpoint.folder.name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(GGML_QUANT_VERSION)
    add_common_settings(writer, stock.config, stock.shape.experts)
    family.add_settings(writer, stock.config, stock.shape.width)
    add_vocabulary(writer, stock.checkpoint.folder, stock.config.vocab_size, pre_tokenizer)
    for name, outline in _tensors(stock, stock.checkpoint.outline):
        stored = _stored_as(name, outline, kind)
        block, block_bytes = GGML_QUANT_SIZES[stored]
        size = outline.numel() // block * block_bytes
        writer.add_tensor_info(name, tuple(outline.shape), np.dtype(np.float32), size, stored)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in _tensors(stock, stock.checkpoint.read):
            writer.write_tensor_data(_encoded(tensor.contiguous(), _stored_as(name, tensor, kind)))
    finally:
        writer.close()


def _tensors(stock: StockModel, read: Reader) -> Iterator[tuple[str, Tensor]]:
    family = gguf_family(stock.config)
    for part in stock.weights(read):
        yield from gguf_tensors(part, family, stock.config)


def _encoded(tensor: Tensor, kind: GGMLQuantizationType) -> np.ndarray:
    if kind is GGMLQuantizationType.BF16:
        return tensor.to(torch.bfloat16).view(torch.int16).numpy()
    if kind is GGMLQuantizationType.F16:
        return tensor.to(torch.float16).numpy()
    return quantize(tensor.float().numpy(), kind)


def _stored_as(name: str, tensor: Tensor, kind: GGMLQuantizationType) -> GGMLQuantizationType:
    if tensor.dim() < 2 or not name.endswith(".weight") or name.endswith(ALWAYS_FLOAT32):
        return GGMLQuantizationType.F32
    if tensor.shape[-1] % GGML_QUANT_SIZES[kind][0]:
        return GGMLQuantizationType.F16
    return kind
