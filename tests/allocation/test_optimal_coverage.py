"""Optimal coverage against an exhaustive search, and its bound above every plan."""

import pytest
import torch
from allocation_strategies import brute_force_widths, budgets, scores_for
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from moeprune.allocation.budget import Budget
from moeprune.allocation.coverage import CoverageAllocator
from moeprune.allocation.merging import DominantMergeAllocator
from moeprune.allocation.optimal_coverage import Certificate, OptimalCoverageAllocator, coverage_certificate
from moeprune.allocation.ranking import RankingAllocator
from moeprune.allocation.whole_experts import WholeExpertsAllocator
from moeprune.errors import BudgetError, InputError
from moeprune.types import Scores


def weights_by_formula(scores: Scores) -> list[float]:
    """Square root of the expert score, its share of the layer, times the layer's loss at mean 1 [L * E]."""
    loss = [float(value) for value in scores.layer_L]
    mean = sum(loss) / len(loss)
    weights = []
    for layer, expert_E in enumerate(scores.expert_LE.tolist()):
        roots = [max(score, 0) ** 0.5 for score in expert_E]
        shares = [root / sum(roots) if sum(roots) else 1 / len(roots) for root in roots]
        weights += [share * (loss[layer] / mean if mean else 1) for share in shares]
    return weights


def covered(scores: Scores, widths: list[int], weights: list[float]) -> float:
    """``sum v Cov(k)`` expert by expert; an expert without a positive score has nothing to cover."""
    total = 0.0
    for row, width, weight in zip(scores.channel_LEC.flatten(0, 1).tolist(), widths, weights, strict=True):
        ranked = sorted((max(score, 0) for score in row), reverse=True)
        total += weight * sum(ranked[:width]) / sum(ranked) if sum(ranked) else 0
    return total


def best_covered(scores: Scores, budget: Budget, weights: list[float]) -> float:
    return max(covered(scores, widths, weights) for widths in brute_force_widths(budget))


# A smoothing that is easy to write down; the others are tested by themselves.
PLAIN = OptimalCoverageAllocator(smoothing="none")

small_budgets = st.one_of(
    budgets(most_layers=1, most_experts=4, most_alignment=1),
    budgets(most_layers=2, most_experts=2, most_alignment=1),
    budgets(most_layers=2, most_experts=2, most_alignment=3),
)


@settings(deadline=None, max_examples=60)
@given(small_budgets, st.data())
def test_with_a_minimum_of_one_block_nothing_covers_more_and_the_bound_is_reached(budget, data):
    budget = Budget(**{**vars(budget), "minimum_width": budget.alignment})
    scores = data.draw(scores_for(budget))
    weights = weights_by_formula(scores)
    plan = PLAIN(scores, budget)
    assert covered(scores, plan.widths_LE.flatten().tolist(), weights) == pytest.approx(
        best_covered(scores, budget, weights), abs=1e-9
    )
    assert coverage_certificate(scores, plan, budget, PLAIN).gap == pytest.approx(0, abs=1e-9)


@settings(deadline=None, max_examples=60)
@given(small_budgets, st.data())
def test_with_any_minimum_the_best_plan_lies_between_what_is_reached_and_the_bound(budget, data):
    scores = data.draw(scores_for(budget))
    weights = weights_by_formula(scores)
    plan = PLAIN(scores, budget)
    found = coverage_certificate(scores, plan, budget, PLAIN)
    best = best_covered(scores, budget, weights)
    assert found.objective == pytest.approx(covered(scores, plan.widths_LE.flatten().tolist(), weights), abs=1e-9)
    assert found.objective <= best + 1e-9
    assert best <= found.upper_bound + 1e-9
    # The search around the relaxation finds the optimum of problems this small.
    assert found.objective >= 0.98 * best - 1e-9


@settings(deadline=None, max_examples=50)
@given(budgets(), st.data())
def test_no_other_allocator_covers_more_than_its_bound_and_channel_allocators_no_more_than_the_optimum(budget, data):
    scores = data.draw(scores_for(budget))
    optimum = coverage_certificate(scores, PLAIN(scores, budget), budget, PLAIN)
    for allocator in (CoverageAllocator(), RankingAllocator("model")):
        found = coverage_certificate(scores, allocator(scores, budget), budget, PLAIN)
        assert found.upper_bound == pytest.approx(optimum.upper_bound)
        assert found.objective <= optimum.upper_bound + 1e-9
    for allocator in (WholeExpertsAllocator(), DominantMergeAllocator()):
        try:
            plan = allocator(scores, budget)
        except BudgetError:
            assume(False)
        found = coverage_certificate(scores, plan, budget, PLAIN)
        # A merged layer may keep fewer experts than top-k; its bound takes that into account.
        weights, widths = weights_by_formula(scores), plan.widths_LE.flatten().tolist()
        assert found.objective == pytest.approx(covered(scores, widths, weights), abs=1e-9)
        assert 0 <= found.gap <= 1


@settings(deadline=None, max_examples=30)
@given(budgets(most_alignment=1), st.data())
def test_in_the_unit_of_channel_scores_it_is_the_global_ranking(budget, data):
    budget = Budget(**{**vars(budget), "top_k": 1, "minimum_width": 1})
    scores = data.draw(scores_for(budget, distinct=True))
    largest_sum = OptimalCoverageAllocator(layer_weight="none", expert_weight="channels")
    assert torch.equal(largest_sum(scores, budget).widths_LE, RankingAllocator("model")(scores, budget).widths_LE)


def heavy_tailed(layers: int, experts: int, channels: int) -> Scores:
    generator = torch.Generator().manual_seed(0)

    def log_normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).exp()

    channel_LEC = log_normal(layers, experts, channels) * log_normal(layers, experts, 1)
    return Scores(channel_LEC, channel_LEC.sum(dim=-1), log_normal(layers))


@pytest.mark.parametrize("minimum", [16, 48, 96])
@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.8])
def test_the_gap_is_small_where_experts_are_many(minimum, ratio):
    scores = heavy_tailed(6, 32, 96)
    budget = Budget(ratio, 6, 32, 96, 4, alignment=16, minimum_width=minimum)
    plan = OptimalCoverageAllocator()(scores, budget)
    assert plan.kept_channels == budget.kept_channels
    assert coverage_certificate(scores, plan, budget).gap <= 1e-3


def test_equal_scores_and_minimum_widths_above_a_block_still_meet_the_budget():
    scores = Scores(torch.ones(2, 6, 8), torch.ones(2, 6), torch.ones(2))
    budget = Budget(0.45, 2, 6, 8, 2, alignment=2, minimum_width=6)
    plan = OptimalCoverageAllocator()(scores, budget)
    assert plan.kept_channels == budget.kept_channels
    assert coverage_certificate(scores, plan, budget).gap == pytest.approx(0, abs=1e-12)


def test_the_gap_of_a_certificate_is_relative_and_0_where_nothing_can_be_covered():
    assert Certificate(3.0, 4.0).gap == 0.25
    assert Certificate(0.0, 0.0).gap == 0


def test_settings_that_do_not_exist_are_refused():
    with pytest.raises(InputError, match=r"(?s)layer_weight=losses does not exist.*Did you mean: loss"):
        OptimalCoverageAllocator(layer_weight="losses")
    with pytest.raises(InputError, match="smoothing_rounds=-1 is not possible"):
        OptimalCoverageAllocator(smoothing_rounds=-1)
