"""Scorers that use the gradient of a loss with respect to channels: block-local, or of the whole language model.

Throughout ``d = dLoss/dh`` of one token. With the block-local loss of arXiv 2606.18304 at alpha it is, in closed form,

    d_tec = 2 alpha (alpha - 1) q_t g_te <w_ec, m_t>

so what needs only h and d comes from the statistics, without a backward pass; the pass gives the same (tested).
"""

from dataclasses import dataclass

from torch import Tensor

from moeprune.calibration.loss_gradients import (
    BLOCK_LOCAL,
    LANGUAGE_MODEL,
    LossGradientPass,
    LossGradients,
    require_known_loss,
)
from moeprune.calibration.statistics import Statistics
from moeprune.errors import InputError
from moeprune.scoring.attribution import block_local_loss_L, scores_by_attribution
from moeprune.scoring.per_token import per_routed_token
from moeprune.types import Scores

FIRST_ORDER = "first"
FISHER = "fisher"


@dataclass(frozen=True)
class SaliencyScorer:
    """Channels by ``mean_t |h_tec d_tec|`` over the tokens routed to the expert [L, E, C] (listed in 2606.18304).

    ``loss``: ``block_local`` (in closed form, no backward pass) or ``language_model``. Experts are scored by
    attribution at ``alpha``. An expert that no token reached scores 0. Raises InputError for another loss.
    """

    loss: str = BLOCK_LOCAL
    alpha: float = 0.9

    def __post_init__(self) -> None:
        require_known_loss(self.loss)

    @property
    def passes(self) -> tuple[LossGradientPass, ...]:
        return _pass_unless_closed_form(self.loss)

    def __call__(self, statistics: Statistics, *gradients: LossGradients) -> Scores:
        if gradients:
            abs_sum_LEC = gradients[0].contribution_abs_sum_LEC
        else:
            abs_sum_LEC = 2 * self.alpha * (1 - self.alpha) * statistics.saliency_sum_LEC
        return scores_by_attribution(per_routed_token(abs_sum_LEC, statistics), statistics, self.alpha)


@dataclass(frozen=True)
class GradientScorer:
    """Channels by ``sqrt(mean_t d_tec^2)`` over the tokens routed to the expert [L, E, C] (listed in 2606.18304).

    ``loss``: ``block_local`` (in closed form, no backward pass) or ``language_model``. Experts are scored by
    attribution at ``alpha``. An expert that no token reached scores 0. Raises InputError for another loss.
    """

    loss: str = BLOCK_LOCAL
    alpha: float = 0.9

    def __post_init__(self) -> None:
        require_known_loss(self.loss)

    @property
    def passes(self) -> tuple[LossGradientPass, ...]:
        return _pass_unless_closed_form(self.loss)

    def __call__(self, statistics: Statistics, *gradients: LossGradients) -> Scores:
        if gradients:
            sq_sum_LEC = gradients[0].gradient_sq_sum_LEC
        else:
            sq_sum_LEC = (2 * self.alpha * (1 - self.alpha)) ** 2 * statistics.gradient_sq_sum_LEC
        return scores_by_attribution(per_routed_token(sq_sum_LEC, statistics).sqrt(), statistics, self.alpha)


@dataclass(frozen=True)
class SnipScorer:
    """Channels by connection sensitivity (SNIP, arXiv 1810.02340) [L, E, C].

        sum over batches of  sum |W * dLoss/dW|  over the channel's row of gate, row of up and column of down

    SNIP takes the absolute value of one batch's gradient; over several batches we add the absolute values, so the
    scores depend on the batch size (see `LossGradients`). ``loss``: ``block_local`` (through the experts only) or
    ``language_model``. Experts are scored by attribution at ``alpha``. Raises InputError for another loss.
    """

    loss: str = BLOCK_LOCAL
    alpha: float = 0.9

    def __post_init__(self) -> None:
        require_known_loss(self.loss)

    @property
    def passes(self) -> tuple[LossGradientPass, ...]:
        return (_pass(self.loss, self.alpha),)

    def __call__(self, statistics: Statistics, gradients: LossGradients) -> Scores:
        return scores_by_attribution(gradients.weight_saliency_sum_LEC, statistics, self.alpha)


@dataclass(frozen=True)
class HeaprScorer:
    """Channels by the second-order loss of removing them, in output space (HEAPr, arXiv 2509.22299).

        1/2 mean_t[h_tec^2] * w_ec^T Gbar_e w_ec,    Gbar_e = mean_t[grad_te grad_te^T]          [L, E, C]

    means over the tokens routed to the expert, grad_te = dLoss/df_te with respect to the expert's output f = W_down h
    before its gate is applied, so the gate is inside the gradient. Then ``w_ec . grad_te = dLoss/dh_tec``, and the
    second factor is ``mean_t d_tec^2``: the matrix Gbar is never formed. Whether the paper takes the output before or
    after the gate, and its means over routed or over all tokens, we could not settle: with the product of two means
    over routed tokens, how often an expert is used does not count. The score is a loss, so an expert scores the sum of
    its channels. ``loss`` is the language-modelling loss in the paper. Raises InputError for another loss than the two.
    """

    loss: str = LANGUAGE_MODEL
    alpha: float = 0.9

    def __post_init__(self) -> None:
        require_known_loss(self.loss)

    @property
    def passes(self) -> tuple[LossGradientPass, ...]:
        return (_pass(self.loss, self.alpha),)

    def __call__(self, statistics: Statistics, gradients: LossGradients) -> Scores:
        h_sq_LEC = per_routed_token(statistics.channel_sq_sum_LEC, statistics)
        channel_LEC = h_sq_LEC * per_routed_token(gradients.gradient_sq_sum_LEC, statistics) / 2
        return _scores_by_sum(channel_LEC, statistics, self.alpha)


@dataclass(frozen=True)
class EndToEndScorer:
    """Channels by how removing them would change the language-modelling loss over the calibration tokens, in nats.

    A mask on the channel goes from 1 to 0, routing of the layer held fixed, later layers as they respond:

        first    - sum_t h_tec d_tec                 first order; positive where removal raises the loss  [L, E, C]
        fisher   1/2 sum_t (h_tec d_tec)^2           second order with the empirical Fisher information, per token

    First-order scores may be negative: the loss would fall. Coverage clips them at 0, rankings remove them first; an
    expert scores the sum of its channels, negative ones included. With ``loss`` block_local, ``first`` is attribution
    again. Raises InputError for another loss or order.
    """

    loss: str = LANGUAGE_MODEL
    order: str = FIRST_ORDER
    alpha: float = 0.9

    def __post_init__(self) -> None:
        require_known_loss(self.loss)
        if self.order not in (FIRST_ORDER, FISHER):
            raise InputError(f"order={self.order} is not possible.", possible=(FIRST_ORDER, FISHER), given=self.order)

    @property
    def passes(self) -> tuple[LossGradientPass, ...]:
        return (_pass(self.loss, self.alpha),)

    def __call__(self, statistics: Statistics, gradients: LossGradients) -> Scores:
        if self.order == FIRST_ORDER:
            return _scores_by_sum(-gradients.contribution_sum_LEC, statistics, self.alpha)
        return _scores_by_sum(gradients.contribution_sq_sum_LEC / 2, statistics, self.alpha)


def _scores_by_sum(channel_LEC: Tensor, statistics: Statistics, alpha: float) -> Scores:
    """Scores of a channel metric that is a loss: an expert's is the sum of its channels'."""
    return Scores(channel_LEC, channel_LEC.sum(dim=-1), block_local_loss_L(statistics, alpha))


def _pass(loss: str, alpha: float) -> LossGradientPass:
    # The language-modelling loss knows no alpha: one result for every alpha of a scorer.
    return LossGradientPass(loss, alpha) if loss == BLOCK_LOCAL else LossGradientPass(loss)


def _pass_unless_closed_form(loss: str) -> tuple[LossGradientPass, ...]:
    return () if loss == BLOCK_LOCAL else (LossGradientPass(loss),)
