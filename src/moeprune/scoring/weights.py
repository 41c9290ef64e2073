"""What allocators may weigh experts by, whatever the scorer."""

from dataclasses import replace

from moeprune.calibration.statistics import Statistics
from moeprune.scoring.attribution import ALPHA, attribution_LEC
from moeprune.types import ExpertWeights, Scores


def with_expert_weights(scores: Scores, statistics: Statistics, alpha: float = ALPHA) -> Scores:
    """The scores with their ``weights`` [L, E]: A_e at ``alpha``, tokens N_e, sum of gates, removal loss R_e."""
    weights = ExpertWeights(
        attribution_LE=attribution_LEC(statistics, alpha).sum(dim=-1),
        usage_LE=statistics.routed_tokens_LE,
        router_LE=statistics.gate_sum_LE,
        removal_LE=statistics.removal_sum_LE,
    )
    return replace(scores, weights=weights)
