"""Ranking: the highest channel scores stay, whichever expert they belong to."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moeprune.allocation.alignment import align
from moeprune.allocation.budget import Budget
from moeprune.allocation.layer_budgets import layer_budgets
from moeprune.allocation.selection import (
    best_channels_plan,
    largest,
    put_back,
    require_channel_scores,
    score_order,
    take_experts,
)
from moeprune.errors import require_choice
from moeprune.types import Plan, Scores

SCOPES = ("layer", "model")


@dataclass(frozen=True)
class RankingAllocator:
    """Keeps the highest channel scores among all channels of a layer, or of the model; then alignment (`align`).

    ``scope="layer"``: layers keep equally many channels (a channel or a block apart where that does not divide).
    ``scope="model"``: one ranking over all layers, which keeps the largest possible sum of scores; every layer keeps
    at least its ``top_k * minimum_width`` best. Scores of different experts, and for the model of different layers,
    must share a unit: attribution and removal do, activation does not.
    """

    scope: str = "layer"
    needs_channel_scores: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_choice("scope", self.scope, SCOPES)

    def __call__(self, scores: Scores, budget: Budget) -> Plan:
        channel_LEC = require_channel_scores(scores, "channel_ranking")
        order_LE = score_order(scores.expert_LE)
        flat_LN = take_experts(channel_LEC, order_LE).flatten(1)
        if self.scope == "layer":
            layer_budget_L = layer_budgets("uniform", channel_LEC, scores.layer_L.double(), budget)
            keep_LN = _best_of_each(flat_LN, layer_budget_L.tolist())
        else:
            must_LN = _best_of_each(flat_LN, [budget.top_k * budget.minimum_width] * len(flat_LN))
            keep_LN = largest(flat_LN.masked_fill(must_LN, torch.inf).flatten(), budget.kept_channels)
        counts_LE = put_back(keep_LN.view_as(channel_LEC).sum(dim=-1), order_LE)
        widths_LE = align(counts_LE, budget, scores.expert_LE)
        return best_channels_plan(channel_LEC, widths_LE, budget.rounding_note)


def _best_of_each(flat_LN: Tensor, counts: list[int]) -> Tensor:
    return torch.stack([largest(scores_N, count) for scores_N, count in zip(flat_LN, counts, strict=True)])
