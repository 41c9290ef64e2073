"""Linear layers whose weights are stored in four bits (bitsandbytes NF4)."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import Tensor, nn

_QUANT_STATE = ".weight.quant_state.bitsandbytes__nf4"


def four_bit_linear(weight_OI: Tensor, bias_O: Tensor | None, *, block_size: int, nested: bool) -> Linear4bit:
    """A linear layer with ``weight_OI`` rounded to NF4 in blocks of ``block_size``; ``nested`` also quantises the
    scales (double quantisation)."""
    outputs, inputs = weight_OI.shape
    layer = empty_four_bit_linear(inputs, outputs, bias=bias_O is not None, dtype=weight_OI.dtype)
    weight: Any = Params4bit(
        weight_OI.detach().contiguous(),
        requires_grad=False,
        blocksize=block_size,
        compress_statistics=nested,
        quant_type="nf4",
        module=layer,
    )
    layer.weight = weight.to(weight_OI.device)
    if bias_O is not None:
        layer.bias = nn.Parameter(bias_O.detach(), requires_grad=False)
    return layer


def empty_four_bit_linear(inputs: int, outputs: int, *, bias: bool, dtype: torch.dtype) -> Linear4bit:
    """A layer without weights, on the meta device, that computes in ``dtype``."""
    layer = Linear4bit(inputs, outputs, bias, compute_dtype=dtype, quant_type="nf4", device="meta")
    if bias:
        layer.bias = nn.Parameter(layer.bias.detach().to(dtype), requires_grad=False)
    return layer


def fill_four_bit_linear(layer: Linear4bit, parts: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Give the layer its stored tensors ``parts``: ``weight``, ``weight.absmax``, ..., perhaps ``bias``.

    Raises ValueError when they are of another shape.
    """
    weight = parts["weight"]
    state = {name.removeprefix("weight."): value for name, value in parts.items() if name.startswith("weight.")}
    layer.weight = Params4bit.from_prequantized(weight, state, device=weight.device, module=layer)
    state_of_layer: Any = layer.quant_state
    state_of_layer.dtype = dtype
    if tuple(state_of_layer.shape) != quantized_shape(layer):
        raise ValueError(f"{quantized_shape(layer)} was expected, {tuple(state_of_layer.shape)} is stored")
    if (layer.bias is not None) != ("bias" in parts):
        raise ValueError("its bias is missing" if "bias" not in parts else "a bias is stored, none was expected")
    if "bias" in parts:
        layer.bias = nn.Parameter(parts["bias"].to(dtype), requires_grad=False)


def four_bit_modules(tensor_names: Iterable[str]) -> set[str]:
    """Names of the modules that are stored in four bits, by the names of a checkpoint's tensors."""
    return {name.removesuffix(_QUANT_STATE) for name in tensor_names if name.endswith(_QUANT_STATE)}


def quantized_shape(layer: Linear4bit) -> tuple[int, int]:
    """The [out, in] shape of the weight that the layer stands for; also of one whose weights are not in memory."""
    return layer.out_features, layer.in_features
