"""Linear layers whose weights are stored in eight bits with a scale per row: LLM.int8() (arXiv 2208.07339)."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from bitsandbytes.nn import Int8Params, Linear8bitLt
from torch import Tensor, nn

SCALES, LAYOUT = "SCB", "weight_format"
# Inputs larger than this meet weights in 16 bits: the paper's choice, and what transformers takes when it loads one.
OUTLIER = 6.0


class EightBitLinear(Linear8bitLt):
    """The library's layer, for inputs of any number of axes; without a GPU the library itself knows up to three, and
    the latent attention of DeepSeek versions 2 and 3 has four."""

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs.flatten(0, -2)).unflatten(0, inputs.shape[:-1])


def eight_bit_linear(weight_OI: Tensor, bias_O: Tensor | None) -> Linear8bitLt:
    """A linear layer with ``weight_OI`` rounded to int8: ``w = q * s_o / 127`` with ``s_o = max_i |w_oi|``.

    The library rounds it to float16 first.
    """
    outputs, inputs = weight_OI.shape
    layer = empty_eight_bit_linear(inputs, outputs, bias=bias_O is not None, dtype=weight_OI.dtype)
    weight: Any = Int8Params(weight_OI.detach().clone(), requires_grad=False, has_fp16_weights=False)
    layer.weight = weight.to(weight_OI.device)
    if bias_O is not None:
        layer.bias = nn.Parameter(bias_O.detach(), requires_grad=False)
    return layer


def empty_eight_bit_linear(inputs: int, outputs: int, *, bias: bool, dtype: torch.dtype) -> Linear8bitLt:
    """A layer without weights, on the meta device, whose bias is in ``dtype``."""
    layer = EightBitLinear(inputs, outputs, bias, has_fp16_weights=False, threshold=OUTLIER, device="meta")
    if bias:
        layer.bias = nn.Parameter(layer.bias.detach().to(dtype), requires_grad=False)
    return layer.eval()


def fill_eight_bit_linear(layer: Linear8bitLt, parts: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Give the layer its stored tensors ``parts``: ``weight``, ``SCB``, ``weight_format``, perhaps ``bias``.

    Raises ValueError when they are of another shape, KeyError when one is missing.
    """
    weight_OI, scales_O = parts["weight"], parts[SCALES]
    expected = (layer.out_features, layer.in_features)
    if tuple(weight_OI.shape) != expected or len(scales_O) != layer.out_features:
        raise ValueError(f"{expected} was expected, {tuple(weight_OI.shape)} is stored")
    if (layer.bias is not None) != ("bias" in parts):
        raise ValueError("its bias is missing" if "bias" not in parts else "a bias is stored, none was expected")
    layer.weight = Int8Params(weight_OI, requires_grad=False, has_fp16_weights=False, CB=weight_OI, SCB=scales_O)
    if "bias" in parts:
        layer.bias = nn.Parameter(parts["bias"].to(dtype), requires_grad=False)


def eight_bit_modules(tensor_names: Iterable[str]) -> set[str]:
    """Names of the modules that are stored in eight bits, by the names of a checkpoint's tensors."""
    return {name.removesuffix(f".{SCALES}") for name in tensor_names if name.endswith(f".{SCALES}")}
