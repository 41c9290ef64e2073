"""Scorers that use the gradient of a loss with respect to channels: block-local, or of the whole language model.

Throughout ``d = dLoss/dh`` of one token. With the block-local loss of arXiv 2606.18304 it is, in closed form,

    d_tec = 2 alpha (alpha - 1) q_t g_te <w_ec, m_t>,          alpha = 0.9

so what needs only h and d comes from the statistics, without a backward pass; the pass gives the same (tested).
"""

from dataclasses import dataclass

from moeprune.calibration.loss_gradients import (
    BLOCK_LOCAL,
    LANGUAGE_MODEL,
    LOSSES,
    LossGradientPass,
    LossGradients,
)
from moeprune.calibration.statistics import Statistics
from moeprune.errors import require_choice
from moeprune.scoring.attribution import ALPHA, scores_by_attribution, scores_by_sum
from moeprune.scoring.per_token import per_routed_token
from moeprune.types import Scores

FIRST_ORDER = "first"
FISHER = "fisher"


@dataclass(frozen=True)
class SaliencyScorer:
    """Channels by ``mean_t |h_tec d_tec|`` over the tokens routed to the expert [L, E, C] (listed in 2606.18304).

    ``loss``: ``block_local`` (in closed form, no backward pass) or ``language_model``. Experts are scored by
    attribution. An expert that no token reached scores 0. Raises InputError for another loss.
    """

    loss: str = BLOCK_LOCAL

    def __post_init__(self) -> None:
        require_choice("loss", self.loss, LOSSES)

    @property
    def passes(self) -> tuple[LossGradientPass, ...]:
        return _pass_unless_closed_form(self.loss)

    def __call__(self, statistics: Statistics, *gradients: LossGradients) -> Scores:
        if gradients:
            abs_sum_LEC = gradients[0].contribution_abs_sum_LEC
        else:
            abs_sum_LEC = 2 * ALPHA * (1 - ALPHA) * statistics.saliency_sum_LEC
        return scores_by_attribution(per_routed_token(abs_sum_LEC, statistics), statistics)


@dataclass(frozen=True)
class GradientScorer:
    """Channels by ``sqrt(mean_t d_tec^2)`` over the tokens routed to the expert [L, E, C] (listed in 2606.18304).

    ``loss``: ``block_local`` (in closed form, no backward pass) or ``language_model``. Experts are scored by
    attribution. An expert that no token reached scores 0. Raises InputError for another loss.
    """

    loss: str = BLOCK_LOCAL

    def __post_init__(self) -> None:
        require_choice("loss", self.loss, LOSSES)

    @property
    def passes(self) -> tuple[LossGradientPass, ...]:
        return _pass_unless_closed_form(self.loss)

    def __call__(self, statistics: Statistics, *gradients: LossGradients) -> Scores:
        if gradients:
            sq_sum_LEC = gradients[0].gradient_sq_sum_LEC
        else:
            sq_sum_LEC = (2 * ALPHA * (1 - ALPHA)) ** 2 * statistics.gradient_sq_sum_LEC
        return scores_by_attribution(per_routed_token(sq_sum_LEC, statistics).sqrt(), statistics)


@dataclass(frozen=True)
class SnipScorer:
    """Channels by connection sensitivity (SNIP, arXiv 1810.02340) [L, E, C].

        sum over batches of  sum |W * dLoss/dW|  over the channel's row of gate, row of up and column of down

    SNIP takes the absolute value of one batch's gradient; over several batches we add the absolute values, so the
    scores depend on the batch size (see `LossGradients`). ``loss``: ``block_local`` (through the experts only) or
    ``language_model``. Experts are scored by attribution. Raises InputError for another loss.
    """

    loss: str = BLOCK_LOCAL

    def __post_init__(self) -> None:
        require_choice("loss", self.loss, LOSSES)

    @property
    def passes(self) -> tuple[LossGradientPass, ...]:
        return (LossGradientPass(self.loss),)

    def __call__(self, statistics: Statistics, gradients: LossGradients) -> Scores:
        return scores_by_attribution(gradients.weight_saliency_sum_LEC, statistics)


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

    def __post_init__(self) -> None:
        require_choice("loss", self.loss, LOSSES)

    @property
    def passes(self) -> tuple[LossGradientPass, ...]:
        return (LossGradientPass(self.loss),)

    def __call__(self, statistics: Statistics, gradients: LossGradients) -> Scores:
        h_sq_LEC = per_routed_token(statistics.channel_sq_sum_LEC, statistics)
        channel_LEC = h_sq_LEC * per_routed_token(gradients.gradient_sq_sum_LEC, statistics) / 2
        return scores_by_sum(channel_LEC, statistics)


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

    def __post_init__(self) -> None:
        require_choice("loss", self.loss, LOSSES)
        require_choice("order", self.order, (FIRST_ORDER, FISHER))

    @property
    def passes(self) -> tuple[LossGradientPass, ...]:
        return (LossGradientPass(self.loss),)

    def __call__(self, statistics: Statistics, gradients: LossGradients) -> Scores:
        if self.order == FIRST_ORDER:
            return scores_by_sum(-gradients.contribution_sum_LEC, statistics)
        return scores_by_sum(gradients.contribution_sq_sum_LEC / 2, statistics)


def _pass_unless_closed_form(loss: str) -> tuple[LossGradientPass, ...]:
    return () if loss == BLOCK_LOCAL else (LossGradientPass(loss),)
