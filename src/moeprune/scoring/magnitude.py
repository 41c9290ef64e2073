"""Magnitude: channels by the size of their weights, without looking at data."""

from dataclasses import dataclass

import torch

from moeprune.calibration.statistics import Statistics
from moeprune.scoring.attribution import scores_by_attribution
from moeprune.types import Scores


@dataclass(frozen=True)
class MagnitudeScorer:
    """Channels by the mean of the L2 norms of their gate row, up row and down column [L, E, C].

    The control for channel metrics in arXiv 2606.18304. Only the channel scores do without data: experts are scored
    by attribution, layers by loss.
    """

    def __call__(self, statistics: Statistics) -> Scores:
        norms = [statistics.gate_row_norm_LEC, statistics.up_row_norm_LEC, statistics.down_column_norm_LEC]
        return scores_by_attribution(torch.stack(norms).mean(dim=0), statistics)
