"""The refitted down projection against torch's least squares on stacked rows, token by token."""

import logging

import pytest
import torch
from surgery_plans import (
    everything,
    gate_up_of,
    mask_channels,
    plan_of,
    random_channels,
    random_channels_and_empty_experts,
    without_experts,
)

from moeprune.errors import InputError, NumericalError
from moeprune.models.adapter import moe_layers
from moeprune.models.layers.streaming import stream_dense
from moeprune.models.layers.walk import run_through
from moeprune.surgery import refit
from moeprune.surgery.prune import prune
from moeprune.surgery.refit import Refit
from moeprune.types import Merge, Plan


def partly_kept(plan):
    """(layer, expert, its slot among the experts with channels, kept channels) of experts that lose some channels."""
    for index, kept in enumerate(plan.kept):
        live = [expert for expert, channels in enumerate(kept) if len(channels)]
        for slot, expert in enumerate(live):
            if len(kept[expert]) < plan.width:
                yield index, expert, slot, kept[expert]


def stacked_rows(tokens, down_HC):
    """Rows ``sqrt(q) g h`` [n, C] of the tokens of one expert, and ``sqrt(q) g W h`` [n, H]."""
    _, g_n, h_nC, _, q_n = tokens
    rows_nC = torch.stack([q.sqrt() * g * h_C for q, g, h_C in zip(q_n, g_n, h_nC, strict=True)])
    return rows_nC, rows_nC @ down_HC.T


def weighted_error(rows_nC, target_nH, kept_S, down_HS):
    return (target_nH - rows_nC[:, kept_S] @ down_HS.T).square().sum()


@pytest.fixture
def dense(tiny_model_64, routed_tokens):
    """The tokens of each expert of the dense model, and its down projections."""
    downs = [layer.experts.down_proj.detach().clone() for layer in moe_layers(tiny_model_64)]
    return routed_tokens(tiny_model_64), downs


@pytest.mark.parametrize("ridge", [0.0, 0.01, 3.0])
@torch.no_grad()
def test_the_refit_is_the_least_squares_solution(dense, tiny_model_64, statistics_64, many_windows, ridge):
    """With a ridge, rows ``sqrt(lambda) I`` whose targets are the plain cut stand for the penalty."""
    seen, downs = dense
    plan = plan_of(tiny_model_64, random_channels_and_empty_experts)
    run_through(Refit(ridge)(tiny_model_64, plan, statistics_64, many_windows, 16))
    layers = moe_layers(tiny_model_64)
    checked = 0
    for index, expert, slot, kept_S in partly_kept(plan):
        down_HC = downs[index][expert]
        rows_nC, target_nH = stacked_rows(seen[index][expert], down_HC)
        rows_nS = rows_nC[:, kept_S]
        if len(rows_nS) < len(kept_S):
            continue
        penalty = (ridge * rows_nS.square().sum(dim=0).mean()).sqrt()
        augmented = torch.cat([rows_nS, penalty * torch.eye(len(kept_S))])
        targets = torch.cat([target_nH, penalty * down_HC[:, kept_S].T])
        expected_SH = torch.linalg.lstsq(augmented, targets).solution
        torch.testing.assert_close(layers[index].experts[slot].down_proj.weight.T, expected_SH, rtol=1e-6, atol=1e-6)
        checked += 1
    assert checked >= 8


@torch.no_grad()
def test_with_changed_propagation_a_layer_is_fitted_to_what_the_pruned_layers_before_it_give(
    build_model, model_name, routed_tokens, statistics_64, many_windows
):
    pruned, masked = (build_model(model_name, torch.float64) for _ in range(2))
    plan = plan_of(pruned, random_channels)
    run_through(Refit(0.0, propagate="changed")(pruned, plan, statistics_64, many_windows, 16))
    first, second = moe_layers(pruned)
    mask_channels(masked, Plan((plan.kept[0], tuple(torch.arange(plan.width) for _ in plan.kept[1])), plan.width))
    for expert, kept_S in enumerate(plan.kept[0]):
        moe_layers(masked)[0].experts.down_proj[expert][:, kept_S] = first.experts[expert].down_proj.weight
    seen = routed_tokens(masked)[1]
    dense_down_EHC = moe_layers(build_model(model_name, torch.float64))[1].experts.down_proj
    checked = 0
    for expert, kept_S in enumerate(plan.kept[1]):
        rows_nC, target_nH = stacked_rows(seen[expert], dense_down_EHC[expert])
        if len(kept_S) <= len(rows_nC) // 2:
            expected_SH = torch.linalg.lstsq(rows_nC[:, kept_S], target_nH).solution
            torch.testing.assert_close(second.experts[expert].down_proj.weight.T, expected_SH, rtol=1e-6, atol=1e-6)
            checked += 1
    assert checked >= 3


def test_a_propagation_that_does_not_exist_is_refused():
    with pytest.raises(InputError, match="dense"):
        Refit(propagate="pruned")


@pytest.mark.parametrize("ridge", [0.0, 1e-4, 0.01, 1.0, 100.0])
@torch.no_grad()
def test_no_ridge_makes_an_expert_worse_than_the_plain_cut(dense, tiny_model_64, statistics_64, many_windows, ridge):
    seen, downs = dense
    plan = plan_of(tiny_model_64, random_channels)
    run_through(Refit(ridge)(tiny_model_64, plan, statistics_64, many_windows, 16))
    gained = 0
    for index, expert, slot, kept_S in partly_kept(plan):
        rows_nC, target_nH = stacked_rows(seen[index][expert], downs[index][expert])
        plain = weighted_error(rows_nC, target_nH, kept_S, downs[index][expert][:, kept_S])
        refitted_HS = moe_layers(tiny_model_64)[index].experts[slot].down_proj.weight
        refitted = weighted_error(rows_nC, target_nH, kept_S, refitted_HS)
        assert refitted <= plain * (1 + 1e-12)
        gained += bool(refitted < 0.9 * plain)
    assert gained > 0 or ridge == 100.0


@torch.no_grad()
def test_gate_and_up_rows_and_experts_that_keep_all_channels_stay(build_model, model_name, statistics_64, many_windows):
    plain, refitted = (build_model(model_name, torch.float64) for _ in range(2))
    plan = plan_of(plain, lambda _layer, expert, width: torch.arange(width if expert % 2 else width // 2))
    prune(plain, plan)
    run_through(Refit()(refitted, plan, statistics_64, many_windows, 16))
    for before, after in zip(moe_layers(plain), moe_layers(refitted), strict=True):
        for slot in range(len(before.experts)):
            assert torch.equal(gate_up_of(before.experts, slot), gate_up_of(after.experts, slot))
        for expert in range(before.expert_count):
            same = torch.equal(before.experts[expert].down_proj.weight.T, after.experts[expert].down_proj.weight.T)
            assert same == bool(expert % 2)


@torch.no_grad()
def test_batches_do_not_matter(build_model, model_name, statistics_64, many_windows):
    first, second = (build_model(model_name, torch.float64) for _ in range(2))
    plan = plan_of(first, random_channels)
    run_through(Refit()(first, plan, statistics_64, many_windows, 40))
    run_through(Refit()(second, plan, statistics_64, many_windows, 7))
    for name, tensor in first.state_dict().items():
        torch.testing.assert_close(second.state_dict()[name], tensor, rtol=1e-7, atol=1e-9)


@torch.no_grad()
def test_experts_with_fewer_tokens_than_kept_channels_keep_the_plain_cut(
    build_model, model_name, statistics_64, many_windows, caplog
):
    plain, refitted = (build_model(model_name, torch.float64) for _ in range(2))
    plan = plan_of(plain, lambda _layer, _expert, width: torch.arange(width // 2))
    routed_tokens_LE = statistics_64.routed_tokens_LE.clone()
    routed_tokens_LE[0, 2] = plan.width // 2 - 1
    few = type(statistics_64)(**{**vars(statistics_64), "routed_tokens_LE": routed_tokens_LE})
    prune(plain, plan)
    with caplog.at_level(logging.WARNING):
        run_through(Refit()(refitted, plan, few, many_windows, 16))
    before, after = (moe_layers(model)[0].experts for model in (plain, refitted))
    same = [torch.equal(before[e].down_proj.weight, after[e].down_proj.weight) for e in range(len(plan.kept[0]))]
    assert same == [e == 2 for e in range(len(plan.kept[0]))]
    assert "1 experts have fewer calibration tokens than kept channels" in caplog.text


@torch.no_grad()
def silence_channels(model, expert, channels):
    for layer in moe_layers(model)[:1]:
        layer.experts.gate_up_proj[expert, channels] = 0


def test_without_a_ridge_a_silent_channel_is_a_numerical_error(tiny_model_64, statistics_64, many_windows):
    plan = plan_of(tiny_model_64, lambda _layer, _expert, width: torch.arange(4))
    silence_channels(tiny_model_64, 1, [0])
    with pytest.raises(NumericalError, match=r"(?s)expert 1 in model\.layers\.\d\.mlp\.experts is singular.*ridge"):
        run_through(Refit(ridge=0.0)(tiny_model_64, plan, statistics_64, many_windows, 16))


@pytest.mark.parametrize("channels", [[0], [0, 1, 2, 3]], ids=["one", "all"])
@torch.no_grad()
def test_with_a_ridge_silent_channels_are_kept_as_they_were(tiny_model_64, statistics_64, many_windows, channels):
    plan = plan_of(tiny_model_64, lambda _layer, _expert, width: torch.arange(4))
    silence_channels(tiny_model_64, 1, channels)
    before_HC = moe_layers(tiny_model_64)[0].experts.down_proj[1].clone()
    run_through(Refit()(tiny_model_64, plan, statistics_64, many_windows, 16))
    after_SH = moe_layers(tiny_model_64)[0].experts[1].down_proj.weight.T
    assert torch.equal(after_SH[channels], before_HC[:, channels].T)


@pytest.mark.parametrize("kept_of", [everything, without_experts((0, 1), (1, 0))])
def test_without_experts_to_refit_the_model_is_not_run(
    tiny_model_64, statistics_64, many_windows, kept_of, monkeypatch
):
    monkeypatch.setattr(refit, "walk_layers", lambda *_: pytest.fail("the model was run"))
    run_through(Refit()(tiny_model_64, plan_of(tiny_model_64, kept_of), statistics_64, many_windows, 16))


@pytest.mark.parametrize("ridge", [-0.1, float("nan")])
def test_a_negative_ridge_is_an_input_error(ridge):
    with pytest.raises(InputError, match="is not possible"):
        Refit(ridge)


def test_a_plan_that_merges_is_refused(tiny_model_64, statistics_64, many_windows):
    experts = moe_layers(tiny_model_64)[0].expert_count
    merge = Merge(torch.arange(experts).repeat(2, 1), torch.ones(2, experts, dtype=torch.float64), False)
    with pytest.raises(InputError, match="The plan merges experts"):
        run_through(Refit()(tiny_model_64, plan_of(tiny_model_64, everything, merge), statistics_64, many_windows, 16))


@pytest.mark.parametrize("propagate", ["dense", "changed"])
@torch.no_grad()
def test_several_devices_fit_what_one_does(propagate, tiny_model_64, statistics_64, many_windows, tmp_path):
    """Gram matrices are summed over the devices' shares; here two of one CPU."""
    tiny_model_64.save_pretrained(tmp_path)
    plan = plan_of(tiny_model_64, random_channels_and_empty_experts)
    streamed = stream_dense(tmp_path, torch.float64, (torch.device("cpu"),) * 2)
    streamed.model.config._experts_implementation = "eager"
    refitted = Refit(propagate=propagate)
    found = {}
    for depth, _, layer in refitted(streamed, plan, statistics_64, many_windows, 16):
        found[depth] = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    for depth, _, layer in refitted(tiny_model_64, plan, statistics_64, many_windows, 16):
        for name, tensor in layer.state_dict().items():
            torch.testing.assert_close(found[depth][name], tensor, rtol=1e-9, atol=1e-12)
