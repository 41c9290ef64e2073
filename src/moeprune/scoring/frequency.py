"""Frequency: whole experts by how many tokens they get."""

from dataclasses import dataclass
from typing import ClassVar

from moeprune.calibration.statistics import Statistics
from moeprune.scoring.attribution import block_local_loss_L
from moeprune.types import Scores


@dataclass(frozen=True)
class FrequencyScorer:
    """Experts by N_e, the calibration tokens routed to them [L, E]; the common baseline. Channels get no score."""

    alpha: float = 0.9
    scores_channels: ClassVar[bool] = False

    def __call__(self, statistics: Statistics) -> Scores:
        return Scores(None, statistics.routed_tokens_LE, block_local_loss_L(statistics, self.alpha))
