"""Whole experts: the lowest-scored experts of each layer go, the others stay as they are."""

import math
from dataclasses import dataclass

import torch

from moeprune.allocation.budget import Budget
from moeprune.errors import BudgetError
from moeprune.types import Plan, Scores


@dataclass(frozen=True)
class WholeExpertsAllocator:
    """Removes ``floor(ratio * E)`` experts from each layer, lowest expert score first; ties go by index.

    Raises BudgetError when fewer than top-k experts would stay.
    """

    def check(self, budget: Budget) -> int:
        """How many experts of each layer go. Raises BudgetError when too few would stay."""
        removed = math.floor(budget.ratio * budget.experts + 1e-9)
        if budget.experts - removed < budget.top_k:
            raise BudgetError(
                f"ratio={budget.ratio} removes {removed} of {budget.experts} experts and leaves "
                f"{budget.experts - removed}, but every token is sent to {budget.top_k}.\n"
                f"Use a ratio of at most {math.floor((1 - budget.top_k / budget.experts) * 1e4) / 1e4}, or a channel "
                "allocator such as allocator=coverage."
            )
        return removed

    def __call__(self, scores: Scores, budget: Budget) -> Plan:
        removed = self.check(budget)
        every, none = torch.arange(budget.width), torch.arange(0)
        kept = []
        for expert_E in scores.expert_LE:
            lowest = set(expert_E.argsort(descending=True, stable=True)[budget.experts - removed :].tolist())
            kept.append(tuple(none if expert in lowest else every for expert in range(budget.experts)))
        return Plan(tuple(kept), budget.width, self._note(budget, removed))

    @staticmethod
    def _note(budget: Budget, removed: int) -> str:
        asked = budget.ratio * budget.experts
        if abs(asked - removed) < 1e-9:
            return ""
        return f"asked to remove {asked:.2f} experts per layer; whole experts make it {removed}"
