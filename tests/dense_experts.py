"""A slow reference for gradients: every expert on every token, with a leaf added to each value of interest."""

from contextlib import ExitStack
from dataclasses import dataclass
from unittest.mock import patch

import torch
from torch import Tensor, nn

from moeprune.calibration.recorder import OUTPUT_NORM_EPS
from moeprune.calibration.windows import TokenWindows
from moeprune.models.adapter import MoeLayer, moe_layers


@dataclass
class Traced:
    """h, dLoss/dh and dLoss/df (f before the gate) of every token and expert of one layer, zero where not routed; and
    sum |W * dLoss/dW| of each channel."""

    routed_TE: Tensor
    h_TEC: Tensor
    dh_TEC: Tensor
    df_TEH: Tensor
    weight_saliency_EC: Tensor


class DenseLayer:
    """The routed experts of one layer as a sum over all of them, gates zero where not routed."""

    def __init__(self, layer: MoeLayer) -> None:
        self.layer = layer

    def __call__(self, x_TH: Tensor, experts_TK: Tensor, gates_TK: Tensor) -> Tensor:
        experts = self.layer.experts
        gates_TE = x_TH.new_zeros(len(x_TH), self.layer.expert_count).scatter(1, experts_TK, gates_TK.to(x_TH.dtype))
        self.routed_TE = torch.zeros_like(gates_TE, dtype=torch.bool).scatter(1, experts_TK, True)
        gate_TEC, up_TEC = torch.einsum("th,eih->tei", x_TH, experts.gate_up_proj).chunk(2, dim=-1)
        self.h_TEC = experts.act_fn(gate_TEC) * up_TEC
        self.h_leaf = torch.zeros_like(self.h_TEC, requires_grad=True)
        f_TEH = torch.einsum("tec,ehc->teh", self.h_TEC + self.h_leaf, experts.down_proj)
        self.f_leaf = torch.zeros_like(f_TEH, requires_grad=True)
        return torch.einsum("te,teh->th", gates_TE, f_TEH + self.f_leaf)

    def traced(self) -> Traced:
        experts = self.layer.experts
        gate_EC, up_EC = (experts.gate_up_proj * experts.gate_up_proj.grad).abs().sum(dim=2).chunk(2, dim=1)
        down_EC = (experts.down_proj * experts.down_proj.grad).abs().sum(dim=1)
        routed_TE1 = self.routed_TE.unsqueeze(-1)
        saliency_EC = (gate_EC + up_EC + down_EC).detach()
        h_TEC = (self.h_TEC * routed_TE1).detach()
        return Traced(self.routed_TE, h_TEC, self.h_leaf.grad, self.f_leaf.grad, saliency_EC)


def trace_language_model(model: nn.Module, windows: TokenWindows, batch_size: int) -> list[list[Traced]]:
    """For each batch and layer: the loss is -log p of every token after its window's first."""
    layers = [DenseLayer(layer) for layer in moe_layers(model)]
    batches = []
    with ExitStack() as stack:
        for dense in layers:
            stack.enter_context(patch.object(dense.layer.experts, "forward", dense))
        for input_ids_BT, _mask in windows.batches(batch_size):
            model.zero_grad()
            log_p_BTV = model(input_ids_BT, use_cache=False).logits.log_softmax(dim=-1)
            loss = 0.0
            for window, token_ids in enumerate(input_ids_BT.tolist()):
                for place in range(1, len(token_ids)):
                    loss = loss - log_p_BTV[window, place - 1, token_ids[place]]
            loss.backward()
            batches.append([dense.traced() for dense in layers])
    model.zero_grad()
    return batches


def trace_block_local(seen, alpha: float) -> Traced:
    """Of one layer as it was seen: the loss is ``sum q ||y' - y||^2``, routed experts scaled by alpha in y'."""
    dense = DenseLayer(seen.layer)
    seen.layer.experts.zero_grad()
    others_TH = seen.y_TH - seen.m_TH
    changed_TH = others_TH + alpha * dense(seen.x_TH, seen.experts_TK, seen.gates_TK)
    error_T = (changed_TH - seen.y_TH).square().sum(dim=-1)
    (error_T / (seen.y_TH.square().sum(dim=-1) + OUTPUT_NORM_EPS)).sum().backward()
    traced = dense.traced()
    seen.layer.experts.zero_grad()
    return traced
