"""Coverage: the paper's allocation. Layers share the budget by loss, experts by attribution, both through coverage."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moeprune.allocation.alignment import align
from moeprune.allocation.budget import Budget
from moeprune.allocation.covering import cover
from moeprune.allocation.selection import best_channels_plan, require_channel_scores
from moeprune.errors import InputError
from moeprune.types import Plan, Scores


@dataclass(frozen=True)
class CoverageAllocator:
    """``loss_coverage`` between layers, coverage-based allocation (CBA) inside, then alignment and reallocation.

    Between layers: layer l keeps the fewest channels that reach coverage ``min(1, s * smooth(loss)_l)`` of its own
    channel scores; bisection on s meets the budget. Inside: expert e keeps the fewest that reach
    ``min(1, beta * sqrt(max(0, A_e)))``; bisection on beta meets the layer's share (arXiv 2606.18304, algorithm
    listing). ``smoothing_rounds`` is how often the square root is repeated; the paper does not give the number.
    """

    smoothing_rounds: int = 2
    needs_channel_scores: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.smoothing_rounds < 0:
            raise InputError(f"smoothing_rounds={self.smoothing_rounds} is not possible.", change="Use 0 or more.")

    def __call__(self, scores: Scores, budget: Budget) -> Plan:
        channel_LEC = require_channel_scores(scores, "coverage").double()
        layers = len(channel_LEC)
        layer_budget_L = cover(
            channel_LEC.reshape(layers, -1),
            smoothed_loss(scores.layer_L.double(), self.smoothing_rounds),
            budget.kept_channels,
            least=budget.top_k * budget.minimum_width,
        )
        weight_LE = scores.expert_LE.double().clamp(min=0).sqrt()
        counts_LE = torch.stack(
            [
                cover(channel_LEC[layer], weight_LE[layer], int(layer_budget_L[layer]), least=0)
                for layer in range(layers)
            ]
        )
        return best_channels_plan(channel_LEC, align(counts_LE, budget), budget.rounding_note)


def smoothed_loss(loss_L: Tensor, rounds: int) -> Tensor:
    """Repeated square root with clipping at mean +- standard deviation, normalised to mean 1 [L]."""
    for _ in range(rounds):
        root_L = loss_L.clamp(min=0).sqrt()
        mean, deviation = root_L.mean(), root_L.std(correction=0)
        loss_L = root_L.clamp(min=float(mean - deviation), max=float(mean + deviation))
    mean_loss = loss_L.mean()
    return loss_L / mean_loss if mean_loss > 0 else torch.ones_like(loss_L)
