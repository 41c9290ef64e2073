"""Votes for cluster representatives, on planted clusters and against clusters cut by scipy."""

import dataclasses

import pytest
import torch
from scipy.cluster.hierarchy import fcluster, linkage

from moeprune.calibration.all_tokens import AllTokens
from moeprune.calibration.statistics import collect_statistics
from moeprune.errors import InputError
from moeprune.scoring.c_prune import CPruneScorer


@pytest.fixture
def statistics(build_model, random_windows):
    """Of a model of two layers of 8 experts."""
    return collect_statistics(build_model("qwen3_renormalised", torch.float64), random_windows, batch_size=5)


def random_outputs(groups: int, *, seed: int = 0, scale_L: tuple[float, ...] = (1.0, 1.0)) -> AllTokens:
    sums = torch.randn(2, 8, groups, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return AllTokens(torch.full((groups,), 2.0, dtype=torch.float64), sums * torch.tensor(scale_L).view(-1, 1, 1, 1))


def test_every_count_keeps_so_many_experts(statistics):
    scores = CPruneScorer()(statistics, random_outputs(5))
    assert scores.subset_LEE.sum(dim=2).tolist() == [list(range(1, 9))] * 2
    assert scores.channel_LEC is None and not CPruneScorer.scores_channels


def test_an_expert_scores_for_how_many_sizes_it_is_kept(statistics):
    scores = CPruneScorer()(statistics, random_outputs(5))
    for layer in range(2):
        sizes = [{e for e in range(8) if scores.subset_LEE[layer, k, e]} for k in range(8)]
        expected = [float(sum(expert in kept for kept in sizes)) for expert in range(8)]
        assert scores.expert_LE[layer].tolist() == expected
    assert scores.expert_LE.dtype == torch.float64


def test_clustering_across_layers_changes_the_expert_scores_alone(statistics):
    outputs = random_outputs(3)
    inside, across = CPruneScorer()(statistics, outputs), CPruneScorer(across_layers=True)(statistics, outputs)
    assert torch.equal(inside.subset_LEE, across.subset_LEE)
    assert torch.equal(inside.layer_L, across.layer_L)
    assert not torch.equal(inside.expert_LE, across.expert_LE)


@pytest.mark.parametrize("seed", range(4))
def test_one_group_keeps_one_expert_of_each_ward_cluster(statistics, seed):
    outputs = random_outputs(1, seed=seed)
    scores = CPruneScorer()(statistics, outputs)
    for layer in range(2):
        tree = linkage(outputs.mean_output_LEH[layer].numpy(), method="ward")
        for count in range(1, 9):
            clusters = fcluster(tree, count, criterion="maxclust")
            kept = scores.subset_LEE[layer, count - 1].nonzero().flatten().tolist()
            assert sorted(clusters[kept]) == list(range(1, count + 1))


def test_the_middle_of_a_planted_cluster_represents_it(statistics):
    """Three on a line around 0 and five around 100: the middle one of each stays when two do."""
    places = torch.tensor([-1.0, 0.1, 1.0, 98.0, 99.0, 100.1, 101.0, 102.0], dtype=torch.float64)
    sums = places.view(1, 8, 1, 1).expand(2, 8, 3, 1).contiguous()
    scores = CPruneScorer()(statistics, AllTokens(torch.ones(3, dtype=torch.float64), sums))
    assert scores.subset_LEE[:, 1].nonzero()[:, 1].tolist() == [1, 5, 1, 5]


def test_most_groups_win_the_vote(statistics):
    outputs = random_outputs(3, seed=1)
    single = [CPruneScorer()(statistics, one_group(outputs, group)).subset_LEE for group in range(3)]
    together = CPruneScorer()(statistics, outputs).subset_LEE
    votes_LEE = sum(subset.int() for subset in single)
    for layer in range(2):
        for count in range(1, 9):
            chosen = together[layer, count - 1]
            votes_E = votes_LEE[layer, count - 1]
            assert votes_E[chosen].min() >= votes_E[~chosen].max() if count < 8 else chosen.all()


def one_group(outputs: AllTokens, group: int) -> AllTokens:
    return AllTokens(outputs.tokens_G[group : group + 1], outputs.output_sum_LEGH[:, :, group : group + 1].contiguous())


def test_the_global_step_retires_copies_before_single_experts(statistics):
    """Layer 0 holds four pairs of near copies, layer 1 eight unlike experts: the less used copies go first."""
    outputs = random_outputs(2)
    sums = outputs.output_sum_LEGH.clone()
    sums[0, 4:] = sums[0, :4] + 1e-3
    expert_LE = CPruneScorer(across_layers=True)(statistics, AllTokens(outputs.tokens_G, sums)).expert_LE
    tokens_E = statistics.routed_tokens_LE[0]
    less_used = {expert if tokens_E[expert] < tokens_E[expert + 4] else expert + 4 for expert in range(4)}
    assert set(expert_LE.flatten().argsort()[:4].tolist()) == less_used


def test_the_size_of_a_layers_outputs_does_not_count(statistics):
    scorer = CPruneScorer(across_layers=True)
    plain = scorer(statistics, random_outputs(3))
    scaled = scorer(statistics, random_outputs(3, scale_L=(1.0, 64.0)))
    assert torch.equal(plain.subset_LEE, scaled.subset_LEE)
    assert torch.equal(plain.expert_LE, scaled.expert_LE)


def test_a_group_of_padding_only_has_no_vote(statistics):
    outputs = random_outputs(3)
    tokens_G = torch.cat([outputs.tokens_G, torch.zeros(1, dtype=torch.float64)])
    sums = torch.cat([outputs.output_sum_LEGH, torch.zeros(2, 8, 1, 6, dtype=torch.float64)], dim=2)
    more = CPruneScorer()(statistics, AllTokens(tokens_G, sums))
    assert torch.equal(more.subset_LEE, CPruneScorer()(statistics, outputs).subset_LEE)


@pytest.mark.parametrize("across_layers", [False, True])
def test_permuting_experts_permutes_the_choice(statistics, across_layers):
    scorer, outputs = CPruneScorer(across_layers=across_layers), random_outputs(3)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(5))
    before = scorer(statistics, outputs)
    permuted = dataclasses.replace(statistics, routed_tokens_LE=statistics.routed_tokens_LE[:, order])
    after = scorer(permuted, AllTokens(outputs.tokens_G, outputs.output_sum_LEGH[:, order]))
    assert torch.equal(after.subset_LEE, before.subset_LEE[:, :, order])
    assert torch.equal(after.expert_LE, before.expert_LE[:, order])


def test_no_group_is_refused():
    with pytest.raises(InputError, match="groups=0"):
        CPruneScorer(groups=0)
