"""What every allocator promises about its plan, and what each of them promises by itself."""

import math
import re

import pytest
import torch
from allocation_strategies import budgets, scores_for
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moeprune.allocation.budget import Budget
from moeprune.allocation.coverage import CoverageAllocator, smoothed_loss
from moeprune.allocation.uniform import UniformAllocator
from moeprune.allocation.whole_experts import WholeExpertsAllocator
from moeprune.errors import BudgetError, InputError
from moeprune.types import Plan, Scores

ALLOCATORS = [CoverageAllocator(), UniformAllocator(), WholeExpertsAllocator()]
CHANNEL_ALLOCATORS = ALLOCATORS[:2]

every_allocator = pytest.mark.parametrize("allocator", ALLOCATORS, ids=lambda allocator: type(allocator).__name__)
channel_allocators = pytest.mark.parametrize(
    "allocator", CHANNEL_ALLOCATORS, ids=lambda allocator: type(allocator).__name__
)


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


def permuted(scores: Scores, order_E: torch.Tensor) -> Scores:
    return Scores(scores.channel_LEC[:, order_E], scores.expert_LE[:, order_E], scores.layer_L)


@channel_allocators
@settings(deadline=None, max_examples=50)
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
@settings(deadline=None, max_examples=50)
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
@settings(deadline=None, max_examples=50)
@given(budgets(), st.data())
def test_a_larger_ratio_never_keeps_more(allocator, budget, data):
    smaller = Budget(**{**vars(budget), "ratio": data.draw(st.floats(0, budget.ratio))})
    assume(possible(allocator, budget))
    scores = data.draw(scores_for(budget))
    assert allocator(scores, smaller).kept_channels >= allocator(scores, budget).kept_channels


@every_allocator
@settings(deadline=None, max_examples=50)
@given(budgets(), st.data())
def test_ratio_zero_keeps_everything(allocator, budget, data):
    whole = Budget(**{**vars(budget), "ratio": 0.0})
    plan = allocator(data.draw(scores_for(whole)), whole)
    assert kept_lists(plan) == [[list(range(whole.width))] * whole.experts] * whole.layers
    assert (plan.removed_ratio, plan.note) == (0, "")


@every_allocator
@settings(deadline=None, max_examples=50)
@given(budgets(most_alignment=1), st.data())
def test_permuting_the_experts_permutes_the_plan(allocator, budget, data):
    # Single channels: with larger blocks the coverage allocator hands them out by whole channels lost, where ties of
    # distinct scores are common.
    budget = Budget(**{**vars(budget), "top_k": 1, "minimum_width": 1})
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


def test_coverage_gives_more_to_experts_and_layers_that_matter_more():
    channel_LEC = torch.ones(2, 4, 8, dtype=torch.float64)
    expert_LE = torch.tensor([[1.0, 1.0, 1.0, 9.0]] * 2, dtype=torch.float64)
    plan = CoverageAllocator()(Scores(channel_LEC, expert_LE, torch.tensor([1.0, 16.0])), budget_of(0.5))
    assert plan.widths_LE[:, 3].tolist() == plan.widths_LE.max(dim=1).values.tolist()
    assert plan.widths_LE[1].sum() > plan.widths_LE[0].sum()


def test_coverage_keeps_top_k_experts_where_scores_would_leave_fewer():
    channel_LEC = torch.zeros(2, 4, 8, dtype=torch.float64)
    channel_LEC[:, 0] = 1.0
    scores = Scores(channel_LEC, channel_LEC.sum(dim=-1), torch.ones(2))
    plan = CoverageAllocator()(scores, budget_of(0.7, minimum_width=4))
    assert ((plan.widths_LE > 0).sum(dim=1) >= 2).all()


def test_coverage_never_removes_more_than_asked_where_experts_are_kept_whole():
    budget = budget_of(0.3, minimum_width=8)
    generator = torch.Generator().manual_seed(0)
    channel_LEC = torch.rand(2, 4, 8, generator=generator, dtype=torch.float64)
    plan = CoverageAllocator()(Scores(channel_LEC, channel_LEC.sum(dim=-1), torch.ones(2)), budget)
    # 0.7 of 64 channels are 44.8; five experts hold 40, six hold 48.
    assert plan.kept_channels == 48
    assert plan.note.endswith("make it 16")


def test_smoothing_brings_losses_together_at_mean_one_and_takes_zeros():
    loss_L = torch.tensor([1.0, 4.0, 100.0], dtype=torch.float64)
    once, twice = smoothed_loss(loss_L, 1), smoothed_loss(loss_L, 2)
    roots = torch.tensor([1.0, 2.0, 10.0], dtype=torch.float64)
    clipped = roots.clamp(roots.mean() - roots.std(correction=0), roots.mean() + roots.std(correction=0))
    torch.testing.assert_close(once, clipped / clipped.mean())
    assert twice.max() - twice.min() < once.max() - once.min()
    assert torch.equal(smoothed_loss(torch.zeros(3), 2), torch.ones(3))


def test_uniform_gives_blocks_left_over_to_the_best_experts_of_each_layer_in_turn():
    channel_LEC = torch.ones(2, 4, 8)
    expert_LE = torch.tensor([[0.0, 3.0, 1.0, 2.0], [5.0, 1.0, 1.0, 0.0]])
    # 64 channels at ratio 0.4 keep 20 blocks of 2: two for each of eight experts, and four more.
    plan = UniformAllocator()(Scores(channel_LEC, expert_LE, torch.ones(2)), budget_of(0.4))
    assert plan.widths_LE.tolist() == [[4, 6, 4, 6], [6, 6, 4, 4]]


def test_uniform_refuses_widths_below_the_minimum_and_says_what_to_change():
    with pytest.raises(BudgetError, match=r"(?s)leaves each expert 2 channels; the minimum width is 4.*smaller ratio"):
        UniformAllocator().check(budget_of(0.7, minimum_width=4, top_k=1))


@settings(deadline=None, max_examples=50)
@given(budgets(), st.data())
def test_whole_experts_keeps_the_best_and_ties_break_by_index(budget, data):
    allocator = WholeExpertsAllocator()
    assume(possible(allocator, budget))
    scores = data.draw(scores_for(budget))
    plan = allocator(scores, budget)
    stays = math.ceil((1 - budget.ratio) * budget.experts - 1e-6)
    for layer, kept in enumerate(kept_lists(plan)):
        score_E = scores.expert_LE[layer].tolist()
        ranked = sorted(range(budget.experts), key=lambda expert, score_E=score_E: (-score_E[expert], expert))
        every, none = list(range(budget.width)), []
        assert kept == [every if expert in ranked[:stays] else none for expert in range(budget.experts)]
    assert plan.removed_ratio <= budget.ratio + 1e-9


def test_whole_experts_needs_no_channel_scores_and_notes_what_rounding_changed():
    plan = WholeExpertsAllocator()(Scores(None, torch.arange(8.0).reshape(2, 4), torch.ones(2)), budget_of(0.4))
    assert plan.widths_LE.tolist() == [[0, 8, 8, 8]] * 2
    assert plan.note == "asked to remove 1.60 experts per layer; whole experts make it 1"


def test_whole_experts_refuses_to_leave_fewer_than_top_k_and_recommends_a_ratio_that_works():
    allocator = WholeExpertsAllocator()
    with pytest.raises(
        BudgetError, match=r"removes 3 of 4 experts and leaves 1, but every token is sent to 2"
    ) as error:
        allocator(Scores(None, torch.ones(2, 4), torch.ones(2)), budget_of(0.75))
    recommended = float(re.search(r"ratio of at most ([\d.]+),", str(error.value))[1])
    assert allocator.check(budget_of(recommended)) == 2
