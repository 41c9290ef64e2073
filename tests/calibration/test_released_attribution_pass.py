"""Attribution as the released code accumulates it, against loops over batches and tokens."""

import pytest
import torch
from dense_experts import trace_block_local
from pass_checks import assert_close_to_scale, left_as_it_was, padded

from moeprune.calibration.released_attribution import ReleasedAttribution, ReleasedAttributionPass
from moeprune.calibration.statistics import collect_statistics
from moeprune.calibration.windows import TokenWindows
from moeprune.errors import InputError
from moeprune.scoring.attribution import attribution_LEC


def clipped_sum_C(contribution_nC, quantile):
    """Each channel's contributions, clipped in size at their own quantile; 0 where there is none."""
    sums = []
    for contributions_n in contribution_nC.T:
        limit = torch.quantile(contributions_n.abs(), quantile) if len(contributions_n) else 0
        sums.append(float(sum(torch.sign(value) * min(value.abs(), limit) for value in contributions_n)))
    return torch.tensor(sums, dtype=torch.float64)


def one_batch_EC(saw, settings):
    traced = trace_block_local(saw, settings.alpha)
    contribution_TEC = -traced.h_TEC * traced.dh_TEC
    experts = range(saw.layer.expert_count)
    rows = [contribution_TEC[traced.routed_TE[:, expert], expert] for expert in experts]
    return torch.stack([clipped_sum_C(row_nC, settings.clip_quantile) for row_nC in rows])


def loop_over_batches(model, windows, seen_layers, batch_size, settings):
    """The pass by its definition: batch by batch, layer by layer, expert by expert."""
    average_LEC = None
    for input_ids_BT, mask_BT in windows.batches(batch_size):
        with seen_layers(model) as seen:
            model.base_model(input_ids_BT, attention_mask=mask_BT)
        batch_LEC = torch.stack([one_batch_EC(saw, settings) for saw in seen])
        before_LEC = batch_LEC if average_LEC is None else average_LEC
        average_LEC = settings.ema * before_LEC + (1 - settings.ema) * batch_LEC
    return average_LEC


def test_without_options_it_is_the_closed_form(tiny_model_64, random_windows):
    plain = ReleasedAttributionPass(ema=None, clip_quantile=None, alpha=0.8)(tiny_model_64, random_windows, 2)
    expected = attribution_LEC(collect_statistics(tiny_model_64, random_windows, batch_size=2), 0.8)
    assert_close_to_scale(plain.attribution_LEC, expected, 1e-10)


@pytest.mark.parametrize("settings", [ReleasedAttributionPass(), ReleasedAttributionPass(0.5, 0.6, 0.8)])
def test_it_equals_a_loop_over_batches_and_tokens(tiny_model_64, random_windows, seen_layers, settings):
    """Five windows in batches of two: the last batch is smaller, and some experts get no token in it."""
    actual = settings(tiny_model_64, random_windows, 2).attribution_LEC
    assert_close_to_scale(actual, loop_over_batches(tiny_model_64, random_windows, seen_layers, 2, settings), 1e-10)


def test_half_precision_that_would_lose_the_gradients_is_refused(tiny_model, random_windows):
    """They are of the size of q, which float16 does not reach where the hidden states of a token are large."""
    with pytest.raises(InputError, match=r"float16(.|\n)*compute_dtype=bfloat16"):
        ReleasedAttributionPass()(tiny_model.half(), random_windows, 5)


def test_a_quantile_of_one_clips_nothing_and_a_low_one_does(tiny_model_64, random_windows):
    def attribution(quantile):
        return ReleasedAttributionPass(None, quantile)(tiny_model_64, random_windows, 5).attribution_LEC

    assert_close_to_scale(attribution(1.0), attribution(None), 1e-12)
    assert not torch.allclose(attribution(0.5), attribution(None), rtol=1e-2)


def test_padding_never_counts(tiny_model_64, random_windows):
    """Neither in the sums nor in the quantiles."""
    plain = ReleasedAttributionPass(clip_quantile=0.7)(tiny_model_64, random_windows, 5).attribution_LEC
    more = ReleasedAttributionPass(clip_quantile=0.7)(tiny_model_64, padded(random_windows, 6), 5).attribution_LEC
    assert_close_to_scale(more, plain, 1e-5)


def test_an_expert_with_padding_only_contributes_nothing(tiny_model_64, random_windows):
    mask_NT = torch.zeros_like(random_windows.mask_NT)
    mask_NT[:, :1] = 1
    windows = TokenWindows(random_windows.input_ids_NT, mask_NT)
    attribution = ReleasedAttributionPass()(tiny_model_64, windows, 5).attribution_LEC
    unreached_LE = collect_statistics(tiny_model_64, windows, batch_size=5).routed_tokens_LE == 0
    assert unreached_LE.any()
    assert (attribution[unreached_LE] == 0).all()


def test_the_model_is_left_as_it_was(tiny_model, random_windows):
    with left_as_it_was(tiny_model, random_windows.input_ids_NT):
        ReleasedAttributionPass()(tiny_model, random_windows, 2)


def test_it_survives_a_round_trip(tmp_path):
    attribution = ReleasedAttribution(torch.rand(2, 3, 4, dtype=torch.float64))
    attribution.save(tmp_path / "attribution.safetensors")
    loaded = ReleasedAttributionPass().load(tmp_path / "attribution.safetensors")
    assert torch.equal(loaded.attribution_LEC, attribution.attribution_LEC)


@pytest.mark.parametrize("settings", [{"ema": 1.0}, {"ema": -0.1}, {"clip_quantile": 0.0}, {"clip_quantile": 1.1}])
def test_impossible_settings_are_refused(settings):
    with pytest.raises(InputError, match="is not possible"):
        ReleasedAttributionPass(**settings)
