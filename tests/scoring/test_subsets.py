"""NAEE: how the search's result becomes scores."""

import pytest
import torch

from moeprune.calibration.statistics import collect_statistics
from moeprune.errors import InputError
from moeprune.scoring.attribution import block_local_loss_L
from moeprune.scoring.subsets import NaeeScorer


def test_naee_scores_are_the_subsets_found_and_the_loss_of_each_removal(tiny_model_64, random_windows):
    scorer = NaeeScorer(exhaustive_up_to=2, alpha=0.8)
    statistics = collect_statistics(tiny_model_64, random_windows, batch_size=5)
    (subsets,) = (one(tiny_model_64, random_windows, 5) for one in scorer.passes)
    scores = scorer(statistics, subsets)
    assert torch.equal(scores.subset_LEE, subsets.keep_LEE)
    assert torch.equal(scores.expert_LE, subsets.removal_loss_LE)
    assert torch.equal(scores.layer_L, block_local_loss_L(statistics, 0.8))
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


def test_impossible_settings_are_refused_before_a_model_is_loaded():
    with pytest.raises(InputError, match="tokens=0"):
        NaeeScorer(tokens=0)
