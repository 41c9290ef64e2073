"""Whole experts by the size of what they put out."""

from dataclasses import dataclass
from typing import ClassVar

from moeprune.calibration.statistics import Statistics
from moeprune.errors import InputError
from moeprune.scoring.attribution import block_local_loss_L
from moeprune.scoring.per_token import per_routed_token, variance_over_routed_tokens
from moeprune.types import Scores


@dataclass(frozen=True)
class ExpertOutputScorer:
    """Experts by ``N_e^-b sum_t g_te^a ||f_te||^p`` over the tokens routed to them [L, E].

    Four criteria are members of this family (arXiv 2606.15716): EAN (a=0, p=1, b=0), REAP (arXiv 2510.13999; a=1, p=1,
    b=1), MAN (a=0, p=1, b=1) and MSAN (a=0, p=2, b=1), with a = ``gated``, p = 2 if ``squared`` else 1 and
    b = ``per_token``. Channels get no score. An expert that no calibration token reached scores 0.

    Raises InputError for a=1 with p=2, which no paper asks for and the statistics do not hold.
    """

    gated: bool
    squared: bool
    per_token: bool
    scores_channels: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.gated and self.squared:
            raise InputError(
                "gated=true with squared=true is not possible: the statistics hold no sum of g ||f||^2.",
                change="Set one of them to false.",
            )

    def __call__(self, statistics: Statistics) -> Scores:
        if self.gated:
            expert_LE = statistics.gated_output_norm_sum_LE
        else:
            expert_LE = statistics.output_sq_norm_sum_LE if self.squared else statistics.output_norm_sum_LE
        if self.per_token:
            expert_LE = per_routed_token(expert_LE, statistics)
        return Scores(None, expert_LE, block_local_loss_L(statistics))


@dataclass(frozen=True)
class EasyEpScorer:
    """Experts by output, weighted by how far each token is moved (EASY-EP, arXiv 2504.06792).

        sum_t g_te ||f_te|| max(0, 1 - cos(y_t - m_t, y_t))          [L, E]

    The paper compares the token before and after the routed experts; "before" is read as the layer's output without
    them, y - m, so that attention and shared experts count on both sides. Channels get no score.
    """

    scores_channels: ClassVar[bool] = False

    def __call__(self, statistics: Statistics) -> Scores:
        return Scores(None, statistics.changed_output_norm_sum_LE, block_local_loss_L(statistics))


@dataclass(frozen=True)
class MoneScorer:
    """Experts by how badly a constant would replace them (MoNE, arXiv 2507.00390).

        ||sqrt(Var_t f_te)||_2 sum_t g_te / N          [L, E]

    The (population) variance is taken for each of the H outputs over the tokens routed to the expert; the authors' code
    approximates it by a running one. The second factor is called access frequency. The paper divides it by N = N_e, its
    code by all T tokens, and so do we, as the mean gate of a routed token does not say how often an expert is used;
    ``over_routed_tokens`` follows the paper instead. Meant to go with ``surgery=constant``. Channels get no score. An
    expert that no calibration token reached scores 0.
    """

    over_routed_tokens: bool = False
    scores_channels: ClassVar[bool] = False

    def __call__(self, statistics: Statistics) -> Scores:
        variance_LEH = variance_over_routed_tokens(statistics.output_sum_LEH, statistics.output_sq_sum_LEH, statistics)
        gates_LE = statistics.gate_sum_LE
        frequency_LE = (
            per_routed_token(gates_LE, statistics) if self.over_routed_tokens else gates_LE / statistics.tokens
        )
        expert_LE = variance_LEH.sum(dim=-1).sqrt() * frequency_LE
        return Scores(None, expert_LE, block_local_loss_L(statistics))
