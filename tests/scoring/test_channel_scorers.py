"""Channel scorers against loops over tokens, in float64."""

import pytest
import torch
from token_loops import matrices_of, tokens_of

from moeprune.calibration.statistics import Statistics
from moeprune.errors import InputError
from moeprune.scoring.activation import ActivationScorer
from moeprune.scoring.attribution import AttributionScorer
from moeprune.scoring.camera import CameraScorer
from moeprune.scoring.flap import FlapScorer
from moeprune.scoring.magnitude import MagnitudeScorer
from moeprune.scoring.random_scores import RandomScorer
from moeprune.scoring.removal import RemovalScorer
from moeprune.scoring.wanda import WandaScorer

EXACT = {"rtol": 1e-10, "atol": 1e-12}


def each_expert(seen):
    """(layer, expert, its routed tokens, its three matrices) of every expert."""
    for layer, saw in enumerate(seen):
        for expert in range(saw.layer.expert_count):
            yield layer, expert, tokens_of(saw, expert), matrices_of(saw, expert)


def root_mean_square(rows):
    return sum(row**2 for row in rows).div(len(rows)).sqrt()


def norm(rows):
    return sum(row**2 for row in rows) ** 0.5


def test_activation_is_the_mean_of_three_root_mean_squares(seen_and_statistics):
    seen, statistics = seen_and_statistics
    scores = ActivationScorer()(statistics)
    for layer, expert, tokens, _ in each_expert(seen):
        expected = torch.zeros_like(scores.channel_LEC[layer, expert])
        if tokens:
            for rows in ([t.h_C for t in tokens], [t.gate_C for t in tokens], [t.up_C for t in tokens]):
                expected += root_mean_square(rows) / 3
        torch.testing.assert_close(scores.channel_LEC[layer, expert], expected, **EXACT)


@pytest.mark.parametrize("inputs", [False, True])
def test_wanda_sums_the_scores_of_single_weights(seen_and_statistics, inputs):
    """|W_ij| ||x_j|| of every weight, summed over a channel's column, and over its two rows."""
    seen, statistics = seen_and_statistics
    scores = WandaScorer(inputs=inputs)(statistics)
    for layer, expert, tokens, (gate_CH, up_CH, down_HC) in each_expert(seen):
        if not tokens:
            assert (scores.channel_LEC[layer, expert] == 0).all()
            continue
        h_norm_C, x_norm_H = norm([t.h_C for t in tokens]), norm([t.x for t in tokens])
        for channel in range(len(gate_CH)):
            expected = sum(abs(float(w)) * float(h_norm_C[channel]) for w in down_HC[:, channel])
            if inputs:
                for row in (gate_CH[channel], up_CH[channel]):
                    expected += sum(abs(float(w)) * float(n) for w, n in zip(row, x_norm_H, strict=True))
                expected /= 3
            assert float(scores.channel_LEC[layer, expert, channel]) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("peak_weight", [0.0, 0.9, 1.0])
def test_camera_mixes_the_sum_and_the_largest_energy_of_a_channel(seen_and_statistics, peak_weight):
    seen, statistics = seen_and_statistics
    scores = CameraScorer(peak_weight=peak_weight)(statistics)
    for layer, expert, tokens, (_, _, down_HC) in each_expert(seen):
        expected = torch.zeros_like(scores.channel_LEC[layer, expert])
        for channel in range(len(expected)):
            energies = [float((t.g * t.h_C[channel] * down_HC[:, channel]).square().sum()) for t in tokens]
            if energies:
                expected[channel] = (1 - peak_weight) * sum(energies) + peak_weight * max(energies)
        torch.testing.assert_close(scores.channel_LEC[layer, expert], expected, **EXACT)
    torch.testing.assert_close(scores.expert_LE, scores.channel_LEC.sum(dim=-1))


@pytest.mark.parametrize("peak_weight", [-0.1, 1.1])
def test_camera_refuses_a_peak_weight_that_is_no_share(peak_weight):
    with pytest.raises(InputError, match=f"peak_weight={peak_weight}"):
        CameraScorer(peak_weight=peak_weight)


def test_flap_standardises_the_weighted_variance_of_each_layer(seen_and_statistics):
    seen, statistics = seen_and_statistics
    scores = FlapScorer()(statistics)
    fluctuation_LEC = torch.zeros_like(scores.channel_LEC)
    for layer, expert, tokens, (_, _, down_HC) in each_expert(seen):
        if tokens:
            h_nC = torch.stack([t.h_C for t in tokens])
            fluctuation_LEC[layer, expert] = h_nC.var(dim=0, correction=0) * down_HC.square().sum(dim=0)
    standardised_LEC = torch.stack([(each - each.mean()) / each.std() for each in fluctuation_LEC])
    assert scores.channel_LEC.min() == 0
    shift_LEC = standardised_LEC - scores.channel_LEC
    torch.testing.assert_close(shift_LEC, torch.full_like(shift_LEC, float(standardised_LEC.min())), **EXACT)


def test_flap_of_a_layer_without_any_fluctuation_is_flat(seen_statistics):
    statistics, _ = seen_statistics()
    still = {name: torch.zeros_like(statistics.channel_sum_LEC) for name in ("channel_sum_LEC", "channel_sq_sum_LEC")}
    scores = FlapScorer()(Statistics(**{**vars(statistics), **still}))
    assert (scores.channel_LEC == 0).all()


def test_magnitude_is_the_mean_of_three_norms(seen_and_statistics):
    seen, statistics = seen_and_statistics
    scores = MagnitudeScorer()(statistics)
    for layer, expert, _, (gate_CH, up_CH, down_HC) in each_expert(seen):
        expected = (gate_CH.norm(dim=1) + up_CH.norm(dim=1) + down_HC.norm(dim=0)) / 3
        torch.testing.assert_close(scores.channel_LEC[layer, expert], expected, **EXACT)


def test_removal_of_a_channel_from_the_intact_model(seen_and_statistics):
    """q ||g h w||^2, token by token; experts likewise with their whole output."""
    seen, statistics = seen_and_statistics
    scores = RemovalScorer()(statistics)
    for layer, expert, tokens, (_, _, down_HC) in each_expert(seen):
        expected = torch.zeros_like(scores.channel_LEC[layer, expert])
        for t in tokens:
            expected += t.q * (t.g * t.h_C * down_HC).square().sum(dim=0)
        torch.testing.assert_close(scores.channel_LEC[layer, expert], expected, **EXACT)
        whole = sum(float(t.q * (t.g * t.f).square().sum()) for t in tokens)
        assert float(scores.expert_LE[layer, expert]) == pytest.approx(whole, rel=1e-10)


@pytest.mark.parametrize("alpha", [0.9, 0.6])
def test_second_order_is_attribution_plus_removal_of_what_alpha_left(seen_and_statistics, alpha):
    _, statistics = seen_and_statistics
    second, first = RemovalScorer(alpha, intact=False)(statistics), AttributionScorer(alpha)(statistics)
    removal = RemovalScorer()(statistics)
    torch.testing.assert_close(second.channel_LEC, first.channel_LEC + alpha**2 * removal.channel_LEC)
    torch.testing.assert_close(second.expert_LE, first.expert_LE + alpha**2 * removal.expert_LE)


def test_usage_weighs_attribution_by_the_share_of_tokens(seen_and_statistics):
    seen, statistics = seen_and_statistics
    plain, weighted = AttributionScorer()(statistics), AttributionScorer(usage=True)(statistics)
    for layer, expert, tokens, _ in each_expert(seen):
        share = len(tokens) / len(seen[layer].x_TH)
        torch.testing.assert_close(weighted.channel_LEC[layer, expert], share * plain.channel_LEC[layer, expert])
        torch.testing.assert_close(weighted.expert_LE[layer, expert], share * plain.expert_LE[layer, expert])


@pytest.mark.parametrize("scorer", [ActivationScorer(), WandaScorer(), FlapScorer(), MagnitudeScorer()])
def test_metrics_that_do_not_add_up_score_experts_and_layers_by_attribution(seen_statistics, scorer):
    statistics, _ = seen_statistics()
    attribution, scores = AttributionScorer()(statistics), scorer(statistics)
    assert torch.equal(scores.expert_LE, attribution.expert_LE)
    assert torch.equal(scores.layer_L, attribution.layer_L)


def test_random_scores_follow_the_seed_alone(seen_statistics, few_tokens):
    statistics, _ = seen_statistics()
    scores, again, other = RandomScorer(3)(statistics), RandomScorer(3)(statistics), RandomScorer(4)(statistics)
    assert torch.equal(scores.channel_LEC, again.channel_LEC)
    assert torch.equal(scores.expert_LE, again.expert_LE)
    assert not torch.equal(scores.channel_LEC, other.channel_LEC)
    assert not torch.equal(scores.expert_LE, other.expert_LE)
    assert torch.equal(scores.channel_LEC, RandomScorer(3)(seen_statistics(few_tokens)[0]).channel_LEC)
    assert 0 <= scores.channel_LEC.min() < 0.05 < 0.95 < scores.channel_LEC.max() <= 1
