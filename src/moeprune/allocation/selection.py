"""From how many channels each expert keeps to which ones; ties always go to the lower index."""

import numpy as np
import torch
from torch import Tensor

from moeprune.errors import InputError
from moeprune.types import Merge, Plan, Scores


def require_channel_scores(scores: Scores, allocator: str) -> Tensor:
    """The channel scores in float64, or InputError when the scorer ranks whole experts only."""
    if scores.channel_LEC is None:
        raise InputError(
            f"allocator={allocator} needs a score for every channel; this scorer ranks whole experts only.",
            change="Use allocator=whole_experts, or a channel scorer such as scorer=attribution.",
        )
    return scores.channel_LEC.double()


def best_channels_plan(channel_LEC: Tensor, widths_LE: Tensor, note: str) -> Plan:
    """The plan that keeps the ``widths_LE[l, e]`` best channels of each expert."""
    sorted_LEC = sorted_descending(channel_LEC)
    last_LE1 = sorted_LEC.gather(-1, (widths_LE - 1).clamp(min=0).unsqueeze(-1))
    keep_LEC = channel_LEC > last_LE1
    room_LE1 = (widths_LE - keep_LEC.sum(dim=-1)).unsqueeze(-1)
    tied_LEC = channel_LEC == last_LE1
    keep_LEC |= tied_LEC & (tied_LEC.cumsum(dim=-1, dtype=torch.int32) <= room_LE1)
    return mask_plan(keep_LEC, note)


def whole_experts_plan(keep_LE: Tensor, width: int, note: str, merge: Merge | None = None) -> Plan:
    """The plan that keeps every channel of the marked experts and none of the others."""
    return mask_plan(keep_LE.unsqueeze(-1).expand(*keep_LE.shape, width), note, merge)


def mask_plan(keep_LEC: Tensor, note: str, merge: Merge | None = None) -> Plan:
    """The plan that keeps the marked channels."""
    experts, width = keep_LEC.shape[1:]
    channels = keep_LEC.flatten().nonzero().squeeze(-1) % width
    pieces = channels.split(keep_LEC.sum(dim=-1).flatten().tolist())
    kept = tuple(tuple(pieces[start : start + experts]) for start in range(0, len(pieces), experts))
    return Plan(kept, width, note, merge)


def sorted_descending(scores_NC: Tensor) -> Tensor:
    """Each row from its highest value to its lowest."""
    # numpy's vectorised sort takes a seventh of torch's time on long rows, and no order of equals is needed.
    return torch.from_numpy(np.sort(scores_NC.numpy(), axis=-1)).flip(-1)


def largest(values_N: Tensor, count: int) -> Tensor:
    """Marks the ``count`` largest values [N], bool."""
    if count <= 0:
        return torch.zeros_like(values_N, dtype=torch.bool)
    position = len(values_N) - count
    threshold = float(np.partition(values_N.numpy(), position)[position])
    above_N, tied_N = values_N > threshold, values_N == threshold
    return above_N | tied_N & (tied_N.cumsum(dim=0) <= count - int(above_N.sum()))


def score_order(expert_LE: Tensor) -> Tensor:
    """The experts of each layer from the highest score to the lowest [L, E], int64.

    Where experts are put in this order first, what breaks ties by index breaks them by score, then by index.
    """
    return expert_LE.argsort(dim=1, descending=True, stable=True)


def take_experts(values_LE: Tensor, order_LE: Tensor) -> Tensor:
    """The experts' values [L, E] or [L, E, C] in this order."""
    return values_LE[torch.arange(len(order_LE)).unsqueeze(-1), order_LE]


def put_back(ordered_LE: Tensor, order_LE: Tensor) -> Tensor:
    """The inverse of `take_experts` for values [L, E]."""
    return torch.empty_like(ordered_LE).scatter_(1, order_LE, ordered_LE)


def sorted_coverage(scores_NC: Tensor) -> Tensor:
    """``Cov(k) = sum_{i<=k} s_(i) / sum_i s_(i)`` for k = 1..C [N, C], scores clipped at 0 and sorted descending.

    A row without any positive score is covered by nothing: its coverage is 1 at every k.
    """
    held_NC = sorted_descending(scores_NC.clamp(min=0)).cumsum(dim=-1)
    total_N1 = held_NC[..., -1:]
    return (held_NC / total_N1).masked_fill_(total_N1 == 0, 1)


def fewest_channels(coverage_NC: Tensor, target_N: Tensor) -> Tensor:
    """The smallest k with ``Cov(k) >= target`` [N], int64; 0 for a target of 0."""
    # Coverage is a rounded cumulative sum; the tolerance keeps a target of 1 reachable where it should be.
    reached_N = torch.searchsorted(coverage_NC, (target_N - 1e-12).unsqueeze(-1)).squeeze(-1) + 1
    return torch.where(target_N > 0, reached_N.clamp(max=coverage_NC.shape[-1]), torch.zeros_like(reached_N))
