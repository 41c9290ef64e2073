"""Scorers of whole experts against loops over tokens, in float64, and what allocators weigh experts by."""

import pytest
import torch
from token_loops import matrices_of, tokens_of

from moeprune.calibration.statistics import Statistics
from moeprune.errors import InputError
from moeprune.scoring.aimer import AimerScorer
from moeprune.scoring.attribution import AttributionScorer
from moeprune.scoring.expert_outputs import EasyEpScorer, ExpertOutputScorer, MoneScorer
from moeprune.scoring.frequency import FrequencyScorer, RouterScoreScorer, SoftCountScorer
from moeprune.scoring.removal import RemovalScorer
from moeprune.scoring.weights import with_expert_weights

EAN, REAP, MAN, MSAN = (
    {"gated": False, "squared": False, "per_token": False},
    {"gated": True, "squared": False, "per_token": True},
    {"gated": False, "squared": False, "per_token": True},
    {"gated": False, "squared": True, "per_token": True},
)


def assert_scores(scores, seen, of_tokens) -> None:
    """Every expert's score is ``of_tokens(its routed tokens)``, or 0 without any."""
    for layer, saw in enumerate(seen):
        for expert in range(saw.layer.expert_count):
            tokens = tokens_of(saw, expert)
            expected = float(of_tokens(tokens)) if tokens else 0.0
            assert float(scores.expert_LE[layer, expert]) == pytest.approx(expected, rel=1e-10, abs=1e-13)


def mean(values):
    return sum(values) / len(values)


def test_frequency_counts_the_tokens_of_each_expert(seen_and_statistics):
    seen, statistics = seen_and_statistics
    assert_scores(FrequencyScorer()(statistics), seen, len)


def test_soft_count_sums_the_gates(seen_and_statistics):
    seen, statistics = seen_and_statistics
    assert_scores(SoftCountScorer()(statistics), seen, lambda tokens: sum(t.g for t in tokens))


def test_router_score_sums_the_softmax_of_all_tokens(seen_and_statistics):
    seen, statistics = seen_and_statistics
    expected = [sum(torch.softmax(logits.double(), 0) for logits in saw.logits_TE) for saw in seen]
    torch.testing.assert_close(RouterScoreScorer()(statistics).expert_LE, torch.stack(expected))


def test_ean_sums_norms(seen_and_statistics):
    seen, statistics = seen_and_statistics
    assert_scores(ExpertOutputScorer(**EAN)(statistics), seen, lambda tokens: sum(t.f.norm() for t in tokens))


def test_reap_averages_gated_norms(seen_and_statistics):
    seen, statistics = seen_and_statistics
    assert_scores(ExpertOutputScorer(**REAP)(statistics), seen, lambda tokens: mean([t.g * t.f.norm() for t in tokens]))


def test_man_averages_norms(seen_and_statistics):
    seen, statistics = seen_and_statistics
    assert_scores(ExpertOutputScorer(**MAN)(statistics), seen, lambda tokens: mean([t.f.norm() for t in tokens]))


def test_msan_averages_squared_norms(seen_and_statistics):
    seen, statistics = seen_and_statistics
    assert_scores(ExpertOutputScorer(**MSAN)(statistics), seen, lambda tokens: mean([t.f.dot(t.f) for t in tokens]))


def test_a_gated_squared_norm_is_refused():
    with pytest.raises(InputError, match="gated=true with squared=true"):
        ExpertOutputScorer(gated=True, squared=True, per_token=True)


def test_easy_ep_weighs_gated_norms_by_how_far_the_token_moved(seen_and_statistics):
    seen, statistics = seen_and_statistics

    def moved(t):
        before = t.y - t.m
        return max(0.0, 1 - float(before @ t.y / (before.norm() * t.y.norm())))

    def expected(tokens):
        return sum(t.g * t.f.norm() * moved(t) for t in tokens)

    assert_scores(EasyEpScorer()(statistics), seen, expected)


@pytest.mark.parametrize("over_routed_tokens", [False, True])
def test_mone_multiplies_fluctuation_and_gates(seen_and_statistics, over_routed_tokens):
    seen, statistics = seen_and_statistics

    def expected(tokens):
        f_nH = torch.stack([t.f for t in tokens])
        deviation_H = (f_nH - f_nH.mean(dim=0)).square().mean(dim=0).sqrt()
        count = len(tokens) if over_routed_tokens else len(seen[0].x_TH)
        return deviation_H.norm() * sum(t.g for t in tokens) / count

    scores = MoneScorer(over_routed_tokens)(statistics)
    for layer, saw in enumerate(seen):
        for expert in range(saw.layer.expert_count):
            tokens = tokens_of(saw, expert)
            # One token alone has no variance; what is left is rounding under a square root.
            wanted = float(expected(tokens)) if len(tokens) > 1 else 0.0
            assert float(scores.expert_LE[layer, expert]) == pytest.approx(wanted, rel=1e-8, abs=1e-7)


def test_aimer_compares_mean_and_root_mean_square_of_all_weights(seen_statistics):
    statistics, seen = seen_statistics()
    scores = AimerScorer()(statistics)
    for layer, saw in enumerate(seen):
        for expert in range(saw.layer.expert_count):
            weights = torch.cat([matrix.flatten() for matrix in matrices_of(saw, expert)])
            expected = 1 - float(weights.abs().mean() / weights.square().mean().sqrt())
            assert float(scores.expert_LE[layer, expert]) == pytest.approx(expected, rel=1e-10)
            # Normal weights, as random models have, give 1 - sqrt(2 / pi).
            assert expected == pytest.approx(1 - (2 / torch.pi) ** 0.5, abs=0.05)


def test_aimer_of_an_expert_without_weights_is_the_least(seen_statistics):
    statistics, _ = seen_statistics()
    fields = dict(vars(statistics))
    for name in ("gate_row", "up_row", "down_column"):
        for kind in ("norm", "abs_sum"):
            values_LEC = fields[f"{name}_{kind}_LEC"].clone()
            values_LEC[0, 0] = 0
            fields[f"{name}_{kind}_LEC"] = values_LEC
    expert_LE = AimerScorer()(Statistics(**fields)).expert_LE
    assert expert_LE[0, 0] == 0
    assert (expert_LE.flatten()[1:] > 0).all()


def test_expert_weights_are_those_of_the_scorers_of_that_name(seen_statistics):
    statistics, _ = seen_statistics()
    scores = FrequencyScorer()(statistics)
    weighted = with_expert_weights(scores, statistics, alpha=0.8)
    assert weighted.weights is not None
    torch.testing.assert_close(weighted.weights.attribution_LE, AttributionScorer(0.8)(statistics).expert_LE)
    assert torch.equal(weighted.weights.usage_LE, scores.expert_LE)
    assert torch.equal(weighted.weights.router_LE, SoftCountScorer()(statistics).expert_LE)
    assert torch.equal(weighted.weights.removal_LE, RemovalScorer()(statistics).expert_LE)
    assert weighted.expert_LE is scores.expert_LE
    assert scores.weights is None
