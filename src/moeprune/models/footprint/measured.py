"""How large a model is: parameters, and bytes counted three ways."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import nn

from moeprune.models.adapter import MoeLayer, moe_layers
from moeprune.models.compressed.adapters import ADAPTERS
from moeprune.models.compressed.four_bit import four_bit_modules
from moeprune.models.compressed.quantized import module_of, quantized_modules
from moeprune.models.footprint.tensors import held_bytes
from moeprune.models.headers import read_header
from moeprune.models.layers.streaming import Model, skeleton
from moeprune.models.runtime.grouped import GroupedWeight
from moeprune.models.shape import weight_files

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
    included. ``on_disk``: the files. ``in_memory``: all parameters, buffers and scales of the whole model as it is
    loaded, in the precision it computes with. Hidden states, keys and values, and what a layer needs for a moment while
    it computes (such as a dequantised matrix), come on top; a model whose layers stay on disk holds one of them.
    """

    ideal: int
    with_overhead: int
    on_disk: int
    in_memory: int


def count_parameters(model: nn.Module) -> Parameters:
    """Counts of a dense, pruned or quantised model; tied weights count once."""
    total = _parameters_in(model)
    routed, used = 0, 0.0
    for layer in moe_layers(model):
        routed += _parameters_in(layer.experts)
        used += _led_to_by_rows(layer) * layer.top_k / layer.expert_count
    return Parameters(total, routed, round(total - routed + used))


def count_bytes(folder: Path, model: Model) -> Bytes:
    """Bytes of the checkpoint in ``folder``, dense or compressed, and of ``model``, which was loaded from it."""
    files, adapters = weight_files(folder), adapter_files(folder)
    sizes = {name: stored_bytes(entry) for file in files for name, entry in read_header(file).items()}
    of_adapters = sum(stored_bytes(entry) for file in adapters for entry in read_header(file).values())
    with_overhead = sum(sizes.values()) + of_adapters
    return Bytes(
        ideal=with_overhead - sum(sizes[name] for name in overhead_names(sizes)),
        with_overhead=with_overhead,
        on_disk=sum(file.stat().st_size for file in [*files, *adapters]),
        in_memory=_bytes_in_memory(model, sizes),
    )


def adapter_files(folder: Path) -> list[Path]:
    """The files of adapters that lie beside a checkpoint's weights."""
    return sorted(folder.glob(f"{ADAPTERS}/*/*.safetensors"))


def stored_bytes(entry: Mapping[str, Any]) -> int:
    """Bytes of a tensor, from its entry in a file's header."""
    start, end = entry["data_offsets"]
    return end - start


def overhead_names(names: Iterable[str]) -> list[str]:
    """Which tensors of a checkpoint hold no weights: scales, zeros, code books and descriptions of quantised layers."""
    names = list(names)
    four_bit = four_bit_modules(names)
    grouped = {name.removesuffix(".codes") for name in names if name.endswith(".codes")}
    scales = {f"{module}.{part}" for module in grouped for part in ("scales", "zeros")}
    return [
        name
        for name in names
        if name.endswith(PARTS_OF_EIGHT_BITS) or name in scales or name.rpartition(".weight.")[0] in four_bit
    ]


def _bytes_in_memory(model: Model, stored: Mapping[str, int]) -> int:
    """As `Bytes` says; ``stored`` are the bytes of the checkpoint's tensors."""
    return sum([*_own_tensors(skeleton(model)), *_tensors_of_bitsandbytes(stored)])


def _own_tensors(model: nn.Module) -> Iterator[int]:
    """Bytes of all tensors but the weights of bitsandbytes' layers, which have none before they are loaded."""
    seen = set()
    for module in model.modules():
        theirs = isinstance(module, Linear4bit | Linear8bitLt)
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if id(tensor) not in seen and not (theirs and name == "weight"):
                yield tensor.nbytes
            seen.add(id(tensor))


def _tensors_of_bitsandbytes(stored: Mapping[str, int]) -> Iterator[int]:
    """Bytes in memory of the weights of its layers, from what is stored of them."""
    modules = quantized_modules(stored)
    for name, size in stored.items():
        module = module_of(name, modules)
        if module is not None and not name.endswith(".bias"):
            yield held_bytes(name.removeprefix(f"{module}."), size)


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
        if isinstance(part, GroupedWeight):
            count += len(part.codes) * part.columns
        elif isinstance(part, Linear4bit | Linear8bitLt) and not part.weight.dtype.is_floating_point:
            count += part.out_features * part.in_features
    return count
