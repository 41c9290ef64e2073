"""Activation: channels by how strongly they fire."""

from dataclasses import dataclass, replace

import torch

from moeprune.calibration.statistics import Statistics
from moeprune.errors import require_choice
from moeprune.scoring.attribution import scores_by_attribution
from moeprune.scoring.per_token import per_routed_token
from moeprune.scoring.removal import RemovalScorer
from moeprune.types import Scores

FIRST_ORDER, SECOND_ORDER = "first_order", "second_order"


@dataclass(frozen=True)
class ActivationScorer:
    """Channels by root mean square activation over the tokens routed to the expert.

        (RMS_t h_tec + RMS_t gate_tec + RMS_t up_tec) / 3          [L, E, C]

    with the gate and up pre-activations (the default channel metric of arXiv 2606.18304). Channels of different
    experts are made comparable by coverage, not by this score. Layers are scored by loss, experts by attribution as in
    the paper (``experts="first_order"``), or as `RemovalScorer` has it from the scaled model ("second_order").
    An expert that no calibration token reached scores 0. Raises InputError for another word.
    """

    experts: str = FIRST_ORDER

    def __post_init__(self) -> None:
        require_choice("scorer.experts", self.experts, (FIRST_ORDER, SECOND_ORDER))

    def __call__(self, statistics: Statistics) -> Scores:
        sq_sums = statistics.channel_sq_sum_LEC, statistics.gate_sq_sum_LEC, statistics.up_sq_sum_LEC
        root_mean_squares = [per_routed_token(sq_sum_LEC, statistics).sqrt() for sq_sum_LEC in sq_sums]
        scores = scores_by_attribution(torch.stack(root_mean_squares).mean(dim=0), statistics)
        if self.experts == SECOND_ORDER:
            return replace(scores, expert_LE=RemovalScorer(intact=False)(statistics).expert_LE)
        return scores
