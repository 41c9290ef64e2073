"""Targets in bytes and active parameters: never exceeded, and never missed by more than what rounding takes."""

import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from safetensors.torch import save_file

from moeprune.allocation.budget import Budget
from moeprune.allocation.targets import ratio_for_active_parameters, ratio_for_bytes
from moeprune.errors import BudgetError, InputError
from moeprune.models.footprint.measured import count_parameters
from moeprune.models.shape import ExpertShape, ModelSizes, read_sizes

WEIGHTS = "model.safetensors"
SHAPE = ExpertShape(layers=4, experts=16, width=96, top_k=4)
CHANNEL = 3 * 64
SIZES = ModelSizes(total_parameters=2_000_000, routed_parameters=4 * 16 * 96 * CHANNEL)
REST = SIZES.total_parameters - SIZES.routed_parameters


def test_sizes_are_those_of_the_model_whether_experts_are_stored_one_by_one_or_fused(
    tiny_model, tiny_checkpoint, tmp_path
):
    parameters = count_parameters(tiny_model)
    assert read_sizes(tiny_checkpoint) == ModelSizes(parameters.total, parameters.routed)
    fused = tmp_path / "fused"
    fused.mkdir()
    tiny_model.config.save_pretrained(fused)
    save_file({name: tensor.clone() for name, tensor in tiny_model.state_dict().items()}, fused / WEIGHTS)
    assert read_sizes(fused).routed_parameters == parameters.routed


def kept_channels(ratio: float, alignment: int, minimum_width: int) -> int:
    return Budget.for_model(SHAPE, ratio=ratio, alignment=alignment, minimum_width=minimum_width).kept_channels


@st.composite
def limits(draw) -> tuple[int, int]:
    alignment = draw(st.sampled_from([1, 4, 8, 48, 96]))
    return alignment, alignment * draw(st.integers(1, 96 // alignment))


@given(st.integers(900_000, 5_000_000), limits())
def test_bytes_never_exceed_the_target_and_no_smaller_ratio_would_do(target, limit):
    alignment, minimum = limit
    try:
        ratio = ratio_for_bytes(target, SIZES, SHAPE, minimum_width=minimum, channels_at_once=alignment)
    except BudgetError:
        assume(False)
    kept = kept_channels(ratio, alignment, minimum)
    assert 2 * (REST + kept * CHANNEL) <= target
    if ratio > 0:
        larger = kept_channels(max(0.0, ratio - 1 / (64 * 96)), alignment, minimum)
        assert larger > kept
        assert 2 * (REST + larger * CHANNEL) > target


@given(st.integers(1_000_000, 2_100_000), limits())
def test_active_parameters_never_exceed_the_target(target, limit):
    alignment, minimum = limit
    try:
        ratio = ratio_for_active_parameters(target, SIZES, SHAPE, minimum_width=minimum, channels_at_once=alignment)
    except BudgetError:
        assume(False)
    assert REST + kept_channels(ratio, alignment, minimum) * CHANNEL * 4 / 16 <= target


@pytest.mark.parametrize("at_once", [96, 4 * 96])
def test_whole_experts_stay_below_the_target_too(at_once):
    target = 2 * (REST + 3000 * CHANNEL)
    ratio = ratio_for_bytes(target, SIZES, SHAPE, minimum_width=16, channels_at_once=at_once)
    removed = round(ratio * 64 * 96)
    assert removed % at_once == 0
    assert removed >= 64 * 96 - 3000 > removed - at_once


def test_a_target_that_holds_the_whole_model_removes_nothing():
    assert ratio_for_bytes(10**9, SIZES, SHAPE, minimum_width=16, channels_at_once=8) == 0
    assert ratio_for_bytes(4_000_000, SIZES, SHAPE, minimum_width=16, channels_at_once=8) == 0


def test_four_bytes_a_parameter_need_a_larger_ratio():
    needed = [
        ratio_for_bytes(4_000_000, SIZES, SHAPE, minimum_width=16, channels_at_once=8, bytes_per_parameter=size)
        for size in (2, 4)
    ]
    assert needed[0] == 0
    assert needed[1] > 0.8


@pytest.mark.parametrize("function", [ratio_for_bytes, ratio_for_active_parameters])
def test_what_cannot_be_met_is_refused_with_the_smallest_that_can(function):
    limit = {"minimum_width": 16, "channels_at_once": 8}
    with pytest.raises(BudgetError, match=r"cannot be met: what is not a routed expert takes") as error:
        function(1000, SIZES, SHAPE, **limit)
    smallest = int(re.search(r"target of at least (\d+) ", str(error.value))[1])
    ratio = function(smallest, SIZES, SHAPE, **limit)
    assert kept_channels(ratio, 8, 16) == 4 * 4 * 16
    with pytest.raises(BudgetError):
        function(smallest - 1, SIZES, SHAPE, **limit)


def test_a_target_below_one_is_refused():
    with pytest.raises(InputError, match="A target of 0 bytes is not possible"):
        ratio_for_bytes(0, SIZES, SHAPE, minimum_width=16, channels_at_once=8)
