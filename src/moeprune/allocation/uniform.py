"""Uniform: every expert keeps the same number of channels."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from moeprune.allocation.budget import Budget
from moeprune.allocation.selection import best_channels_plan, require_channel_scores
from moeprune.errors import BudgetError
from moeprune.types import Plan, Scores


@dataclass(frozen=True)
class UniformAllocator:
    """Every expert keeps ``budget / (L E)`` channels, its best ones.

    Where that is not a whole number of blocks, the blocks left over go one each to the experts of highest score in
    their layer, layer after layer, so the budget is met exactly.
    """

    needs_channel_scores: ClassVar[bool] = True

    def check(self, budget: Budget) -> int:
        """Channels that every expert keeps at least. Raises BudgetError when they are fewer than the minimum width."""
        width = budget.kept_channels // budget.alignment // (budget.layers * budget.experts) * budget.alignment
        if width < budget.minimum_width:
            raise BudgetError(
                f"ratio={budget.ratio} leaves each expert {width} channels; the minimum width is "
                f"{budget.minimum_width}.\nUse a smaller ratio, a smaller model.minimum_width, or allocator=coverage, "
                "which can remove whole experts."
            )
        return width

    def __call__(self, scores: Scores, budget: Budget) -> Plan:
        channel_LEC = require_channel_scores(scores, "uniform")
        layers, experts, _ = channel_LEC.shape
        blocks = budget.kept_channels // budget.alignment
        widths_LE = torch.full((layers, experts), self.check(budget))
        rank_LE = scores.expert_LE.argsort(dim=1, descending=True, stable=True)
        for extra in range(blocks % (layers * experts)):
            expert = rank_LE[extra % layers, extra // layers]
            widths_LE[extra % layers, expert] += budget.alignment
        return best_channels_plan(channel_LEC, widths_LE, budget.rounding_note)
