"""Models whose decoder layers lie on disk and come into memory one at a time."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear8bitLt
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from moeprune.errors import ModelError
from moeprune.models.adapter import decoder_layers
from moeprune.models.compressed.adapters import refuse_adapters
from moeprune.models.compressed.reader import checkpoint_tensors, fill_layer, fill_rest, pruned_model_on_meta
from moeprune.models.layers.dense_checkpoint import DenseCheckpoint, only_layers
from moeprune.models.layers.freed_memory import give_freed_memory_back


class StreamedModel:
    """A model whose decoder layers are on the meta device, and everything else is in memory.

    ``fill(depth, device)`` puts the weights of a decoder layer from disk into the modules of ``model``. ``devices`` are
    those that compute; ``model`` is on the first. ``activations_gib`` is how many GiB of hidden states may be
    in memory where there is no folder for them.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        fill: Callable[[int, torch.device], None],
        devices: tuple[torch.device, ...],
        activations_gib: float = math.inf,
    ) -> None:
        self.model = model
        self.devices = devices
        self.activations_gib = activations_gib
        self._fill = fill
        self._layers = [layer for _, layer in decoder_layers(model)]

    @property
    def config(self) -> PreTrainedConfig:
        return self.model.config

    @contextmanager
    def resident(self, depth: int) -> Iterator[nn.Module]:
        """Within the context the decoder layer has its weights; afterwards its tensors are on the meta device, also
        those that came into it meanwhile."""
        layer = self._layers[depth]
        # Also those that are replaced meanwhile: lists of MoE layers still refer to them.
        parts = list(layer.modules())
        try:
            self._fill(depth, self.devices[0])
            yield layer
        finally:
            drop_tensors(dict.fromkeys([*parts, *layer.modules()]))


Model = PreTrainedModel | StreamedModel


def skeleton(model: Model) -> PreTrainedModel:
    """The model's modules; the decoder layers of a streamed one hold no weights unless they are resident."""
    return model.model if isinstance(model, StreamedModel) else model


def devices_of(model: Model) -> tuple[torch.device, ...]:
    """The devices that compute; the first holds what is outside the decoder layers."""
    return model.devices if isinstance(model, StreamedModel) else (next(model.parameters()).device,)


def resident(model: Model, depth: int, layer: nn.Module) -> AbstractContextManager[nn.Module]:
    """Within the context decoder layer ``layer`` at ``depth`` has its weights; one in memory has them always."""
    return model.resident(depth) if isinstance(model, StreamedModel) else nullcontext(layer)


def stream_dense(
    folder: Path, dtype: torch.dtype, devices: tuple[torch.device, ...], activations_gib: float = math.inf
) -> StreamedModel:
    """The dense checkpoint in ``folder``, computing in ``dtype``. Raises ModelError as `DenseCheckpoint` does."""
    give_freed_memory_back()
    checkpoint = DenseCheckpoint(folder, dtype)
    model = checkpoint.skeleton(devices[0])
    layers = [layer for _, layer in decoder_layers(model)]

    def fill(depth: int, device: torch.device) -> None:
        _give_tensors(checkpoint.layer(depth, device), layers[depth])

    return StreamedModel(model, fill, devices, activations_gib)


def stream_compressed(
    folder: Path, dtype: torch.dtype, devices: tuple[torch.device, ...], activations_gib: float = math.inf
) -> StreamedModel:
    """The compressed checkpoint in ``folder``, computing in ``dtype``. Raises ModelError when it is damaged, or has
    adapters."""
    refuse_adapters(folder)
    give_freed_memory_back()
    stored = checkpoint_tensors(folder)
    model = pruned_model_on_meta(folder, dtype)
    layers = list(decoder_layers(model))
    prefixes = tuple(f"{name}." for name, _ in layers)
    fill_rest(model, {key: tensor.read() for key, tensor in stored.items() if not key.startswith(prefixes)}, dtype)
    with only_layers(model, {}):
        torch.nn.Module.to(model, devices[0])

    def fill(depth: int, device: torch.device) -> None:
        name, layer = layers[depth]
        within = {key: tensor.read().to(device) for key, tensor in stored.items() if key.startswith(f"{name}.")}
        fill_layer(layer, name, within, dtype)

    return StreamedModel(model.eval(), fill, devices, activations_gib)


def _give_tensors(source: nn.Module, target: nn.Module) -> None:
    """Put the parameters and buffers of a layer into the modules of another of the same structure."""
    for name, part in source.named_modules():
        try:
            own = target.get_submodule(name)
        except AttributeError:
            own = None
        if own is None or part._parameters.keys() != own._parameters.keys():
            raise ModelError(f"{name} of the layer was changed, so it cannot be read again.\nOpen the model anew.")
        own._parameters.update(part._parameters)
        own._buffers.update(part._buffers)


def drop_tensors(parts: Iterable[nn.Module]) -> None:
    """Put the modules' own parameters and buffers on the meta device: their memory is free when nothing else refers to
    them.

    Buffers that checkpoints leave out stay: they are small, and not read again.
    """
    for part in parts:
        for name, parameter in list(part._parameters.items()):
            if parameter is not None:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
                part._parameters[name] = nn.Parameter(empty, requires_grad=False)
        for name, buffer in list(part._buffers.items()):
            if buffer is not None and name not in part._non_persistent_buffers_set:
                part._buffers[name] = buffer.to("meta")
        if hasattr(part, "quant_state"):  # bitsandbytes keeps the scales beside the weight
            linear: Any = part
            linear.quant_state = None
        if isinstance(part, Linear8bitLt):
            part.state.CB = part.state.SCB = None  # once it has run, the library keeps the codes here too
