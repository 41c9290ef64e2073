"""Writes compressed checkpoints, whole or one decoder layer at a time; `files` says what lies where."""

import json
from collections.abc import Collection, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

from moeprune.errors import InputError, ModelError
from moeprune.models.adapter import decoder_layers
from moeprune.models.compressed.adapters import ADAPTERS, adapter_names, save_adapters, without_adapters
from moeprune.models.compressed.code import write_code
from moeprune.models.compressed.eight_bit import OUTLIER
from moeprune.models.compressed.files import (
    CONFIG,
    INDEX,
    REST,
    layer_file,
    layer_metadata,
    merged,
    never_rounded,
    read_layer_metadata,
    save_tensors,
    save_text,
    stored_precision,
    structure_of,
)
from moeprune.models.compressed.four_bit import four_bit_modules
from moeprune.models.compressed.grouping import grouped_in
from moeprune.models.compressed.quantized import quantized_modules
from moeprune.models.layers.stored import stored_tensors


class CheckpointWriter:
    """Writes a pruned, perhaps quantised model into an existing folder, layer by layer; unquantised weights in
    ``dtype``.

    A layer's file appears when it is complete. Layers may come in any order and from several processes: a writer for a
    folder that holds some already goes on. Buffers, scales of quantised matrices, and weights that the family never
    rounds below float32 keep their precision.
    """

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self.folder = folder
        self.dtype = dtype

    def add_layer(self, depth: int, name: str, layer: nn.Module) -> None:
        """Write decoder layer ``name`` (``model.layers.3``), number ``depth``, whose weights are in memory.

        Raises InputError when its experts are not cut yet.
        """
        for part_name, part in layer.named_modules():
            if isinstance(getattr(part, "gate_up_proj", None), nn.Parameter):
                raise InputError(
                    f"The experts {name}.{part_name} are still the family's dense ones.",
                    change="Cut the model first; where nothing is to be removed, with allocator=keep_all.",
                )
        tensors = _stored(layer, f"{name}.", self.dtype)
        save_tensors(self.folder / layer_file(depth), tensors, layer_metadata(name, structure_of(layer, f"{name}.")))

    def finish(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Write what is outside the decoder layers of ``model``, the tokenizer, the code, the index, then the config.

        The decoder layers of ``model`` need not be in memory. Raises ModelError when the file of one is missing.
        """
        layers = [name for name, _ in decoder_layers(model)]
        inside = tuple(f"{name}." for name in layers)
        outside = {name: module for name, module in model.named_modules() if not name.startswith(inside)}
        structures = [self._structure(depth, name) for depth, name in enumerate(layers)]
        structures.append({"grouped": grouped_in(outside, ())})
        save_tensors(self.folder / REST, _stored(model, "", self.dtype, inside), {})
        tokenizer.save_pretrained(self.folder)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(self.folder)
        files = [*(layer_file(depth) for depth in range(len(layers))), REST]
        stored = {name: tensor for file in files for name, tensor in stored_tensors(self.folder / file).items()}
        size = sum(prod(tensor.shape) * tensor.dtype.itemsize for tensor in stored.values())
        index = {"metadata": {"total_size": size}, "weight_map": {name: t.file.name for name, t in stored.items()}}
        save_text(self.folder / INDEX, json.dumps(index, indent=1))
        config = model.config.to_diff_dict() | write_code(self.folder, type(model), type(model.config))
        config |= {"dtype": str(self.dtype).removeprefix("torch."), "pruned": merged(structures)}
        if quantized_modules(stored):
            config["quantization_config"] = _quantization(model, stored, config["pruned"]["widths"], self.dtype)
        if adapter_names(model):
            config[ADAPTERS] = adapter_names(model)
        save_text(self.folder / CONFIG, json.dumps(config, indent=1))

    def _structure(self, depth: int, name: str) -> dict[str, Any]:
        file = self.folder / layer_file(depth)
        try:
            stored_name, structure = read_layer_metadata(file)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{self.folder} has no sound {file.name} of {name}; write that layer first.") from error
        if stored_name != name:
            raise ModelError(f"{file} holds {stored_name}, not {name}; use an empty folder.")
        return structure


def save_compressed(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: torch.dtype
) -> None:
    """Write a pruned, perhaps quantised model in memory into an existing folder, as `CheckpointWriter` does; its
    adapters too."""
    save_adapters(model, folder, dtype)
    with without_adapters(model):
        writer = CheckpointWriter(folder, dtype)
        for depth, (name, layer) in enumerate(decoder_layers(model)):
            writer.add_layer(depth, name, layer)
        writer.finish(model, tokenizer)


def _stored(module: nn.Module, prefix: str, dtype: torch.dtype, elsewhere: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """What a checkpoint holds of ``module``, under names that begin with ``prefix``; tied weights once.

    Names that begin with one of ``elsewhere`` are left out.
    """
    parameters = {name for name, parameter in module.named_parameters() if parameter.is_floating_point()}
    kept = never_rounded(module, dtype)
    stored: dict[str, Tensor] = {}
    seen: set[tuple[int, torch.Size]] = set()
    for name, tensor in module.state_dict().items():
        place = (tensor.data_ptr(), tensor.shape)
        if name.startswith(elsewhere) or (tensor.numel() and place in seen):
            continue
        if tensor.is_meta:
            raise ModelError(f"{prefix}{name} is not in memory, so it cannot be written.")
        seen.add(place)
        tensor = tensor.to(stored_precision(name, dtype, kept)) if name in parameters else tensor
        stored[prefix + name] = tensor.contiguous()
    return stored


def _quantization(
    model: nn.Module, names: Collection[str], widths: Mapping[str, tuple[int, ...]], dtype: torch.dtype
) -> dict[str, Any]:
    """What transformers needs to know to load the quantised matrices among the tensors ``names``."""
    linear = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    for experts, of_slots in widths.items():
        slots = range(len(of_slots))
        linear |= {f"{experts}.{slot}.{part}_proj" for slot in slots for part in ("gate", "up", "down")}
    settings: dict[str, Any] = {"llm_int8_skip_modules": sorted(linear - quantized_modules(names).keys())}
    if four_bit_modules(names):
        settings |= {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
        settings["bnb_4bit_use_double_quant"] = any(name.endswith(".weight.nested_absmax") for name in names)
    else:
        settings |= {"load_in_8bit": True, "llm_int8_threshold": OUTLIER}
    return BitsAndBytesConfig(**settings).to_dict()
