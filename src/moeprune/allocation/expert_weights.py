"""What the experts of a layer are weighed by when they share its channels."""

import torch
from torch import Tensor

from moeprune.errors import InputError
from moeprune.types import ExpertWeights, Scores

EXPERT_WEIGHTS = ("score", "attribution", "usage", "router", "removal", "channels", "uniform")


def expert_weight_LE(scores: Scores, name: str) -> Tensor:
    """The quantity x_e >= 0 that weighs expert e [L, E], float64.

        score         the scorer's expert score        attribution  A_e          usage    tokens routed to e
        router        sum of its gates                 removal      R_e          channels sum of its channel scores
        uniform       1

    Negative values count as 0. Raises InputError where the scores lack it.
    """
    if name == "uniform":
        return torch.ones_like(scores.expert_LE).double()
    if name == "score":
        weight_LE = scores.expert_LE
    elif name == "channels":
        if scores.channel_LEC is None:
            raise InputError("expert_weight=channels needs a score for every channel.", change="Use another weight.")
        weight_LE = scores.channel_LEC.clamp(min=0).sum(dim=-1)
    else:
        weight_LE = getattr(require_weights(scores, f"expert_weight={name}"), f"{name}_LE")
    return weight_LE.double().clamp(min=0)


def expert_share_LE(scores: Scores, name: str) -> Tensor:
    """``sqrt(x_e) / sum_e sqrt(x_e)`` of `expert_weight_LE` [L, E] (CBA of arXiv 2606.18304, there of A_e); equal
    shares in a layer where all are 0."""
    root_LE = expert_weight_LE(scores, name).sqrt()
    total_L1 = root_LE.sum(dim=1, keepdim=True)
    return torch.where(total_L1 > 0, root_LE / total_L1, torch.full_like(root_LE, 1 / root_LE.shape[1]))


def require_weights(scores: Scores, asked_by: str) -> ExpertWeights:
    """The experts' weights from the statistics, or InputError where nobody filled them in."""
    if scores.weights is None:
        raise InputError(
            f"{asked_by} needs what the statistics say about experts; these scores carry none.",
            change="Pass the scores through moeprune.scoring.weights.with_expert_weights, as the pipeline does.",
        )
    return scores.weights
