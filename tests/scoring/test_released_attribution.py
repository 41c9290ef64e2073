"""Attribution with the released code's options: how the pass' result becomes scores."""

import pytest
import torch
from pass_checks import assert_close_to_scale

from moeprune.calibration.statistics import collect_statistics
from moeprune.errors import InputError
from moeprune.scoring.attribution import AttributionScorer
from moeprune.scoring.released_attribution import ReleasedAttributionScorer


@pytest.mark.parametrize("usage", [False, True])
def test_without_ema_and_clipping_it_is_attribution(tiny_model_64, random_windows, usage):
    statistics = collect_statistics(tiny_model_64, random_windows, batch_size=2)
    scorer = ReleasedAttributionScorer(ema=None, clip_quantile=None, usage=usage)
    scores = scorer(statistics, *(one(tiny_model_64, random_windows, 2) for one in scorer.passes))
    expected = AttributionScorer(usage=usage)(statistics)
    assert_close_to_scale(scores.channel_LEC, expected.channel_LEC, 1e-10)
    assert_close_to_scale(scores.expert_LE, expected.expert_LE, 1e-10)
    assert torch.equal(scores.layer_L, expected.layer_L)


def test_with_its_defaults_it_is_another_score(tiny_model_64, random_windows):
    statistics = collect_statistics(tiny_model_64, random_windows, batch_size=2)
    scorer = ReleasedAttributionScorer()
    scores = scorer(statistics, *(one(tiny_model_64, random_windows, 2) for one in scorer.passes))
    assert not torch.allclose(scores.expert_LE, AttributionScorer(usage=True)(statistics).expert_LE, rtol=0.01)


def test_impossible_settings_are_refused_before_a_model_is_loaded():
    with pytest.raises(InputError, match=r"ema=1\.5"):
        ReleasedAttributionScorer(ema=1.5)
