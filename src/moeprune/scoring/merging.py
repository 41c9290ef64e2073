"""Scorers for merging: how different the experts of a layer are, and which are used most."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from moeprune.calibration.all_tokens import AllTokens, AllTokensPass
from moeprune.calibration.statistics import Statistics
from moeprune.scoring.attribution import block_local_loss_L
from moeprune.types import Scores


@dataclass(frozen=True)
class HcSmoeScorer:
    """Experts by the Euclidean distance of their mean outputs (HC-SMoE, arXiv 2410.08589).

        distance_ef = || mean_t f_te - mean_t f_tf ||_2          [L, E, E]

    over all calibration tokens, routed to the experts or not. Experts score N_e, the tokens routed to them, by which
    groups are merged. Goes with ``allocator=merge_linkage``.
    """

    scores_channels: ClassVar[bool] = False
    gives_distances: ClassVar[bool] = True
    # The default groups: where C-Prune ran, the pass is there already.
    passes: ClassVar[tuple[AllTokensPass, ...]] = (AllTokensPass(),)

    def __call__(self, statistics: Statistics, all_tokens: AllTokens) -> Scores:
        mean_LEH = all_tokens.mean_output_LEH
        # Squared norms and products would cancel between experts that are nearly alike.
        distance_LEE = torch.cdist(mean_LEH, mean_LEH, compute_mode="donot_use_mm_for_euclid_dist")
        layer_L = block_local_loss_L(statistics)
        return Scores(None, statistics.routed_tokens_LE, layer_L, distance_LEE=distance_LEE)


@dataclass(frozen=True)
class MSmoeScorer:
    """Experts by how differently the router rates them (M-SMoE, arXiv 2310.01334).

        distance_ef = 1 - sum_t z_te z_tf / sqrt(sum_t z_te^2 sum_t z_tf^2)          [L, E, E]

    one minus the cosine similarity of two experts' router logits z over all calibration tokens, in 0 to 2; an expert
    whose logits are all zero is at distance 1 from every other. Experts score N_e, the tokens routed to them: the most
    used ones lead groups. The statistics suffice. Goes with ``allocator=merge_dominant``.
    """

    scores_channels: ClassVar[bool] = False
    gives_distances: ClassVar[bool] = True

    def __call__(self, statistics: Statistics) -> Scores:
        product_LEE = statistics.logit_product_LEE
        norm_LE = product_LEE.diagonal(dim1=1, dim2=2).sqrt()
        norms_LEE = norm_LE.unsqueeze(2) * norm_LE.unsqueeze(1)
        cosine_LEE = torch.where(norms_LEE > 0, product_LEE / norms_LEE.clamp(min=torch.finfo(torch.float64).tiny), 0)
        distance_LEE = 1 - cosine_LEE.clamp(-1, 1)
        distance_LEE.diagonal(dim1=1, dim2=2).zero_()
        layer_L = block_local_loss_L(statistics)
        return Scores(None, statistics.routed_tokens_LE, layer_L, distance_LEE=distance_LEE)
