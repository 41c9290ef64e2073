"""Reads compressed checkpoints, whole or one decoder layer at a time; `files` says what lies where."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.initialization import no_init_weights

import moeprune.models.families  # noqa: F401  (makes transformers know the families that it lacks)
from moeprune.errors import ModelError
from moeprune.models.adapter import decoder_layers
from moeprune.models.compressed.adapters import ADAPTERS, load_adapters
from moeprune.models.compressed.files import CONFIG, INDEX, PREFIX, never_rounded
from moeprune.models.compressed.quantized import Scheme, module_of, quantized_modules
from moeprune.models.layers.stored import StoredTensor, stored_tensors
from moeprune.models.runtime.structure import make_ragged
from moeprune.models.shape import weight_files

# What config.json holds beside the settings of the family's own config.
_NOT_THE_FAMILYS = ("model_type", "architectures", "auto_map", "pruned", "quantization_config", "dtype", ADAPTERS)


def load_compressed(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """A model written by `CheckpointWriter`, computing in ``dtype``, ready for inference.

    Code that lies in the folder is never run. Raises ModelError when files are missing, damaged, or do not fit each
    other.
    """
    model, stored = pruned_model_on_meta(folder, dtype), checkpoint_tensors(folder)
    layers = dict(decoder_layers(model))
    for name, layer in layers.items():
        inside = {key: tensor.read() for key, tensor in stored.items() if key.startswith(f"{name}.")}
        fill_layer(layer, name, inside, dtype)
    within = tuple(f"{name}." for name in layers)
    fill_rest(model, {key: tensor.read() for key, tensor in stored.items() if not key.startswith(within)}, dtype)
    load_adapters(model, folder, dtype)
    return model.eval()


def checkpoint_tensors(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint by name, not read yet. Raises ModelError when files are missing or damaged."""
    if not (folder / INDEX).exists():
        raise ModelError(f"{folder} is no complete checkpoint: it has no {INDEX}.\nCopy it again, or write it anew.")
    stored: dict[str, StoredTensor] = {}
    for file in weight_files(folder):
        stored |= stored_tensors(file)
    index = json.loads((folder / INDEX).read_text())["weight_map"]
    if index.keys() != stored.keys():
        odd = ", ".join(sorted(index.keys() ^ stored.keys())[:3])
        raise ModelError(f"{folder / INDEX} does not fit the files beside it: {odd}.\nCopy it again, or write it anew.")
    return stored


def pruned_model_on_meta(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a compressed checkpoint without its weights: modules of the true shapes, computing in ``dtype``.

    Buffers that checkpoints leave out are real. Raises ModelError when the config is missing, damaged, no compressed
    model's, or does not fit the family.
    """
    try:
        values = json.loads((folder / CONFIG).read_text())
        structure, family = values["pruned"], values["model_type"].removeprefix(PREFIX)
        config = AutoConfig.for_model(family, **{k: v for k, v in values.items() if k not in _NOT_THE_FAMILYS})
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
            make_ragged(model, structure)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        raise ModelError(
            f"{folder / CONFIG} is missing, damaged, or not of a compressed model: {type(error).__name__}: {error}"
        ) from error
    with no_init_weights():
        for name, scheme in quantized_modules(checkpoint_tensors(folder)).items():
            _make_quantized(model, name, scheme, dtype, folder)
    for name, module in list(model.named_modules()):
        if module is not model and module._non_persistent_buffers_set and not list(module.parameters()):
            model.set_submodule(name, type(module)(config=config))
    kept = never_rounded(model, dtype)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and any(part in name for part in kept):
            tensor.data = tensor.data.float()
    if (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def fill_layer(layer: nn.Module, name: str, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Give decoder layer ``name`` of `pruned_model_on_meta` its weights, computing in ``dtype``.

    ``tensors`` are those of the checkpoint whose names begin with ``name`` and a dot; their device becomes the layer's.
    Raises ModelError for a tensor that is missing, unexpected, or of another shape.
    """
    _fill(layer, f"{name}.", tensors, dtype)


def fill_rest(model: PreTrainedModel, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Give a model what is outside its decoder layers, as `fill_layer` does; tied weights are one tensor afterwards."""
    inside = tuple(f"{name}." for name, _ in decoder_layers(model))
    _fill(model, "", tensors, dtype, elsewhere=inside, absent=set(model.all_tied_weights_keys))
    model.tie_weights()


def _fill(
    module: nn.Module,
    prefix: str,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype,
    elsewhere: tuple[str, ...] = (),
    absent: Collection[str] = (),
) -> None:
    """Set the weights of ``module``; those that begin with one of ``elsewhere`` are not asked for, and those in
    ``absent`` may be missing."""
    local = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    schemes = quantized_modules(local)
    quantized: dict[str, dict[str, Tensor]] = {name: {} for name in schemes}
    plain: dict[str, Tensor] = {}
    for name, tensor in local.items():
        owner = module_of(name, quantized)
        if owner is None:
            plain[name] = tensor
        else:
            quantized[owner][name.removeprefix(f"{owner}.")] = tensor
    for name, parts in quantized.items():
        try:
            schemes[name].fill(_quantized(module, name, schemes[name]), parts, dtype)
        except (KeyError, ValueError, AttributeError) as error:
            raise ModelError(f"The quantised matrix {prefix}{name} does not fit the model: {error}") from error
    expected = {
        name: tensor
        for name, tensor in module.state_dict().items()
        if module_of(name, quantized) is None and not name.startswith(elsewhere)
    }
    _check_fit(prefix, expected, plain, absent)
    cast = {name: t.to(expected[name].dtype) if t.is_floating_point() else t for name, t in plain.items()}
    module.load_state_dict(cast, strict=False, assign=True)


def _check_fit(
    prefix: str, expected: Mapping[str, Tensor], given: Mapping[str, Tensor], absent: Collection[str]
) -> None:
    """Raise ModelError where the names or shapes of ``given`` are not those expected."""
    missing = sorted(expected.keys() - given.keys() - set(absent))
    unexpected = sorted(given.keys() - expected.keys())
    if missing or unexpected:
        raise ModelError(
            f"The checkpoint does not fit the model that its {CONFIG} describes: missing "
            f"{[prefix + name for name in missing[:3]]}, unexpected {[prefix + name for name in unexpected[:3]]}.\n"
            "Copy it again, or write it anew."
        )
    for name, tensor in given.items():
        if tensor.shape != expected[name].shape:
            raise ModelError(
                f"{prefix}{name} in the checkpoint is {list(tensor.shape)}; its {CONFIG} describes a model where it is "
                f"{list(expected[name].shape)}.\nCopy it again, or write it anew."
            )


def _make_quantized(model: nn.Module, name: str, scheme: Scheme, dtype: torch.dtype, folder: Path) -> None:
    try:
        linear = model.get_submodule(name)
    except AttributeError:
        linear = None
    if type(linear) is not nn.Linear:
        raise ModelError(f"{folder} holds a quantised matrix {name}, which its {CONFIG} does not describe.")
    empty = scheme.empty(linear.in_features, linear.out_features, bias=linear.bias is not None, dtype=dtype)
    model.set_submodule(name, empty)


def _quantized(module: nn.Module, name: str, scheme: Scheme) -> nn.Module:
    linear = module.get_submodule(name)
    if not isinstance(linear, scheme.kind):
        raise ValueError(f"the layer is no {scheme.kind.__name__}")
    return linear
