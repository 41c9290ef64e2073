"""Tensors that a checkpoint would hold, by name, type and shape; needs no torch.

Where a quantizer takes the weight of a linear layer, it names the tensors that are stored instead (`Parts`).
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

BYTES_OF = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1}
CODE_OF_DTYPE = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8",
}  # fmt: skip
# From last to first in the library's list of types, which is how it lays tensors out.
LAYOUT_ORDER = ("I64", "F64", "F32", "I32", "BF16", "F16", "I16", "I8", "U8")
HEADER_ALIGNMENT = 8
SCALES_PER_SCALE = 256  # block of double quantisation, in bitsandbytes
CODES_4, CODES_8 = 16, 256
# What holds a matrix itself, in the formats that are known.
CODES = ("weight", "codes")
DESCRIPTIONS = ("weight.quant_state.bitsandbytes__nf4", "weight_format")
MEAN_BYTES = 4
# The mean of the scales, written out in decimal; its digits differ from matrix to matrix.
TYPICAL_OFFSET = 0.012345678901234567

Parts = dict[str, tuple[str, tuple[int, ...]]]  # what follows the layer's name -> safetensors type, shape


@dataclass(frozen=True)
class TensorSpec:
    """One stored tensor, its type as safetensors writes it. ``overhead``: it holds no weights, but their scales."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    overhead: bool = False

    @property
    def nbytes(self) -> int:
        return BYTES_OF[self.dtype] * prod(self.shape)


def four_bit_parts(shape: tuple[int, int], *, block_size: int, nested: bool, dtype: str) -> Parts:
    """What bitsandbytes stores for an NF4 weight [out, in] that was quantised from ``dtype`` (such as "bfloat16").

    Codes, two in a byte; a scale per block (``nested``: in 8 bits, with their own scales and mean); code books; and a
    description as JSON, whose length is exact but for the digits of the mean.
    """
    count = prod(shape)
    blocks = -(-count // block_size)
    state: dict[str, object] = {"quant_type": "nf4", "blocksize": block_size, "dtype": dtype, "shape": list(shape)}
    parts: Parts = {
        "weight": ("U8", (-(-count // 2), 1)),
        "weight.absmax": ("U8" if nested else "F32", (blocks,)),
        "weight.quant_map": ("F32", (CODES_4,)),
    }
    if nested:
        parts["weight.nested_absmax"] = ("F32", (-(-blocks // SCALES_PER_SCALE),))
        parts["weight.nested_quant_map"] = ("F32", (CODES_8,))
        state |= {"nested_blocksize": SCALES_PER_SCALE, "nested_dtype": "float32", "nested_offset": TYPICAL_OFFSET}
    parts["weight.quant_state.bitsandbytes__nf4"] = ("U8", (len(json.dumps(state)),))
    return parts


def eight_bit_parts(shape: tuple[int, int]) -> Parts:
    """What bitsandbytes stores for an int8 weight [out, in]: codes, a scale per row, and how the codes are laid out."""
    return {"weight": ("I8", shape), "SCB": ("F32", (shape[0],)), "weight_format": ("U8", ())}


def grouped_parts(shape: tuple[int, int], *, bits: int, group_size: int) -> Parts:
    """What `moeprune.models.runtime.grouped.GroupedWeight` stores for a matrix [rows, columns].

    Codes, each row in whole bytes; a scale and a zero of 16 bits for each group of a row, its last one perhaps shorter.
    """
    rows, columns = shape
    packed, groups = -(-columns * bits // 8), -(-columns // group_size)
    return {"codes": ("U8", (rows, packed)), "scales": ("I16", (rows, groups)), "zeros": ("I16", (rows, groups))}


def held_bytes(part: str, nbytes: int) -> int:
    """What a stored part of a quantised layer takes in memory, where bitsandbytes has no use for descriptions, and
    keeps the mean of the scales as a number of its own."""
    if part in DESCRIPTIONS:
        return 0
    return nbytes + MEAN_BYTES if part == "weight.nested_absmax" else nbytes


def file_bytes(specs: Iterable[TensorSpec], metadata: dict[str, str]) -> int:
    """Size of the safetensors file that holds these tensors: 8 bytes of length, the header as JSON, the tensors.

    Tensors lie in the order of the library: by type, then by name. The header is padded to a multiple of 8.
    """
    header: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for spec in sorted(specs, key=lambda spec: (LAYOUT_ORDER.index(spec.dtype), spec.name)):
        start, end = end, end + spec.nbytes
        header[spec.name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": (start, end)}
    text = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-text // HEADER_ALIGNMENT) * HEADER_ALIGNMENT + end
