"""How large a model is: parameters, and bytes counted three ways."""

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path

from bitsandbytes.nn import Linear4bit
from torch import nn

from moeprune.models.adapter import moe_layers
from moeprune.models.checkpoint import STRUCTURE
from moeprune.models.four_bit import quantized_module, quantized_shape
from moeprune.models.shape import read_header, weight_files

_BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U8": 8}
QUANTIZED_BITS = 4


@dataclass(frozen=True)
class Parameters:
    """Parameter counts: all, those of routed experts (their biases included), and those that one token uses.

    ``active`` counts top-k router rows of the layer's mean width, rows without an expert as 0; which experts a token
    really meets depends on routing.
    """

    total: int
    routed: int
    active: int


@dataclass(frozen=True)
class Bytes:
    """Size of the weights in bytes.

    ``ideal``: parameters times their nominal bits. ``with_overhead``: every stored tensor, scales and code books
    included. ``on_disk``: the files.
    """

    ideal: int
    with_overhead: int
    on_disk: int


def count_parameters(model: nn.Module) -> Parameters:
    """Counts of a dense, pruned or quantised model; tied weights count once."""
    total = sum(parameter.numel() for parameter in model.parameters() if parameter.dtype.is_floating_point)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            total += prod(quantized_shape(module))
    routed = used = 0.0
    for layer in moe_layers(model):
        channel_parameters = 3 * layer.hidden_size
        bias_EH = getattr(layer.experts, "bias_EH", None)
        biases = 0 if bias_EH is None else bias_EH.numel()
        routed += channel_parameters * sum(layer.stored_widths) + biases
        used += (channel_parameters * sum(layer.widths) + biases) * layer.top_k / layer.expert_count
    return Parameters(total, int(routed), round(total - routed + used))


def count_bytes(folder: Path) -> Bytes:
    """Bytes of the checkpoint in ``folder``, dense or compressed, from its headers."""
    structure = folder / STRUCTURE
    quantized = json.loads(structure.read_text())["quantized"] if structure.exists() else {}
    ideal_bits = sum(QUANTIZED_BITS * prod(shape) for shape in quantized.values())
    with_overhead = on_disk = 0
    for file in weight_files(folder):
        on_disk += file.stat().st_size
        for name, entry in read_header(file).items():
            start, end = entry["data_offsets"]
            with_overhead += end - start
            module = quantized_module(name)
            if module not in quantized or name.endswith(".bias"):
                ideal_bits += _BITS[entry["dtype"]] * prod(entry["shape"])
    return Bytes(-(-ideal_bits // 8), with_overhead, on_disk)
