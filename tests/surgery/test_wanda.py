"""Which single weights become zero, against a loop over rows."""

import pytest
import torch
from surgery_plans import everything, gate_up_of, plan_of, random_channels

from moeprune.errors import InputError
from moeprune.models.adapter import moe_layers
from moeprune.models.layers.walk import run_through
from moeprune.surgery.wanda import UnstructuredWanda


def zeroed_row(weight_I, norm_I, sparsity):
    """The row with its lowest ``|W| * norm`` set to zero."""
    order = sorted(range(len(weight_I)), key=lambda j: (abs(float(weight_I[j])) * float(norm_I[j]), j))
    row_I = weight_I.clone()
    row_I[order[: int(sparsity * len(weight_I))]] = 0
    return row_I


@pytest.mark.parametrize("sparsity", [0.25, 0.5])
@torch.no_grad()
def test_the_lowest_weights_of_each_row_become_zero(
    tiny_model_64, statistics_64, many_windows, routed_tokens, sparsity
):
    seen = routed_tokens(tiny_model_64)
    before = [
        (layer.experts.gate_up_proj.clone(), layer.experts.down_proj.clone()) for layer in moe_layers(tiny_model_64)
    ]
    plan = plan_of(tiny_model_64, everything)
    run_through(UnstructuredWanda(sparsity)(tiny_model_64, plan, statistics_64, many_windows, 16))
    for index, layer in enumerate(moe_layers(tiny_model_64)):
        for expert, (x_nH, _, h_nC, _, _) in enumerate(seen[index]):
            for weight_OI, after_OI, input_nI in (
                (before[index][0][expert], gate_up_of(layer.experts, expert), x_nH),
                (before[index][1][expert], layer.experts[expert].down_proj.weight, h_nC),
            ):
                norm_I = torch.stack([column.square().sum().sqrt() for column in input_nI.T])
                expected = torch.stack([zeroed_row(row_I, norm_I, sparsity) for row_I in weight_OI])
                assert torch.equal(after_OI, expected)


@torch.no_grad()
def test_in_an_expert_that_no_token_reached_the_smallest_weights_go(tiny_model_64, statistics_64, many_windows):
    fields = {name: value.clone() for name, value in vars(statistics_64).items()}
    for name in ("routed_tokens_LE", "input_sq_sum_LEH", "channel_sq_sum_LEC"):
        fields[name][1, 2] = 0
    before_OI = moe_layers(tiny_model_64)[1].experts.gate_up_proj[2].clone()
    plan = plan_of(tiny_model_64, everything)
    run_through(UnstructuredWanda(0.5)(tiny_model_64, plan, type(statistics_64)(**fields), many_windows, 16))
    expected = torch.stack([zeroed_row(row_I, torch.ones(32), 0.5) for row_I in before_OI])
    assert torch.equal(gate_up_of(moe_layers(tiny_model_64)[1].experts, 2), expected)


def test_a_plan_that_removes_channels_is_refused(tiny_model_64, statistics_64, many_windows):
    plan = plan_of(tiny_model_64, random_channels)
    with pytest.raises(InputError, match=r"(?s)The plan removes .*allocator=keep_all"):
        run_through(UnstructuredWanda(0.5)(tiny_model_64, plan, statistics_64, many_windows, 16))


@pytest.mark.parametrize("sparsity", [-0.1, 1.0])
def test_a_sparsity_out_of_range_is_an_input_error(sparsity):
    with pytest.raises(InputError, match="sparsity="):
        UnstructuredWanda(sparsity)
