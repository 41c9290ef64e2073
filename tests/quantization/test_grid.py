"""Scales, zeros and codes of groups, against every point of the grid tried in turn."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeprune.errors import NumericalError
from moeprune.quantization import grid
from moeprune.quantization.grid import Rounded, nearest

SHAPES = {"outputs": st.integers(1, 5), "inputs": st.integers(1, 40), "group_size": st.integers(1, 24)}


def random_weight(outputs, inputs, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(outputs, inputs, generator=generator, dtype=torch.float64) * 0.07 + 0.02).to(dtype)


def groups_of(rounded: Rounded, group_size: int):
    """(row, slice of inputs, scale, zero) of every group, one after the other, as plain numbers."""
    outputs, inputs = rounded.codes_OI.shape
    for row in range(outputs):
        for index, start in enumerate(range(0, inputs, group_size)):
            scale, zero = (float(tensor[row, index]) for tensor in (rounded.scales_OG, rounded.zeros_OG))
            yield row, slice(start, min(start + group_size, inputs)), scale, zero


@given(**SHAPES, bits=st.integers(2, 8), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_each_weight_is_at_the_nearest_point_of_its_groups_grid(outputs, inputs, group_size, bits, seed):
    weight_OI = random_weight(outputs, inputs, seed)
    rounded = nearest(weight_OI, bits=bits, group_size=group_size)
    assert rounded.codes_OI.dtype == torch.uint8 and rounded.codes_OI.shape == weight_OI.shape
    assert rounded.scales_OG.shape == rounded.zeros_OG.shape == (outputs, -(-inputs // group_size))
    for row, columns, scale, zero in groups_of(rounded, group_size):
        points = [(code - zero) * scale for code in range(2**bits)]
        codes = rounded.codes_OI[row, columns].tolist()
        for weight, code in zip(weight_OI[row, columns].tolist(), codes, strict=True):
            least = min(abs(weight - point) for point in points)
            assert abs(weight - points[code]) <= least * (1 + 1e-4) + 1e-6 * scale


@given(**SHAPES, bits=st.integers(2, 8), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_the_grid_reaches_from_the_smallest_weight_to_the_largest(outputs, inputs, group_size, bits, seed):
    """But for what rounding scale and zero to float16 takes away."""
    weight_OI = random_weight(outputs, inputs, seed)
    rounded = nearest(weight_OI, bits=bits, group_size=group_size)
    for row, columns, scale, zero in groups_of(rounded, group_size):
        lowest, highest = min(0, *weight_OI[row, columns].tolist()), max(0, *weight_OI[row, columns].tolist())
        slack = 2**bits * (2**-10 * scale + 2**-24)
        assert -zero * scale == pytest.approx(lowest, abs=slack)
        assert (2**bits - 1 - zero) * scale == pytest.approx(highest, abs=2 * slack)


def test_a_matrix_that_is_rounded_in_pieces_is_the_same(monkeypatch):
    weight_OI = random_weight(11, 23, seed=0)
    expected = nearest(weight_OI, bits=3, group_size=8)
    monkeypatch.setattr(grid, "WEIGHTS_AT_ONCE", 50)
    found = nearest(weight_OI, bits=3, group_size=8)
    assert all(torch.equal(found_, vars(expected)[name]) for name, found_ in vars(found).items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.0, 0.5, -0.5])
def test_equal_weights_are_kept(value, dtype):
    rounded = nearest(torch.full((3, 10), value, dtype=dtype), bits=4, group_size=4)
    for row, columns, scale, zero in groups_of(rounded, 4):
        kept = [(code - zero) * scale for code in rounded.codes_OI[row, columns].tolist()]
        assert kept == pytest.approx([value] * len(kept), rel=1e-3)


def test_weights_too_small_for_a_float16_scale_are_within_a_step():
    weight_OI = random_weight(4, 64, seed=0) * 1e-7
    rounded = nearest(weight_OI, bits=4, group_size=64)
    for row, columns, scale, zero in groups_of(rounded, 64):
        kept_I = (rounded.codes_OI[row, columns].float() - zero) * scale
        assert (kept_I - weight_OI[row, columns]).abs().max() <= 2.0**-24


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_matrices_without_weights(shape):
    rounded = nearest(torch.zeros(shape), bits=4, group_size=4)
    assert rounded.codes_OI.shape == shape
    assert rounded.scales_OG.shape == rounded.zeros_OG.shape == (shape[0], -(-shape[1] // 4))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e6])
def test_what_float16_cannot_hold_is_a_numerical_error(value):
    weight_OI = torch.zeros(3, 10)
    weight_OI[1, 7] = value
    with pytest.raises(NumericalError, match="beyond float16"):
        nearest(weight_OI, bits=4, group_size=4)


def test_a_stack_is_split_into_its_matrices():
    weights = [random_weight(rows, 10, seed=rows) for rows in (3, 0, 2)]
    pieces = nearest(torch.cat(weights), bits=4, group_size=4).split([3, 0, 2])
    for weight_OI, piece in zip(weights, pieces, strict=True):
        alone = nearest(weight_OI, bits=4, group_size=4)
        assert all(torch.equal(tensor, vars(alone)[name]) for name, tensor in vars(piece).items())
