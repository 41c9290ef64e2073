"""Optimal coverage: the allocation that covers most, with a bound that says how far any allocation is from it."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moeprune.allocation.budget import Budget
from moeprune.allocation.expert_weights import EXPERT_WEIGHTS, expert_share_LE, expert_weight_LE
from moeprune.allocation.opening import solve
from moeprune.allocation.relaxation import BlockProblem, relax
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

LAYER_WEIGHTS = ("loss", "uniform", "none")


@dataclass(frozen=True)
class Certificate:
    """The coverage that a plan reaches, and a bound on that of every plan of as many channels."""

    objective: float
    upper_bound: float

    @property
    def gap(self) -> float:
        """``(upper_bound - objective) / upper_bound``: how much of the possible the plan misses at most."""
        return (self.upper_bound - self.objective) / self.upper_bound if self.upper_bound > 0 else 0.0


@dataclass(frozen=True)
class OptimalCoverageAllocator:
    """Widths k_le that maximise the weighted coverage ``sum_le v_le Cov_le(k_le)`` at exactly the budget.

    Cov_le(k) is the share of an expert's positive channel scores in its best k. Weights v_le = u_l * w_le: u_l is the
    smoothed loss of the layer at mean 1 (``layer_weight="loss"``) or 1 (``"uniform"``), w_le the share of
    `expert_share_LE`; the most that can be covered is then L. With ``layer_weight="none"`` v_le is `expert_weight_LE`
    itself, neither rooted nor normalised: with ``expert_weight="channels"`` the kept sum of channel scores is largest,
    for removal scores the least total of single-channel removal losses.

    Marginal gains of blocks never increase, so taking the largest first is optimal where the minimum width is one
    block; a larger minimum makes it a knapsack, solved by Lagrangian relaxation and a search around it (`solve`).
    The objective is ours; coverage is that of arXiv 2606.18304, which reaches targets in proportion to w_e instead.
    """

    layer_weight: str = "loss"
    smoothing: str = "sqrt"
    smoothing_rounds: int = 2
    expert_weight: str = "score"
    needs_channel_scores: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_choice("layer_weight", self.layer_weight, LAYER_WEIGHTS)
        require_smoothing(self.smoothing, self.smoothing_rounds)
        require_choice("expert_weight", self.expert_weight, EXPERT_WEIGHTS)

    def __call__(self, scores: Scores, budget: Budget) -> Plan:
        channel_LEC = require_channel_scores(scores, "optimal_coverage")
        order_LE = score_order(scores.expert_LE)
        gain_LEB = take_experts(_block_gains(self.gains(scores), budget.alignment), order_LE)
        total = budget.kept_channels // budget.alignment
        blocks_LE, _ = solve(BlockProblem(gain_LEB, budget.minimum_width // budget.alignment, budget.top_k, total))
        widths_LE = put_back(blocks_LE, order_LE) * budget.alignment
        return best_channels_plan(channel_LEC, widths_LE, budget.rounding_note)

    def gains(self, scores: Scores) -> Tensor:
        """What the k-th best channel of an expert adds, ``v_le s_(k) / sum s`` [L, E, C], float64.

        All 0 for an expert without any positive score: there is nothing of it to cover.
        """
        sorted_LEC = sorted_descending(require_channel_scores(scores, "optimal_coverage").clamp(min=0))
        total_LE1 = sorted_LEC.sum(dim=-1, keepdim=True)
        weight_LE1 = self.weight_LE(scores).unsqueeze(-1)
        return torch.where(total_LE1 > 0, sorted_LEC * (weight_LE1 / total_LE1), torch.zeros_like(sorted_LEC))

    def weight_LE(self, scores: Scores) -> Tensor:
        """The weights v_le [L, E], float64."""
        if self.layer_weight == "none":
            return expert_weight_LE(scores, self.expert_weight)
        share_LE = expert_share_LE(scores, self.expert_weight)
        if self.layer_weight == "uniform":
            return share_LE
        return share_LE * smoothed_loss(scores.layer_L.double(), self.smoothing, self.smoothing_rounds).unsqueeze(-1)


def coverage_certificate(
    scores: Scores,
    plan: Plan,
    budget: Budget,
    objective: OptimalCoverageAllocator = OptimalCoverageAllocator(),
) -> Certificate:
    """How much a plan of any allocator covers, in the weights of ``objective``, against the bound for its own number of
    channels.

    Judges widths: that the plan keeps the best channels of each expert is taken for granted. Of merged experts only the
    leader counts: the others keep no channels. A layer that keeps fewer than top-k experts (a merged one may) lowers
    what the bound asks of all layers. Raises InputError when the scores rank whole experts only.
    """
    gain_LEC = objective.gains(scores)
    widths_LE = plan.widths_LE
    held_LEK = torch.nn.functional.pad(gain_LEC.cumsum(dim=-1), (1, 0))
    reached = float(held_LEK.gather(-1, widths_LE.unsqueeze(-1)).sum())
    problem = BlockProblem(
        _block_gains(gain_LEC, budget.alignment),
        budget.minimum_width // budget.alignment,
        min(budget.top_k, int((widths_LE > 0).sum(dim=1).min())),
        -(-int(widths_LE.sum()) // budget.alignment),
    )
    return Certificate(reached, max(reached, relax(problem).bound))


def _block_gains(gain_LEC: Tensor, alignment: int) -> Tensor:
    return gain_LEC.unflatten(-1, (-1, alignment)).sum(dim=-1)
