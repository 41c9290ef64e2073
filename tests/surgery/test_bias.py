"""The mean of what is removed, against loops over tokens and dense models with the same means put in."""

import logging
from dataclasses import replace

import pytest
import torch
from surgery_plans import (
    everything,
    mask_channels,
    plan_of,
    random_channels,
    random_channels_and_empty_experts,
    removed_channels,
    without_experts,
)

from moeprune.calibration.statistics import collect_statistics
from moeprune.errors import InputError
from moeprune.models.adapter import moe_layers
from moeprune.models.layers.walk import run_through
from moeprune.surgery.bias import MeanBias
from moeprune.surgery.prune import prune
from moeprune.types import Merge


@torch.no_grad()
def add_to_experts(model, biases_LEH) -> None:
    """Add ``sum_e g_te bias_e`` to what the dense experts compute, token by token."""
    for layer, bias_EH in zip(moe_layers(model), biases_LEH, strict=True):

        def add_bias(_module, inputs, output, bias_EH=bias_EH):
            _, experts_TK, gates_TK = inputs
            added = torch.zeros_like(output)
            for token in range(len(output)):
                for gate, expert in zip(gates_TK[token], experts_TK[token].tolist(), strict=True):
                    added[token] += gate * bias_EH[expert]
            return output + added

        layer.experts.register_forward_hook(add_bias)


@torch.no_grad()
def test_the_bias_is_the_mean_of_what_the_removed_channels_gave(
    tiny_model_64, statistics_64, many_windows, routed_tokens
):
    plan = plan_of(tiny_model_64, random_channels_and_empty_experts)
    seen = routed_tokens(tiny_model_64)
    downs = [layer.experts.down_proj.clone() for layer in moe_layers(tiny_model_64)]
    run_through(MeanBias("keep_row")(tiny_model_64, plan, statistics_64, many_windows, 16))
    for index, layer in enumerate(moe_layers(tiny_model_64)):
        for expert, (_, _, h_nC, _, _) in enumerate(seen[index]):
            removed_C = removed_channels(plan.kept[index][expert], plan.width)
            missing_nH = torch.stack([downs[index][expert][:, removed_C] @ h_C[removed_C] for h_C in h_nC])
            torch.testing.assert_close(layer.experts.bias_EH[expert], missing_nH.mean(dim=0), rtol=1e-9, atol=1e-12)


@torch.no_grad()
def test_a_sliced_model_with_biases_equals_the_masked_one(build_model, model_name, statistics_64, many_windows):
    masked, sliced = (build_model(model_name, torch.float64) for _ in range(2))
    plan = plan_of(masked, random_channels_and_empty_experts)
    run_through(MeanBias("keep_row")(sliced, plan, statistics_64, many_windows, 16))
    mask_channels(masked, plan)
    add_to_experts(masked, [layer.experts.bias_EH for layer in moe_layers(sliced)])
    ids = many_windows.input_ids_NT[:4]
    expected = masked(ids).logits
    torch.testing.assert_close(sliced(ids).logits, expected, rtol=1e-10, atol=1e-10)
    plain = prune(build_model(model_name, torch.float64), plan, "keep_row")
    assert (plain(ids).logits - expected).abs().max() > 0.01


@torch.no_grad()
def test_an_expert_without_channels_becomes_its_mean_output(
    build_model, model_name, statistics_64, many_windows, routed_tokens
):
    """MoNE: the router keeps the row, and the expert answers every token with the same vector."""
    dense, pruned = (build_model(model_name, torch.float64) for _ in range(2))
    gone = [(0, 1), (0, 2), (1, 0)]
    mean_LEH = []
    for index, experts in enumerate(routed_tokens(dense)):
        means = [
            f_nH.mean(dim=0) if (index, e) in gone else torch.zeros(32) for e, (_, _, _, f_nH, _) in enumerate(experts)
        ]
        mean_LEH.append(means)
    plan = plan_of(dense, without_experts(*gone))
    mask_channels(dense, plan)
    add_to_experts(dense, mean_LEH)
    run_through(MeanBias("keep_row")(pruned, plan, statistics_64, many_windows, 16))
    ids = many_windows.input_ids_NT[:4]
    torch.testing.assert_close(pruned(ids).logits, dense(ids).logits, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_biases_of_removed_rows_go_with_them(tiny_model_64, statistics_64, many_windows, build_model, model_name):
    kept_rows = build_model(model_name, torch.float64)
    plan = plan_of(tiny_model_64, random_channels_and_empty_experts)
    run_through(MeanBias("keep_row")(kept_rows, plan, statistics_64, many_windows, 16))
    run_through(MeanBias("remove_row")(tiny_model_64, plan, statistics_64, many_windows, 16))
    for removed, kept, channels in zip(moe_layers(tiny_model_64), moe_layers(kept_rows), plan.kept, strict=True):
        live = [expert for expert, kept_C in enumerate(channels) if len(kept_C)]
        assert removed.expert_count == len(live) < kept.expert_count
        assert torch.equal(removed.experts.bias_EH, kept.experts.bias_EH[live])


@torch.no_grad()
def test_no_bias_is_stored_where_no_kept_row_lost_channels(tiny_model_64, statistics_64, many_windows):
    plan = plan_of(tiny_model_64, without_experts((0, 1)))
    run_through(MeanBias()(tiny_model_64, plan, statistics_64, many_windows, 16))
    assert all(layer.experts.bias_EH is None for layer in moe_layers(tiny_model_64))


@torch.no_grad()
def test_an_expert_that_no_token_reached_has_no_bias_and_a_warning(tiny_model_64, statistics_64, many_windows, caplog):
    routed_tokens_LE, channel_sum_LEC = statistics_64.routed_tokens_LE.clone(), statistics_64.channel_sum_LEC.clone()
    routed_tokens_LE[0, 3], channel_sum_LEC[0, 3] = 0, 0
    unseen = replace(statistics_64, routed_tokens_LE=routed_tokens_LE, channel_sum_LEC=channel_sum_LEC)
    plan = plan_of(tiny_model_64, lambda _layer, _expert, width: torch.arange(width // 2))
    with caplog.at_level(logging.WARNING):
        run_through(MeanBias()(tiny_model_64, plan, unseen, many_windows, 16))
    bias_EH = moe_layers(tiny_model_64)[0].experts.bias_EH
    assert not bias_EH[3].any() and bias_EH[2].any()
    assert "1 experts lose channels but got no calibration token" in caplog.text


def test_biases_keep_the_dtype_of_the_weights(tiny_model, many_windows):
    statistics = collect_statistics(tiny_model, many_windows, batch_size=40)
    model = tiny_model.bfloat16()
    run_through(MeanBias()(model, plan_of(model, random_channels), statistics, many_windows, 16))
    assert moe_layers(model)[0].experts.bias_EH.dtype == torch.bfloat16


def test_a_plan_that_merges_is_refused_and_nothing_is_cut(tiny_model_64, statistics_64, many_windows):
    experts = moe_layers(tiny_model_64)[0].expert_count
    merge = Merge(torch.arange(experts).repeat(2, 1), torch.ones(2, experts, dtype=torch.float64), False)
    plan = plan_of(tiny_model_64, everything, merge)
    before = set(tiny_model_64.state_dict())
    with pytest.raises(InputError, match="The plan merges experts"):
        run_through(MeanBias()(tiny_model_64, plan, statistics_64, many_windows, 16))
    assert set(tiny_model_64.state_dict()) == before
