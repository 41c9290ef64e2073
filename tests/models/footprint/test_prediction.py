"""Predicted sizes against those measured on models that were really pruned, quantised and written."""

import copy

import pytest
import torch
from families import FAMILIES, build_family
from hypothesis import given, settings
from hypothesis import strategies as st
from quantising import quantised
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from moeprune.allocation.budget import Budget
from moeprune.allocation.coverage import CoverageAllocator
from moeprune.allocation.uniform import UniformAllocator
from moeprune.embedded import architectures
from moeprune.models.adapter import moe_layers
from moeprune.models.compressed.quantizable import QuantizedParts
from moeprune.models.compressed.reader import load_compressed
from moeprune.models.compressed.writer import save_compressed
from moeprune.models.families import to_contract
from moeprune.models.footprint.measured import count_bytes, count_parameters
from moeprune.models.footprint.prediction import empty_model, even_widths, predict, shape_of
from moeprune.models.footprint.tensors import TensorSpec, file_bytes
from moeprune.models.shape import ExpertShape
from moeprune.quantization.gptq import GPTQQuantizer
from moeprune.quantization.hqq import HQQQuantizer
from moeprune.quantization.int8 import Int8Quantizer
from moeprune.quantization.nf4 import NF4Quantizer
from moeprune.quantization.rtn import NearestQuantizer
from moeprune.surgery.prune import prune
from moeprune.types import Plan, Scores

EVERYWHERE = QuantizedParts(embeddings=True, head=True)
QUANTIZERS = {
    "as stored": None,
    "int8": Int8Quantizer(),
    "nf4": NF4Quantizer(),
    "nf4 of 128": NF4Quantizer(block_size=128),
    "nf4 double": NF4Quantizer(double_quantization=True),
    "nf4 everywhere": NF4Quantizer(parts=EVERYWHERE),
    "int8 of experts": Int8Quantizer(parts=QuantizedParts(True, False, False, False)),
    "nearest 3": NearestQuantizer("rtn3", bits=3),
    "hqq 2 everywhere": HQQQuantizer("hqq2", bits=2, group_size=24, parts=EVERYWHERE),
    "gptq 4 of attention": GPTQQuantizer("gptq4", parts=QuantizedParts(False, False, True, False)),
}
LAST_DIGITS = 8  # bytes per matrix by which the mean of its scales may be longer or shorter
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.uint8: "U8", torch.int8: "I8", torch.int64: "I64"}

each_quantizer = pytest.mark.parametrize("quantizer", QUANTIZERS.values(), ids=QUANTIZERS)
FOR_FAMILIES = {name: QUANTIZERS[name] for name in ("as stored", "int8", "nf4", "nearest 3", "hqq 2 everywhere")}


def uneven_plan(model) -> Plan:
    """The first expert of every layer is gone, the others keep 8 channels or all."""
    layers = moe_layers(model)
    width = layers[0].widths[0]
    widths = [[0, *(8 if e % 2 else width for e in range(1, layer.expert_count))] for layer in layers]
    return Plan(tuple(tuple(torch.arange(count) for count in layer) for layer in widths), width)


def assert_predicted(model, plan, quantizer, folder, tokenizer, dtype, empty_experts="remove_row") -> None:
    """Cut, quantise and write ``model``; what was predicted of it, and of one without memory, must be what is there."""
    empty = empty_model(model.config, model.dtype)
    predicted = predict(empty, plan.widths_LE.tolist(), dtype, quantizer)
    pruned = prune(model, plan, empty_experts)
    if quantizer is not None:
        quantised(pruned, quantizer)
    save_compressed(pruned, tokenizer, folder, dtype)
    assert predicted.parameters == count_parameters(pruned)
    counted = count_bytes(folder, load_compressed(folder, model.dtype))
    if getattr(quantizer, "double_quantization", False):
        matrices = sum(module.weight.dtype == torch.uint8 for module in pruned.modules() if hasattr(module, "weight"))
        assert predicted.bytes.ideal == counted.ideal
        assert abs(predicted.bytes.with_overhead - counted.with_overhead) <= LAST_DIGITS * matrices
        assert abs(predicted.bytes.on_disk - counted.on_disk) <= 3 * LAST_DIGITS * matrices
    else:
        assert predicted.bytes == counted


@each_quantizer
@pytest.mark.parametrize("allocator", [UniformAllocator(), CoverageAllocator()], ids=["uniform", "coverage"])
@pytest.mark.parametrize("name", ["tiny_qwen3_moe", "tiny_deepseek_v2"])
def test_an_embedded_architecture_is_as_large_as_predicted(name, allocator, quantizer, byte_tokenizer, tmp_path):
    model = AutoModelForCausalLM.from_config(getattr(architectures, name)())
    shape = shape_of(model)
    generator = torch.Generator().manual_seed(0)
    channel_LEC = torch.rand(shape.layers, shape.experts, shape.width, generator=generator, dtype=torch.float64) ** 8
    scores = Scores(channel_LEC, channel_LEC.sum(dim=2), channel_LEC.sum(dim=(1, 2)))
    budget = Budget.for_model(shape, ratio=0.5, alignment=8, minimum_width=16)
    assert_predicted(model, allocator(scores, budget), quantizer, tmp_path, byte_tokenizer, torch.bfloat16)


@pytest.mark.parametrize("quantizer", FOR_FAMILIES.values(), ids=FOR_FAMILIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_as_large_as_predicted(family, quantizer, byte_tokenizer, tmp_path):
    model = build_family(family, torch.float32)
    to_contract(model)
    assert_predicted(model, uneven_plan(model), quantizer, tmp_path, byte_tokenizer, torch.bfloat16)


def test_where_groups_are_chosen_first_all_router_rows_stay(byte_tokenizer, tmp_path):
    model = build_family("deepseek_v3", torch.float32, n_group=2, topk_group=1)
    assert_predicted(model, uneven_plan(model), None, tmp_path, byte_tokenizer, torch.bfloat16, "keep_row")


def test_even_widths_are_those_of_the_uniform_allocator(tiny_model):
    shape = shape_of(tiny_model)
    channel_LEC = torch.ones(shape.layers, shape.experts, shape.width, dtype=torch.float64)
    scores = Scores(channel_LEC, channel_LEC.sum(dim=2), channel_LEC.sum(dim=(1, 2)))
    for ratio in (0, 0.1, 0.25, 0.4):
        budget = Budget.for_model(shape, ratio=ratio, alignment=4, minimum_width=4)
        even = even_widths(shape, budget.kept_channels, 4, 4)
        assert torch.equal(torch.tensor(even), UniformAllocator()(scores, budget).widths_LE)


@given(st.integers(1, 4), st.integers(1, 8), st.integers(1, 6), st.data())
def test_even_widths_meet_the_budget_and_its_limits(layers, experts, blocks, data):
    alignment, least = data.draw(st.integers(1, 5)), data.draw(st.integers(1, blocks))
    ratio = data.draw(st.floats(0, 1 - least / (experts * blocks)))
    shape = ExpertShape(layers, experts, blocks * alignment, top_k=1)
    budget = Budget.for_model(shape, ratio=ratio, alignment=alignment, minimum_width=least * alignment)
    widths = even_widths(shape, budget.kept_channels, alignment, budget.minimum_width)
    given_widths = [width for layer in widths for width in layer]
    assert sum(given_widths) == budget.kept_channels
    assert all(width == 0 or budget.minimum_width <= width <= shape.width for width in given_widths)
    assert all(width % alignment == 0 for width in given_widths)


def test_nothing_is_allocated_and_nothing_changes(tiny_model):
    before = copy.deepcopy(tiny_model.state_dict())
    empty = empty_model(tiny_model.config, torch.float32)
    assert all(tensor.is_meta for tensor in empty.parameters())
    shape = shape_of(tiny_model)
    assert shape == shape_of(empty)
    whole = [[shape.width] * shape.experts] * shape.layers
    assert predict(tiny_model, whole, torch.float32) == predict(empty, whole, torch.float32)
    assert all(torch.equal(before[name], tensor) for name, tensor in tiny_model.state_dict().items())


def test_the_largest_layer_is_the_largest(tiny_model):
    shape = shape_of(tiny_model)
    whole = [[shape.width] * shape.experts] * shape.layers
    layers = [sum(t.nbytes for t in layer.state_dict().values()) for layer in tiny_model.model.layers]
    assert predict(tiny_model, whole, torch.float32).largest_layer == max(layers)


@settings(max_examples=30)
@given(
    st.dictionaries(
        st.from_regex(r"[a-c](\.[0-9]{1,3}){0,2}\.(weight|bias|ä)", fullmatch=True),
        st.tuples(st.sampled_from(list(DTYPES)), st.lists(st.integers(1, 9), max_size=3)),
        min_size=1,
        max_size=12,
    ),
    st.dictionaries(st.text('ab"{', min_size=1, max_size=4), st.text('ab"{:', max_size=30), max_size=2),
)
def test_file_sizes_are_those_of_the_library(tmp_path_factory, tensors, metadata):
    file = tmp_path_factory.mktemp("sizes") / "x.safetensors"
    save_file({name: torch.zeros(shape, dtype=dtype) for name, (dtype, shape) in tensors.items()}, file, metadata)
    specs = [TensorSpec(name, DTYPES[dtype], tuple(shape)) for name, (dtype, shape) in tensors.items()]
    assert file_bytes(specs, metadata) == file.stat().st_size
