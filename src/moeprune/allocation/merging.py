"""Merging: experts are grouped, and each group becomes one expert; every router row stays."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from scipy.cluster.hierarchy import cut_tree, linkage
from scipy.spatial.distance import squareform
from torch import Tensor

from moeprune.allocation.budget import Budget
from moeprune.allocation.expert_weights import require_weights
from moeprune.allocation.selection import largest, whole_experts_plan
from moeprune.allocation.whole_experts import best_experts, over_layers_note, per_layer_note, removed_experts
from moeprune.errors import BudgetError, InputError, require_choice
from moeprune.models.shape import ExpertShape
from moeprune.types import Merge, Plan, Scores

LINKAGES = ("average", "single", "complete")
SPREADS = ("global", "uniform")


@dataclass(frozen=True)
class LinkageMergeAllocator:
    """Each layer's experts are clustered into ``E - floor(ratio * E)`` groups by agglomerative clustering of their
    distances (HC-SMoE, arXiv 2410.08589: average linkage).

    A group takes the place of its most used expert; its weights are averaged by usage (tokens routed). Distances need
    not be Euclidean, so Ward's and the centroid linkages are not offered.
    """

    linkage: str = "average"
    merges: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_choice("linkage", self.linkage, LINKAGES)

    def channels_at_once(self, shape: ExpertShape) -> int:
        """Plans remove multiples of this: an expert from every layer."""
        return shape.layers * shape.width

    def __call__(self, scores: Scores, budget: Budget) -> Plan:
        distance_LEE = _require_distance(scores, "merge_linkage", "hc_smoe")
        usage_LE = require_weights(scores, "allocator=merge_linkage").usage_LE.double()
        removed = removed_experts(budget.ratio, budget.experts)
        leaders = []
        for distance_EE, usage_E in zip(distance_LEE, usage_LE, strict=True):
            group_E = _clusters(distance_EE, budget.experts - removed, self.linkage)
            leaders.append(_most_used(group_E, usage_E))
        return _merged_plan(torch.stack(leaders), usage_LE, False, budget, per_layer_note(budget, removed))


@dataclass(frozen=True)
class DominantMergeAllocator:
    """The most used experts lead; every other joins the leader of its layer at the smallest distance (M-SMoE, arXiv
    2310.01334).

    Usage is an expert's share of its layer's routed tokens. With ``between_layers="global"``, the paper's, leaders are
    the ``L E - floor(ratio * L * E)`` most used of all layers, at least one in each; with ``"uniform"`` the
    ``E - floor(ratio * E)`` most used of each layer. ``align_channels`` permutes members to their leader before
    weights are averaged by usage. Raises BudgetError when a layer would have no leader.
    """

    between_layers: str = "global"
    align_channels: bool = True
    merges: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_choice("between_layers", self.between_layers, SPREADS)

    def check(self, budget: Budget) -> None:
        """Raise BudgetError when there are fewer leaders than layers."""
        experts = budget.layers * budget.experts
        leaders = experts - removed_experts(budget.ratio, experts)
        if leaders < budget.layers:
            raise BudgetError(
                f"ratio={budget.ratio} leaves {leaders} of {experts} experts, but each of {budget.layers} layers needs "
                "one to merge the others into.\n"
                f"Use a ratio of at most {math.floor((1 - 1 / budget.experts) * 1e4) / 1e4}."
            )

    def channels_at_once(self, shape: ExpertShape) -> int:
        """Plans remove multiples of this: one expert, or one from every layer."""
        return shape.width * (shape.layers if self.between_layers == "uniform" else 1)

    def __call__(self, scores: Scores, budget: Budget) -> Plan:
        self.check(budget)
        distance_LEE = _require_distance(scores, "merge_dominant", "m_smoe")
        usage_LE = require_weights(scores, "allocator=merge_dominant").usage_LE.double()
        leads_LE, note = self._leaders(usage_LE, budget)
        # A leader is nearer to itself than anyone; the distances of the others to it are what the scorer says.
        to_leader_LEE = distance_LEE.masked_fill(~leads_LE.unsqueeze(1), torch.inf)
        leader_LE = torch.where(leads_LE, torch.arange(budget.experts), to_leader_LEE.argmin(dim=-1))
        return _merged_plan(leader_LE, usage_LE, self.align_channels, budget, note)

    def _leaders(self, usage_LE: Tensor, budget: Budget) -> tuple[Tensor, str]:
        if self.between_layers == "uniform":
            removed = removed_experts(budget.ratio, budget.experts)
            best = [largest(usage_E, budget.experts - removed) for usage_E in usage_LE]
            return torch.stack(best), per_layer_note(budget, removed)
        removed = removed_experts(budget.ratio, usage_LE.numel())
        share_LE = usage_LE / usage_LE.sum(dim=1, keepdim=True).clamp(min=1)
        return best_experts(share_LE, usage_LE.numel() - removed, least=1), over_layers_note(budget, removed)


def _require_distance(scores: Scores, allocator: str, scorer: str) -> Tensor:
    if scores.distance_LEE is None:
        raise InputError(
            f"allocator={allocator} needs distances between experts; this scorer gives none.",
            change=f"Use scorer={scorer}.",
        )
    return scores.distance_LEE.double()


def _clusters(distance_EE: Tensor, groups: int, method: str) -> Tensor:
    """The group of each expert [E]."""
    if len(distance_EE) == 1:
        return torch.zeros(1, dtype=torch.int64)
    # Distances are symmetric with a zero diagonal up to rounding, which scipy would refuse.
    symmetric_EE = (distance_EE + distance_EE.T) / 2
    tree = linkage(squareform(symmetric_EE.fill_diagonal_(0).numpy(), checks=False), method=method)
    return torch.from_numpy(cut_tree(tree, n_clusters=groups)).squeeze(-1).long()


def _most_used(group_E: Tensor, usage_E: Tensor) -> Tensor:
    """The most used expert of each expert's group [E]; among equals the first."""
    same_EE = group_E.unsqueeze(-1) == group_E
    return usage_E.expand_as(same_EE).masked_fill(~same_EE, -torch.inf).argmax(dim=-1)


def _merged_plan(leader_LE: Tensor, usage_LE: Tensor, align_channels: bool, budget: Budget, note: str) -> Plan:
    def group_sum(values_LE: Tensor) -> Tensor:
        return torch.zeros_like(values_LE).scatter_add_(1, leader_LE, values_LE).gather(1, leader_LE)

    total_LE = group_sum(usage_LE)
    equal_LE = 1 / group_sum(torch.ones_like(usage_LE))
    weight_LE = torch.where(total_LE > 0, usage_LE / total_LE, equal_LE)
    leads_LE = leader_LE == torch.arange(budget.experts)
    return whole_experts_plan(leads_LE, budget.width, note, Merge(leader_LE, weight_LE, align_channels))
