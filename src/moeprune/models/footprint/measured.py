"""How large a model is: parameters, and bytes counted three ways."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import nn

from moeprune.models.adapter import MoeLayer, moe_layers
from moeprune.models.compressed.four_bit import four_bit_modules
from moeprune.models.shape import read_header, weight_files

# What bitsandbytes stores beside the codes of a layer in eight bits.
PARTS_OF_EIGHT_BITS = (".SCB", ".weight_format")


@dataclass(frozen=True)
class Parameters:
    """Parameter counts: all, those of routed experts (their biases included), and those that one token uses.

    ``active`` counts top-k router rows of the layer's mean size, rows without an expert as 0; which experts a token
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
    total = _parameters_in(model)
    routed, used = 0, 0.0
    for layer in moe_layers(model):
        routed += _parameters_in(layer.experts)
        used += _led_to_by_rows(layer) * layer.top_k / layer.expert_count
    return Parameters(total, routed, round(total - routed + used))


def count_bytes(folder: Path) -> Bytes:
    """Bytes of the checkpoint in ``folder``, dense or compressed, from its headers."""
    files = weight_files(folder)
    sizes: dict[str, int] = {}
    for file in files:
        for name, entry in read_header(file).items():
            start, end = entry["data_offsets"]
            sizes[name] = end - start
    with_overhead = sum(sizes.values())
    return Bytes(
        ideal=with_overhead - sum(sizes[name] for name in overhead_names(sizes)),
        with_overhead=with_overhead,
        on_disk=sum(file.stat().st_size for file in files),
    )


def overhead_names(names: Iterable[str]) -> list[str]:
    """Which tensors of a checkpoint hold no weights: scales, code books and descriptions of quantised layers."""
    names = list(names)
    four_bit = four_bit_modules(names)
    return [name for name in names if name.endswith(PARTS_OF_EIGHT_BITS) or name.rpartition(".weight.")[0] in four_bit]


def _led_to_by_rows(layer: MoeLayer) -> int:
    """Parameters that the router's rows lead to; an expert that several rows share counts for each."""
    if not hasattr(layer.experts, "slot_of_row"):
        return _parameters_in(layer.experts)
    sizes = [_parameters_in(expert) for expert in layer.experts]
    biases = 0 if layer.experts.bias_EH is None else layer.experts.bias_EH.numel()
    return biases + sum(sizes[slot] for slot in layer.experts.slot_of_row if slot >= 0)


def _parameters_in(module: nn.Module) -> int:
    """Parameters below ``module``; codes of quantised layers count as the weights that they stand for."""
    count = sum(parameter.numel() for parameter in module.parameters() if parameter.dtype.is_floating_point)
    for part in module.modules():
        if isinstance(part, Linear4bit | Linear8bitLt) and not part.weight.dtype.is_floating_point:
            count += part.out_features * part.in_features
    return count
