"""Rankings keep the largest possible sum of scores."""

import pytest
import torch
from allocation_strategies import brute_force_widths, budgets, scores_for
from hypothesis import given, settings
from hypothesis import strategies as st

from moeprune.allocation.budget import Budget
from moeprune.allocation.ranking import RankingAllocator
from moeprune.errors import InputError
from moeprune.types import Plan, Scores


def kept_score(scores: Scores, plan: Plan) -> float:
    return sum(
        float(scores.channel_LEC[layer, expert, channels].sum())
        for layer, kept in enumerate(plan.kept)
        for expert, channels in enumerate(kept)
    )


@settings(deadline=None, max_examples=30)
@given(budgets(most_layers=2, most_experts=2, most_alignment=1), st.data())
def test_the_global_ranking_keeps_the_largest_sum_of_scores(budget, data):
    budget = Budget(**{**vars(budget), "top_k": 1, "minimum_width": 1})
    scores = data.draw(scores_for(budget))
    sorted_NC = scores.channel_LEC.flatten(0, 1).sort(descending=True).values.tolist()
    best = max(
        sum(sum(row[:width]) for row, width in zip(sorted_NC, widths, strict=True))
        for widths in brute_force_widths(budget)
    )
    assert kept_score(scores, RankingAllocator("model")(scores, budget)) == pytest.approx(best)


@settings(deadline=None, max_examples=50)
@given(budgets(most_alignment=1), st.data())
def test_the_layer_ranking_keeps_the_highest_scores_of_each_layer_in_equal_numbers(budget, data):
    budget = Budget(**{**vars(budget), "top_k": 1, "minimum_width": 1})
    scores = data.draw(scores_for(budget))
    plan = RankingAllocator()(scores, budget)
    for layer, kept in enumerate(plan.kept):
        layer_kept = torch.cat([scores.channel_LEC[layer, expert, channels] for expert, channels in enumerate(kept)])
        best = scores.channel_LEC[layer].flatten().sort(descending=True).values[: len(layer_kept)]
        assert torch.equal(layer_kept.sort(descending=True).values, best)
    layers = plan.widths_LE.sum(dim=1)
    assert int(layers.max() - layers.min()) <= 1


def test_a_layer_of_low_scores_keeps_room_for_its_top_k():
    channel_LEC = torch.stack([torch.full((4, 8), 5.0), torch.arange(32.0).reshape(4, 8) / 100])
    budget = Budget(ratio=0.5, layers=2, experts=4, width=8, top_k=2, alignment=4, minimum_width=4)
    plan = RankingAllocator("model")(Scores(channel_LEC, channel_LEC.sum(dim=-1), torch.ones(2)), budget)
    # The second layer's room is eight channels, all of its last expert; the next one lives with the minimum, and of the
    # experts that lost nothing the one of the lowest score pays for it.
    assert plan.widths_LE.tolist() == [[8, 8, 8, 0], [0, 0, 4, 4]]


def test_a_scope_that_does_not_exist_is_refused():
    with pytest.raises(InputError, match=r"(?s)scope=layers does not exist.*Did you mean: layer"):
        RankingAllocator("layers")
