"""CAMERA-P: channels as micro-experts, by the energy that they bring into the layer's output."""

from dataclasses import dataclass

from moeprune.calibration.statistics import Statistics
from moeprune.errors import InputError
from moeprune.scoring.attribution import scores_by_sum
from moeprune.types import Scores


@dataclass(frozen=True)
class CameraScorer:
    """Channels by energy (CAMERA-P, arXiv 2508.02322).

        ||w_ec||^2 [(1 - a) sum_t (g_te h_tec)^2 + a max_t (g_te h_tec)^2]          [L, E, C]

    with a = ``peak_weight``, 0.9 in the paper. The gates are those that the family's router applies, where the authors'
    code has a router of its own for each model; and only routed experts compete, where theirs prunes shared experts in
    the same ranking. The energy is a squared output error, so an expert scores the sum of its channels. An expert that
    no calibration token reached scores 0.

    Raises InputError for a ``peak_weight`` outside 0 to 1.
    """

    peak_weight: float = 0.9

    def __post_init__(self) -> None:
        if not 0 <= self.peak_weight <= 1:
            raise InputError(f"peak_weight={self.peak_weight} is not possible.", change="Use a number from 0 to 1.")

    def __call__(self, statistics: Statistics) -> Scores:
        total_LEC, largest_LEC = statistics.gated_channel_sq_sum_LEC, statistics.gated_channel_sq_max_LEC
        mixed_LEC = (1 - self.peak_weight) * total_LEC + self.peak_weight * largest_LEC
        channel_LEC = statistics.down_column_norm_LEC.square() * mixed_LEC
        return scores_by_sum(channel_LEC, statistics)
