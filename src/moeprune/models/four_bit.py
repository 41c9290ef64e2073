"""Linear layers and ragged experts whose weights are stored in four bits (bitsandbytes NF4)."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import Tensor, nn

_OF_LINEAR = re.compile(r"(?P<module>.+)\.(?:weight(?:\..+)?|bias)$")


def four_bit_linear(weight_OI: Tensor, bias_O: Tensor | None, *, block_size: int, nested: bool) -> Linear4bit:
    """A linear layer with ``weight_OI`` rounded to NF4 in blocks of ``block_size``; ``nested`` also quantises the
    scales (double quantisation)."""
    layer = _empty_linear(weight_OI.shape[1], weight_OI.shape[0], bias_O is not None, nested, weight_OI.dtype)
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


def stored_four_bit_linear(parts: Mapping[str, Tensor], dtype: torch.dtype) -> Linear4bit:
    """The layer whose stored tensors are ``parts``: ``weight``, ``weight.absmax``, ..., perhaps ``bias``.

    Computes in ``dtype``.
    """
    weight = parts["weight"]
    state = {name.removeprefix("weight."): value for name, value in parts.items() if name.startswith("weight.")}
    layer = _empty_linear(1, 1, False, "nested_absmax" in state, dtype)
    layer.weight = Params4bit.from_prequantized(weight, state, device=weight.device, module=layer)
    state_of_layer: Any = layer.quant_state
    state_of_layer.dtype = dtype
    layer.out_features, layer.in_features = state_of_layer.shape
    if "bias" in parts:
        layer.bias = nn.Parameter(parts["bias"].to(dtype), requires_grad=False)
    return layer


def quantized_module(tensor_name: str) -> str | None:
    """The module that a stored tensor belongs to if that module is quantised: ``a.b`` for ``a.b.weight.absmax``."""
    match = _OF_LINEAR.match(tensor_name)
    return match["module"] if match else None


def _empty_linear(inputs: int, outputs: int, bias: bool, nested: bool, dtype: torch.dtype) -> Linear4bit:
    return Linear4bit(
        inputs, outputs, bias, compute_dtype=dtype, compress_statistics=nested, quant_type="nf4", device="meta"
    )


def quantized_shape(layer: Linear4bit) -> tuple[int, int]:
    """The [out, in] shape of the weight that the layer stands for."""
    state: Any = layer.quant_state
    return tuple(state.shape)


class FourBitWeights(nn.Module):
    """The four-bit counterpart of `PackedWeights`: one quantised matrix per expert and projection."""

    def __init__(self, gate_up: Sequence[nn.Module], down: Sequence[nn.Module]) -> None:
        super().__init__()
        self.gate_up = nn.ModuleList(gate_up)
        self.down = nn.ModuleList(down)

    def gate_and_up(self, expert: int, hidden_TH: Tensor) -> Tensor:
        """``[x W_gate^T, x W_up^T]`` [T, 2 C_e]."""
        return self.gate_up[expert](hidden_TH)

    def project_down(self, expert: int, channels_TC: Tensor) -> Tensor:
        """``h W_down^T`` [T, H]."""
        return self.down[expert](channels_TC)
