"""Distances between experts against loops over tokens."""

import dataclasses

import torch
from pass_checks import assert_close_to_scale

from moeprune.calibration.statistics import collect_statistics
from moeprune.scoring.attribution import block_local_loss_L
from moeprune.scoring.merging import HcSmoeScorer, MSmoeScorer


def pairs(count: int) -> list[tuple[int, int]]:
    return torch.cartesian_prod(torch.arange(count), torch.arange(count)).tolist()


@torch.no_grad()
def test_hc_smoe_compares_mean_outputs_over_all_tokens(tiny_model_64, random_windows, seen_layers):
    scorer = HcSmoeScorer()
    (all_tokens,) = (one(tiny_model_64, random_windows, 5) for one in scorer.passes)
    with seen_layers(tiny_model_64) as seen:
        statistics = collect_statistics(tiny_model_64, random_windows, batch_size=5)
    scores = scorer(statistics, all_tokens)
    for layer, saw in enumerate(seen):
        experts = saw.layer.experts
        means = []
        for gate_up, down in zip(experts.gate_up_proj, experts.down_proj, strict=True):
            gate, up = gate_up.chunk(2)
            means.append(sum(down @ (experts.act_fn(gate @ x) * (up @ x)) for x in saw.x_TH) / len(saw.x_TH))
        expected = torch.zeros_like(scores.distance_LEE[layer])
        for first, second in pairs(len(means)):
            expected[first, second] = (means[first] - means[second]).norm()
        assert_close_to_scale(scores.distance_LEE[layer], expected, 1e-11)
    assert torch.equal(scores.expert_LE, statistics.routed_tokens_LE)
    assert torch.equal(scores.layer_L, block_local_loss_L(statistics, 0.9))
    assert scores.channel_LEC is None and not scorer.scores_channels


@torch.no_grad()
def test_m_smoe_compares_router_logits_over_tokens(tiny_model_64, random_windows, seen_layers):
    with seen_layers(tiny_model_64) as seen:
        statistics = collect_statistics(tiny_model_64, random_windows, batch_size=5)
    scores = MSmoeScorer()(statistics)
    for layer, saw in enumerate(seen):
        logits_TE = saw.logits_TE.double()
        expected = torch.zeros_like(scores.distance_LEE[layer])
        for first, second in pairs(saw.layer.expert_count):
            one, other = logits_TE[:, first], logits_TE[:, second]
            expected[first, second] = 1 - one @ other / (one.norm() * other.norm())
        torch.testing.assert_close(scores.distance_LEE[layer], expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(scores.expert_LE, statistics.routed_tokens_LE)
    assert scores.channel_LEC is None


def test_distances_are_symmetric_with_a_zero_diagonal(tiny_model_64, random_windows):
    statistics = collect_statistics(tiny_model_64, random_windows, batch_size=5)
    hc_smoe = HcSmoeScorer()
    for scores in (
        hc_smoe(statistics, *(one(tiny_model_64, random_windows, 5) for one in hc_smoe.passes)),
        MSmoeScorer()(statistics),
    ):
        assert torch.equal(scores.distance_LEE, scores.distance_LEE.transpose(1, 2))
        assert (scores.distance_LEE.diagonal(dim1=1, dim2=2) == 0).all()
        assert (scores.distance_LEE >= 0).all()


def test_logits_that_are_all_zero_are_unlike_every_other(tiny_model_64, random_windows):
    statistics = collect_statistics(tiny_model_64, random_windows, batch_size=5)
    product_LEE = statistics.logit_product_LEE.clone()
    product_LEE[0, 3] = product_LEE[0, :, 3] = 0
    scores = MSmoeScorer()(dataclasses.replace(statistics, logit_product_LEE=product_LEE))
    assert (scores.distance_LEE[0, 3, [0, 1, 2, 4]] == 1).all()
    assert scores.distance_LEE[0, 3, 3] == 0
