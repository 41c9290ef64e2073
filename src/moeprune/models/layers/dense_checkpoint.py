"""Reads a dense checkpoint one decoder layer at a time, as transformers reads it whole."""

import copy
import dataclasses
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging as transformers_logging
from transformers.utils.loading_report import LoadStateDictInfo

from moeprune.errors import ModelError
from moeprune.models.adapter import decoder_layers
from moeprune.models.families import to_contract
from moeprune.models.layers.expert_stacks import FoundTensor, expert_stacks
from moeprune.models.layers.stored import StoredTensor, stored_tensors
from moeprune.models.shape import weight_files

log = logging.getLogger(__name__)

META = torch.device("meta")
OUTSIDE = -1  # the depth of what belongs to no decoder layer
OUTSIDE_NAME = "what is outside the decoder layers"
READABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class DenseCheckpoint:
    """The decoder layers of a checkpoint, each read when it is asked for; weights in ``dtype``.

    Names are mapped, experts fused, and precisions chosen by transformers' own loading code, which is given the tensors
    of one layer at a time: the weights are bit for bit those of ``from_pretrained``.

    Raises ModelError, from the headers of the files alone, where one is missing, damaged, or lacks tensors, or where
    shapes do not fit the config.
    """

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self._folder = folder
        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
            # Gives the layers as the family has them; loaded are copies of its layers, one at a time.
            self._family = _model_on_meta(config, dtype)
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(f"The checkpoint in {folder} cannot be read: {error}") from error
        if getattr(config, "quantization_config", None) is not None:
            raise ModelError(
                f"The weights in {folder} are quantised, and only those in 16 or more bits are read layer by layer.\n"
                "Use a checkpoint in bfloat16, or model.streaming=never."
            )
        self._dtype = dtype
        self._names = [name for name, _ in decoder_layers(self._family)]
        self._layers = [layer for _, layer in decoder_layers(self._family)]
        mapping: Any = get_model_conversion_mapping(self._family)
        self._load_config = LoadStateDictConfig(
            dtype=dtype,
            dtype_plan=self._family._get_dtype_plan(dtype),
            weight_mapping=mapping,
        )
        self._found = self._found_by_depth()
        self._stacks = {depth: expert_stacks(found) for depth, found in self._found.items()}
        for depth in range(len(self._layers)):
            self._read(depth, META)

    def skeleton(self, device: torch.device) -> PreTrainedModel:
        """The model with everything outside its decoder layers on ``device``; its experts keep the contract."""
        model = _model_on_meta(self._family.config, self._dtype)
        with only_layers(model, {}):
            info = self._convert(model, OUTSIDE, device)
            self._refuse(info, OUTSIDE_NAME, ())
            config = dataclasses.replace(self._load_config, device_map={"": device})
            with _quiet():
                PreTrainedModel._finalize_model_loading(model, config, info)
            self._refuse(info, OUTSIDE_NAME, info.missing_keys)  # without those that are tied
        to_contract(model)
        if (self._folder / "generation_config.json").exists():
            model.generation_config = GenerationConfig.from_pretrained(self._folder, local_files_only=True)
        return model.eval()

    def layer(self, depth: int, device: torch.device) -> nn.Module:
        """A decoder layer with its weights on ``device``; its experts keep the contract."""
        layer = self._read(depth, device)
        to_contract(layer)
        return layer

    def _read(self, depth: int, device: torch.device) -> nn.Module:
        layer = copy.deepcopy(self._layers[depth])
        name = self._names[depth]
        stacks = self._stacks.get(depth, []) if device != META else []
        for stack in stacks:
            path, _, own_name = stack.key.removeprefix(f"{name}.").rpartition(".")
            part: Any = layer.get_submodule(path)
            weights: Any = nn.Parameter(stack.read(getattr(part, own_name), device))
            weights._is_hf_initialized = True  # so that transformers does not fill it with random numbers
            setattr(part, own_name, weights)
        with only_layers(self._family, {depth: layer}):
            info = self._convert(self._family, depth, device, {part for stack in stacks for part in stack.names})
            if device != META:
                nothing: Any = set()
                self._family._move_missing_keys_from_meta_to_device(nothing, {"": device}, None, None)
                self._family._initialize_missing_keys(is_quantized=False)
        missing = {key for key in info.missing_keys if key.startswith(f"{name}.")} - {stack.key for stack in stacks}
        self._refuse(info, name, missing)
        return layer

    def _convert(
        self, model: PreTrainedModel, depth: int, device: torch.device, but: Collection[str] = ()
    ) -> LoadStateDictInfo:
        """Let transformers read what belongs to a layer, ``but`` for some names."""
        stored = {part.name: part.tensor for part in self._found.get(depth, []) if part.name not in but}
        tensors: Mapping[str, StoredTensor | Tensor] = stored
        if device == META:
            tensors = {name: torch.empty(one.shape, dtype=one.dtype, device=META) for name, one in stored.items()}
        config = dataclasses.replace(self._load_config, device_map={"": device})
        with _quiet():
            info, _ = convert_and_load_state_dict_in_model(model, dict(tensors), config)
        return info

    def _refuse(self, info: LoadStateDictInfo, where: str, missing: Iterable[str]) -> None:
        """Raise ModelError where transformers would go on with weights of its own making."""
        mismatched = [f"{name} ({tuple(got)}, not {tuple(wanted)})" for name, got, wanted in info.mismatched_keys]
        for problem, names in (
            ("of other shapes than its config.json says", sorted(mismatched)),
            ("that cannot be converted", sorted(info.conversion_errors)),
            ("that are missing", sorted(missing)),
        ):
            if names:
                raise ModelError(
                    f"The checkpoint in {self._folder} cannot be loaded: {where} has tensors {problem}: "
                    f"{', '.join(names[:3])}{' ...' if len(names) > 3 else ''}."
                )

    def _found_by_depth(self) -> dict[int, list[FoundTensor]]:
        """What belongs to each decoder layer."""
        expected = self._family.state_dict()
        renamed = Renaming(self._family, expected)
        depth_of = {f"{name}.": depth for depth, name in enumerate(self._names)}
        prefix_of = {key: prefix for prefix in depth_of for key in expected if key.startswith(prefix)}
        by_depth: dict[int, list[FoundTensor]] = {}
        unknown = []
        for file in weight_files(self._folder):
            for name, tensor in stored_tensors(file).items():
                key, pattern = renamed(name)
                if key not in expected:
                    unknown.append(name)
                    continue
                if tensor.dtype not in READABLE and expected[key].is_floating_point():
                    raise ModelError(f"{name} in {file} is stored as {tensor.dtype}; use a checkpoint in bfloat16.")
                depth = depth_of[prefix_of[key]] if key in prefix_of else OUTSIDE
                converter = renamed.converter_of[pattern] if pattern is not None else None
                by_depth.setdefault(depth, []).append(FoundTensor(name, tensor, key, converter, pattern))
        if unknown:
            log.info("%d tensors of %s belong to no part of the model, as %s", len(unknown), self._folder, unknown[0])
        return by_depth


class Renaming:
    """How transformers calls the tensors of a family's checkpoints in its ``model``; ``expected`` are the names there.

    ``converter_of`` says what makes one tensor of several.
    """

    def __init__(self, model: PreTrainedModel, expected: Mapping[str, Any]) -> None:
        mapping: Any = get_model_conversion_mapping(model) or []
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self.converter_of = {pattern: one for one in self._converters for pattern in one.source_patterns}
        self._prefix, self._expected = model.base_model_prefix, dict(expected)

    def __call__(self, name: str) -> tuple[str, str | None]:
        """(name in the model, pattern of the converter that it goes through, if any)."""
        key, pattern = rename_source_key(name, self._renamings, self._converters, self._prefix, self._expected)
        if key not in self._expected and name in self._expected:
            return name, None
        return key, pattern


def _model_on_meta(config: Any, dtype: torch.dtype) -> PreTrainedModel:
    with META:
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype).eval()


@contextmanager
def only_layers(model: PreTrainedModel, present: Mapping[int, nn.Module]) -> Iterator[None]:
    """Within the context the model has only these decoder layers, at their places."""
    path = next(name for name, _ in decoder_layers(model)).rpartition(".")[0]
    layers: Any = model.get_submodule(path)
    model.set_submodule(path, nn.ModuleList(present.get(depth, nn.Identity()) for depth in range(len(layers))))
    try:
        yield
    finally:
        model.set_submodule(path, layers)


@contextmanager
def _quiet() -> Iterator[None]:
    """Within the context transformers shows no progress bar per layer, and reports no problems: they are raised."""
    shown, level = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if shown:
            transformers_logging.enable_progress_bar()
