"""Alignment: widths of whole blocks that sum to the budget, and who gets what rounding released."""

import pytest
import torch
from allocation_strategies import budgets, counts_of
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moeprune.allocation.alignment import align
from moeprune.allocation.budget import Budget


def aligned(
    counts: list[list[int]], *, width: int, block: int, minimum: int, top_k: int = 1, scores: list | None = None
) -> list[list[int]]:
    """Widths of counts that are themselves the budget."""
    counts_LE = torch.tensor(counts)
    total = counts_LE.numel() * width
    budget = Budget(
        ratio=1 - int(counts_LE.sum()) / total,
        layers=len(counts),
        experts=len(counts[0]),
        width=width,
        top_k=top_k,
        alignment=block,
        minimum_width=minimum,
    )
    scores_LE = torch.zeros(counts_LE.shape) if scores is None else torch.tensor(scores)
    return align(counts_LE, budget, scores_LE).tolist()


@settings(deadline=None, max_examples=50)
@given(budgets(), st.data())
def test_widths_are_allowed_and_sum_to_the_budget_and_every_layer_keeps_its_top_k(budget, data):
    counts_LE = data.draw(counts_of(budget))
    before = counts_LE.clone()
    widths_LE = align(counts_LE, budget, torch.zeros(counts_LE.shape))
    assert torch.equal(counts_LE, before)
    assert widths_LE.dtype == torch.int64
    assert int(widths_LE.sum()) == budget.kept_channels
    assert set(widths_LE.flatten().tolist()) <= {0, *range(budget.minimum_width, budget.width + 1, budget.alignment)}
    assert int((widths_LE > 0).sum(dim=1).min()) >= budget.top_k


@settings(deadline=None, max_examples=50)
@given(budgets(), st.data())
def test_aligned_counts_stay_as_they_are(budget, data):
    counts_LE = data.draw(counts_of(budget))
    scores_LE = torch.zeros(counts_LE.shape)
    widths_LE = align(counts_LE, budget, scores_LE)
    assert torch.equal(align(widths_LE, budget, scores_LE), widths_LE)


@settings(deadline=None, max_examples=50)
@given(budgets(), st.data())
def test_no_block_goes_to_an_expert_while_another_with_room_has_lost_more(budget, data):
    block = budget.alignment
    budget = Budget(**{**vars(budget), "minimum_width": block})
    counts_LE = data.draw(counts_of(budget))
    rounded_LE = counts_LE // block * block
    assume(int((rounded_LE > 0).sum(dim=1).min()) >= budget.top_k)
    widths_LE = align(counts_LE, budget, torch.zeros(counts_LE.shape))
    lost_LE = counts_LE - widths_LE
    got, has_room = widths_LE > rounded_LE, widths_LE < budget.width
    if got.any() and has_room.any():
        assert int(lost_LE[got].max()) >= int(lost_LE[has_room].max()) - block
        assert int(lost_LE[got].min()) + block >= int(lost_LE[has_room].max())


def test_released_blocks_go_to_those_that_lost_most_and_ties_to_the_lower_index():
    # Rounding releases 3, 2, 1 and 2 channels: two blocks.
    assert aligned([[11, 10, 9, 6]], width=12, block=4, minimum=4) == [[12, 12, 8, 4]]


def test_among_equal_losses_the_higher_score_gets_the_block_and_the_lower_score_gives_it_back():
    assert aligned([[6, 6, 8]], width=12, block=4, minimum=4) == [[8, 4, 8]]
    assert aligned([[6, 6, 8]], width=12, block=4, minimum=4, scores=[[1.0, 2.0, 0.0]]) == [[4, 8, 8]]
    # The third needs a minimum it has not: one of the first two pays.
    assert aligned([[12, 12, 0]], width=12, block=4, minimum=4, top_k=3) == [[12, 8, 4]]
    assert aligned([[12, 12, 0]], width=12, block=4, minimum=4, top_k=3, scores=[[1.0, 2.0, 0.0]]) == [[8, 12, 4]]


def test_among_equal_counts_the_experts_of_higher_score_are_those_that_must_live():
    assert aligned([[9, 1, 1, 1]], width=12, block=4, minimum=4, top_k=2) == [[8, 4, 0, 0]]
    scores = [[0.0, 0.0, 2.0, 1.0]]
    assert aligned([[9, 1, 1, 1]], width=12, block=4, minimum=4, top_k=2, scores=scores) == [[8, 0, 4, 0]]


def test_with_scores_blocks_go_to_those_that_lost_most_score():
    budget = Budget(ratio=0.5, layers=1, experts=3, width=8, top_k=1, alignment=4, minimum_width=4)
    channel_LEC = torch.tensor([[[1.0] * 8, [9.0] * 8, [0.0] * 8]])
    held_LEK = torch.nn.functional.pad(channel_LEC.cumsum(dim=-1), (1, 0))
    counts_LE, scores_LE = torch.tensor([[7, 5, 0]]), torch.zeros(1, 3)
    # Rounding to [4, 4, 0] took three channels of score 1 from the first and one of score 9 from the second.
    assert align(counts_LE, budget, scores_LE).tolist() == [[8, 4, 0]]
    assert align(counts_LE, budget, scores_LE, held_LEK).tolist() == [[4, 8, 0]]


def test_released_blocks_cross_layers():
    assert aligned([[8, 9], [11, 8]], width=12, block=4, minimum=4) == [[8, 8], [12, 8]]


def test_an_expert_below_the_minimum_comes_back_with_the_minimum_at_once():
    assert aligned([[15, 7, 10]], width=16, block=4, minimum=8) == [[16, 8, 8]]


def test_an_expert_for_whose_minimum_there_is_no_room_stays_away():
    assert aligned([[13, 3, 8]], width=16, block=4, minimum=8) == [[16, 0, 8]]


def test_where_only_a_removed_expert_has_room_the_others_give_what_its_minimum_lacks():
    assert aligned([[16, 8, 0]], width=16, block=4, minimum=12) == [[12, 12, 0]]


def test_those_that_lost_least_counting_what_they_were_given_give_first():
    # Expert 1 was given a block; when expert 2 needs one more, expert 1 has lost less than expert 0, which lost none.
    assert aligned([[16, 15, 3, 3, 3]], width=16, block=4, minimum=12) == [[16, 12, 12, 0, 0]]


def test_the_top_k_widest_of_a_layer_live_and_the_others_pay():
    assert aligned([[10, 1, 1]], width=12, block=4, minimum=4, top_k=2) == [[8, 4, 0]]
    assert aligned([[12, 1, 1, 2]], width=12, block=4, minimum=4, top_k=3) == [[8, 4, 0, 4]]


def test_a_minimum_of_the_whole_width_makes_experts_whole():
    assert aligned([[8, 7, 5, 4]], width=8, block=2, minimum=8) == [[8, 8, 8, 0]]


@pytest.mark.parametrize("minimum", [2, 8])
def test_where_everything_is_kept_nothing_changes(minimum):
    assert aligned([[8, 8], [8, 8]], width=8, block=2, minimum=minimum) == [[8, 8], [8, 8]]
