"""Runs the calibration windows and shows what enters the routed experts of every MoE layer."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from moeprune.calibration.windows import TokenWindows
from moeprune.models.adapter import moe_layers


@dataclass(frozen=True)
class ExpertInputs:
    """One MoE layer and one batch: ``x_BTH`` enters the router and the experts; ``mask_BT`` is 0 for padding."""

    layer: int  # index among the MoE layers
    first_window: int  # index of the batch's first window
    x_BTH: Tensor
    mask_BT: Tensor


@torch.no_grad()
def visit_expert_inputs(
    model: PreTrainedModel,
    windows: TokenWindows,
    batch_size: int,
    receive: Callable[[ExpertInputs], None],
    label: str,
) -> None:
    """Run every window once through the model without its head. The model is left as it was."""
    device = next(model.parameters()).device
    first_window = 0
    mask_BT = torch.empty(0)

    def show(index: int, _module: nn.Module, inputs: tuple[Any, ...]) -> None:
        x_BTH = inputs[0].reshape(*mask_BT.shape, inputs[0].shape[-1])
        receive(ExpertInputs(index, first_window, x_BTH, mask_BT))

    with ExitStack() as hooks:
        for index, layer in enumerate(moe_layers(model)):
            hooks.callback(layer.experts.register_forward_pre_hook(partial(show, index)).remove)
        for input_ids_BT, batch_mask_BT in tqdm(windows.batches(batch_size), desc=label, unit="batch"):
            mask_BT = batch_mask_BT.to(device)
            model.base_model(input_ids=input_ids_BT.to(device), attention_mask=mask_BT, use_cache=False)
            first_window += len(input_ids_BT)


def channels_of(experts: Any, expert: int, x_TH: Tensor) -> Tensor:
    """``h = act(x W_gate^T) * (x W_up^T)`` [T, C] of one expert, for any tokens."""
    gate_TC, up_TC = (x_TH @ experts.gate_up_proj[expert].T).chunk(2, dim=-1)
    return experts.act_fn(gate_TC) * up_TC
