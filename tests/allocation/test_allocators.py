"""What every allocator promises about its plan, and what each of them promises by itself."""

import pytest
import torch
from allocation_strategies import budgets, permuted, scores_for
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moeprune.allocation.budget import Budget
from moeprune.allocation.coverage import CoverageAllocator
from moeprune.allocation.merging import DominantMergeAllocator, LinkageMergeAllocator
from moeprune.allocation.optimal_coverage import OptimalCoverageAllocator
from moeprune.allocation.ranking import RankingAllocator
from moeprune.allocation.uniform import UniformAllocator
from moeprune.allocation.whole_experts import (
    GlobalWholeExpertsAllocator,
    ImportanceWholeExpertsAllocator,
    WholeExpertsAllocator,
)
from moeprune.errors import BudgetError, InputError
from moeprune.types import Plan, Scores

CHANNEL_ALLOCATORS = {
    "coverage": CoverageAllocator(),
    "most_score": CoverageAllocator(reallocation="most_score"),
    "uniform_coverage": CoverageAllocator(between_layers="uniform_coverage", expert_weight="usage"),
    "uniform_layers": CoverageAllocator(between_layers="uniform", expert_weight="router"),
    "u_shaped": CoverageAllocator(between_layers="u_shaped", expert_weight="removal"),
    "loss": CoverageAllocator(between_layers="loss", smoothing="none", expert_weight="uniform"),
    "channel_ranking": RankingAllocator(),
    "global": RankingAllocator("model"),
    "optimal_coverage": OptimalCoverageAllocator(),
    "largest_sum": OptimalCoverageAllocator(layer_weight="none", expert_weight="channels"),
    "uniform": UniformAllocator(),
}
ALLOCATORS = {
    **CHANNEL_ALLOCATORS,
    "whole_experts": WholeExpertsAllocator(),
    "whole_experts_global": GlobalWholeExpertsAllocator(),
    "whole_experts_by_importance": ImportanceWholeExpertsAllocator(),
    "merge_linkage": LinkageMergeAllocator(),
    "merge_dominant": DominantMergeAllocator(),
}

every_allocator = pytest.mark.parametrize("allocator", ALLOCATORS.values(), ids=ALLOCATORS)
channel_allocators = pytest.mark.parametrize("allocator", CHANNEL_ALLOCATORS.values(), ids=CHANNEL_ALLOCATORS)


def budget_of(ratio: float, **changes: int) -> Budget:
    shape = {"layers": 2, "experts": 4, "width": 8, "top_k": 2, "alignment": 2, "minimum_width": 2}
    return Budget(ratio=ratio, **{**shape, **changes})


def possible(allocator: object, budget: Budget) -> bool:
    try:
        getattr(allocator, "check", lambda _budget: None)(budget)
    except BudgetError:
        return False
    return True


def kept_lists(plan: Plan) -> list[list[list[int]]]:
    return [[channels.tolist() for channels in layer] for layer in plan.kept]


@channel_allocators
@settings(deadline=None, max_examples=30)
@given(budgets(), st.data())
def test_the_budget_is_met_to_the_block_by_allowed_widths(allocator, budget, data):
    assume(possible(allocator, budget))
    plan = allocator(data.draw(scores_for(budget)), budget)
    assert plan.kept_channels == budget.kept_channels
    assert plan.removed_ratio <= budget.ratio + 1e-9
    assert plan.note == budget.rounding_note
    assert set(plan.widths_LE.flatten().tolist()) <= {
        0,
        *range(budget.minimum_width, budget.width + 1, budget.alignment),
    }
    assert int((plan.widths_LE > 0).sum(dim=1).min()) >= budget.top_k


@channel_allocators
@settings(deadline=None, max_examples=30)
@given(budgets(), st.data())
def test_every_expert_keeps_its_best_scored_channels_and_ties_break_by_index(allocator, budget, data):
    assume(possible(allocator, budget))
    scores = data.draw(scores_for(budget))
    plan = allocator(scores, budget)
    for layer, kept in enumerate(kept_lists(plan)):
        for expert, channels in enumerate(kept):
            score_C = scores.channel_LEC[layer, expert].tolist()
            ranked = sorted(range(budget.width), key=lambda channel, score_C=score_C: (-score_C[channel], channel))
            assert channels == sorted(ranked[: len(channels)])


@every_allocator
@settings(deadline=None, max_examples=30)
@given(budgets(), st.data())
def test_a_larger_ratio_never_keeps_more(allocator, budget, data):
    smaller = Budget(**{**vars(budget), "ratio": data.draw(st.floats(0, budget.ratio))})
    assume(possible(allocator, budget))
    scores = data.draw(scores_for(budget))
    assert allocator(scores, smaller).kept_channels >= allocator(scores, budget).kept_channels


@every_allocator
@settings(deadline=None, max_examples=30)
@given(budgets(), st.data())
def test_ratio_zero_keeps_everything(allocator, budget, data):
    whole = Budget(**{**vars(budget), "ratio": 0.0})
    plan = allocator(data.draw(scores_for(whole)), whole)
    assert kept_lists(plan) == [[list(range(whole.width))] * whole.experts] * whole.layers
    assert (plan.removed_ratio, plan.note) == (0, "")


@every_allocator
@settings(deadline=None, max_examples=30)
@given(budgets(), st.data())
def test_permuting_the_experts_permutes_the_plan(allocator, budget, data):
    assume(possible(allocator, budget))
    scores = data.draw(scores_for(budget, distinct=True))
    order = data.draw(st.permutations(range(budget.experts)))
    plan = kept_lists(allocator(scores, budget))
    assert kept_lists(allocator(permuted(scores, torch.tensor(order)), budget)) == [
        [layer[expert] for expert in order] for layer in plan
    ]


@channel_allocators
def test_channels_need_a_scorer_that_scores_them(allocator):
    experts_only = Scores(None, torch.ones(2, 4), torch.ones(2))
    with pytest.raises(InputError, match=r"(?s)ranks whole experts only.*allocator=whole_experts.*scorer=attribution"):
        allocator(experts_only, budget_of(0.5))


def test_uniform_gives_blocks_left_over_to_the_best_experts_of_each_layer_in_turn():
    channel_LEC = torch.ones(2, 4, 8)
    expert_LE = torch.tensor([[0.0, 3.0, 1.0, 2.0], [5.0, 1.0, 1.0, 0.0]])
    # 64 channels at ratio 0.4 keep 20 blocks of 2: two for each of eight experts, and four more.
    plan = UniformAllocator()(Scores(channel_LEC, expert_LE, torch.ones(2)), budget_of(0.4))
    assert plan.widths_LE.tolist() == [[4, 6, 4, 6], [6, 6, 4, 4]]


def test_uniform_refuses_widths_below_the_minimum_and_says_what_to_change():
    with pytest.raises(BudgetError, match=r"(?s)leaves each expert 2 channels; the minimum width is 4.*smaller ratio"):
        UniformAllocator().check(budget_of(0.7, minimum_width=4, top_k=1))
