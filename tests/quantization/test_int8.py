"""int8: what is quantised, what it computes, and that what is stored is enough to compute it again."""

import pytest
import torch
from bitsandbytes.nn import Linear8bitLt
from hypothesis import given
from hypothesis import strategies as st
from quantising import quantised
from torch import nn

from moeprune.errors import ModelError, NumericalError
from moeprune.models.compressed.eight_bit import (
    SCALES,
    eight_bit_linear,
    eight_bit_modules,
    empty_eight_bit_linear,
    fill_eight_bit_linear,
)
from moeprune.models.compressed.quantizable import QuantizedParts
from moeprune.models.compressed.reader import load_compressed
from moeprune.models.compressed.writer import save_compressed
from moeprune.models.layers.streaming import drop_tensors
from moeprune.quantization import int8
from moeprune.quantization.int8 import Int8Quantizer


def in_int8(model):
    return quantised(model, Int8Quantizer())


def dequantised(layer: Linear8bitLt) -> torch.Tensor:
    state = layer.state_dict()
    return state["weight"].float() * state[SCALES][:, None] / 127


@given(outputs=st.integers(1, 20), inputs=st.integers(1, 40), seed=st.integers(0, 99))
def test_each_weight_is_within_half_a_step_of_its_rows_scale(outputs, inputs, seed):
    generator = torch.Generator().manual_seed(seed)
    # Powers of two times small integers survive the library's detour over float16.
    weight_OI = torch.randint(-50, 51, (outputs, inputs), generator=generator) / 64
    step_O1 = weight_OI.abs().amax(dim=1, keepdim=True) / 127
    error_OI = (dequantised(eight_bit_linear(weight_OI, None)) - weight_OI).abs()
    assert (error_OI <= 0.501 * step_O1).all()


def test_everything_linear_is_quantised_except_router_embedding_and_head(pruned):
    linear = set(QuantizedParts().names(pruned))
    untouched = {n: p.clone() for n, p in pruned.named_parameters() if n.rsplit(".", 1)[0] not in linear}
    model = in_int8(pruned)
    assert {name for name, module in model.named_modules() if isinstance(module, Linear8bitLt)} == linear
    parameters = dict(model.named_parameters())
    assert {name for name, value in parameters.items() if value.dtype != torch.int8} == set(untouched)
    assert all(torch.equal(parameters[name], value) for name, value in untouched.items())
    assert eight_bit_modules(model.state_dict()) == linear


@torch.no_grad()
def test_the_quantised_model_is_near_the_one_of_its_dequantised_weights(pruned, random_windows):
    """Inputs are rounded too, to 1/127 of the largest of a token."""
    ids = random_windows.input_ids_NT
    model = in_int8(pruned)
    actual = model(ids).logits
    for name, module in list(model.named_modules()):
        if isinstance(module, Linear8bitLt):
            weight_OI = dequantised(module)
            plain = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=module.bias is not None)
            plain.weight.copy_(weight_OI)
            model.set_submodule(name, plain)
    expected = model(ids).logits
    assert (actual - expected).norm() < 0.1 * expected.norm()


@torch.no_grad()
def test_running_it_changes_nothing_that_is_stored(pruned, random_windows):
    model = in_int8(pruned)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model(random_windows.input_ids_NT)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())


@torch.no_grad()
def test_a_written_model_computes_the_same_bit_for_bit(pruned, random_windows, byte_tokenizer, tmp_path):
    model = in_int8(pruned)
    ids = random_windows.input_ids_NT
    save_compressed(model, byte_tokenizer, tmp_path, torch.float32)
    loaded = load_compressed(tmp_path, torch.float32)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@torch.no_grad()
def test_a_layer_is_filled_from_what_is_stored():
    layer = eight_bit_linear(torch.randn(8, 16), torch.randn(8))
    filled = empty_eight_bit_linear(16, 8, bias=True, dtype=torch.float32)
    fill_eight_bit_linear(filled, layer.state_dict(), torch.float32)
    x = torch.randn(3, 16)
    assert torch.equal(filled(x), layer(x))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda parts: parts | {"weight": torch.zeros(8, 15, dtype=torch.int8)}, ValueError),
        (lambda parts: parts | {SCALES: torch.zeros(7)}, ValueError),
        (lambda parts: {n: t for n, t in parts.items() if n != "bias"}, ValueError),
        (lambda parts: {n: t for n, t in parts.items() if n != SCALES}, KeyError),
    ],
)
def test_parts_that_do_not_fit_are_refused(change, error):
    parts = change(eight_bit_linear(torch.randn(8, 16), torch.randn(8)).state_dict())
    with pytest.raises(error):
        fill_eight_bit_linear(empty_eight_bit_linear(16, 8, bias=True, dtype=torch.float32), parts, torch.float32)


def test_a_skipped_linear_layer_is_a_model_error(pruned, monkeypatch):
    monkeypatch.setattr(int8, "eight_bit_linear", lambda weight, bias: nn.Linear(*reversed(weight.shape)))
    with pytest.raises(ModelError, match=r"These matrices of model\.layers\.0 were not quantised"):
        in_int8(pruned)


@torch.no_grad()
def test_weights_beyond_float16_are_a_numerical_error(pruned):
    """The library rounds to float16 first: a whole row would become NaN."""
    pruned.get_submodule("model.layers.1.self_attn.o_proj").weight[1, 3] = 1e5
    with pytest.raises(NumericalError, match=r"beyond float16"):
        in_int8(pruned)


@torch.no_grad()
def test_a_layer_that_was_dropped_holds_nothing_and_can_be_filled_again():
    layer = eight_bit_linear(torch.randn(8, 16), torch.randn(8))
    x = torch.randn(3, 16)
    expected, parts = layer(x), {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    drop_tensors([layer])
    assert layer.weight.is_meta and layer.state.CB is None and layer.state.SCB is None
    fill_eight_bit_linear(layer, parts, torch.float32)
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("axes", [(3,), (2, 3), (2, 1, 3)])
@torch.no_grad()
def test_inputs_may_have_any_number_of_axes(axes):
    layer = eight_bit_linear(torch.randn(8, 16), torch.randn(8))
    inputs = torch.randn(*axes, 16)
    assert torch.equal(layer(inputs).reshape(-1, 8), layer(inputs.reshape(-1, 16)))
