"""Whole experts per layer and over all layers: which stay, and what is refused."""

import itertools
import math
import re

import pytest
import torch
from allocation_strategies import budgets, permuted, scores_for
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moeprune.allocation.budget import Budget
from moeprune.allocation.keep_all import KeepAllAllocator
from moeprune.allocation.whole_experts import (
    GlobalWholeExpertsAllocator,
    ImportanceWholeExpertsAllocator,
    WholeExpertsAllocator,
)
from moeprune.errors import BudgetError, InputError
from moeprune.models.shape import ExpertShape
from moeprune.types import Plan, Scores


def budget_of(ratio: float, **changes: int) -> Budget:
    shape = {"layers": 2, "experts": 4, "width": 8, "top_k": 2, "alignment": 2, "minimum_width": 2}
    return Budget(ratio=ratio, **{**shape, **changes})


def experts_only(rows: list[list[float]], **fields) -> Scores:
    return Scores(None, torch.tensor(rows), torch.ones(len(rows)), **fields)


@settings(deadline=None, max_examples=50)
@given(budgets(), st.data())
def test_the_best_of_each_layer_stay_and_ties_break_by_index(budget, data):
    allocator = WholeExpertsAllocator()
    try:
        allocator.check(budget)
    except BudgetError:
        assume(False)
    scores = data.draw(scores_for(budget))
    plan = allocator(scores, budget)
    stays = math.ceil((1 - budget.ratio) * budget.experts - 1e-6)
    for layer, widths in enumerate(plan.widths_LE.tolist()):
        score_E = scores.expert_LE[layer].tolist()
        ranked = sorted(range(budget.experts), key=lambda expert, score_E=score_E: (-score_E[expert], expert))
        assert widths == [budget.width if expert in ranked[:stays] else 0 for expert in range(budget.experts)]
    assert plan.removed_ratio <= budget.ratio + 1e-9


def test_no_channel_scores_are_needed_and_the_note_says_what_rounding_changed():
    plan = WholeExpertsAllocator()(Scores(None, torch.arange(8.0).reshape(2, 4), torch.ones(2)), budget_of(0.4))
    assert plan.widths_LE.tolist() == [[0, 8, 8, 8]] * 2
    assert plan.note == "asked to remove 1.60 experts per layer; whole experts make it 1"


def test_experts_that_were_chosen_together_stay_together():
    # Row k - 1 marks the k to keep; the pair is not the two of the highest scores.
    subset_EE = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 1], [1, 1, 0, 1], [1, 1, 1, 1]], dtype=torch.bool)
    scores = experts_only([[9.0, 1.0, 8.0, 2.0]] * 2, subset_LEE=torch.stack([subset_EE, subset_EE]))
    assert WholeExpertsAllocator()(scores, budget_of(0.5)).widths_LE.tolist() == [[0, 8, 0, 8]] * 2
    assert WholeExpertsAllocator()(scores, budget_of(0.25)).widths_LE.tolist() == [[8, 8, 0, 8]] * 2


@settings(deadline=None, max_examples=50)
@given(budgets(most_experts=4), st.data())
def test_over_all_layers_the_kept_sum_is_the_largest_that_leaves_each_layer_its_top_k(budget, data):
    allocator = GlobalWholeExpertsAllocator()
    try:
        removed = allocator.check(budget)
    except BudgetError:
        assume(False)
    scores = data.draw(scores_for(budget))
    plan = allocator(scores, budget)
    keep_LE = plan.widths_LE > 0
    assert int(keep_LE.sum()) == keep_LE.numel() - removed
    assert int(keep_LE.sum(dim=1).min()) >= budget.top_k
    score_N = scores.expert_LE.flatten().tolist()
    assume(len(score_N) <= 10)
    best = max(
        sum(score_N[index] for index in kept)
        for kept in itertools.combinations(range(len(score_N)), len(score_N) - removed)
        if all(
            sum(index // budget.experts == layer for index in kept) >= budget.top_k for layer in range(budget.layers)
        )
    )
    assert float(scores.expert_LE[keep_LE].sum()) == pytest.approx(best)


def test_over_all_layers_scores_compare_as_they_are_or_as_shares_of_their_layer():
    scores = experts_only([[1.0, 2.0, 3.0, 4.0], [80.0, 70.0, 60.0, 50.0]])
    budget = budget_of(0.25, top_k=1, experts=4)
    assert GlobalWholeExpertsAllocator()(scores, budget).widths_LE.tolist() == [[0, 0, 8, 8], [8, 8, 8, 8]]
    by_share = GlobalWholeExpertsAllocator("layer")(scores, budget)
    # Shares .1 .2 .3 .4 against .31 .27 .23 .19: the lowest are one of each layer.
    assert by_share.widths_LE.tolist() == [[0, 8, 8, 8], [8, 8, 8, 0]]
    assert by_share.note == ""
    assert GlobalWholeExpertsAllocator("layer")(experts_only([[0.0] * 4] * 2), budget).kept_channels == 48


def test_over_all_layers_the_note_says_what_rounding_changed():
    plan = GlobalWholeExpertsAllocator()(experts_only([[1.0, 2.0, 3.0, 4.0]] * 2), budget_of(0.4))
    assert plan.note == "asked to remove 3.20 experts; whole experts make it 3"


def counts_of(plan: Plan) -> list[int]:
    return (plan.widths_LE > 0).sum(dim=1).tolist()


def exact_shares(weights: list[float], total: int, least: int, most: int) -> list[float]:
    """``clamp(s * weight, least, most)`` summing to ``total``: every choice of layers at a bound is tried."""
    for bounds in itertools.product([least, most, None], repeat=len(weights)):
        pairs = list(zip(weights, bounds, strict=True))
        free = sum(weight for weight, bound in pairs if bound is None)
        rest = total - sum(bound for _, bound in pairs if bound is not None)
        scale = rest / free if free else max((most / weight for weight, bound in pairs if bound == most), default=0)
        shares = [min(max(scale * weight, least), most) for weight in weights]
        as_chosen = all(bound is None or abs(share - bound) < 1e-9 for share, bound in zip(shares, bounds, strict=True))
        if as_chosen and abs(sum(shares) - total) < 1e-9:
            return shares
    raise AssertionError("no shares meet the total")


@settings(deadline=None, max_examples=40)
@given(budgets(), st.data())
def test_layers_keep_the_whole_counts_nearest_to_shares_of_their_importance(budget, data):
    allocator = ImportanceWholeExpertsAllocator()
    scores = data.draw(scores_for(budget, distinct=True))
    try:
        removed = allocator.check(budget)
    except BudgetError:
        assume(False)
    total = budget.layers * budget.experts - removed
    shares = exact_shares(scores.expert_LE.sum(dim=1).tolist(), total, budget.top_k, budget.experts)
    possible = [
        counts
        for counts in itertools.product(range(budget.top_k, budget.experts + 1), repeat=budget.layers)
        if sum(counts) == total
    ]

    def distance(counts) -> float:
        return sum((count - share) ** 2 for count, share in zip(counts, shares, strict=True))

    plan = allocator(scores, budget)
    assert tuple(counts_of(plan)) in possible
    assert distance(counts_of(plan)) == pytest.approx(min(map(distance, possible)), abs=1e-6)
    assert removed == math.floor(budget.ratio * budget.layers * budget.experts + 1e-9)
    for score_E, widths, count in zip(scores.expert_LE.tolist(), plan.widths_LE.tolist(), counts_of(plan), strict=True):
        best = sorted(range(budget.experts), key=lambda expert, score_E=score_E: -score_E[expert])[:count]
        assert widths == [budget.width if expert in best else 0 for expert in range(budget.experts)]


@settings(deadline=None, max_examples=40)
@given(budgets(), st.data())
def test_more_important_layers_keep_more_and_order_does_not_matter(budget, data):
    allocator = ImportanceWholeExpertsAllocator()
    scores = data.draw(scores_for(budget, distinct=True))
    try:
        allocator.check(budget)
    except BudgetError:
        assume(False)
    plan = allocator(scores, budget)
    importances = scores.expert_LE.sum(dim=1)
    by_importance = [counts_of(plan)[layer] for layer in importances.argsort().tolist()]
    assert by_importance == sorted(by_importance)

    layer = data.draw(st.integers(0, budget.layers - 1))
    raised_LE = scores.expert_LE.clone()
    raised_LE[layer] *= data.draw(st.floats(1, 100))
    assert counts_of(allocator(Scores(None, raised_LE, scores.layer_L), budget))[layer] >= counts_of(plan)[layer]

    turned = Scores(None, scores.expert_LE.flip(0), scores.layer_L)
    assert allocator(turned, budget).widths_LE.tolist() == plan.widths_LE.flip(0).tolist()
    order_E = torch.tensor(data.draw(st.permutations(range(budget.experts))))
    assert torch.equal(allocator(permuted(scores, order_E), budget).widths_LE, plan.widths_LE[:, order_E])


def test_by_importance_each_layer_keeps_the_subset_of_its_own_count():
    # Importances 2 and 6 share 4 of 8 experts by 1 and 3.
    subset_EE = torch.tensor([[0, 1, 0, 0], [1, 0, 1, 0], [0, 1, 1, 1], [1, 1, 1, 1]], dtype=torch.bool)
    scores = experts_only([[1.0, 0.0, 1.0, 0.0], [3.0, 1.0, 1.0, 1.0]], subset_LEE=torch.stack([subset_EE, subset_EE]))
    plan = ImportanceWholeExpertsAllocator()(scores, budget_of(0.5, top_k=1))
    assert plan.widths_LE.tolist() == [[0, 8, 0, 0], [0, 8, 8, 8]]
    # Top-2 leave a layer no fewer; at ratio 0.4 one expert more stays, and 0.2 of an expert is not removed.
    assert counts_of(ImportanceWholeExpertsAllocator()(scores, budget_of(0.5))) == [2, 2]
    rounded = ImportanceWholeExpertsAllocator()(scores, budget_of(0.4))
    assert (counts_of(rounded), rounded.note) == ([2, 3], "asked to remove 3.20 experts; whole experts make it 3")


def test_by_importance_layers_without_any_keep_as_much_as_is_left():
    scores = experts_only([[0.0] * 4, [-1.0] * 4, [0.0] * 4])
    assert counts_of(ImportanceWholeExpertsAllocator()(scores, budget_of(0.25, layers=3))) == [3, 3, 3]
    scores = experts_only([[-1.0] * 4, [1.0] * 4, [0.0] * 4])
    assert counts_of(ImportanceWholeExpertsAllocator()(scores, budget_of(0.25, layers=3))) == [3, 4, 2]


@pytest.mark.parametrize(
    "allocator", [WholeExpertsAllocator(), GlobalWholeExpertsAllocator(), ImportanceWholeExpertsAllocator()]
)
def test_fewer_than_top_k_are_refused_with_a_ratio_that_works(allocator):
    with pytest.raises(BudgetError, match=r"(?s)removes \d of \d experts and leaves \d.*top-2|sent to 2") as error:
        allocator(experts_only([[1.0] * 4] * 2), budget_of(0.75))
    recommended = float(re.search(r"ratio of at most ([\d.]+),", str(error.value))[1])
    assert recommended == 0.5
    assert allocator.check(budget_of(recommended)) > 0


def test_a_normalization_that_does_not_exist_is_refused():
    with pytest.raises(InputError, match=r"(?s)normalization=layers does not exist.*Did you mean: layer"):
        GlobalWholeExpertsAllocator("layers")


def test_plans_say_how_many_channels_they_remove_at_once():
    shape = ExpertShape(layers=3, experts=8, width=16, top_k=2)
    assert WholeExpertsAllocator().channels_at_once(shape) == 48
    assert GlobalWholeExpertsAllocator().channels_at_once(shape) == 16
    assert ImportanceWholeExpertsAllocator().channels_at_once(shape) == 16


def test_keep_all_keeps_all_and_says_who_answers_for_the_ratio():
    plan = KeepAllAllocator()(experts_only([[1.0] * 4] * 2), budget_of(0.5))
    assert plan.kept_channels == plan.total_channels
    assert plan.note == "no channel is removed; what ratio=0.5 means is left to the surgery"
    assert KeepAllAllocator()(experts_only([[1.0] * 4] * 2), budget_of(0.0)).note == ""
