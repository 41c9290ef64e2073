"""Experts chosen together: the subset that changes a layer's output least."""

from dataclasses import dataclass
from typing import ClassVar

from moeprune.calibration.expert_subsets import ExpertSubsetPass, ExpertSubsets
from moeprune.calibration.statistics import Statistics
from moeprune.calibration.subset_search import GeneticSearch
from moeprune.scoring.attribution import block_local_loss_L
from moeprune.types import Scores


@dataclass(frozen=True)
class NaeeScorer:
    """Subsets S of a layer's experts by ``||F(x) - F_S(x)||_F`` (NAEE, arXiv 2402.14800).

    For every count k the subset with the smallest loss that the search of `ExpertSubsetPass` found, tokens rerouted
    within S: ``subset_LEE``, which the allocator `whole_experts` keeps. Rows below the router's top-k mark no expert.
    Where experts are ranked one by one, over all layers, an expert scores the loss without it alone [L, E]; that
    ranking is ours.
    ``tokens`` and ``exhaustive_up_to`` are the search's: the paper tries all subsets of up to 8 experts.
    """

    tokens: int = 2048
    exhaustive_up_to: int = 8
    seed: int = 0

    scores_channels: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _ = self.passes  # refuses impossible settings before a model is loaded

    @property
    def passes(self) -> tuple[ExpertSubsetPass, ...]:
        return (ExpertSubsetPass(self.tokens, self.exhaustive_up_to, self.seed),)

    def __call__(self, statistics: Statistics, subsets: ExpertSubsets) -> Scores:
        return _subset_scores(statistics, subsets)


@dataclass(frozen=True)
class MoeI2Scorer:
    """Subsets of a layer's experts from a genetic search, for the pruning stage of MoE-I2 (arXiv 2411.01016).

    An expert scores the loss ``||F(x) - F_S(x)||_F`` without it alone [L, E]; the sum over a layer is the paper's layer
    importance, by which `whole_experts_by_importance` shares the budget. For every count ``subset_LEE`` marks the best
    subset that `GeneticSearch` bred with the same loss; up to ``exhaustive_up_to`` experts all are tried.
    ``population`` and ``generations`` are the search's, ``tokens`` the sample's.

    Left out: the paper's choice among the best few combinations of neighbouring layers by the loss behind them (its
    block-wise KT-reception field), since a pass is run before any budget says how many experts each layer keeps, so the
    best of each layer stays; and its second stage, which decomposes the remaining experts into low rank.
    """

    tokens: int = 2048
    exhaustive_up_to: int = 8
    population: int = 24
    generations: int = 16
    seed: int = 0

    scores_channels: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _ = self.passes  # refuses impossible settings before a model is loaded

    @property
    def passes(self) -> tuple[ExpertSubsetPass, ...]:
        genetic = GeneticSearch(self.population, self.generations, self.seed)
        return (ExpertSubsetPass(self.tokens, self.exhaustive_up_to, self.seed, genetic),)

    def __call__(self, statistics: Statistics, subsets: ExpertSubsets) -> Scores:
        return _subset_scores(statistics, subsets)


def _subset_scores(statistics: Statistics, subsets: ExpertSubsets) -> Scores:
    layer_L = block_local_loss_L(statistics)
    return Scores(None, subsets.removal_loss_LE, layer_L, subset_LEE=subsets.keep_LEE)
