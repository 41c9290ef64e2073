"""Layer budgets and the smoothing of losses, each against its formula in plain Python."""

import math
import statistics

import pytest
import torch
from allocation_strategies import budgets
from hypothesis import given, settings
from hypothesis import strategies as st

from moeprune.allocation.budget import Budget
from moeprune.allocation.layer_budgets import LAYER_RULES, layer_budgets, proportional, u_shape
from moeprune.allocation.smoothing import SMOOTHINGS, smoothed_loss

losses = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6)


def clipped(values: list[float]) -> list[float]:
    mean, deviation = statistics.fmean(values), statistics.pstdev(values)
    return [min(max(value, mean - deviation), mean + deviation) for value in values]


def smoothed_by_formula(values: list[float], smoothing: str, rounds: int) -> list[float]:
    mean, deviation = statistics.fmean(values), statistics.pstdev(values)
    knee = mean + deviation
    if smoothing == "sqrt":
        for _ in range(rounds):
            values = clipped([math.sqrt(value) for value in values])
    else:
        values = {
            "none": values,
            "log": [math.log(1 + value / mean) for value in values],
            "huber": [x if x <= knee else math.sqrt(2 * knee * (x - knee / 2)) for x in values],
            "clip": clipped(values),
        }[smoothing]
    return [value / statistics.fmean(values) for value in values]


@settings(deadline=None, max_examples=50)
@given(losses, st.sampled_from(SMOOTHINGS), st.integers(0, 3))
def test_smoothing_follows_its_formula(values, smoothing, rounds):
    smooth_L = smoothed_loss(torch.tensor(values, dtype=torch.float64), smoothing, rounds)
    assert smooth_L.tolist() == pytest.approx(smoothed_by_formula(values, smoothing, rounds), rel=1e-9)


@settings(deadline=None, max_examples=50)
@given(losses, st.sampled_from(SMOOTHINGS))
def test_smoothing_keeps_the_order_and_never_spreads(values, smoothing):
    loss_L = torch.tensor(sorted(values), dtype=torch.float64)
    smooth_L = smoothed_loss(loss_L, smoothing, 2)
    assert bool((smooth_L.diff() >= -1e-12).all())
    assert float(smooth_L.max() / smooth_L.min()) <= float(loss_L.max() / loss_L.min()) * (1 + 1e-9)
    assert float(smooth_L.mean()) == pytest.approx(1)


def test_without_any_loss_layers_are_equal():
    for smoothing in SMOOTHINGS:
        assert smoothed_loss(torch.zeros(3), smoothing, 2).tolist() == [1, 1, 1]


def test_a_u_over_depth():
    assert u_shape(5).tolist() == [2, 1.25, 1, 1.25, 2]
    assert u_shape(2).tolist() == [2, 2]
    assert u_shape(1).tolist() == [1]


@settings(deadline=None, max_examples=50)
@given(budgets(), st.data())
def test_every_rule_meets_the_budget_with_room_for_top_k_and_never_above_the_layer(budget, data):
    channel_LEC = torch.rand(
        budget.layers, budget.experts, budget.width, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    weight = st.floats(0, 10) | st.just(0.0)
    loss = data.draw(st.lists(weight, min_size=budget.layers, max_size=budget.layers))
    for rule in LAYER_RULES:
        layer_L = layer_budgets(rule, channel_LEC, torch.tensor(loss, dtype=torch.float64), budget)
        assert layer_L.dtype == torch.int64
        assert int(layer_L.sum()) == budget.kept_channels
        assert int(layer_L.min()) >= budget.top_k * budget.minimum_width
        assert int(layer_L.max()) <= budget.experts * budget.width


def four_layers(ratio: float) -> Budget:
    return Budget(ratio=ratio, layers=4, experts=10, width=10, top_k=1, alignment=1, minimum_width=5)


@pytest.mark.parametrize(
    ("weights", "ratio", "expected"),
    [
        ([1, 1, 1, 1], 0.5, [50, 50, 50, 50]),
        ([1, 2, 3, 4], 0.75, [10, 20, 30, 40]),
        ([1, 2, 3, 4], 0.5, [20, 40, 60, 80]),
        ([1, 1, 1, 97], 0.75, [5, 5, 5, 85]),  # the least
        ([1, 1, 1, 97], 0.5, [34, 33, 33, 100]),  # the most, and a fraction by index
        ([0, 0, 1, 1], 0.25, [50, 50, 100, 100]),
        ([0, 0, 0, 0], 0.5, [50, 50, 50, 50]),
    ],
)
def test_shares_are_in_proportion_within_their_limits(weights, ratio, expected):
    assert proportional(torch.tensor(weights, dtype=torch.float64), four_layers(ratio)).tolist() == expected
