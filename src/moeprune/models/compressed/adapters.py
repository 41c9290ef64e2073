"""Low-rank adapters (PEFT) of a compressed model: attached, merged, written beside its checkpoint and read again.

adapters/NAME/adapter_config.json         PEFT's own files, so that `peft.PeftModel` reads them where this package is
adapters/NAME/adapter_model.safetensors   not installed; in config.json ``adapters`` lists the names
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import LoraConfig, LoraModel
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel

from moeprune.errors import ModelError
from moeprune.models.compressed.files import CONFIG, PREFIX, save_tensors, save_text
from moeprune.models.compressed.low_rank import AdaptedLinear, AdaptedRouter
from moeprune.models.layers.stored import stored_tensors
from moeprune.models.runtime.grouped import GroupedWeight

ADAPTERS = "adapters"  # the folder, and the key in config.json
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_OF_PEFT_MODEL = "base_model.model."  # how the names of tensors begin in PEFT's files
_MAGNITUDE = ".lora_magnitude_vector"


def attach_adapters(model: PreTrainedModel, configs: Mapping[str, LoraConfig], *, empty: bool = False) -> None:
    """Put adapters on the model, in place, by name; all are active, and only they train.

    Their values are random, but change nothing yet; ``empty`` ones have none and are on the meta device.
    """
    # Each adapter looks for its targets outside those that came before: the fewest first, or it takes hours.
    order = sorted(configs, key=lambda name: _is_for_linears(configs[name]))
    for config in configs.values():
        config._register_custom_module(
            {nn.Linear: AdaptedLinear} if _is_for_linears(config) else {nn.Module: AdaptedRouter}
        )
    with _own_type(model):
        tuner = _Tuner(model, {name: configs[name] for name in order}, order[0], low_cpu_mem_usage=empty)
        for name in order[1:]:
            tuner.inject_adapter(model, name, low_cpu_mem_usage=empty)
        tuner.set_adapter(order)
    model.train(model.training)  # the new modules too


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """{name: layer} of the layers that have adapters, as PEFT wraps them."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def adapter_names(model: nn.Module) -> list[str]:
    """The names of the adapters that a model in memory has."""
    return list(getattr(model, "peft_config", {}))


def adapter_parameters(model: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    """The parameters of one adapter, by their names in the model."""
    ending = f".{adapter}.weight"
    return {name: value for name, value in parameters_of_adapters(model).items() if name.endswith(ending)}


def parameters_of_adapters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of all adapters, by their names in the model."""
    return {name: value for name, value in model.named_parameters() if ".lora_" in name}


def adapts_quantized(model: nn.Module) -> bool:
    """Whether adapters lie on quantised weights, into which they cannot be merged."""
    kinds = (Linear4bit, Linear8bitLt, GroupedWeight)
    return any(isinstance(layer.get_base_layer(), kinds) for layer in adapted_layers(model).values())


def merge_adapters(model: PreTrainedModel) -> None:
    """Add the adapters to the weights, in place; afterwards the model has none.

    Raises ModelError where a merged weight is not finite. The weights must not be quantised.
    """
    for name, layer in adapted_layers(model).items():
        try:
            layer.merge(safe_merge=True)
        except ValueError as error:
            raise ModelError(f"The adapter of {name} cannot be merged: {error}") from error
        model.set_submodule(name, layer.get_base_layer())
    del model.peft_config


@contextmanager
def without_adapters(model: PreTrainedModel) -> Iterator[None]:
    """Within the context the model has no adapters."""
    layers = adapted_layers(model)
    for name, layer in layers.items():
        model.set_submodule(name, layer.get_base_layer())
    try:
        yield
    finally:
        for name, layer in layers.items():
            model.set_submodule(name, layer)


def save_adapters(model: PreTrainedModel, folder: Path, dtype: torch.dtype) -> None:
    """Write the adapters of the model below the folder of its checkpoint, in ``dtype``."""
    for adapter in adapter_names(model):
        place = folder / ADAPTERS / adapter
        place.mkdir(parents=True, exist_ok=True)
        parameters = adapter_parameters(model, adapter)
        stored = {_stored_name(name, adapter): value.detach().to(dtype) for name, value in parameters.items()}
        save_tensors(place / _WEIGHTS, stored, {})
        peft_config: Any = model.peft_config[adapter]
        settings = peft_config.to_dict() | {"inference_mode": True}
        plain = {key: sorted(value) if isinstance(value, set) else value for key, value in settings.items()}
        save_text(place / _CONFIG, json.dumps(plain, indent=1))


def load_adapters(model: PreTrainedModel, folder: Path, dtype: torch.dtype) -> None:
    """Attach the adapters of the checkpoint in ``folder`` to its model, computing in ``dtype``.

    Raises ModelError where one is missing, damaged, or does not fit the model.
    """
    names = stored_adapters(folder)
    if not names:
        return
    places = {name: folder / ADAPTERS / name for name in names}
    try:
        attach_adapters(
            model, {name: LoraConfig.from_pretrained(str(place)) for name, place in places.items()}, empty=True
        )
        given = {
            _name_in_model(key, name): tensor.read().to(dtype)
            for name, place in places.items()
            for key, tensor in stored_tensors(place / _WEIGHTS).items()
        }
        left = model.load_state_dict(given, strict=False, assign=True)
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"The adapters in {folder / ADAPTERS} cannot be read: {error}\nCopy them again.") from error
    missing = [name for name in left.missing_keys if ".lora_" in name]
    if missing or left.unexpected_keys:
        raise ModelError(
            f"The adapters in {folder / ADAPTERS} do not fit the model: missing {missing[:3]}, unexpected "
            f"{left.unexpected_keys[:3]}.\nCopy the whole checkpoint again."
        )
    model.requires_grad_(False)


def stored_adapters(folder: Path) -> list[str]:
    """The names of the adapters that belong to the checkpoint in ``folder``. Raises ModelError where one is missing."""
    names = json.loads((folder / CONFIG).read_text()).get(ADAPTERS, [])
    missing = [str(file.relative_to(folder)) for file in _files(folder, names) if not file.is_file()]
    if missing:
        raise ModelError(f"{folder} is no complete checkpoint: it has no {', '.join(missing)}.\nCopy it again.")
    return names


def adapter_files(folder: Path) -> list[Path]:
    """The files of weights of the adapters that belong to the checkpoint in ``folder``; of a dense one, none."""
    return [file for file in _files(folder, stored_adapters(folder)) if file.name == _WEIGHTS]


def refuse_adapters(folder: Path) -> None:
    """Raise ModelError where the checkpoint in ``folder`` has adapters: its layers cannot come one at a time."""
    if stored_adapters(folder):
        raise ModelError(
            f"{folder} has adapters beside its weights, and a model with adapters is not streamed.\n"
            "Use model.streaming=never where it fits in memory, or recovery.merge=true."
        )


class _Tuner(LoraModel):
    """PEFT's, but for asking each layer about twenty times for its weight, which of some kinds is dequantised anew."""

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)  # it is on the right device since it was made


@contextmanager
def _own_type(model: PreTrainedModel) -> Iterator[None]:
    """Within the context the config does not say the family's type, for which PEFT would look for fused experts."""
    config: Any = model.config
    config.model_type = f"{PREFIX}{type(config).model_type}"
    try:
        yield
    finally:
        del config.model_type


def _is_for_linears(config: LoraConfig) -> bool:
    return not config.target_parameters


def _files(folder: Path, names: list[str]) -> list[Path]:
    return [folder / ADAPTERS / name / file for name in names for file in (_CONFIG, _WEIGHTS)]


def _stored_name(name: str, adapter: str) -> str:
    """As PEFT writes ``a.lora_A.NAME.weight`` of a model in memory: without the adapter's name."""
    kept = "" if f"{_MAGNITUDE}." in name else ".weight"
    return _OF_PEFT_MODEL + name.removesuffix(f".{adapter}.weight") + kept


def _name_in_model(name: str, adapter: str) -> str:
    """The inverse of `_stored_name`."""
    return f"{name.removeprefix(_OF_PEFT_MODEL).removesuffix('.weight')}.{adapter}.weight"
