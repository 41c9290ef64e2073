"""Runs the calibration windows layer by layer and shows what enters the routed experts."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from moeprune.calibration.windows import TokenWindows
from moeprune.models.adapter import MoeLayer, moe_layers
from moeprune.models.layers.streaming import Model, skeleton
from moeprune.models.layers.walk import LayerVisit, walk_layers
from moeprune.models.layers.workspace import IN_MEMORY, Workspace
from moeprune.models.runtime.activations import gated_activation
from moeprune.models.runtime.contract import gate_and_up


@dataclass(frozen=True)
class ExpertInputs:
    """One batch at one MoE layer: ``x_BTH`` enters the router and the experts; ``y_BTH`` is the output of the whole
    decoder layer; ``mask_BT`` is 0 for padding."""

    first_window: int  # index of the batch's first window
    x_BTH: Tensor
    y_BTH: Tensor
    mask_BT: Tensor


def walk_expert_inputs(
    model: Model, windows: TokenWindows, batch_size: int, label: str, workspace: Workspace = IN_MEMORY
) -> Iterator[tuple[MoeLayer, Iterator[ExpertInputs]]]:
    """For each MoE layer in turn, the layer with its weights, and its inputs batch by batch.

    The model is left as it was. Where gates scale the experts' inputs (Llama 4), the inputs are those before that.
    """
    moe_layer_in = {layer.decoder_layer: layer for layer in moe_layers(skeleton(model))}
    batches = list(windows.batches(batch_size))
    for visit in walk_layers(model, batches, label, workspace):
        if visit.layer in moe_layer_in:
            layer = moe_layer_in[visit.layer]
            yield layer, _inputs(layer, visit, batches)


def _inputs(layer: MoeLayer, visit: LayerVisit, batches: list[tuple[Tensor, Tensor]]) -> Iterator[ExpertInputs]:
    entered: list[Tensor] = []

    def keep(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
        entered.append(inputs[0])

    first_window = 0
    for _, mask_BT in batches:
        hook = layer.experts.register_forward_pre_hook(keep)
        try:
            _, y_TH = next(visit.outputs)
        finally:
            hook.remove()
        x_BTH = entered.pop().reshape(*mask_BT.shape, -1)
        yield ExpertInputs(first_window, x_BTH, y_TH.reshape(x_BTH.shape), mask_BT.to(x_BTH.device))
        first_window += len(mask_BT)


def channels_of(experts: Any, expert: int, x_TH: Tensor) -> Tensor:
    """``h`` [T, C] of one expert, for any tokens; in most families ``act(x W_gate^T) * (x W_up^T)``."""
    gate_TC, up_TC = gate_and_up(experts, expert, x_TH).chunk(2, dim=-1)
    return gated_activation(experts)(gate_TC, up_TC)
