"""From how many channels each expert keeps to which ones."""

import torch
from torch import Tensor

from moeprune.errors import InputError
from moeprune.types import Plan, Scores


def require_channel_scores(scores: Scores, allocator: str) -> Tensor:
    """The channel scores, or InputError when the scorer ranks whole experts only."""
    if scores.channel_LEC is None:
        raise InputError(
            f"allocator={allocator} needs a score for every channel; this scorer ranks whole experts only.",
            change="Use allocator=whole_experts, or a channel scorer such as scorer=attribution.",
        )
    return scores.channel_LEC


def best_channels_plan(channel_LEC: Tensor, widths_LE: Tensor, note: str) -> Plan:
    """The plan that keeps the ``widths_LE[l, e]`` best channels of each expert; ties go to the lower index."""
    order_LEC = channel_LEC.argsort(dim=-1, descending=True, stable=True)
    kept = tuple(
        tuple(order_LEC[layer, expert, :width].sort().values for expert, width in enumerate(widths))
        for layer, widths in enumerate(widths_LE.tolist())
    )
    return Plan(kept, width=channel_LEC.shape[-1], note=note)


def sorted_coverage(scores_NC: Tensor) -> Tensor:
    """``Cov(k) = sum_{i<=k} s_(i) / sum_i s_(i)`` for k = 1..C [N, C], scores clipped at 0 and sorted descending.

    A row without any positive score is covered by nothing: its coverage is 1 at every k.
    """
    sorted_NC = scores_NC.clamp(min=0).sort(dim=-1, descending=True).values
    total_N1 = sorted_NC.sum(dim=-1, keepdim=True)
    coverage_NC = sorted_NC.cumsum(dim=-1) / total_N1
    return torch.where(total_N1 > 0, coverage_NC, torch.ones_like(coverage_NC)).clamp(max=1)


def fewest_channels(coverage_NC: Tensor, target_N: Tensor) -> Tensor:
    """The smallest k with ``Cov(k) >= target`` [N], int64; 0 for a target of 0."""
    # Coverage is a rounded cumulative sum; the tolerance keeps a target of 1 reachable where it should be.
    reached_N = torch.searchsorted(coverage_NC, (target_N - 1e-12).unsqueeze(-1)).squeeze(-1) + 1
    return torch.where(target_N > 0, reached_N.clamp(max=coverage_NC.shape[-1]), torch.zeros_like(reached_N))
