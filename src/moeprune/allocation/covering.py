"""Counts by coverage: every row keeps the fewest channels that reach its share of a common coverage level."""

import torch
from torch import Tensor

from moeprune.allocation.selection import fewest_channels, largest, sorted_coverage, sorted_descending


def cover(scores_NC: Tensor, weight_N: Tensor, target: int, *, least: int) -> Tensor:
    """Counts k_n [N], int64, summing to ``target``, each at least ``least``.

    ``k_n`` is the fewest channels of row n that reach coverage ``min(1, level * weight_n)``; the common level is found
    by bisection (arXiv 2606.18304, algorithm listing: for layers and for the experts of a layer alike). The paper stops
    within a tolerance of the target; here the last few channels are then given or taken by smallest marginal score.
    """
    width = scores_NC.shape[1]
    coverage_NC = sorted_coverage(scores_NC)
    weight_N = weight_N if bool((weight_N > 0).any()) else torch.ones_like(weight_N)

    def counts_at(level: float) -> Tensor:
        return fewest_channels(coverage_NC, (level * weight_N).clamp(max=1)).clamp(min=least, max=width)

    low, high = 0.0, 1 / float(weight_N[weight_N > 0].min())
    # To the last bit: a row of hardly any weight makes ``high`` so large that a fixed number of steps blurs the others.
    while low < (middle := (low + high) / 2) < high:
        counts_N = counts_at(middle)
        kept = int(counts_N.sum())
        if kept == target:
            return counts_N
        low, high = (middle, high) if kept < target else (low, middle)
    return _corrected(counts_at(high), scores_NC, target, least)


def _corrected(counts_N: Tensor, scores_NC: Tensor, target: int, least: int) -> Tensor:
    """Counts that sum to ``target``: drop the lowest kept channels, or add the highest of those not kept."""
    difference = target - int(counts_N.sum())
    if difference == 0:
        return counts_N
    sorted_NC = sorted_descending(scores_NC)
    position_C = torch.arange(sorted_NC.shape[1])
    kept_NC = position_C < counts_N.unsqueeze(-1)
    if difference > 0:
        candidate_NC, count = ~kept_NC, difference
    else:
        candidate_NC = kept_NC & (position_C >= least)
        count = int(candidate_NC.sum()) + difference
    # Equal scores of a row are chosen from the front, so a prefix of every row stays.
    chosen_NC = largest(sorted_NC.masked_fill(~candidate_NC, -torch.inf).flatten(), count).view_as(kept_NC)
    fixed_NC = kept_NC if difference > 0 else kept_NC & ~candidate_NC
    return (fixed_NC | chosen_NC).sum(dim=-1)
