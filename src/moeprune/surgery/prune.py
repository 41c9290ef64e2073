"""Cuts a model to a plan: expert channels, whole experts and their router rows."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moeprune.errors import InputError
from moeprune.models.adapter import MoeLayer, keep_router_rows, moe_layers
from moeprune.models.ragged import PackedWeights, RaggedExperts
from moeprune.types import Plan


@torch.no_grad()
def prune(model: PreTrainedModel, plan: Plan) -> PreTrainedModel:
    """Remove in place what the plan does not keep; returns the model.

    Channel c of an expert is row c of its gate and up projections and column c of its down projection. An expert that
    keeps no channel goes, and its router row with it: its tokens are then routed among the experts that stay.

    Raises InputError, before anything is cut, when the plan was made for another model or removes too many experts.
    """
    layers = moe_layers(model)
    if any(isinstance(layer.experts, RaggedExperts) for layer in layers):
        raise InputError("The model is pruned already.", change="Prune the dense model.")
    shapes = [(layer.expert_count, layer.widths[0]) for layer in layers]
    if shapes != [(len(kept), plan.width) for kept in plan.kept]:
        raise InputError(
            f"The plan is for {len(plan.kept)} MoE layers of {len(plan.kept[0])} experts of width {plan.width}; "
            f"the model has (experts, width) {shapes}.",
            change="Make the plan from statistics of this model.",
        )
    for layer, kept in zip(layers, plan.kept, strict=True):
        _check_live_experts(layer, sum(len(channels) > 0 for channels in kept))
    for layer, kept in zip(layers, plan.kept, strict=True):
        _prune_layer(model, layer, kept)
    return model


def _check_live_experts(layer: MoeLayer, live: int) -> None:
    if live < layer.top_k:
        raise InputError(
            f"{layer.name} would keep {live} experts, but every token is sent to {layer.top_k}.",
            change="Use a smaller ratio.",
        )
    if live < layer.expert_count and layer.routes_by_group:
        raise InputError(
            f"{layer.name} would lose {layer.expert_count - live} whole experts, but its router chooses among groups "
            "of experts, which cannot shrink.",
            change="Use allocator=uniform, which keeps every expert.",
        )


def _prune_layer(model: nn.Module, layer: MoeLayer, kept: tuple[Tensor, ...]) -> None:
    live = [expert for expert, channels in enumerate(kept) if len(channels)]
    widths = [len(kept[expert]) for expert in live]
    ragged = RaggedExperts(_packed(layer.experts, kept, live), widths, layer.experts.act_fn)
    model.set_submodule(layer.name, ragged)
    if len(live) < len(kept):
        keep_router_rows(layer.router, torch.tensor(live))


def _packed(experts: Any, kept: tuple[Tensor, ...], live: list[int]) -> PackedWeights:
    gate_up, down = experts.gate_up_proj, experts.down_proj
    hidden, width = down.shape[1], down.shape[2]
    packed = PackedWeights([len(kept[e]) for e in live], hidden, device=down.device, dtype=down.dtype)
    for slot, expert in enumerate(live):
        channels = kept[expert].to(down.device)
        packed.gate_up_of(slot).copy_(gate_up[expert, torch.cat([channels, channels + width])])
        packed.down_of(slot).copy_(down[expert, :, channels].T)
    return packed
