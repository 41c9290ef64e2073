"""Random: the control that every other scorer has to beat."""

from dataclasses import dataclass

import torch

from moeprune.calibration.statistics import Statistics
from moeprune.scoring.attribution import block_local_loss_L
from moeprune.types import Scores


@dataclass(frozen=True)
class RandomScorer:
    """Channels and experts by independent uniform numbers from 0 to 1, the same for the same ``seed`` and shape.

    Layers are scored by their loss, as for every scorer; choose an allocator that does not look at it
    (uniform, whole_experts) for a control without any knowledge.
    """

    seed: int

    def __call__(self, statistics: Statistics) -> Scores:
        generator = torch.Generator().manual_seed(self.seed)
        layers, experts, width = statistics.channel_sq_sum_LEC.shape
        expert_LE = torch.rand(layers, experts, dtype=torch.float64, generator=generator)
        channel_LEC = torch.rand(layers, experts, width, dtype=torch.float64, generator=generator)
        return Scores(channel_LEC, expert_LE, block_local_loss_L(statistics))
