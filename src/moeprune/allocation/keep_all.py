"""Keep all: for methods that remove something other than channels."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from moeprune.allocation.budget import Budget
from moeprune.allocation.selection import whole_experts_plan
from moeprune.types import Plan, Scores


@dataclass(frozen=True)
class KeepAllAllocator:
    """Keeps every channel whatever the budget, where the surgery does the work: unstructured Wanda zeroes weights and
    leaves shapes as they are."""

    keeps_all_channels: ClassVar[bool] = True

    def __call__(self, scores: Scores, budget: Budget) -> Plan:
        keep_LE = torch.ones_like(scores.expert_LE, dtype=torch.bool)
        note = f"no channel is removed; what ratio={budget.ratio} means is left to the surgery" if budget.ratio else ""
        return whole_experts_plan(keep_LE, budget.width, note)
