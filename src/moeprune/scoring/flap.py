"""FLAP: channels by how much they fluctuate around a mean that a bias can replace."""

from dataclasses import dataclass

from moeprune.calibration.statistics import Statistics
from moeprune.scoring.attribution import scores_by_attribution
from moeprune.scoring.per_token import variance_over_routed_tokens
from moeprune.types import Scores


@dataclass(frozen=True)
class FlapScorer:
    """Channels by weighted fluctuation, standardised per layer (FLAP, arXiv 2312.11983, metric WIFV).

        F_ec = Var_t(h_tec) ||w_ec||^2          z = (F - mean F) / std F  over all channels of the layer   [L, E, C]

    The variance is over the tokens routed to the expert (population); the standard deviation is the sample's, as in the
    authors' code. FLAP ranks z over all layers. Coverage needs scores of at least 0, so the smallest z of all layers is
    subtracted from every one, which leaves that ranking as it is. FLAP was made for dense models: a layer's down
    projection is one matrix there, and here the layer's experts are taken together. In a layer where all channels
    fluctuate alike z is 0. Meant to go with ``surgery=constant``, which adds the removed channels' mean back and
    leaves the router alone. Experts are scored by attribution, layers by loss. Of an expert that no calibration token
    reached the channels have the least score of their layer.
    """

    def __call__(self, statistics: Statistics) -> Scores:
        variance_LEC = variance_over_routed_tokens(
            statistics.channel_sum_LEC, statistics.channel_sq_sum_LEC, statistics
        )
        fluctuation_LEC = variance_LEC * statistics.down_column_norm_LEC.square()
        deviation_LEC = fluctuation_LEC - fluctuation_LEC.mean(dim=(1, 2), keepdim=True)
        spread_L11 = fluctuation_LEC.std(dim=(1, 2), keepdim=True)
        standardised_LEC = (deviation_LEC / spread_L11).where(spread_L11 > 0, 0.0)
        return scores_by_attribution(standardised_LEC - standardised_LEC.min(), statistics)
