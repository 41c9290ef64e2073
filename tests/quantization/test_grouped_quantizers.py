"""Quantizers that keep groups: what they change and leave, what it computes, and how many bits it takes."""

from dataclasses import replace

import pytest
import torch
from quantising import WINDOWS, quantised
from torch import nn

from moeprune.errors import InputError
from moeprune.models.adapter import moe_layers
from moeprune.models.compressed.quantizable import QuantizedParts
from moeprune.models.footprint.tensors import CODE_OF_DTYPE
from moeprune.models.runtime.grouped import GroupedEmbedding, GroupedLinear, GroupedWeight, TiedHead
from moeprune.quantization.gptq import GPTQQuantizer
from moeprune.quantization.grid import nearest
from moeprune.quantization.hqq import HQQQuantizer, half_quadratic
from moeprune.quantization.int8 import Int8Quantizer
from moeprune.quantization.nf4 import NF4Quantizer
from moeprune.quantization.rtn import NearestQuantizer
from moeprune.surgery.prune import prune
from moeprune.types import Plan

QUANTIZERS = {
    "nearest": NearestQuantizer("rtn3", bits=3, group_size=12),
    "hqq": HQQQuantizer("hqq2", bits=2, group_size=20),
    "gptq": GPTQQuantizer("gptq4", bits=4, group_size=8, fewest_tokens=1),
}
EVERYTHING = QuantizedParts(embeddings=True, head=True)
each_quantizer = pytest.mark.parametrize("quantizer", QUANTIZERS.values(), ids=QUANTIZERS)


def grouped_modules(model) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, GroupedWeight)}


def plain_copy(matrix: GroupedWeight) -> nn.Module:
    weight = matrix.weight.clone()
    if isinstance(matrix, GroupedEmbedding):
        return nn.Embedding.from_pretrained(weight)
    plain = nn.Linear(weight.shape[1], weight.shape[0], bias=matrix.bias is not None)
    plain.weight = nn.Parameter(weight)
    if matrix.bias is not None:
        plain.bias = matrix.bias
    return plain


@each_quantizer
def test_everything_linear_changes_but_router_embedding_and_head(pruned, quantizer):
    linear = {name for name, module in pruned.named_modules() if type(module) is nn.Linear} - {"lm_head"}
    before = {name: tensor.clone() for name, tensor in pruned.state_dict().items()}
    model = quantised(pruned, quantizer)
    assert grouped_modules(model) == linear
    after = model.state_dict()
    untouched = {name for name in before if name.rpartition(".")[0] not in linear}
    assert any("router" in name or "gate.weight" in name for name in untouched)
    assert all(torch.equal(after[name], before[name]) for name in untouched)
    for name in linear:
        matrix, weight_OI = model.get_submodule(name), before[f"{name}.weight"]
        assert matrix.weight.shape == weight_OI.shape
        assert not weight_OI.numel() or (matrix.weight - weight_OI).norm() < 0.7 * weight_OI.norm()


@pytest.mark.parametrize("round_", [nearest, half_quadratic])
def test_weights_are_rounded_as_the_solver_says(pruned, round_):
    kind = NearestQuantizer if round_ is nearest else HQQQuantizer
    before = {name: matrix.weight.clone() for name, matrix in pruned.named_modules() if type(matrix) is nn.Linear}
    model = quantised(pruned, kind("", bits=3, group_size=12))
    for name in grouped_modules(model):
        expected, matrix = round_(before[name], bits=3, group_size=12), model.get_submodule(name)
        assert torch.equal(matrix.scales.view(torch.float16), expected.scales_OG)
        assert torch.equal(matrix.zeros.view(torch.float16), expected.zeros_OG)
        assert matrix.storage == {"bits": 3, "group_size": 12, "rounding": kind.rounding}


@each_quantizer
@torch.no_grad()
def test_it_computes_what_a_model_of_the_dequantised_weights_does(pruned, random_windows, quantizer):
    ids = random_windows.input_ids_NT
    dense = pruned(ids).logits
    model = quantised(pruned, replace(quantizer, parts=EVERYTHING))
    actual = model(ids).logits
    for name in grouped_modules(model):
        model.set_submodule(name, plain_copy(model.get_submodule(name)))
    if isinstance(model.get_output_embeddings(), TiedHead):
        head = nn.Linear(32, 257, bias=False)
        head.weight = nn.Parameter(model.get_input_embeddings().weight)
        model.set_output_embeddings(head)
    torch.testing.assert_close(actual, model(ids).logits, rtol=1e-5, atol=1e-5)
    assert (actual - dense).abs().max() > 1e-3


PARTS = ("routed_experts", "shared_experts", "attention", "dense_mlp", "embeddings", "head")


@pytest.mark.parametrize("model_name", ["deepseek_v2"])
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("quantizer", [*QUANTIZERS.values(), NF4Quantizer(), Int8Quantizer()], ids=lambda one: one.name)
def test_one_part_alone(pruned, quantizer, part):
    only = QuantizedParts(**{each: each == part for each in PARTS})
    words = {
        "routed_experts": "mlp.experts.", "shared_experts": "mlp.shared_experts.", "attention": "self_attn.",
        "dense_mlp": "layers.0.mlp.", "embeddings": "embed_tokens.", "head": "lm_head.",
    }  # fmt: skip
    before = dict(pruned.named_modules())
    model = quantised(pruned, replace(quantizer, parts=only))
    changed = {name for name, module in model.named_modules() if module is not before[name]}
    expected = {
        name for name, module in before.items()
        if isinstance(module, nn.Linear | nn.Embedding) and words[part] in f"{name}."
    }  # fmt: skip
    assert changed == expected and changed


@pytest.mark.parametrize("model_name", ["qwen3_renormalised"])
@pytest.mark.parametrize("quantizer", [NearestQuantizer("rtn4"), NF4Quantizer(), Int8Quantizer()])
def test_a_tied_head_and_its_embedding_go_together(pruned, quantizer):
    with pytest.raises(InputError, match="Set both to true, or both to false"):
        quantised(pruned, replace(quantizer, parts=QuantizedParts(head=True)))
    model = quantised(pruned, replace(quantizer, parts=EVERYTHING))
    assert isinstance(model.get_output_embeddings(), TiedHead)
    table = model.get_input_embeddings()
    assert isinstance(table, GroupedEmbedding)
    assert (table.bits, table.group_size, table.rounding) == (quantizer.bits, 64, "nearest")


@pytest.mark.parametrize("kind", [NearestQuantizer, HQQQuantizer, GPTQQuantizer])
@pytest.mark.parametrize(("bits", "group_size"), [(2, 64), (3, 64), (4, 64), (8, 64), (4, 24)])
def test_what_is_stored_is_what_is_said_to_be(pruned, kind, bits, group_size):
    quantizer = kind("", bits=bits, group_size=group_size, parts=EVERYTHING)
    before = {name: tuple(part.weight.shape) for name, part in pruned.named_modules()
              if isinstance(part, nn.Linear | nn.Embedding)}  # fmt: skip
    model = quantised(pruned, quantizer)
    for name in grouped_modules(model):
        matrix = model.get_submodule(name)
        say = quantizer.stored_table if isinstance(matrix, GroupedEmbedding) else None
        said = say(before[name]) if say else quantizer.stored(before[name], "float32")
        tensors = {part: (CODE_OF_DTYPE[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape))
                   for part, tensor in matrix.state_dict().items() if part != "bias"}  # fmt: skip
        assert tensors == said


def test_bits_a_weight():
    for bits in (2, 3, 4, 8):
        layer = quantised_layer(torch.randn(16, 256), bits)
        stored = sum(tensor.nbytes for tensor in layer.state_dict().values())
        assert stored * 8 / (16 * 256) == bits + 32 / 64
    assert sum(tensor.nbytes for tensor in quantised_layer(torch.randn(16, 24), 4).state_dict().values()) == 16 * 16


def quantised_layer(weight_OI, bits):
    rounded = nearest(weight_OI, bits=bits, group_size=64)
    layer = GroupedLinear(weight_OI.shape[1], weight_OI.shape[0], bits, 64, "nearest", bias=False)
    layer.fill(rounded.codes_OI, rounded.scales_OG, rounded.zeros_OG)
    return layer


@each_quantizer
@torch.no_grad()
def test_removed_experts_and_any_width_work(tiny_model, random_windows, quantizer):
    layers = moe_layers(tiny_model)
    kept = [[torch.arange(expert) for expert in range(layer.expert_count)] for layer in layers]
    model = quantised(prune(tiny_model, Plan(tuple(map(tuple, kept)), layers[0].widths[0])), quantizer)
    assert {layer.widths[0] for layer in moe_layers(model)} == {1}
    assert torch.isfinite(model(random_windows.input_ids_NT).logits).all()


@each_quantizer
def test_unquantised_matrices_are_dropped_layer_by_layer(pruned, quantizer):
    layers = moe_layers(pruned)
    before = [list(layer.experts[1].children()) for layer in layers]
    dropped = []
    for _, _, decoder_layer in quantizer(pruned, WINDOWS, 2):
        if decoder_layer in [layer.decoder_layer for layer in layers]:
            dropped.append([all(matrix.weight.is_meta for matrix in matrices) for matrices in before])
    assert dropped == [[True, False], [True, True]]


@pytest.mark.parametrize("kind", [NearestQuantizer, HQQQuantizer, GPTQQuantizer])
@pytest.mark.parametrize(
    ("settings", "message"),
    [({"bits": 1}, "bits=1 is not possible"), ({"bits": 16}, "bits=16"), ({"group_size": 0}, "group_size=0")],
)
def test_bits_and_groups_that_cannot_be_are_refused(kind, settings, message):
    with pytest.raises(InputError, match=message):
        kind("", **settings)
