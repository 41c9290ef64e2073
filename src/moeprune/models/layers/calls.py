"""What a model does around its decoder layers: how it calls each, and what it makes of the last one's output."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moeprune.models.adapter import decoder_layers

# The arguments of a call, the hidden states first, and its keywords.
Call = tuple[tuple[Any, ...], dict[str, Any]]


@torch.no_grad()
def layer_calls(model: PreTrainedModel, input_ids_BS: Tensor, mask_BS: Tensor) -> list[Call]:
    """The arguments with which the model calls each layer, with its embeddings in the place of hidden states.

    No layer is run. Not for several threads at once.
    """
    calls: list[Call] = []

    def note(_layer: nn.Module, *arguments: Any, **keywords: Any) -> Tensor:
        calls.append((arguments, keywords))
        return arguments[0]

    with _layers_replaced(model, note):
        model.base_model(**_inputs(model, input_ids_BS, mask_BS))
    return calls


@torch.no_grad()
def logits_after(
    model: PreTrainedModel, input_ids_BS: Tensor, mask_BS: Tensor, y_BSH: Tensor, positions_P: Tensor
) -> Tensor:
    """Logits [B, P, V] at some positions, where ``y_BSH`` is what the last decoder layer gave; no layer is run."""

    def give(_layer: nn.Module, *_arguments: Any, **_keywords: Any) -> Tensor:
        return y_BSH

    with _layers_replaced(model, give):
        inputs = _inputs(model, input_ids_BS, mask_BS)
        return model(**inputs, logits_to_keep=positions_P.to(y_BSH.device)).logits


def _inputs(model: PreTrainedModel, input_ids_BS: Tensor, mask_BS: Tensor) -> dict[str, Any]:
    embeddings: Any = model.get_input_embeddings()
    device = next(itertools.chain(embeddings.parameters(), embeddings.buffers())).device
    return {"input_ids": input_ids_BS.to(device), "attention_mask": mask_BS.to(device), "use_cache": False}


class _Instead(nn.Module):
    """Stands for a decoder layer, and does ``forward(layer, ...)`` in its place."""

    def __init__(self, layer: nn.Module, forward: Callable[..., Tensor]) -> None:
        super().__init__()
        # Some models read attributes of their layers; a list, so that the layer is not registered as a part.
        self._layer, self._forward = [layer], forward

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_layer"][0], name)

    def forward(self, *arguments: Any, **keywords: Any) -> Tensor:
        return self._forward(self._layer[0], *arguments, **keywords)


@contextmanager
def _layers_replaced(model: PreTrainedModel, forward: Callable[..., Tensor]) -> Iterator[None]:
    """Within the context ``forward`` is called in the place of each decoder layer; they themselves are not touched."""
    path = next(name for name, _ in decoder_layers(model)).rpartition(".")[0]
    parent_name, _, own_name = path.rpartition(".")
    parent = model.get_submodule(parent_name)
    layers = parent._modules[own_name]
    assert isinstance(layers, nn.ModuleList)
    parent._modules[own_name] = nn.ModuleList(_Instead(layer, forward) for layer in layers)
    try:
        yield
    finally:
        parent._modules[own_name] = layers
