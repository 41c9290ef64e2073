"""Cuts a model to a plan: expert channels, whole experts and their router rows, merged experts."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from moeprune.errors import InputError, require_choice
from moeprune.models.adapter import MoeLayer, keep_router_rows, moe_layers
from moeprune.models.ragged import PackedWeights, RaggedExperts
from moeprune.surgery.merging import check_merge, merge_experts
from moeprune.types import Plan

REMOVE_ROW, KEEP_ROW = "remove_row", "keep_row"


@torch.no_grad()
def prune(
    model: PreTrainedModel,
    plan: Plan,
    empty_experts: str = REMOVE_ROW,
    biases: Sequence[Tensor | None] | None = None,
) -> PreTrainedModel:
    """Remove in place what the plan does not keep; returns the model.

    Channel c of an expert is row c of its gate and up projections and column c of its down projection. An expert that
    keeps no channel goes. ``empty_experts`` says what becomes of its router row: ``remove_row`` takes it along, so that
    its tokens are routed among the experts that stay; ``keep_row`` lets them meet nothing there. Merged experts always
    keep their rows, which lead to the merged one.

    ``biases``, one [E, H] or None per MoE layer, adds ``g * bias_e`` for every token that row e gets with gate g; the
    biases of removed rows go with them.

    Raises InputError, before anything is cut, when the plan was made for another model or removes too many experts.
    """
    check_plan(model, plan, empty_experts)
    for index, layer in enumerate(tqdm(moe_layers(model), desc="cut", unit="layer")):
        kept = plan.kept[index]
        leader_E = None
        if plan.merge is not None:
            leader_E = plan.merge.leader_LE[index]
            merge_experts(layer.experts, leader_E, plan.merge.weight_LE[index], plan.merge.align_channels)
        bias_EH = None if biases is None else biases[index]
        _cut_layer(model, layer, kept, _live_rows(kept, empty_experts, leader_E), bias_EH)
    return model


def check_plan(model: PreTrainedModel, plan: Plan, empty_experts: str) -> None:
    """Raise InputError where the plan was made for another model or removes too many experts of this one."""
    check_row_policy(empty_experts)
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
    if plan.merge is not None:
        check_merge(plan.merge, plan.widths_LE)
    elif empty_experts == REMOVE_ROW:
        for layer, kept in zip(layers, plan.kept, strict=True):
            _check_live_experts(layer, sum(len(channels) > 0 for channels in kept))


def check_row_policy(empty_experts: str) -> None:
    """Raise InputError for what no router row of an expert without channels can undergo."""
    require_choice("empty_experts", empty_experts, (REMOVE_ROW, KEEP_ROW))


def refuse_merging(plan: Plan, surgery: str) -> None:
    """Raise InputError for a plan that merges, from a surgery that compensates for what is removed."""
    if plan.merge is not None:
        raise InputError(
            f"The plan merges experts; {surgery} makes up for channels that are removed, and merging removes none.",
            change="Use surgery=none, or an allocator that does not merge.",
        )


def _check_live_experts(layer: MoeLayer, live: int) -> None:
    if live < layer.top_k:
        raise InputError(
            f"{layer.name} would keep {live} experts, but every token is sent to {layer.top_k}.",
            change="Use a smaller ratio, or keep the router rows of empty experts: surgery=keep_rows.",
        )
    if live < layer.expert_count and layer.routes_by_group:
        raise InputError(
            f"{layer.name} would lose {layer.expert_count - live} router rows with their experts, but its router "
            "chooses among groups of experts, which cannot shrink.",
            change="Keep the rows of empty experts, surgery=keep_rows, or use allocator=uniform, which keeps every "
            "expert.",
        )


def _live_rows(kept: tuple[Tensor, ...], empty_experts: str, leader_E: Tensor | None) -> dict[int, int]:
    """{router row that stays: the expert it leads to}."""
    leader_of = range(len(kept)) if leader_E is None else leader_E.tolist()
    every = {row: leader_of[row] for row in range(len(kept))}
    if empty_experts == KEEP_ROW:
        return every
    return {row: expert for row, expert in every.items() if len(kept[expert])}


def _cut_layer(
    model: nn.Module, layer: MoeLayer, kept: tuple[Tensor, ...], expert_of_row: dict[int, int], bias_EH: Tensor | None
) -> None:
    live = [expert for expert, channels in enumerate(kept) if len(channels)]
    slot_of = {expert: slot for slot, expert in enumerate(live)}
    slot_of_row = [slot_of.get(expert, -1) for expert in expert_of_row.values()]
    rows = torch.tensor(list(expert_of_row))
    down = layer.experts.down_proj
    if bias_EH is not None:
        bias_EH = bias_EH[rows.to(bias_EH.device)].to(down.device, down.dtype)
        bias_EH = bias_EH if bias_EH.any() else None  # nothing was removed where the rows stay
    widths = [len(kept[expert]) for expert in live]
    packed = _packed(layer.experts, kept, live)
    # Lists of the layers still refer to the dense experts: without their memory, else both would be held until the end.
    layer.experts.to("meta")
    model.set_submodule(layer.name, RaggedExperts(packed, widths, layer.experts.act_fn, slot_of_row, bias_EH))
    if len(rows) < len(kept):
        keep_router_rows(layer.router, rows)


def _packed(experts: Any, kept: tuple[Tensor, ...], live: list[int]) -> PackedWeights:
    gate_up, down = experts.gate_up_proj, experts.down_proj
    hidden, width = down.shape[1], down.shape[2]
    packed = PackedWeights([len(kept[e]) for e in live], hidden, device=down.device, dtype=down.dtype)
    for slot, expert in enumerate(live):
        channels = kept[expert].to(down.device)
        packed.gate_up_of(slot).copy_(gate_up[expert, torch.cat([channels, channels + width])])
        packed.down_of(slot).copy_(down[expert, :, channels].T)
    return packed
