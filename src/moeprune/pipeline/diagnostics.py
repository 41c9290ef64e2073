"""What a plan was made from and what it did, as plain numbers: concentration, routing, widths, coverage."""

import math
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from moeprune.allocation.budget import Budget
from moeprune.allocation.optimal_coverage import OptimalCoverageAllocator, coverage_certificate
from moeprune.calibration.statistics import Statistics
from moeprune.types import Plan, Scores

LORENZ_POINTS = 21
TOP_SHARE = 0.1
DEFAULT_OBJECTIVE = OptimalCoverageAllocator()
NO_CHANNEL_SCORES = "the scorer ranks whole experts only, so channels have no scores"


def lorenz(scores_NC: Tensor, positions_X: Tensor) -> Tensor:
    """The Lorenz curve of each row at the shares ``positions_X`` of its channels [N, X], float64.

    With the scores clipped at 0 and sorted, s_(1) <= ... <= s_(C), of sum S: ``L(k / C) = sum_{i<=k} s_(i) / S``,
    linear in between: the share of the score that the lowest channels hold. NaN for a row without a positive score.
    """
    sorted_NC = scores_NC.double().clamp(min=0).sort(dim=-1).values
    channels = sorted_NC.shape[-1]
    held_NC = torch.cat([torch.zeros_like(sorted_NC[:, :1]), sorted_NC.cumsum(dim=-1)], dim=-1)
    place_X = positions_X.double() * channels
    below_X = place_X.floor().clamp(max=channels - 1).long()
    between_X = place_X - below_X
    curve_NX = held_NC[:, below_X] * (1 - between_X) + held_NC[:, below_X + 1] * between_X
    return curve_NX / held_NC[:, -1:]


def gini(scores_NC: Tensor) -> Tensor:
    """The Gini coefficient of each row [N], float64: 0 where all channels score the same, 1 - 1/C where one has all.

    With the scores clipped at 0 and sorted, s_(1) <= ... <= s_(C):
    ``G = sum_i (2 i - C - 1) s_(i) / (C sum_i s_(i))``, which is one minus twice the area under the Lorenz curve. NaN
    for a row without a positive score.
    """
    sorted_NC = scores_NC.double().clamp(min=0).sort(dim=-1).values
    channels = sorted_NC.shape[-1]
    rank_C = 2 * torch.arange(1, channels + 1, dtype=torch.float64) - channels - 1
    return (sorted_NC * rank_C).sum(dim=-1) / (channels * sorted_NC.sum(dim=-1))


def top_share(scores_NC: Tensor) -> Tensor:
    """``1 - L(0.9)`` of each row [N], float64: the share of the score in the top 10% of channels; NaN as above."""
    return 1 - lorenz(scores_NC, torch.tensor([1 - TOP_SHARE], dtype=torch.float64)).squeeze(-1)


def coverage_reached(channel_LEC: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """Share of the scores (clipped at 0) on kept channels: of each expert [L, E], of each layer [L]; NaN as above."""
    score_LEC = channel_LEC.double().clamp(min=0)
    kept_LE = torch.stack(
        [
            torch.stack([score_C[kept].sum() for score_C, kept in zip(score_EC, kept_E, strict=True)])
            for score_EC, kept_E in zip(score_LEC, plan.kept, strict=True)
        ]
    )
    total_LE = score_LEC.sum(dim=-1)
    return kept_LE / total_LE, kept_LE.sum(dim=-1) / total_LE.sum(dim=-1)


def diagnostics(
    statistics: Statistics,
    scores: Scores,
    plan: Plan,
    budget: Budget,
    objective: OptimalCoverageAllocator = DEFAULT_OBJECTIVE,
) -> dict[str, Any]:
    """Plain values for ``diagnostics.json``; lists go by layer, then by expert; null where a number does not exist.

    ``router_entropy``: mean over tokens of the entropy of the router's softmax, in nats and as a share of ln E.
    ``coverage``: what the plan keeps of the channel scores, and its certificate by the weights of ``objective``.
    ``channel_scores`` and ``coverage`` are null, and ``without_channel_scores`` says why, when channels have no scores.
    """
    entropy_L = statistics.router_entropy_sum_L / statistics.tokens
    channel_LEC = scores.channel_LEC
    return {
        "width": plan.width,
        "kept_channels": plan.widths_LE.tolist(),
        "merged_into": plan.merge.leader_LE.tolist() if plan.merge is not None else None,
        "router_entropy": {
            "nats": _plain(entropy_L),
            "share_of_uniform": _plain(entropy_L / math.log(statistics.routed_tokens_LE.shape[1])),
        },
        "channel_scores": None if channel_LEC is None else _concentration(channel_LEC),
        "coverage": None if channel_LEC is None else _coverage(channel_LEC, scores, plan, budget, objective),
        "without_channel_scores": NO_CHANNEL_SCORES if channel_LEC is None else None,
    }


def _concentration(channel_LEC: Tensor) -> dict[str, Any]:
    """Per expert, and per layer: the mean Lorenz curve of its experts, and Gini and top share over all its channels."""
    layers, experts, _ = channel_LEC.shape
    positions_X = torch.linspace(0, 1, LORENZ_POINTS, dtype=torch.float64)
    channel_NC, layer_LC = channel_LEC.flatten(0, 1), channel_LEC.flatten(1)
    lorenz_LEX = lorenz(channel_NC, positions_X).reshape(layers, experts, -1)
    return {
        "lorenz_positions": _plain(positions_X),
        "lorenz": _plain(lorenz_LEX.nanmean(dim=1)),
        "gini": _plain(gini(channel_NC).reshape(layers, experts)),
        "top_tenth": _plain(top_share(channel_NC).reshape(layers, experts)),
        "layer_gini": _plain(gini(layer_LC)),
        "layer_top_tenth": _plain(top_share(layer_LC)),
    }


def _coverage(
    channel_LEC: Tensor, scores: Scores, plan: Plan, budget: Budget, objective: OptimalCoverageAllocator
) -> dict[str, Any]:
    expert_LE, layer_L = coverage_reached(channel_LEC, plan)
    certificate = coverage_certificate(scores, plan, budget, objective)
    return {
        "expert": _plain(expert_LE),
        "layer": _plain(layer_L),
        "judged_by": asdict(objective),
        "objective": certificate.objective,
        "upper_bound": certificate.upper_bound,
        "gap": certificate.gap,
    }


def _plain(values: Tensor) -> list[Any]:
    """Nested lists of numbers; null for NaN, which JSON does not know."""
    if values.ndim > 1:
        return [_plain(row) for row in values]
    return [None if math.isnan(value) else value for value in values.tolist()]
