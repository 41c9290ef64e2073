"""Whole experts by how much the router uses them: three ways to count."""

from dataclasses import dataclass
from typing import ClassVar

from moeprune.calibration.statistics import Statistics
from moeprune.scoring.attribution import block_local_loss_L
from moeprune.types import Scores


@dataclass(frozen=True)
class FrequencyScorer:
    """Experts by N_e, the calibration tokens routed to them [L, E]; the common baseline. Channels get no score."""

    scores_channels: ClassVar[bool] = False

    def __call__(self, statistics: Statistics) -> Scores:
        return Scores(None, statistics.routed_tokens_LE, block_local_loss_L(statistics))


@dataclass(frozen=True)
class SoftCountScorer:
    """Experts by the sum of their gates over the tokens routed to them, ``sum_t g_te`` [L, E].

    The soft counting of SEER-MoE (arXiv 2404.05089). The gates are those that the family finally applies, so where it
    renormalises, every token counts as one in all. Channels get no score.
    """

    scores_channels: ClassVar[bool] = False

    def __call__(self, statistics: Statistics) -> Scores:
        return Scores(None, statistics.gate_sum_LE, block_local_loss_L(statistics))


@dataclass(frozen=True)
class RouterScoreScorer:
    """Experts by the sum over all tokens of the softmax over all router logits [L, E].

    The routing score of He et al. (arXiv 2406.02500), for ranking inside layers or over all of them. It sees also the
    tokens that nearly reached an expert. Channels get no score.
    """

    scores_channels: ClassVar[bool] = False

    def __call__(self, statistics: Statistics) -> Scores:
        return Scores(None, statistics.probability_sum_LE, block_local_loss_L(statistics))
