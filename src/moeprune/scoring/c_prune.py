"""C-Prune: experts that represent a cluster stay."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from scipy.cluster.hierarchy import linkage
from torch import Tensor

from moeprune.calibration.all_tokens import AllTokens, AllTokensPass
from moeprune.calibration.statistics import Statistics
from moeprune.scoring.attribution import block_local_loss_L
from moeprune.types import Scores

# Distances to a centroid that differ by less, relatively, are equal but for rounding.
TIE = 1e-9


@dataclass(frozen=True)
class CPruneScorer:
    """Experts by how many groups of windows elect them to represent a cluster (C-Prune, arXiv 2504.07807).

    From the paper and its code: every expert runs on the calibration text, routed to it or not; experts are clustered
    by their outputs with Ward's linkage on several pieces of the text; those nearest to the centroids get a vote from
    each piece; the experts with the fewest votes go. First inside each layer, then over the experts of all layers.

    Our reading: an expert's features on a group of windows are its mean output over all their tokens [H] (the code
    passes each window's mean input through the expert). For k kept experts a layer is cut into k clusters, and each
    elects the expert nearest to its centroid (the code elects a share of a fixed number of clusters, with constants of
    its own). Of experts equally near, as both of a pair are, the one with more routed tokens is elected. Equal votes
    are decided by routed tokens, then by index.

    The layer step is ``subset_LEE``, used where every layer keeps equally many (`whole_experts`). ``expert_LE`` is
    for how many sizes the expert is in it.

    With ``across_layers``, ``expert_LE`` comes from the global step instead, which clusters the experts of all layers,
    each layer's features divided by their mean norm. With one cluster per expert, all are elected; the score is how
    many merges happen until the expert no longer is, a mean over groups. It counts where experts are ranked over all
    layers (`whole_experts_global`): equal budgets per layer cannot express it, and the two steps are not taken one
    after the other. Cost: Ward's linkage of L * E experts for each of ``groups`` groups, quadratic in L * E; minutes
    for some thousands of experts.
    """

    groups: int = 10
    across_layers: bool = False

    scores_channels: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _ = self.passes  # refuses impossible settings before a model is loaded

    @property
    def passes(self) -> tuple[AllTokensPass, ...]:
        return (AllTokensPass(self.groups),)

    def __call__(self, statistics: Statistics, all_tokens: AllTokens) -> Scores:
        used_G = all_tokens.tokens_G > 0
        sum_GLEH = all_tokens.output_sum_LEGH.permute(2, 0, 1, 3)[used_G]
        mean_GLEH = sum_GLEH / all_tokens.tokens_G[used_G].view(-1, 1, 1, 1)
        tokens_LE = statistics.routed_tokens_LE
        layers = zip(mean_GLEH.unbind(dim=1), tokens_LE, strict=True)
        subset_LEE = torch.stack([_most_votes_EE(mean_GEH, tokens_E) for mean_GEH, tokens_E in layers])
        expert_LE = _global_score_LE(mean_GLEH, tokens_LE) if self.across_layers else subset_LEE.sum(dim=1).double()
        return Scores(None, expert_LE, block_local_loss_L(statistics), subset_LEE=subset_LEE)


def _most_votes_EE(features_GEH: Tensor, tokens_E: Tensor) -> Tensor:
    """Row k - 1 marks the k experts that most groups elect when they cut into k clusters; bool."""
    votes_EE = torch.stack([_elected_NN(features_EH, tokens_E) for features_EH in features_GEH]).sum(dim=0)
    chosen_EE = torch.zeros_like(votes_EE, dtype=torch.bool)
    for row, votes_E in enumerate(votes_EE):
        # The last key decides first; equal keys leave the order of the indices.
        order_E = np.lexsort((-tokens_E, -votes_E))
        chosen_EE[row, order_E[: row + 1].tolist()] = True
    return chosen_EE


def _global_score_LE(mean_GLEH: Tensor, tokens_LE: Tensor) -> Tensor:
    """The merges of the experts of all layers that each expert survives, a mean over groups."""
    norm_GL11 = mean_GLEH.norm(dim=3).mean(dim=2)[..., None, None]
    scaled_GNH = (mean_GLEH / norm_GL11.clamp(min=torch.finfo(torch.float64).tiny)).flatten(1, 2)
    merges_GN = torch.stack([_merges_survived_N(scaled_NH, tokens_LE.flatten()) for scaled_NH in scaled_GNH])
    return merges_GN.mean(dim=0).reshape(tokens_LE.shape)


def _merges_survived_N(features_NH: Tensor, tokens_N: Tensor) -> Tensor:
    """How many merges happen before the first cut that does not elect the expert; N for one that every cut elects."""
    finest_first_NN = _elected_NN(features_NH, tokens_N).flip(0)
    return finest_first_NN.long().cumprod(dim=0).sum(dim=0).double()


def _elected_NN(features_NH: Tensor, tokens_N: Tensor) -> Tensor:
    """Row k - 1 marks the expert nearest to the centroid of each of k clusters by Ward's linkage; bool."""
    count = len(features_NH)
    elected_NN = torch.zeros(count, count, dtype=torch.bool)
    # Clusters are numbered as scipy numbers them: the experts, then one new cluster per merge.
    members = [[expert] for expert in range(count)]
    begins_with = [count] * count  # the number of clusters of the first cut that has this cluster
    merges = linkage(features_NH.numpy(), method="ward")[:, :2].astype(int).tolist() if count > 1 else []
    for step, pair in enumerate(merges):
        for cluster in pair:
            representative = _representative(members[cluster], features_NH, tokens_N)
            elected_NN[count - step - 1 : begins_with[cluster], representative] = True
        members.append(members[pair[0]] + members[pair[1]])
        begins_with.append(count - step - 1)
    elected_NN[0, _representative(members[-1], features_NH, tokens_N)] = True
    return elected_NN


def _representative(members: list[int], features_NH: Tensor, tokens_N: Tensor) -> int:
    features_MH = features_NH[members]
    distance_M = (features_MH - features_MH.mean(dim=0)).norm(dim=1)
    nearest = [members[m] for m in (distance_M <= distance_M.min() * (1 + TIE)).nonzero().flatten().tolist()]
    return max(sorted(nearest), key=lambda expert: float(tokens_N[expert]))
