"""Removal: the exact block-local loss of removing one channel or one expert, routing held fixed."""

from dataclasses import dataclass

from moeprune.calibration.statistics import Statistics
from moeprune.scoring.attribution import ALPHA, attribution_LEC, block_local_loss_L, require_alpha
from moeprune.types import Scores


@dataclass(frozen=True)
class RemovalScorer:
    """Channels and experts by the block-local loss that their removal alone costs.

    The loss ``sum_t q_t ||y'_t - y_t||^2`` of `AttributionScorer` is quadratic in a mask, so its second-order expansion
    is exact. From the intact model (``intact``, where the first order vanishes) removal costs

        R_ec = ||w_ec||^2 sum_t q_t g_te^2 h_tec^2   [L, E, C]        R_e = sum_t q_t g_te^2 ||f_te||^2   [L, E]

    and from the model with all routed experts scaled by alpha, as the second-order variant of arXiv 2606.18304 has it,

        A_ec + alpha^2 R_ec                                           A_e + alpha^2 R_e

    R_e is not the sum of its R_ec: channels of an expert add up before they are squared. The paper reports 17 times the
    time of its first order for its second; these closed forms need the forward pass of the statistics only. Where the
    router row of a removed expert goes too, its tokens reroute and the true loss differs. Scores from the scaled model
    may be negative: such a channel works against the routed output. Raises InputError unless alpha is above 0 and
    below 1.
    """

    alpha: float = ALPHA
    intact: bool = True

    def __post_init__(self) -> None:
        require_alpha(self.alpha)

    def __call__(self, statistics: Statistics) -> Scores:
        channel_LEC = statistics.removal_sum_LEC * statistics.down_column_norm_LEC.square()
        expert_LE = statistics.removal_sum_LE
        if not self.intact:
            first_LEC = attribution_LEC(statistics, self.alpha)
            channel_LEC = first_LEC + self.alpha**2 * channel_LEC
            expert_LE = first_LEC.sum(dim=-1) + self.alpha**2 * expert_LE
        return Scores(channel_LEC, expert_LE, block_local_loss_L(statistics, self.alpha))
