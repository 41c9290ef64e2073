"""Every family, cut: nothing removed is nothing changed, sliced equals masked, and routers without rows route right."""

from contextlib import ExitStack

import pytest
import torch
from families import FAMILIES, build_family, out_of_reach
from surgery_plans import everything, plan_of, random_channels, random_channels_and_empty_experts, without_experts

from moeprune.models.adapter import moe_layers
from moeprune.models.compressed.reader import load_compressed
from moeprune.models.compressed.writer import save_compressed
from moeprune.models.families import to_contract
from moeprune.models.runtime.ragged import RaggedExperts
from moeprune.surgery.prune import KEEP_ROW, prune

every_family = pytest.mark.parametrize("family", FAMILIES)
# transformers computes this family's gates in float32, whatever the model's precision.
TOLERANCE = {"llama4": 1e-5}
STORED_TRANSPOSED = ("gpt_oss", "llama4")


def at_contract(family, dtype=torch.float64):
    model = build_family(family, dtype)
    to_contract(model)
    return model


def logits_of(model, windows):
    with torch.no_grad():
        return model(windows.input_ids_NT).logits


def assert_same_logits(family, model, expected, windows):
    tolerance = TOLERANCE.get(family, 1e-11)
    torch.testing.assert_close(logits_of(model, windows), expected, atol=tolerance, rtol=tolerance)


@torch.no_grad()
def mask(stock, family, plan):
    """Zero what the plan removes in the down projections of a model as transformers has it."""
    for layer, kept in zip(moe_layers(at_contract(family)), plan.kept, strict=True):
        down = stock.get_submodule(layer.name).down_proj
        for expert, channels in enumerate(kept):
            gone = [channel for channel in range(24) if channel not in channels.tolist()]
            if family in STORED_TRANSPOSED:
                down[expert, gone, :] = 0
            else:
                down[expert, :, gone] = 0


@every_family
@pytest.mark.parametrize("empty_experts", ["remove_row", "keep_row"])
def test_removing_nothing_changes_nothing(family, empty_experts, random_windows):
    model = at_contract(family)
    expected = logits_of(model, random_windows)
    prune(model, plan_of(model, everything), empty_experts)
    assert all(isinstance(layer.experts, RaggedExperts) for layer in moe_layers(model))
    assert_same_logits(family, model, expected, random_windows)


@every_family
def test_sliced_experts_compute_what_masked_ones_do(family, random_windows):
    model, stock = at_contract(family), build_family(family)
    plan = plan_of(model, random_channels)
    prune(model, plan)
    mask(stock, family, plan)
    assert [list(layer.widths) for layer in moe_layers(model)] == plan.widths_LE.tolist()
    assert_same_logits(family, model, logits_of(stock, random_windows), random_windows)


@every_family
def test_removed_experts_are_never_chosen(family, random_windows):
    """Their router rows, biases and corrections are gone; tokens go where the family would send them."""
    model, stock = at_contract(family), build_family(family)
    gone = [1, 4]
    routers = [block_router(stock, layer.name) for layer in moe_layers(model)]
    before = [layer.expert_count for layer in moe_layers(model)]
    prune(model, plan_of(model, without_experts(*((index, e) for index in range(len(routers)) for e in gone))))
    for layer, count in zip(moe_layers(model), before, strict=True):
        assert layer.expert_count == count - 2
        shapes = [values.shape for values in layer.router.state_dict().values()]
        assert all(count not in shape and count - 2 in shape for shape in shapes)
    with ExitStack() as contexts:
        for router in routers:
            contexts.enter_context(out_of_reach(router, gone))
        expected = logits_of(stock, random_windows)
    # Routers compute in float32, and a softmax over fewer experts is rounded differently.
    torch.testing.assert_close(logits_of(model, random_windows), expected, atol=1e-5, rtol=1e-5)


def block_router(model, experts_name):
    block = model.get_submodule(experts_name.rpartition(".")[0])
    return block.router if hasattr(block, "router") else block.gate


@every_family
def test_an_expert_without_channels_whose_row_stays_gives_nothing(family, random_windows):
    """Not even the bias of its down projection."""
    model, stock = at_contract(family), build_family(family)
    plan = plan_of(model, random_channels_and_empty_experts)
    prune(model, plan, KEEP_ROW)
    mask(stock, family, plan)
    if family == "gpt_oss":
        with torch.no_grad():
            for layer, kept in zip(moe_layers(at_contract(family)), plan.kept, strict=True):
                for expert, channels in enumerate(kept):
                    if not len(channels):
                        stock.get_submodule(layer.name).down_proj_bias[expert] = 0
    assert_same_logits(family, model, logits_of(stock, random_windows), random_windows)


@every_family
def test_a_cut_model_is_the_same_after_saving_and_loading(family, random_windows, byte_tokenizer, tmp_path):
    model = at_contract(family, torch.float32)
    prune(model, plan_of(model, random_channels_and_empty_experts))
    save_compressed(model, byte_tokenizer, tmp_path, torch.float32)
    loaded = load_compressed(tmp_path, torch.float32)
    assert [layer.widths for layer in moe_layers(loaded)] == [layer.widths for layer in moe_layers(model)]
    assert torch.equal(logits_of(loaded, random_windows), logits_of(model, random_windows))
