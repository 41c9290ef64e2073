"""Whole experts: the lowest-scored experts go, the others stay as they are."""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from moeprune.allocation.budget import Budget
from moeprune.allocation.layer_budgets import proportional
from moeprune.allocation.selection import largest, whole_experts_plan
from moeprune.errors import BudgetError, require_choice
from moeprune.models.shape import ExpertShape
from moeprune.types import Plan, Scores

NORMALIZATIONS = ("none", "layer")


@dataclass(frozen=True)
class WholeExpertsAllocator:
    """Removes ``floor(ratio * E)`` experts from each layer, lowest expert score first; ties go by index.

    Where the scorer chose experts together (``scores.subset_LEE``), the subset of that size stays instead. Raises
    BudgetError when fewer than top-k experts would stay.
    """

    removes_whole_experts: ClassVar[bool] = True

    def check(self, budget: Budget) -> int:
        """How many experts of each layer go. Raises BudgetError when too few would stay."""
        removed = removed_experts(budget.ratio, budget.experts)
        if budget.experts - removed < budget.top_k:
            raise BudgetError(
                f"ratio={budget.ratio} removes {removed} of {budget.experts} experts and leaves "
                f"{budget.experts - removed}, but every token is sent to {budget.top_k}.\n"
                f"Use a ratio of at most {math.floor((1 - budget.top_k / budget.experts) * 1e4) / 1e4}, or a channel "
                "allocator such as allocator=coverage."
            )
        return removed

    def channels_at_once(self, shape: ExpertShape) -> int:
        """Plans remove multiples of this: an expert from every layer."""
        return shape.layers * shape.width

    def __call__(self, scores: Scores, budget: Budget) -> Plan:
        removed = self.check(budget)
        kept_L = torch.full((budget.layers,), budget.experts - removed)
        return whole_experts_plan(_stay(scores, kept_L), budget.width, per_layer_note(budget, removed))


@dataclass(frozen=True)
class GlobalWholeExpertsAllocator:
    """Removes ``floor(ratio * L * E)`` experts, the lowest-scored of all layers (He et al., arXiv 2406.02500; SEER-MoE,
    arXiv 2404.05089); the top-k best of each layer stay.

    With ``normalization="layer"`` scores are divided by the sum of their absolute values in the layer first, so that
    layers of large scores do not keep everything. Ties go by layer, then by index.
    """

    normalization: str = "none"
    removes_whole_experts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_choice("normalization", self.normalization, NORMALIZATIONS)

    def check(self, budget: Budget) -> int:
        """How many experts go. Raises BudgetError when layers could not keep top-k each."""
        return _removed_over_layers(budget)

    def channels_at_once(self, shape: ExpertShape) -> int:
        """Plans remove multiples of this: one expert."""
        return shape.width

    def __call__(self, scores: Scores, budget: Budget) -> Plan:
        removed = self.check(budget)
        score_LE = scores.expert_LE.double()
        if self.normalization == "layer":
            score_LE = score_LE / score_LE.abs().sum(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
        keep_LE = best_experts(score_LE, score_LE.numel() - removed, least=budget.top_k)
        return whole_experts_plan(keep_LE, budget.width, over_layers_note(budget, removed))


@dataclass(frozen=True)
class ImportanceWholeExpertsAllocator:
    """Removes ``floor(ratio * L * E)`` experts, most from the layers whose experts matter least (MoE-I2, arXiv
    2411.01016).

    Layer l keeps ``clamp(s * I_l, top_k, E)`` experts, ``I_l = sum_e score_le`` its importance, with the s that meets
    the budget; fractions go to the largest first, then by index. Which stay is as for `WholeExpertsAllocator`. With
    `MoeI2Scorer` I_l is the paper's importance, the sum of the losses of removing each expert alone. That important
    layers lose fewer is the paper's; that counts are proportional is our reading. Sums are compared as they are, so
    layers of large outputs keep most. A layer whose sum is not positive counts as 0.

    Raises BudgetError when layers could not keep top-k each.
    """

    removes_whole_experts: ClassVar[bool] = True

    def check(self, budget: Budget) -> int:
        """How many experts go. Raises BudgetError when layers could not keep top-k each."""
        return _removed_over_layers(budget)

    def channels_at_once(self, shape: ExpertShape) -> int:
        """Plans remove multiples of this: one expert."""
        return shape.width

    def __call__(self, scores: Scores, budget: Budget) -> Plan:
        removed = self.check(budget)
        ratio = removed / (budget.layers * budget.experts)
        experts_as_channels = replace(budget, ratio=ratio, width=1, alignment=1, minimum_width=1)
        kept_L = proportional(scores.expert_LE.double().sum(dim=1), experts_as_channels)
        return whole_experts_plan(_stay(scores, kept_L), budget.width, over_layers_note(budget, removed))


def best_experts(score_LE: Tensor, count: int, *, least: int) -> Tensor:
    """Marks the ``count`` experts of highest score over all layers, ``least`` of each layer among them [L, E], bool."""
    must_LE = torch.stack([largest(score_E, least) for score_E in score_LE])
    return largest(score_LE.masked_fill(must_LE, torch.inf).flatten(), count).view_as(must_LE)


def removed_experts(ratio: float, experts: int) -> int:
    """``floor(ratio * experts)``; the tolerance keeps 1 - 0.9 from sparing an expert."""
    return math.floor(ratio * experts + 1e-9)


def per_layer_note(budget: Budget, removed: int) -> str:
    """What rounding to whole experts per layer changed; empty when nothing."""
    return _note(budget.ratio * budget.experts, removed, " per layer")


def over_layers_note(budget: Budget, removed: int) -> str:
    """What rounding to whole experts of the model changed; empty when nothing."""
    return _note(budget.ratio * budget.layers * budget.experts, removed, "")


def _stay(scores: Scores, kept_L: Tensor) -> Tensor:
    """Marks the experts that stay when layer l keeps ``kept_L[l]`` of them [L, E], bool."""
    if scores.subset_LEE is not None:
        return scores.subset_LEE[torch.arange(len(kept_L)), kept_L - 1].bool()
    pairs = zip(scores.expert_LE, kept_L.tolist(), strict=True)
    return torch.stack([largest(expert_E, kept) for expert_E, kept in pairs])


def _removed_over_layers(budget: Budget) -> int:
    removed, experts = removed_experts(budget.ratio, budget.layers * budget.experts), budget.layers * budget.experts
    if experts - removed < budget.layers * budget.top_k:
        raise BudgetError(
            f"ratio={budget.ratio} removes {removed} of {experts} experts and leaves {experts - removed}, but "
            f"{budget.layers} layers need top-{budget.top_k} experts each.\n"
            f"Use a ratio of at most {math.floor((1 - budget.top_k / budget.experts) * 1e4) / 1e4}, or a channel "
            "allocator such as allocator=coverage."
        )
    return removed


def _note(asked: float, removed: int, where: str) -> str:
    if abs(asked - removed) < 1e-9:
        return ""
    return f"asked to remove {asked:.2f} experts{where}; whole experts make it {removed}"
