"""Takes all batches through one decoder layer before the next, so that what is made of a layer can be dropped early."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from moeprune.models.adapter import decoder_layers


@dataclass(frozen=True)
class _LayerCall:
    """How the model calls a decoder layer on a batch: what it passes besides the hidden states."""

    layer: nn.Module
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]


@torch.no_grad()
def walk_layers(
    model: PreTrainedModel, batches: Sequence[tuple[Tensor, Tensor]], description: str
) -> Iterator[tuple[nn.Module, Iterator[tuple[Tensor, Tensor]]]]:
    """For each decoder layer in turn, ``(layer, outputs)``.

    ``batches`` are ``(input_ids [B, S], attention_mask [B, S])``. ``outputs`` runs the layer on one batch after the
    other and gives ``(valid_T, y_TH)``: which of its T = B * S tokens are no padding, and what the layer computed.
    Batches that the caller does not ask for are run before the next layer comes; a layer whose outputs are used up may
    be changed without consequence for the later ones. What the layers compute is what the model computes, bit for bit.

    Held between layers are the hidden states of all batches, in CPU memory: 2 * tokens * H bytes in bfloat16.
    """
    layers = [layer for _, layer in decoder_layers(model)]
    device = next(model.parameters()).device
    calls: list[list[_LayerCall]] = []
    hidden: list[Tensor] = []
    for input_ids_BS, mask_BS in batches:
        with _layers_left_out(layers) as (entered, called):
            model.base_model(input_ids=input_ids_BS.to(device), attention_mask=mask_BS.to(device), use_cache=False)
        calls.append(called)
        hidden.append(entered[0].cpu())
    valid = [mask_BS.flatten().bool().to(device) for _, mask_BS in batches]
    for depth, call in enumerate(tqdm(calls[0], desc=description, unit="layer")):
        outputs = _outputs([of_batch[depth] for of_batch in calls], hidden, valid)
        yield call.layer, outputs
        for _ in outputs:
            pass


@torch.no_grad()
def _outputs(calls: list[_LayerCall], hidden: list[Tensor], valid: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Run one layer on each batch, and put its outputs in the place of its inputs in ``hidden``."""
    for index, (call, valid_T) in enumerate(zip(calls, valid, strict=True)):
        output = call.layer(hidden[index].to(valid_T.device), *call.arguments, **call.keywords)
        y_BSH = output if isinstance(output, Tensor) else output[0]
        hidden[index] = y_BSH.cpu()
        yield valid_T, y_BSH.flatten(0, 1)


@contextmanager
def _layers_left_out(layers: Sequence[nn.Module]) -> Iterator[tuple[list[Tensor], list[_LayerCall]]]:
    """Within the context decoder layers hand on what they get; lists what entered each and how it was called."""
    entered: list[Tensor] = []
    called: list[_LayerCall] = []

    def pass_through(layer: nn.Module) -> Any:
        def forward(hidden_states: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
            entered.append(hidden_states)
            called.append(_LayerCall(layer, arguments, keywords))
            return hidden_states

        return forward

    for layer in layers:
        layer.forward = pass_through(layer)
    try:
        yield entered, called
    finally:
        for layer in layers:
            del layer.forward
