"""Attribution: the first-order effect of scaling an expert or a channel on the layer's output, in closed form."""

from dataclasses import dataclass

from torch import Tensor

from moeprune.calibration.statistics import Statistics
from moeprune.errors import InputError
from moeprune.types import Scores

# By what arXiv 2606.18304 scales the routed experts.
ALPHA = 0.9


@dataclass(frozen=True)
class AttributionScorer:
    """Channels by attribution.

    With the block-local loss ``sum_t q_t ||y'_t - y_t||^2``, ``q_t = 1 / (||y_t||^2 + eps)``, where y' is the layer's
    output with all routed experts scaled by alpha, minus the gradient in direction of the channel is

        A_ec = 2 alpha (1 - alpha) sum_t q_t g_te h_tec <w_ec, m_t>          [L, E, C]

    and an expert's attribution A_e is the sum of its channels'. The paper (arXiv 2606.18304, method section) obtains A
    by a backward pass per layer; this closed form is exactly equal and needs the forward pass only. With ``usage`` all
    scores of an expert are multiplied by N_e / T, the share of tokens routed to it, as the released code does.

    Raises InputError unless alpha is above 0 and below 1.
    """

    alpha: float = ALPHA
    usage: bool = False

    def __post_init__(self) -> None:
        require_alpha(self.alpha)

    def __call__(self, statistics: Statistics) -> Scores:
        channel_LEC = attribution_LEC(statistics, self.alpha)
        if self.usage:
            channel_LEC = channel_LEC * (statistics.routed_tokens_LE / statistics.tokens).unsqueeze(-1)
        return scores_by_sum(channel_LEC, statistics, self.alpha)


def require_alpha(alpha: float) -> None:
    """Raise InputError for an alpha at which the loss or its gradient vanishes, or that grows or flips the experts."""
    if not 0 < alpha < 1:
        raise InputError(f"alpha={alpha} is not possible.", change="Use a number above 0 and below 1, as 0.9.")


def attribution_LEC(statistics: Statistics, alpha: float = ALPHA) -> Tensor:
    """``2 alpha (1 - alpha) sum_t q_t g_te h_tec <w_ec, m_t>`` [L, E, C], float64."""
    return 2 * alpha * (1 - alpha) * statistics.attribution_sum_LEC


def block_local_loss_L(statistics: Statistics, alpha: float = ALPHA) -> Tensor:
    """``(1 - alpha)^2 sum_t q_t ||m_t||^2`` [L]: the loss itself, as scaling all routed experts changes y by
    ``(alpha - 1) m``."""
    return (1 - alpha) ** 2 * statistics.routed_output_loss_L


def scores_by_attribution(channel_LEC: Tensor, statistics: Statistics, alpha: float = ALPHA) -> Scores:
    """Scores of a channel metric that cannot be summed to an expert's: experts by attribution, layers by loss.

    The paper pairs its channel metrics with attribution between experts in the same way.
    """
    expert_LE = attribution_LEC(statistics, alpha).sum(dim=-1)
    return Scores(channel_LEC, expert_LE, block_local_loss_L(statistics, alpha))


def scores_by_sum(channel_LEC: Tensor, statistics: Statistics, alpha: float = ALPHA) -> Scores:
    """Scores of a channel metric that adds up: an expert's is the sum of its channels', layers by loss."""
    return Scores(channel_LEC, channel_LEC.sum(dim=-1), block_local_loss_L(statistics, alpha))
