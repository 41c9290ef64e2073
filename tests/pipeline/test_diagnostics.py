"""Diagnostics, against loops over channels and areas of trapezia."""

import itertools
import json
import math

import pytest
import torch

from moeprune.allocation.budget import Budget
from moeprune.allocation.coverage import CoverageAllocator
from moeprune.allocation.optimal_coverage import OptimalCoverageAllocator
from moeprune.allocation.uniform import UniformAllocator
from moeprune.allocation.whole_experts import WholeExpertsAllocator
from moeprune.calibration.statistics import collect_statistics
from moeprune.pipeline.diagnostics import coverage_reached, diagnostics, gini, lorenz, top_share
from moeprune.scoring.attribution import AttributionScorer
from moeprune.scoring.frequency import FrequencyScorer
from moeprune.types import Plan

BUDGET = Budget(ratio=0.5, layers=2, experts=8, width=16, top_k=2, alignment=4, minimum_width=4)


@pytest.fixture
def statistics(build_model, random_windows):
    return collect_statistics(build_model("qwen3_renormalised", torch.float64), random_windows, batch_size=2)


def random_rows(channels: int) -> torch.Tensor:
    """Heavy-tailed scores, a fifth of them negative."""
    generator = torch.Generator().manual_seed(channels)
    return torch.randn((6, channels), dtype=torch.float64, generator=generator).exp() - 0.4


def curve_by_hand(scores: list[float], share: float) -> float:
    """L(share) by adding the lowest channels one by one, the last of them in part."""
    positive = sorted(max(0.0, score) for score in scores)
    left, held = share * len(positive), 0.0
    for score in positive:
        held += min(1.0, max(0.0, left)) * score
        left -= 1
    return held / sum(positive)


@pytest.mark.parametrize("channels", [1, 2, 7, 16, 96])
def test_lorenz_curve(channels):
    rows = random_rows(channels)
    shares = [0.0, 0.03, 0.1, 0.5, 0.77, 0.95, 1.0]
    expected = [[curve_by_hand(row, share) for share in shares] for row in rows.tolist()]
    assert lorenz(rows, torch.tensor(shares, dtype=torch.float64)).tolist() == [
        pytest.approx(curve, abs=1e-12) for curve in expected
    ]


@pytest.mark.parametrize("channels", [1, 2, 7, 16])
def test_gini_is_the_mean_difference_and_twice_the_area_above_the_curve(channels):
    rows = random_rows(channels)
    found = gini(rows)
    for row, value in zip(rows.tolist(), found.tolist(), strict=True):
        positive = [max(0.0, score) for score in row]
        differences = sum(abs(one - other) for one, other in itertools.product(positive, repeat=2))
        assert value == pytest.approx(differences / (2 * channels * sum(positive)), abs=1e-12)
        heights = [curve_by_hand(row, k / channels) for k in range(channels + 1)]
        area = sum((low + high) / 2 / channels for low, high in itertools.pairwise(heights))
        assert value == pytest.approx(1 - 2 * area, abs=1e-12)


def test_equal_scores_are_not_concentrated_and_a_single_one_is():
    equal, single = torch.ones(1, 10), torch.eye(10)[:1]
    assert gini(equal).item() == pytest.approx(0)
    assert top_share(equal).item() == pytest.approx(0.1)
    assert gini(single).item() == pytest.approx(0.9)
    assert top_share(single).item() == pytest.approx(1)


def test_the_top_tenth_of_twenty_channels_are_two():
    (row,) = random_rows(20)[:1].tolist()
    positive = sorted((max(0.0, score) for score in row), reverse=True)
    assert top_share(torch.tensor([row])).item() == pytest.approx(sum(positive[:2]) / sum(positive))


def test_without_a_positive_score_there_is_no_number():
    rows = torch.tensor([[0.0, -1.0, 0.0]])
    assert math.isnan(gini(rows)) and math.isnan(top_share(rows))


def test_coverage_reached_is_the_score_on_kept_channels():
    channel_LEC = torch.tensor([[[4.0, 3.0, 2.0, 1.0], [5.0, -5.0, 0.0, 5.0]]])
    plan = Plan(((torch.tensor([0, 3]), torch.tensor([1, 3])),), width=4)
    expert_LE, layer_L = coverage_reached(channel_LEC, plan)
    assert expert_LE.tolist() == [[0.5, 0.5]]
    assert layer_L.tolist() == [0.5]


def test_coverage_carries_the_certificate_of_the_objective_asked_for(statistics):
    scores = AttributionScorer()(statistics)
    objective = OptimalCoverageAllocator(layer_weight="uniform", expert_weight="uniform")
    best, other = objective(scores, BUDGET), UniformAllocator()(scores, BUDGET)
    of_best, of_other = (diagnostics(statistics, scores, plan, BUDGET, objective)["coverage"] for plan in (best, other))
    # Equal weights: the objective is the mean coverage of a layer's experts, summed over layers.
    assert of_best["objective"] == pytest.approx(sum(sum(row) / 8 for row in of_best["expert"]))
    assert of_best["objective"] >= of_other["objective"]
    assert of_best["upper_bound"] == pytest.approx(of_other["upper_bound"])
    assert of_other["gap"] == pytest.approx(1 - of_other["objective"] / of_other["upper_bound"])
    assert of_best["judged_by"]["expert_weight"] == "uniform"


def test_diagnostics_are_plain_values(statistics):
    scores = AttributionScorer()(statistics)
    plan = CoverageAllocator()(scores, BUDGET)
    found = diagnostics(statistics, scores, plan, BUDGET)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["kept_channels"] == plan.widths_LE.tolist()
    assert found["without_channel_scores"] is None
    concentration = found["channel_scores"]
    assert len(concentration["lorenz_positions"]) == 21
    assert concentration["gini"][1][3] == pytest.approx(gini(scores.channel_LEC[1, 3:4]).item())
    assert concentration["layer_gini"][1] == pytest.approx(gini(scores.channel_LEC[1].reshape(1, -1)).item())
    assert [curve[0] for curve in concentration["lorenz"]] == [0, 0]
    assert [curve[-1] for curve in concentration["lorenz"]] == [pytest.approx(1)] * 2
    middle = [curve_by_hand(row, 0.5) for row in scores.channel_LEC[0].tolist()]
    assert concentration["lorenz"][0][10] == pytest.approx(sum(middle) / 8)


def test_router_entropy_is_that_of_the_softmax(statistics, build_model, random_windows, seen_layers):
    scores = AttributionScorer()(statistics)
    found = diagnostics(statistics, scores, CoverageAllocator()(scores, BUDGET), BUDGET)["router_entropy"]
    model = build_model("qwen3_renormalised", torch.float64)
    with seen_layers(model) as seen:
        model(input_ids=random_windows.input_ids_NT)
    for layer, nats, share in zip(seen, found["nats"], found["share_of_uniform"], strict=True):
        per_token = [
            -sum(p * math.log(p) for p in torch.softmax(logits_E.double(), 0).tolist()) for logits_E in layer.logits_TE
        ]
        assert nats == pytest.approx(sum(per_token) / len(per_token), rel=1e-6)
        assert share == pytest.approx(nats / math.log(8))


def test_an_expert_without_a_score_is_null_and_left_out_of_the_mean(statistics):
    scores = AttributionScorer()(statistics)
    scores.channel_LEC[0, 2] = 0
    plan = CoverageAllocator()(scores, BUDGET)
    found = diagnostics(statistics, scores, plan, BUDGET)
    assert found["channel_scores"]["gini"][0][2] is None
    assert found["coverage"]["expert"][0][2] is None
    others = [curve_by_hand(row, 0.5) for expert, row in enumerate(scores.channel_LEC[0].tolist()) if expert != 2]
    assert found["channel_scores"]["lorenz"][0][10] == pytest.approx(sum(others) / 7)


def test_a_scorer_of_whole_experts_has_no_concentration_and_says_why(statistics):
    scores = FrequencyScorer()(statistics)
    found = diagnostics(statistics, scores, WholeExpertsAllocator()(scores, BUDGET), BUDGET)
    assert found["channel_scores"] is None
    assert found["coverage"] is None
    assert "whole experts" in found["without_channel_scores"]
    assert sorted(found["kept_channels"][0]) == [0] * 4 + [16] * 4
