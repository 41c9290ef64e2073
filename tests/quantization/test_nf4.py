"""NF4: what is quantised, what it computes, and how many bits it takes."""

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from quantising import quantised
from torch import nn

from moeprune.errors import ModelError
from moeprune.models.adapter import moe_layers
from moeprune.models.compressed.four_bit import four_bit_linear, four_bit_modules, quantized_shape
from moeprune.models.compressed.quantized import module_of
from moeprune.models.layers.streaming import drop_tensors
from moeprune.quantization import nf4
from moeprune.quantization.nf4 import NF4Quantizer
from moeprune.surgery.prune import prune
from moeprune.types import Plan

SCHEMES = pytest.mark.parametrize("double_quantization", [False, True], ids=["plain scales", "double quantisation"])


def in_nf4(model, **settings):
    return quantised(model, NF4Quantizer(**settings))


def dequantised(layer: Linear4bit) -> torch.Tensor:
    return bnb.functional.dequantize_4bit(layer.weight.data, layer.quant_state)


def expert_matrices(model) -> dict[str, nn.Module]:
    return {
        f"{layer.name}.{expert}.{part}": layer.experts[expert].get_submodule(part)
        for layer in moe_layers(model)
        for expert in range(len(layer.experts))
        for part in ("gate_proj", "up_proj", "down_proj")
    }


def test_everything_linear_is_quantised_except_router_embedding_and_head(pruned):
    linear = {name for name, module in pruned.named_modules() if type(module) is nn.Linear} - {"lm_head"}
    assert set(expert_matrices(pruned)) < linear
    untouched = {
        name: parameter.clone() for name, parameter in pruned.named_parameters() if name.rsplit(".", 1)[0] not in linear
    }
    model = in_nf4(pruned)
    assert {name for name in linear if not isinstance(model.get_submodule(name), Linear4bit)} == set()
    assert all(matrix.weight.dtype == torch.uint8 for matrix in expert_matrices(model).values())
    assert not any(isinstance(layer.router, Linear4bit) for layer in moe_layers(model))
    assert type(model.lm_head) is nn.Linear
    parameters = dict(model.named_parameters())
    assert {name for name, value in parameters.items() if value.dtype != torch.uint8} == set(untouched)
    assert all(torch.equal(parameters[name], value) for name, value in untouched.items())


@SCHEMES
@torch.no_grad()
def test_quantised_forward_equals_the_forward_of_its_dequantised_weights(pruned, random_windows, double_quantization):
    ids = random_windows.input_ids_NT
    full = pruned(ids).logits
    model = in_nf4(pruned, double_quantization=double_quantization)
    actual = model(ids).logits
    for name, module in list(model.named_modules()):
        if isinstance(module, Linear4bit):
            weight_OI = dequantised(module)
            plain = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=module.bias is not None)
            plain.weight.copy_(weight_OI)
            model.set_submodule(name, plain)
    torch.testing.assert_close(actual, model(ids).logits, rtol=1e-4, atol=1e-4)
    assert (actual - full).abs().max() > 1e-3


@torch.no_grad()
def test_experts_are_quantised_from_their_own_weights(pruned):
    """Each dequantised matrix is within half the widest NF4 step (0.31 of a block's largest value) of the original."""
    before = {name: matrix.weight.clone() for name, matrix in expert_matrices(pruned).items()}
    for name, matrix in expert_matrices(in_nf4(pruned)).items():
        assert dequantised(matrix).shape == before[name].shape
        blocks = before[name].reshape(-1, 64)
        error = (dequantised(matrix).reshape(-1, 64) - blocks).abs()
        assert (error <= 0.16 * blocks.abs().amax(dim=1, keepdim=True)).all()


def test_values_that_nf4_can_hold_are_kept_exactly():
    """Multiples of a code by a power of two: -1, 0 and 1 are codes, and the largest value is the block's scale."""
    weight_OI = torch.tensor([[-1.0, 0.0, 1.0, 1.0]]).repeat(8, 16) * 0.25
    assert torch.equal(dequantised(four_bit_linear(weight_OI, None, block_size=64, nested=False)), weight_OI)


@pytest.mark.parametrize(("nested", "bits"), [(False, 4.5), (True, 4.127)])
def test_bits_per_weight(nested, bits):
    """Codes and scales; the code books (16 and 256 values per matrix) are left out, as they do not grow."""
    weight_OI = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0))
    state = four_bit_linear(weight_OI, None, block_size=64, nested=nested).state_dict()
    counted = ("weight", "weight.absmax", "weight.nested_absmax")
    stored = sum(state[name].nbytes for name in counted if name in state)
    assert stored * 8 / weight_OI.numel() == pytest.approx(bits, abs=5e-4)


@pytest.mark.parametrize("block_size", [64, 128])
@SCHEMES
def test_every_matrix_follows_the_settings(pruned, block_size, double_quantization):
    model = in_nf4(pruned, block_size=block_size, double_quantization=double_quantization)
    states = [module.quant_state for module in model.modules() if isinstance(module, Linear4bit)]
    assert {(state.quant_type, state.blocksize, state.nested) for state in states} == {
        ("nf4", block_size, double_quantization)
    }


def test_larger_blocks_take_fewer_bits_for_scales():
    weight_OI = torch.randn(256, 256)
    scales = [
        four_bit_linear(weight_OI, None, block_size=size, nested=False).quant_state.absmax.numel() for size in (64, 256)
    ]
    assert scales == [256 * 256 // 64, 256 * 256 // 256]


def test_a_bias_is_kept():
    bias_O = torch.randn(16)
    layer = four_bit_linear(torch.randn(16, 64), bias_O, block_size=64, nested=False)
    assert torch.equal(layer.bias, bias_O)
    torch.testing.assert_close(layer(torch.zeros(1, 64)), bias_O[None])


@SCHEMES
@torch.no_grad()
def test_widths_of_sixteen_and_removed_experts_work(pruned, random_windows, double_quantization):
    model = in_nf4(pruned, double_quantization=double_quantization)
    first, second = moe_layers(model)
    assert (first.widths[0], second.widths[:2]) == (16, (8, 16))
    assert first.expert_count == second.expert_count - 1
    assert torch.isfinite(model(random_windows.input_ids_NT).logits).all()


@torch.no_grad()
def test_a_width_that_does_not_fill_a_block_works(tiny_model, random_windows):
    layers = moe_layers(tiny_model)
    kept = tuple(tuple(torch.arange(1 + expert) for expert in range(layer.expert_count)) for layer in layers)
    model = in_nf4(prune(tiny_model, Plan(kept, layers[0].widths[0])))
    assert torch.isfinite(model(random_windows.input_ids_NT).logits).all()


def test_a_skipped_linear_layer_is_a_model_error(pruned, monkeypatch):
    """As a library would skip it: the layer stays as it is, and nothing is said."""
    monkeypatch.setattr(nf4, "four_bit_linear", lambda weight, bias, **_: nn.Linear(*reversed(weight.shape)))
    with pytest.raises(ModelError, match=r"These matrices of model\.layers\.0 were not quantised"):
        in_nf4(pruned)


def test_a_matrix_that_stays_unpacked_is_a_model_error(pruned, monkeypatch):
    def unpacked(weight, bias, **_):
        return Linear4bit(weight.shape[1], weight.shape[0], bias=False)

    monkeypatch.setattr(nf4, "four_bit_linear", unpacked)
    with pytest.raises(ModelError, match=r"These matrices of model\.layers\.0 were not quantised"):
        in_nf4(pruned)


def test_unquantised_matrices_are_dropped_layer_by_layer(pruned):
    layers = moe_layers(pruned)
    before = [list(layer.experts[1].children()) for layer in layers]
    dropped = []
    for _, _, decoder_layer in NF4Quantizer()(pruned, None, 1):
        if decoder_layer in [layer.decoder_layer for layer in layers]:
            dropped.append([all(matrix.weight.is_meta for matrix in matrices) for matrices in before])
    assert dropped == [[True, False], [True, True]]


def test_shapes_are_known_without_weights(pruned):
    model = in_nf4(pruned)
    shapes = {name: quantized_shape(matrix) for name, matrix in expert_matrices(model).items()}
    drop_tensors(model.modules())
    assert {name: quantized_shape(matrix) for name, matrix in expert_matrices(model).items()} == shapes
    for layer in moe_layers(model):
        for expert, width in enumerate(layer.widths):
            assert shapes[f"{layer.name}.{expert}.up_proj"] == (width, 32)
            assert shapes[f"{layer.name}.{expert}.down_proj"] == (32, width)


def test_tensor_names_say_which_modules_are_in_four_bits(pruned):
    model = in_nf4(pruned, double_quantization=True)
    names = model.state_dict().keys()
    modules = four_bit_modules(names)
    assert modules == {name for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    assert {module_of(name, modules) for name in names} == modules | {None}
    assert module_of("a.b.bias", {"a.b"}) == module_of("a.b.weight.absmax", {"a.b"}) == "a.b"
    assert module_of("a.bias", {"a.b"}) is None
