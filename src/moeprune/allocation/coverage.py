"""Coverage: the paper's allocation. Layers share the budget by loss, experts by attribution, both through coverage."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moeprune.allocation.alignment import align
from moeprune.allocation.budget import Budget
from moeprune.allocation.covering import cover
from moeprune.allocation.expert_weights import EXPERT_WEIGHTS, expert_share_LE
from moeprune.allocation.layer_budgets import LAYER_RULES, layer_budgets
from moeprune.allocation.selection import (
    best_channels_plan,
    put_back,
    require_channel_scores,
    score_order,
    sorted_descending,
    take_experts,
)
from moeprune.allocation.smoothing import require_smoothing, smoothed_loss
from moeprune.errors import require_choice
from moeprune.types import Plan, Scores

REALLOCATIONS = ("most_lost", "most_score")


@dataclass(frozen=True)
class CoverageAllocator:
    """A rule between layers, coverage-based allocation (CBA) inside, then alignment and reallocation (AAR).

    Between layers: see `layer_budgets`; losses are smoothed first, see `smoothed_loss`. Inside: expert e keeps the
    fewest channels that reach coverage ``min(1, beta * w_e)``, with the shares w_e of `expert_share_LE`; bisection on
    beta meets the layer's budget (arXiv 2606.18304, algorithm listing). ``reallocation`` hands blocks that rounding
    released to the experts that lost most channels, or most score; see `align`, which may move single blocks from
    layer to layer. The defaults are the paper's, but for ``smoothing_rounds``, which it does not give.
    """

    between_layers: str = "loss_coverage"
    smoothing: str = "sqrt"
    smoothing_rounds: int = 2
    expert_weight: str = "score"
    reallocation: str = "most_lost"
    needs_channel_scores: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_choice("between_layers", self.between_layers, LAYER_RULES)
        require_smoothing(self.smoothing, self.smoothing_rounds)
        require_choice("expert_weight", self.expert_weight, EXPERT_WEIGHTS)
        require_choice("reallocation", self.reallocation, REALLOCATIONS)

    def __call__(self, scores: Scores, budget: Budget) -> Plan:
        channel_LEC = require_channel_scores(scores, "coverage")
        loss_L = smoothed_loss(scores.layer_L.double(), self.smoothing, self.smoothing_rounds)
        layer_budget_L = layer_budgets(self.between_layers, channel_LEC, loss_L, budget)
        counts_LE = self._inside(channel_LEC, scores, layer_budget_L)
        held_LEK = _held_score(channel_LEC) if self.reallocation == "most_score" else None
        widths_LE = align(counts_LE, budget, scores.expert_LE, held_LEK)
        return best_channels_plan(channel_LEC, widths_LE, budget.rounding_note)

    def _inside(self, channel_LEC: Tensor, scores: Scores, layer_budget_L: Tensor) -> Tensor:
        order_LE = score_order(scores.expert_LE)
        ordered_LEC = take_experts(channel_LEC, order_LE)
        share_LE = take_experts(expert_share_LE(scores, self.expert_weight), order_LE)
        counts = [
            cover(channel_EC, share_E, target, least=0)
            for channel_EC, share_E, target in zip(ordered_LEC, share_LE, layer_budget_L.tolist(), strict=True)
        ]
        return put_back(torch.stack(counts), order_LE)


def _held_score(channel_LEC: Tensor) -> Tensor:
    """The score in an expert's best k channels, k = 0..C [L, E, C + 1]; negative scores count as 0."""
    held_LEC = sorted_descending(channel_LEC.clamp(min=0)).cumsum(dim=-1)
    return torch.nn.functional.pad(held_LEC, (1, 0))
