"""NAEE and MoE-I2: how the search's result becomes scores."""

import pytest
import torch

from moeprune.calibration.expert_subsets import ExpertSubsetPass
from moeprune.calibration.statistics import collect_statistics
from moeprune.calibration.subset_search import GeneticSearch
from moeprune.errors import InputError
from moeprune.scoring.attribution import block_local_loss_L
from moeprune.scoring.subsets import MoeI2Scorer, NaeeScorer


@pytest.mark.parametrize("kind", [NaeeScorer, MoeI2Scorer])
def test_scores_are_the_subsets_found_and_the_loss_of_each_removal(kind, tiny_model_64, random_windows):
    scorer = kind(exhaustive_up_to=2)
    statistics = collect_statistics(tiny_model_64, random_windows, batch_size=5)
    (subsets,) = (one(tiny_model_64, random_windows, 5) for one in scorer.passes)
    scores = scorer(statistics, subsets)
    assert torch.equal(scores.subset_LEE, subsets.keep_LEE)
    assert torch.equal(scores.expert_LE, subsets.removal_loss_LE)
    assert torch.equal(scores.layer_L, block_local_loss_L(statistics, 0.9))
    assert scores.channel_LEC is None and not scorer.scores_channels


def test_removing_an_expert_that_no_token_reaches_costs_nothing(build_model, random_windows):
    """Its router row is far below the others, so that it gets no softmax mass either."""
    model = build_model("qwen3_plain_gates", torch.float64)
    router = model.base_model.layers[0].mlp.gate
    router.register_forward_pre_hook(lambda _module, inputs: (inputs[0].abs(),))
    with torch.no_grad():
        router.weight[2] = -100
    scorer = NaeeScorer(exhaustive_up_to=2)
    (subsets,) = (one(model, random_windows, 5) for one in scorer.passes)
    assert subsets.removal_loss_LE[0, 2] < 1e-5
    assert (subsets.removal_loss_LE[0, [0, 1, 3]] > 1e-3).all()


def test_moe_i2_breeds_its_subsets_with_its_own_settings():
    scorer = MoeI2Scorer(tokens=9, exhaustive_up_to=4, population=5, generations=6, seed=7)
    assert scorer.passes == (ExpertSubsetPass(9, 4, 7, GeneticSearch(5, 6, 7)),)


def test_impossible_settings_are_refused_before_a_model_is_loaded():
    with pytest.raises(InputError, match="tokens=0"):
        NaeeScorer(tokens=0)
    with pytest.raises(InputError, match="generations=0"):
        MoeI2Scorer(generations=0)
