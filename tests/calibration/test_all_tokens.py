"""All experts on all tokens, against a loop over tokens."""

import pytest
import torch
from pass_checks import assert_close_to_scale, left_as_it_was, padded

from moeprune.calibration.all_tokens import AllTokens, AllTokensPass
from moeprune.errors import InputError
from moeprune.models.adapter import moe_layers


@pytest.mark.parametrize(("groups", "group_of_window"), [(1, [0] * 5), (2, [0, 0, 0, 1, 1]), (9, [0, 1, 2, 3, 4])])
@torch.no_grad()
def test_output_sums_equal_a_loop(tiny_model_64, random_windows, seen_layers, groups, group_of_window):
    with seen_layers(tiny_model_64) as seen:
        found = AllTokensPass(groups)(tiny_model_64, random_windows, 5)
    length = random_windows.input_ids_NT.shape[1]
    for layer, saw in enumerate(seen):
        experts = saw.layer.experts
        expected = torch.zeros_like(found.output_sum_LEGH[layer])
        for expert in range(saw.layer.expert_count):
            gate_CH, up_CH = experts.gate_up_proj[expert].chunk(2)
            for token, x in enumerate(saw.x_TH):
                h = experts.act_fn(gate_CH @ x) * (up_CH @ x)
                expected[expert, group_of_window[token // length]] += experts.down_proj[expert] @ h
        assert_close_to_scale(found.output_sum_LEGH[layer], expected, 1e-11)
    assert found.tokens_G.tolist() == [length * group_of_window.count(group) for group in sorted({*group_of_window})]


def test_padding_and_batch_size_do_not_count(tiny_model_64, random_windows):
    plain = AllTokensPass(2)(tiny_model_64, random_windows, 5)
    for other in (
        AllTokensPass(2)(tiny_model_64, padded(random_windows, 6), 5),
        AllTokensPass(2)(tiny_model_64, random_windows, 2),
    ):
        assert_close_to_scale(other.output_sum_LEGH, plain.output_sum_LEGH, 1e-5)
        assert torch.equal(other.tokens_G, plain.tokens_G)


def test_the_mean_output_weighs_groups_by_their_tokens():
    sums = torch.tensor([[[[2.0, 4.0], [6.0, 8.0]]]], dtype=torch.float64)  # one layer, one expert, two groups
    found = AllTokens(torch.tensor([1.0, 3.0], dtype=torch.float64), sums)
    assert found.mean_output_LEH.tolist() == [[[2.0, 3.0]]]


def test_the_model_is_left_as_it_was(tiny_model, random_windows):
    with left_as_it_was(tiny_model, random_windows.input_ids_NT):
        AllTokensPass()(tiny_model, random_windows, 2)


def test_all_experts_count_not_only_routed_ones(tiny_model_64, random_windows):
    found = AllTokensPass()(tiny_model_64, random_windows, 5)
    assert (found.output_sum_LEGH.abs().sum(dim=-1) > 0).all()
    assert found.output_sum_LEGH.shape[1] == moe_layers(tiny_model_64)[0].expert_count


def test_it_survives_a_round_trip(tmp_path):
    found = AllTokens(torch.rand(3, dtype=torch.float64), torch.rand(2, 4, 3, 5, dtype=torch.float64))
    found.save(tmp_path / "all_tokens.safetensors")
    loaded = AllTokensPass().load(tmp_path / "all_tokens.safetensors")
    assert torch.equal(loaded.tokens_G, found.tokens_G)
    assert torch.equal(loaded.output_sum_LEGH, found.output_sum_LEGH)


def test_no_group_is_refused():
    with pytest.raises(InputError, match="groups=0"):
        AllTokensPass(groups=0)
