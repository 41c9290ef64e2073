"""How many channels each layer keeps."""

import torch
from torch import Tensor

from moeprune.allocation.budget import Budget
from moeprune.allocation.covering import cover

LAYER_RULES = ("loss_coverage", "uniform_coverage", "uniform", "u_shaped", "loss")


def layer_budgets(rule: str, channel_LEC: Tensor, loss_L: Tensor, budget: Budget) -> Tensor:
    """Channels per layer [L], int64, summing to the budget, each at least ``top_k * minimum_width``.

        loss_coverage      the fewest that reach coverage min(1, s * loss_l) of the layer's channel scores
        uniform_coverage   the same with s for all
        uniform            equal
        u_shaped           proportional to `u_shape`
        loss               proportional to loss_l

    The common s, or factor, is what meets the budget. ``loss_L`` is smoothed already. The rules are named in
    arXiv 2606.18304; its method is ``loss_coverage``.
    """
    if rule in ("loss_coverage", "uniform_coverage"):
        weight_L = loss_L if rule == "loss_coverage" else torch.ones_like(loss_L)
        return cover(channel_LEC.flatten(1), weight_L, budget.kept_channels, least=_least(budget))
    weights = {"uniform": torch.ones_like(loss_L), "u_shaped": u_shape(len(loss_L)), "loss": loss_L}
    return proportional(weights[rule], budget)


def u_shape(layers: int) -> Tensor:
    """``1 + (2 l / (L - 1) - 1)^2`` for l = 0..L-1 [L]: the ends weigh twice as much as the middle.

    arXiv 2606.18304 names a U over depth without a formula; this parabola is ours.
    """
    return 1 + torch.linspace(-1, 1, layers, dtype=torch.float64).square() if layers > 1 else torch.ones(1).double()


def proportional(weight_L: Tensor, budget: Budget) -> Tensor:
    """``clamp(s * weight_l, top_k * minimum_width, E * C)`` in whole channels [L], int64, summing to the budget.

    Fractions go to the largest first, then by index. Layers of weight 0 share equally what the others cannot take.
    """
    least, most = _least(budget), budget.experts * budget.width
    weight_L = weight_L / weight_L.max() if bool((weight_L > 0).any()) else torch.ones_like(weight_L)
    weight_L = weight_L.clamp(min=1e-12)

    def share_at(level: float) -> Tensor:
        return (level * weight_L).clamp(min=least, max=most)

    low, high = 0.0, most / float(weight_L.min())
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if float(share_at(middle).sum()) <= budget.kept_channels else (low, middle)
    share_L = share_at(low)
    # Shares are rounded sums; the tolerance keeps what should be whole from losing a channel.
    whole_L = (share_L + 1e-6).floor().long()
    left = budget.kept_channels - int(whole_L.sum())
    fraction_L = (share_L - whole_L).masked_fill(whole_L >= most, -torch.inf)
    whole_L[fraction_L.argsort(descending=True, stable=True)[:left]] += 1
    return whole_L


def _least(budget: Budget) -> int:
    return budget.top_k * budget.minimum_width
