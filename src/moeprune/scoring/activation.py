"""Activation: channels by how strongly they fire."""

from dataclasses import dataclass

import torch
from torch import Tensor

from moeprune.calibration.statistics import Statistics
from moeprune.scoring.attribution import attribution_LEC, block_local_loss_L
from moeprune.types import Scores


@dataclass(frozen=True)
class ActivationScorer:
    """Channels by root mean square activation over the tokens routed to the expert.

        (RMS_t h_tec + RMS_t gate_tec + RMS_t up_tec) / 3          [L, E, C]

    with the gate and up pre-activations (the default channel metric of arXiv 2606.18304). Channels of different
    experts are made comparable by coverage, not by this score. Experts and layers are scored by attribution at
    ``alpha``, as in the paper. An expert that no calibration token reached scores 0.
    """

    alpha: float = 0.9

    def __call__(self, statistics: Statistics) -> Scores:
        tokens_LE1 = statistics.routed_tokens_LE.unsqueeze(-1).clamp(min=1)

        def root_mean_square(sq_sum_LEC: Tensor) -> Tensor:
            return torch.sqrt(sq_sum_LEC / tokens_LE1)

        channel_LEC = torch.stack(
            [
                root_mean_square(statistics.channel_sq_sum_LEC),
                root_mean_square(statistics.gate_sq_sum_LEC),
                root_mean_square(statistics.up_sq_sum_LEC),
            ]
        ).mean(dim=0)
        expert_LE = attribution_LEC(statistics, self.alpha).sum(dim=-1)
        return Scores(channel_LEC, expert_LE, block_local_loss_L(statistics, self.alpha))
