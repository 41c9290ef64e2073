"""Merging: who leads, who joins whom, and with which weight."""

import itertools

import pytest
import torch
from allocation_strategies import budgets, scores_for
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moeprune.allocation.budget import Budget
from moeprune.allocation.merging import DominantMergeAllocator, LinkageMergeAllocator
from moeprune.errors import BudgetError, InputError
from moeprune.models.shape import ExpertShape
from moeprune.types import ExpertWeights, Scores

MERGERS = {
    "average": LinkageMergeAllocator(),
    "complete": LinkageMergeAllocator("complete"),
    "global": DominantMergeAllocator(),
    "uniform": DominantMergeAllocator("uniform", False),
}

each_merger = pytest.mark.parametrize("allocator", MERGERS.values(), ids=MERGERS)


def budget_of(ratio: float, **changes: int) -> Budget:
    shape = {"layers": 1, "experts": 4, "width": 8, "top_k": 1, "alignment": 2, "minimum_width": 2}
    return Budget(ratio=ratio, **{**shape, **changes})


def scores_of(positions: list[list[float]], usage: list[list[float]]) -> Scores:
    """Experts at points of a line; the distance is that of their points."""
    position_LE, usage_LE = torch.tensor(positions), torch.tensor(usage)
    distance_LEE = (position_LE.unsqueeze(-1) - position_LE.unsqueeze(-2)).abs()
    weights = ExpertWeights(usage_LE, usage_LE, usage_LE, usage_LE)
    return Scores(None, usage_LE, torch.ones(len(usage)), distance_LEE=distance_LEE, weights=weights)


@each_merger
@settings(deadline=None, max_examples=50)
@given(budgets(), st.data())
def test_groups_have_one_leader_that_keeps_everything_and_weights_that_sum_to_one(allocator, budget, data):
    try:
        plan = allocator(data.draw(scores_for(budget)), budget)
    except BudgetError:
        assume(False)
    leader_LE, weight_LE = plan.merge.leader_LE, plan.merge.weight_LE
    assert leader_LE.dtype == torch.int64
    assert weight_LE.dtype == torch.float64
    for leader_E, weight_E, widths in zip(leader_LE.tolist(), weight_LE.tolist(), plan.widths_LE.tolist(), strict=True):
        leaders = set(leader_E)
        assert all(leader_E[leader] == leader for leader in leaders)
        assert widths == [budget.width if expert in leaders else 0 for expert in range(budget.experts)]
        for leader in leaders:
            members = [weight for weight, its in zip(weight_E, leader_E, strict=True) if its == leader]
            assert sum(members) == pytest.approx(1)
            assert min(members) >= 0
    assert plan.removed_ratio <= budget.ratio + 1e-9


@each_merger
@settings(deadline=None, max_examples=50)
@given(budgets(), st.data())
def test_exactly_so_many_groups_stay_as_asked_ties_or_not(allocator, budget, data):
    scores = data.draw(scores_for(budget))
    try:
        plan = allocator(scores, budget)
    except BudgetError:
        assume(False)
    groups = [len(set(leader_E)) for leader_E in plan.merge.leader_LE.tolist()]
    if allocator == DominantMergeAllocator():
        everyone = budget.layers * budget.experts
        assert sum(groups) == everyone - int(budget.ratio * everyone + 1e-9)
        assert min(groups) >= 1
    else:
        assert groups == [budget.experts - int(budget.ratio * budget.experts + 1e-9)] * budget.layers


def average_linkage(distance: list[list[float]], groups: int) -> set[frozenset[int]]:
    """By definition: join the two clusters of the smallest mean distance between their members, again and again."""
    clusters = [frozenset([index]) for index in range(len(distance))]
    while len(clusters) > groups:

        def between(pair) -> float:
            return sum(distance[i][j] for i in pair[0] for j in pair[1]) / (len(pair[0]) * len(pair[1]))

        one, other = min(itertools.combinations(clusters, 2), key=between)
        clusters = [cluster for cluster in clusters if cluster not in (one, other)] + [one | other]
    return set(clusters)


@settings(deadline=None, max_examples=50)
@given(budgets(), st.data())
def test_clusters_are_those_of_average_linkage_and_the_most_used_member_leads(budget, data):
    scores = data.draw(scores_for(budget, distinct=True))
    plan = LinkageMergeAllocator()(scores, budget)
    groups = budget.experts - int(budget.ratio * budget.experts + 1e-9)
    for layer, leader_E in enumerate(plan.merge.leader_LE.tolist()):
        found = {
            frozenset(expert for expert, its in enumerate(leader_E) if its == leader): leader for leader in leader_E
        }
        assert set(found) == average_linkage(scores.distance_LEE[layer].tolist(), groups)
        usage_E = scores.weights.usage_LE[layer].tolist()
        assert all(leader == max(members, key=lambda expert: usage_E[expert]) for members, leader in found.items())


def test_near_experts_become_one_weighted_by_usage():
    scores = scores_of([[0.0, 0.1, 5.0, 5.3]], [[10.0, 30.0, 0.0, 0.0]])
    plan = LinkageMergeAllocator()(scores, budget_of(0.5))
    assert plan.merge.leader_LE.tolist() == [[1, 1, 2, 2]]
    assert plan.merge.weight_LE.tolist() == [[0.25, 0.75, 0.5, 0.5]]  # nobody used the second pair: equal shares
    assert plan.merge.align_channels is False
    assert plan.note == ""


def test_the_most_used_of_all_layers_lead_and_the_others_join_the_nearest():
    usage = [[100.0, 90.0, 80.0, 1.0], [2000.0, 10.0, 20.0, 30.0]]
    scores = scores_of([[0.0, 4.0, 9.0, 8.0], [0.0, 1.0, 2.0, 3.0]], usage)
    plan = DominantMergeAllocator()(scores, budget_of(0.5, layers=2))
    # As shares of their layers' tokens: 0.37 0.33 0.30 0.004 and 0.97 0.005 0.01 0.015.
    assert plan.merge.leader_LE.tolist() == [[0, 1, 2, 2], [0, 0, 0, 0]]
    assert plan.merge.align_channels is True
    equal = DominantMergeAllocator("uniform")(scores, budget_of(0.5, layers=2))
    assert equal.merge.leader_LE.tolist() == [[0, 1, 1, 1], [0, 0, 3, 3]]


def test_more_groups_than_leaders_can_be_are_refused_before_anything_is_computed():
    with pytest.raises(BudgetError, match=r"leaves 1 of 8 experts, but each of 2 layers needs one"):
        DominantMergeAllocator().check(budget_of(0.875, layers=2))
    DominantMergeAllocator().check(budget_of(0.75, layers=2))


@each_merger
def test_missing_distances_and_usage_are_refused_with_the_scorer_that_gives_them(allocator):
    scorer = "m_smoe" if isinstance(allocator, DominantMergeAllocator) else "hc_smoe"
    with pytest.raises(InputError, match=rf"(?s)needs distances between experts.*Use scorer={scorer}"):
        allocator(Scores(None, torch.ones(1, 4), torch.ones(1)), budget_of(0.5))
    with pytest.raises(InputError, match=r"(?s)these scores carry none.*with_expert_weights"):
        allocator(Scores(None, torch.ones(1, 4), torch.ones(1), distance_LEE=torch.ones(1, 4, 4)), budget_of(0.5))


def test_settings_that_do_not_exist_are_refused():
    with pytest.raises(InputError, match=r"(?s)linkage=ward does not exist.*Possible: average, single, complete"):
        LinkageMergeAllocator("ward")
    with pytest.raises(InputError, match=r"(?s)between_layers=globe does not exist.*Did you mean: global"):
        DominantMergeAllocator("globe")


def test_plans_say_how_many_channels_they_remove_at_once():
    shape = ExpertShape(layers=3, experts=8, width=16, top_k=2)
    assert LinkageMergeAllocator().channels_at_once(shape) == 48
    assert DominantMergeAllocator("uniform").channels_at_once(shape) == 48
    assert DominantMergeAllocator().channels_at_once(shape) == 16
