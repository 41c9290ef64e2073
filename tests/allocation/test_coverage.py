"""The coverage allocator and its settings: who gets more, and which names exist."""

import pytest
import torch
from allocation_strategies import budgets, scores_for
from hypothesis import given, settings
from hypothesis import strategies as st

from moeprune.allocation.budget import Budget
from moeprune.allocation.coverage import CoverageAllocator
from moeprune.errors import InputError
from moeprune.types import ExpertWeights, Scores


def budget_of(ratio: float, **changes: int) -> Budget:
    shape = {"layers": 2, "experts": 4, "width": 8, "top_k": 2, "alignment": 2, "minimum_width": 2}
    return Budget(ratio=ratio, **{**shape, **changes})


def test_experts_and_layers_that_matter_more_get_more():
    channel_LEC = torch.ones(2, 4, 8, dtype=torch.float64)
    expert_LE = torch.tensor([[1.0, 1.0, 1.0, 9.0]] * 2, dtype=torch.float64)
    plan = CoverageAllocator()(Scores(channel_LEC, expert_LE, torch.tensor([1.0, 16.0])), budget_of(0.5))
    assert plan.widths_LE[:, 3].tolist() == plan.widths_LE.max(dim=1).values.tolist()
    assert plan.widths_LE[1].sum() > plan.widths_LE[0].sum()


def test_top_k_experts_stay_where_scores_would_leave_fewer():
    channel_LEC = torch.zeros(2, 4, 8, dtype=torch.float64)
    channel_LEC[:, 0] = 1.0
    scores = Scores(channel_LEC, channel_LEC.sum(dim=-1), torch.ones(2))
    plan = CoverageAllocator()(scores, budget_of(0.7, minimum_width=4))
    assert ((plan.widths_LE > 0).sum(dim=1) >= 2).all()


def test_never_more_is_removed_than_asked_where_experts_are_kept_whole():
    budget = budget_of(0.3, minimum_width=8)
    generator = torch.Generator().manual_seed(0)
    channel_LEC = torch.rand(2, 4, 8, generator=generator, dtype=torch.float64)
    plan = CoverageAllocator()(Scores(channel_LEC, channel_LEC.sum(dim=-1), torch.ones(2)), budget)
    # 0.7 of 64 channels are 44.8; five experts hold 40, six hold 48.
    assert plan.kept_channels == 48
    assert plan.note.endswith("make it 16")


@pytest.mark.parametrize("weight", ["attribution", "usage", "router", "removal"])
def test_the_expert_that_the_chosen_weight_favours_keeps_most(weight):
    names = ["attribution", "usage", "router", "removal"]
    favoured = {f"{name}_LE": torch.ones(2, 4) + 20 * torch.eye(4)[index] for index, name in enumerate(names)}
    scores = Scores(torch.ones(2, 4, 8), torch.ones(2, 4), torch.ones(2), weights=ExpertWeights(**favoured))
    widths_LE = CoverageAllocator(expert_weight=weight)(scores, budget_of(0.5)).widths_LE
    assert widths_LE.argmax(dim=1).tolist() == [names.index(weight)] * 2


def test_depth_and_loss_decide_between_layers():
    channel_LEC = torch.ones(3, 4, 8)
    scores = Scores(channel_LEC, channel_LEC.sum(dim=-1), torch.tensor([1.0, 1.0, 3.0]))

    def layers(kept: int, **settings: str) -> list[int]:
        budget = budget_of(1 - kept / 96, layers=3)
        return CoverageAllocator(**settings)(scores, budget).widths_LE.sum(dim=1).tolist()

    assert layers(48, between_layers="uniform") == [16, 16, 16]
    assert layers(48, between_layers="uniform_coverage") == [16, 16, 16]
    assert layers(40, between_layers="u_shaped") == [16, 8, 16]
    assert layers(40, between_layers="loss", smoothing="none") == [8, 8, 24]


@settings(deadline=None, max_examples=30)
@given(budgets(), st.data())
def test_smoothing_and_weights_do_not_depend_on_the_unit_of_scores(budget, data):
    scores = data.draw(scores_for(budget))
    scaled = Scores(4 * scores.channel_LEC, 16 * scores.expert_LE, 64 * scores.layer_L)
    allocator = CoverageAllocator(smoothing=data.draw(st.sampled_from(["none", "sqrt", "log", "huber", "clip"])))
    assert torch.equal(allocator(scores, budget).widths_LE, allocator(scaled, budget).widths_LE)


@pytest.mark.parametrize(
    ("setting", "wrong", "meant"),
    [
        ("between_layers", "uniform_cover", "uniform_coverage"),
        ("smoothing", "hubber", "huber"),
        ("expert_weight", "attribute", "attribution"),
        ("reallocation", "most_scores", "most_score"),
    ],
)
def test_a_setting_that_does_not_exist_is_refused_with_the_nearest(setting, wrong, meant):
    with pytest.raises(InputError, match=rf"(?s){setting}={wrong} does not exist.*Did you mean: {meant}.*Possible"):
        CoverageAllocator(**{setting: wrong})


def test_rounds_below_zero_are_refused():
    with pytest.raises(InputError, match="smoothing_rounds=-1 is not possible"):
        CoverageAllocator(smoothing_rounds=-1)


def test_weights_that_nobody_filled_in_are_refused_with_what_to_do():
    scores = Scores(torch.ones(2, 4, 8), torch.ones(2, 4), torch.ones(2))
    with pytest.raises(InputError, match=r"(?s)expert_weight=usage needs.*with_expert_weights"):
        CoverageAllocator(expert_weight="usage")(scores, budget_of(0.5))
