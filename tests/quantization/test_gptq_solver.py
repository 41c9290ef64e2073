"""GPTQ's solver against the paper's formulas with explicit inverses, one column at a time, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kept_weights import kept_by

from moeprune.quantization.gptq_solver import gptq, inverse_factor
from moeprune.quantization.grid import nearest

DOUBLE = torch.float64


def random_problem(outputs, inputs, tokens, seed):
    """A weight, and the Hessian of inputs that depend on each other."""
    generator = torch.Generator().manual_seed(seed)
    mixing_II = torch.randn(inputs, inputs, generator=generator, dtype=DOUBLE) / inputs**0.5
    x_NI = torch.randn(tokens, inputs, generator=generator, dtype=DOUBLE) @ (torch.eye(inputs) + 2 * mixing_II)
    return torch.randn(outputs, inputs, generator=generator, dtype=DOUBLE) * 0.1, x_NI


def brute_force(weight_OI, hessian_II, damping, bits, group_size):
    """Optimal brain quantisation in the fixed order of columns: the inverse of what is left of H, anew each time."""
    weight_OI, inputs = weight_OI.clone(), weight_OI.shape[1]
    hessian_II = hessian_II + damping * hessian_II.diagonal().mean() * torch.eye(inputs, dtype=DOUBLE)
    kept_OI = torch.zeros_like(weight_OI)
    for column in range(inputs):
        if column % group_size == 0:
            group_OS = weight_OI[:, column : column + group_size]
            lowest_O, highest_O = group_OS.amin(1).clamp(max=0), group_OS.amax(1).clamp(min=0)
            scale_O = ((highest_O - lowest_O) / (2**bits - 1)).half().double()
            zero_O = (-lowest_O / scale_O).half().double()
        code_O = (weight_OI[:, column] / scale_O + zero_O).round().clamp(0, 2**bits - 1)
        kept_OI[:, column] = (code_O - zero_O) * scale_O
        inverse_RR = torch.linalg.inv(hessian_II[column:, column:])
        error_O = (weight_OI[:, column] - kept_OI[:, column]) / inverse_RR[0, 0]
        weight_OI[:, column + 1 :] -= error_O[:, None] * inverse_RR[0, 1:]
    return kept_OI


@given(
    inputs=st.integers(1, 24), tokens=st.integers(1, 60), bits=st.integers(2, 4), group_size=st.integers(1, 30),
    seed=st.integers(0, 99),
)  # fmt: skip
@settings(deadline=None, max_examples=40)
def test_codes_are_those_of_the_formulas(inputs, tokens, bits, group_size, seed):
    weight_OI, x_NI = random_problem(3, inputs, tokens, seed)
    found = gptq(weight_OI, inverse_factor(x_NI.T @ x_NI, 0.05), bits=bits, group_size=group_size)
    expected_OI = brute_force(weight_OI, x_NI.T @ x_NI, 0.05, bits, group_size)
    torch.testing.assert_close(kept_by(found, group_size), expected_OI, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("group_size", [64, 48, 200, 500])
def test_so_are_those_of_more_columns_than_are_corrected_at_once(group_size):
    weight_OI, x_NI = random_problem(4, 300, 900, seed=0)
    found = gptq(weight_OI, inverse_factor(x_NI.T @ x_NI, 0.01), bits=3, group_size=group_size)
    expected_OI = brute_force(weight_OI, x_NI.T @ x_NI, 0.01, 3, group_size)
    torch.testing.assert_close(kept_by(found, group_size), expected_OI, rtol=1e-9, atol=1e-12)


@given(inputs=st.integers(1, 30), seed=st.integers(0, 99))
@settings(deadline=None)
def test_the_factor_is_that_of_the_damped_inverse(inputs, seed):
    _, x_NI = random_problem(1, inputs, inputs + 5, seed)
    hessian_II = x_NI.T @ x_NI
    upper_II = inverse_factor(hessian_II, 0.1)
    assert torch.equal(upper_II, upper_II.triu())
    damped_II = hessian_II + 0.1 * hessian_II.diagonal().mean() * torch.eye(inputs, dtype=DOUBLE)
    torch.testing.assert_close(upper_II.T @ upper_II, torch.linalg.inv(damped_II), rtol=1e-8, atol=1e-10)


def test_inputs_that_do_not_depend_on_each_other_are_rounded_to_nearest():
    weight_OI, _ = random_problem(4, 30, 1, seed=0)
    hessian_II = torch.diag(torch.arange(30, dtype=DOUBLE))  # the first input is never anything but 0
    found = gptq(weight_OI, inverse_factor(hessian_II, 0.01), bits=4, group_size=8)
    expected = nearest(weight_OI, bits=4, group_size=8)
    assert all(torch.equal(tensor, vars(expected)[name]) for name, tensor in vars(found).items())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_output_error_is_below_that_of_nearest_rounding(bits):
    weight_OI, x_NI = random_problem(20, 96, 400, seed=1)
    found = gptq(weight_OI, inverse_factor(x_NI.T @ x_NI, 0.01), bits=bits, group_size=32)
    plain = nearest(weight_OI, bits=bits, group_size=32)
    errors = [((kept_by(each, 32) - weight_OI) @ x_NI.T).norm() for each in (found, plain)]
    assert errors[0] < 0.8 * errors[1]


def test_a_hessian_with_nan_has_no_factor():
    with pytest.raises(torch.linalg.LinAlgError):
        inverse_factor(torch.full((3, 3), float("nan")), 0.01)
