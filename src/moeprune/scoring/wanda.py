"""Wanda, made structured: channels by the size of their activations times the size of their weights."""

from dataclasses import dataclass

import torch

from moeprune.calibration.statistics import Statistics
from moeprune.scoring.attribution import scores_by_attribution
from moeprune.types import Scores


@dataclass(frozen=True)
class WandaScorer:
    """Channels by the summed Wanda scores of their weights.

        ||h_c||_2 sum_i |W_down[i, c]|          [L, E, C]

    with norms over the tokens routed to the expert. Wanda (arXiv 2306.11695) scores a weight by ``|W_ij| ||x_j||_2``;
    this is the sum over the column that goes with channel c. With ``inputs`` it is averaged with the sums over the
    channel's rows of the gate and up projections, ``sum_j |W[c, j]| ||x_j||_2``. Wanda itself prunes single weights
    (``surgery=wanda_unstructured``); arXiv 2606.18304 has the structured form among its channel metrics. Experts are
    scored by attribution, layers by loss. An expert that no calibration token reached scores 0.
    """

    inputs: bool = False

    def __call__(self, statistics: Statistics) -> Scores:
        channel_LEC = statistics.channel_sq_sum_LEC.sqrt() * statistics.down_column_abs_sum_LEC
        if self.inputs:
            rows = [statistics.gate_row_input_norm_LEC, statistics.up_row_input_norm_LEC]
            channel_LEC = torch.stack([channel_LEC, *rows]).mean(dim=0)
        return scores_by_attribution(channel_LEC, statistics)
