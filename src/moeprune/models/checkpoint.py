"""Writes and reads compressed models: config, tokenizer, safetensors of the true shapes, and their structure as JSON.

config.json            the family's own config
structure.json         widths of the experts of each MoE layer, where router rows lead, which matrices are in four bits
model.safetensors      the weights
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from moeprune.errors import ModelError
from moeprune.models.adapter import MoeLayer, keep_router_rows, moe_layers
from moeprune.models.four_bit import FourBitWeights, quantized_module, quantized_shape, stored_four_bit_linear
from moeprune.models.ragged import PackedWeights, RaggedExperts

STRUCTURE = "structure.json"
WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Structure:
    """How a compressed model differs from its family's, by module name.

    ``widths`` of the stored experts; ``quantized``, the shapes [out, in] of the matrices in four bits; ``slot_of_row``
    of the layers where router row i does not lead to expert i; ``biased``, the layers whose router rows have a bias.
    """

    widths: Mapping[str, tuple[int, ...]]
    quantized: Mapping[str, tuple[int, int]]
    slot_of_row: Mapping[str, tuple[int, ...]]
    biased: tuple[str, ...]


def structure_of(model: nn.Module) -> Structure:
    """The structure of a model in memory whose experts are ragged."""
    quantized = {
        name: quantized_shape(module) for name, module in model.named_modules() if isinstance(module, Linear4bit)
    }
    layers = moe_layers(model)
    return Structure(
        widths={layer.name: layer.stored_widths for layer in layers},
        quantized=quantized,
        slot_of_row={layer.name: layer.experts.slot_of_row for layer in layers if not layer.experts.rows_are_slots},
        biased=tuple(layer.name for layer in layers if layer.experts.bias_EH is not None),
    )


def save_compressed(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: torch.dtype
) -> None:
    """Write a pruned, perhaps quantised model into an existing folder; unquantised weights in ``dtype``."""
    structure = structure_of(model)
    plain = {name for name, _ in model.named_parameters() if quantized_module(name) not in structure.quantized}
    stored: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict().items():
        if tensor.numel() and tensor.data_ptr() in seen:
            continue  # tied to a tensor that is stored already
        seen.add(tensor.data_ptr())
        # Scales of quantised matrices and buffers such as a router's correction bias keep their own precision.
        stored[name] = (tensor.to(dtype) if name in plain else tensor).contiguous()
    save_file(stored, folder / WEIGHTS, {"format": "pt"})
    (folder / STRUCTURE).write_text(json.dumps(asdict(structure), indent=1))
    model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load_compressed(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """A model written by `save_compressed`, computing in ``dtype``, ready for inference.

    Raises ModelError when files are missing, damaged, or do not fit each other.
    """
    try:
        structure = json.loads((folder / STRUCTURE).read_text())
        tensors = load_file(folder / WEIGHTS)
        model = _empty_model(AutoConfig.from_pretrained(folder), dtype)
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"The compressed model in {folder} is missing or damaged: {error}") from error
    try:
        _fill(model, structure, tensors, dtype, folder)
    except (KeyError, ValueError, RuntimeError) as error:
        raise ModelError(f"The weights in {folder} do not fit its {STRUCTURE} and config.json: {error}") from error
    return model.eval()


def _fill(
    model: PreTrainedModel, structure: dict[str, Any], tensors: dict[str, Tensor], dtype: torch.dtype, folder: Path
) -> None:
    """Give the empty model its structure and its weights."""
    for layer in moe_layers(model):
        in_four_bits = f"{layer.name}.weights.down" not in tensors
        _make_ragged(model, layer, structure, in_four_bits, dtype)
    plain: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {module: {} for module in structure["quantized"]}
    for name, tensor in tensors.items():
        module = quantized_module(name)
        if module in parts:
            parts[module][name.removeprefix(f"{module}.")] = tensor
        else:
            plain[name] = tensor
    for module, stored in parts.items():
        model.set_submodule(module, stored_four_bit_linear(stored, dtype))
    _load_plain(model, plain, set(parts), dtype, folder)


def _load_plain(
    model: PreTrainedModel, plain: dict[str, Tensor], quantized: set[str], dtype: torch.dtype, folder: Path
) -> None:
    parameters = {name for name, _ in model.named_parameters()}
    converted = {name: tensor.to(dtype) if name in parameters else tensor for name, tensor in plain.items()}
    missing, unexpected = model.load_state_dict(converted, strict=False, assign=True)
    model.tie_weights()
    absent = [name for name in missing if quantized_module(name) not in quantized and not _is_tied(model, name)]
    if absent or unexpected:
        raise ModelError(f"The weights in {folder} do not fit: missing {absent[:3]}, unexpected {unexpected[:3]}.")


def _is_tied(model: PreTrainedModel, name: str) -> bool:
    return name in (getattr(model, "_tied_weights_keys", None) or {}) and bool(model.config.tie_word_embeddings)


def _empty_model(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The family's model without memory for its weights; buffers that checkpoints leave out are real."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for name, module in list(model.named_modules()):
        if module is not model and any(True for _ in module.buffers(recurse=False)) and not list(module.parameters()):
            model.set_submodule(name, type(module)(config=config))
    return model


def _make_ragged(
    model: nn.Module, layer: MoeLayer, structure: dict[str, Any], quantized: bool, dtype: torch.dtype
) -> None:
    """Give a layer experts of the stored shapes; older structures know neither ``slot_of_row`` nor ``biased``."""
    widths = structure["widths"][layer.name]
    slot_of_row = structure.get("slot_of_row", {}).get(layer.name, range(len(widths)))
    weights: nn.Module
    if quantized:
        weights = FourBitWeights([nn.Identity() for _ in widths], [nn.Identity() for _ in widths])
    else:
        weights = PackedWeights(widths, layer.hidden_size, device="meta", dtype=dtype)
    bias_EH = None
    if layer.name in structure.get("biased", ()):
        bias_EH = torch.empty(len(slot_of_row), layer.hidden_size, device="meta", dtype=dtype)
    experts = RaggedExperts(weights, widths, layer.experts.act_fn, slot_of_row, bias_EH)
    model.set_submodule(layer.name, experts)
    keep_router_rows(layer.router, torch.arange(len(slot_of_row)))
