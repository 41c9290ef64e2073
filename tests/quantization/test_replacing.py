"""After quantising, every matrix that should have changed is checked: quantizers that skip one are found out."""

import dataclasses

import pytest
import torch
from quantising import quantised
from torch import nn

from moeprune.errors import ModelError, NumericalError
from moeprune.models.compressed.eight_bit import eight_bit_linear
from moeprune.models.compressed.four_bit import four_bit_linear
from moeprune.models.compressed.quantizable import QuantizedParts
from moeprune.models.layers.walk import run_through
from moeprune.models.layers.workspace import IN_MEMORY
from moeprune.quantization.gptq import GPTQQuantizer
from moeprune.quantization.grouped import nearest_layer, nearest_table
from moeprune.quantization.hqq import HQQQuantizer
from moeprune.quantization.int8 import Int8Quantizer
from moeprune.quantization.nf4 import NF4Quantizer
from moeprune.quantization.replacing import check_replaced, replaced_layers
from moeprune.quantization.rtn import NearestQuantizer

EVERYTHING = QuantizedParts(embeddings=True, head=True)


class Skipping:
    """Leaves the n-th matrix that it gets as it is, and says nothing: as libraries do with shapes they do not like."""

    def __init__(self, quantize, number):
        self.quantize, self.left = quantize, number

    def __call__(self, matrix):
        self.left -= 1
        if self.left == 0:
            return type(matrix)(*reversed(matrix.weight.shape))
        return self.quantize(matrix)


def replaced(model, linear, table, parts=EVERYTHING, bits=4):
    run_through(replaced_layers(model, parts, IN_MEMORY, bits, linear, table))


@pytest.mark.parametrize("model_name", ["deepseek_v2"])
@pytest.mark.parametrize("number", [1, 5, 40])
def test_a_skipped_matrix_of_a_layer_is_a_model_error_that_names_it(pruned, number):
    names = [name for name, module in pruned.named_modules() if type(module) is nn.Linear and "router" not in name]
    skipped = names[number - 1]
    with pytest.raises(ModelError, match=skipped.partition("layers.")[2].partition(".")[2]) as error:
        replaced(pruned, Skipping(nearest_layer(4, 64), number), nearest_table(4, 64))
    assert f"matrices of {'.'.join(skipped.split('.')[:3])} were not quantised to 4 bits" in str(error.value)


@pytest.mark.parametrize("model_name", ["deepseek_v2"])
def test_a_skipped_head_is_a_model_error(pruned):
    linears = len([module for module in pruned.modules() if type(module) is nn.Linear])
    with pytest.raises(ModelError, match=r"DeepseekV2ForCausalLM were not quantised to 4 bits: lm_head"):
        replaced(pruned, Skipping(nearest_layer(4, 64), linears), nearest_table(4, 64))


def test_a_skipped_embedding_is_a_model_error(pruned):
    def skip(table):
        kept = nearest_table(4, 64)(table)
        kept.codes = kept.codes.float()
        return kept

    with pytest.raises(ModelError, match=r"were not quantised to 4 bits: model\.embed_tokens"):
        replaced(pruned, nearest_layer(4, 64), skip)


ORIGINAL = nn.Linear(16, 8)
MAKERS = {
    "grouped": (lambda: nearest_layer(4, 5)(ORIGINAL), 4),
    "nf4": (lambda: four_bit_linear(ORIGINAL.weight, None, block_size=64, nested=True), 4),
    "int8": (lambda: eight_bit_linear(ORIGINAL.weight, None), 8),
}


@pytest.mark.parametrize(("make", "bits"), MAKERS.values(), ids=MAKERS)
def test_bits_shape_and_type_are_checked_in_every_scheme(make, bits):
    parent = nn.ModuleDict({"a": make(), "b": make()})
    check_replaced(parent, "here", {"a": ORIGINAL, "b": ORIGINAL}, bits)
    for wanted, wrong in (
        ({"a": ORIGINAL}, 12 - bits),
        ({"b": nn.Linear(16, 9)}, bits),
        ({"b": nn.Linear(8, 16)}, bits),
    ):
        with pytest.raises(ModelError, match=f"of here were not quantised to {wrong} bits"):
            check_replaced(parent, "here", wanted, wrong)
    with pytest.raises(ModelError, match="not quantised"):
        check_replaced(nn.ModuleDict({"a": ORIGINAL}), "here", {"a": ORIGINAL}, bits)


def test_a_message_names_the_first_five():
    parent = nn.ModuleDict({str(index): nn.Linear(4, 4) for index in range(8)})
    with pytest.raises(ModelError, match=r"4 bits: 0, 1, 2, 3, 4 and 3 more\."):
        check_replaced(parent, "here", dict(parent.items()), 4)


@torch.no_grad()
def test_what_is_not_selected_is_not_touched(pruned):
    attention = QuantizedParts(routed_experts=False, shared_experts=False, dense_mlp=False)
    before = {name: tensor.clone() for name, tensor in pruned.state_dict().items()}
    replaced(pruned, nearest_layer(4, 64), nearest_table(4, 64), attention)
    kept = {name: tensor for name, tensor in pruned.state_dict().items() if "self_attn" not in name}
    assert len(kept) > 10 and all(torch.equal(tensor, before[name]) for name, tensor in kept.items())


EACH = {
    "nearest": NearestQuantizer("rtn4"), "hqq": HQQQuantizer("hqq4"), "gptq": GPTQQuantizer("gptq4"),
    "nf4": NF4Quantizer(double_quantization=True), "int8": Int8Quantizer(),
}  # fmt: skip


@pytest.mark.parametrize("model_name", ["deepseek_v2"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["model.layers.1.self_attn.o_proj", "model.layers.1.mlp.experts.2.up_proj", "lm_head"])
@pytest.mark.parametrize("quantizer", EACH.values(), ids=EACH)
@torch.no_grad()
def test_a_matrix_that_holds_nan_or_infinity_is_a_numerical_error_that_names_it(pruned, quantizer, name, value):
    """bitsandbytes would make a row, or with double quantisation the whole matrix, NaN and say nothing."""
    pruned.get_submodule(name).weight[1, 3] = value
    with pytest.raises(NumericalError, match=rf"{name.replace('.', '[.]')} holds NaN or infinity"):
        quantised(pruned, dataclasses.replace(quantizer, parts=EVERYTHING))


@pytest.mark.parametrize("model_name", ["deepseek_v2"])
@torch.no_grad()
def test_an_embedding_that_holds_nan_is_named_too(pruned):
    pruned.get_input_embeddings().weight[1, 3] = torch.nan
    with pytest.raises(NumericalError, match=r"model\.embed_tokens holds NaN or infinity"):
        replaced(pruned, nearest_layer(4, 64), nearest_table(4, 64))


@pytest.mark.parametrize("model_name", ["deepseek_v2"])
@pytest.mark.parametrize("first", EACH.values(), ids=EACH)
def test_what_is_quantised_already_is_refused_and_not_skipped(pruned, first):
    experts = QuantizedParts(attention=False, shared_experts=False, dense_mlp=False)
    quantised(pruned, dataclasses.replace(first, parts=experts))
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.experts\.0\.gate_proj is quantised already"):
        quantised(pruned, NearestQuantizer("rtn2", bits=2))
    quantised(pruned, NearestQuantizer("rtn8", bits=8, parts=QuantizedParts(routed_experts=False)))
