"""Cuts a model to a plan: expert channels, whole experts and their router rows, merged experts."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moeprune.errors import InputError, require_choice
from moeprune.models.adapter import MoeLayer, moe_layers
from moeprune.models.layers.streaming import Model, skeleton
from moeprune.models.layers.walk import each_layer, run_through
from moeprune.models.layers.workspace import IN_MEMORY, Workspace
from moeprune.models.runtime.activations import gated_activation
from moeprune.models.runtime.ragged import Expert, RaggedExperts
from moeprune.models.runtime.router import keep_router_rows
from moeprune.surgery.merging import check_merge, merge_experts
from moeprune.types import Plan

REMOVE_ROW, KEEP_ROW = "remove_row", "keep_row"

# (depth, name, decoder layer) of a layer that is final, in the order of depth.
FinishedLayer = tuple[int, str, nn.Module]
BeforeCut = Callable[[int, MoeLayer], Tensor | None]


def prune(model: PreTrainedModel, plan: Plan, empty_experts: str = REMOVE_ROW) -> PreTrainedModel:
    """Cut a model in memory to the plan, in place, and return it; see `cut_layers`."""
    run_through(cut_layers(model, plan, empty_experts))
    return model


def cut_layers(
    model: Model,
    plan: Plan,
    empty_experts: str = REMOVE_ROW,
    workspace: Workspace = IN_MEMORY,
    before_cut: BeforeCut | None = None,
) -> Iterator[FinishedLayer]:
    """Remove in place what the plan does not keep, and give each decoder layer when it is final.

    Channel c of an expert is row c of its gate and up projections and column c of its down projection. An expert that
    keeps no channel goes. ``empty_experts`` says what becomes of its router row: ``remove_row`` takes it along, so that
    its tokens are routed among the experts that stay; ``keep_row`` lets them meet nothing there. Merged experts always
    keep their rows, which lead to the merged one.

    ``before_cut(index, layer)`` may change the dense weights of MoE layer ``index`` and may return biases [E, H]: then
    ``g * bias_e`` is added for every token that row e gets with gate g. Biases of removed rows go with them.

    Raises InputError, before anything is cut, when the plan was made for another model or removes too many experts.
    """
    check_plan(model, plan, empty_experts)
    return _cut_each(model, plan, empty_experts, workspace, before_cut)


@torch.no_grad()
def _cut_each(
    model: Model, plan: Plan, empty_experts: str, workspace: Workspace, before_cut: BeforeCut | None
) -> Iterator[FinishedLayer]:
    moe_layer_at = indexed_moe_layers(model)
    for depth, name, decoder_layer in each_layer(model, "cut", workspace):
        if decoder_layer in moe_layer_at:
            index, layer = moe_layer_at[decoder_layer]
            bias_EH = before_cut(index, layer) if before_cut is not None else None
            cut_layer(name, layer, index, plan, empty_experts, bias_EH)
        yield depth, name, decoder_layer


def indexed_moe_layers(model: Model) -> dict[nn.Module, tuple[int, MoeLayer]]:
    """{decoder layer: (its index among the MoE layers, its MoE layer)}."""
    return {layer.decoder_layer: (index, layer) for index, layer in enumerate(moe_layers(skeleton(model)))}


def check_plan(model: Model, plan: Plan, empty_experts: str) -> None:
    """Raise InputError where the plan was made for another model or removes too many experts of this one."""
    check_row_policy(empty_experts)
    layers = moe_layers(skeleton(model))
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


def cut_layer(
    name: str, layer: MoeLayer, index: int, plan: Plan, empty_experts: str, bias_EH: Tensor | None = None
) -> None:
    """Cut MoE layer ``index`` in the decoder layer called ``name``, whose weights are in memory; see `cut_layers`."""
    kept, leader_E = plan.kept[index], None
    if plan.merge is not None:
        leader_E = plan.merge.leader_LE[index]
        merge_experts(layer.experts, leader_E, plan.merge.weight_LE[index], plan.merge.align_channels)
    expert_of_row = _live_rows(kept, empty_experts, leader_E)
    live = [expert for expert, channels in enumerate(kept) if len(channels)]
    slot_of = {expert: slot for slot, expert in enumerate(live)}
    slot_of_row = [slot_of.get(expert, -1) for expert in expert_of_row.values()]
    rows = torch.tensor(list(expert_of_row))
    down = layer.experts.down_proj
    if bias_EH is not None:
        bias_EH = bias_EH[rows.to(bias_EH.device)].to(down.device, down.dtype)
        bias_EH = bias_EH if bias_EH.any() else None  # nothing was removed where the rows stay
    experts = [_cut_expert(layer.experts, expert, kept[expert].to(down.device)) for expert in live]
    activation = gated_activation(layer.experts)
    ragged = RaggedExperts(experts, activation, slot_of_row, bias_EH, layer.gates_inputs)
    # Lists of the layers still refer to the dense experts: without their memory, else both would be held until the end.
    layer.experts.to("meta")
    layer.decoder_layer.set_submodule(layer.name.removeprefix(f"{name}."), ragged)
    if len(rows) < len(kept):
        keep_router_rows(layer.router, rows)


def _cut_expert(experts: Any, expert: int, channels_S: Tensor) -> Expert:
    """The kept channels of one dense expert, in memory of their own."""
    gate_CH, up_CH = experts.gate_up_proj[expert].chunk(2)
    down_HC = experts.down_proj[expert]
    biased = getattr(experts, "down_bias", None) is not None
    cut = Expert(len(channels_S), len(down_HC), bias=biased, device="meta")
    cut.gate_proj.weight = nn.Parameter(gate_CH[channels_S])
    cut.up_proj.weight = nn.Parameter(up_CH[channels_S])
    cut.down_proj.weight = nn.Parameter(down_HC[:, channels_S])
    if biased:
        gate_C, up_C = experts.gate_up_bias[expert].chunk(2)
        cut.gate_proj.bias = nn.Parameter(gate_C[channels_S])
        cut.up_proj.bias = nn.Parameter(up_C[channels_S])
        cut.down_proj.bias = nn.Parameter(experts.down_bias[expert].clone())
    return cut
