"""Parameters against counts by hand, and bytes against the tensors and files they claim to count."""

import pytest
import torch
from safetensors.torch import load_file

from moeprune.models.adapter import moe_layers
from moeprune.models.compressed.quantizable import quantizable_linears
from moeprune.models.compressed.writer import save_compressed
from moeprune.models.footprint.measured import Parameters, count_bytes, count_parameters, overhead_names
from moeprune.models.layers.walk import run_through
from moeprune.models.runtime.activations import gated_activation
from moeprune.models.runtime.ragged import Expert, RaggedExperts
from moeprune.quantization.int8 import Int8Quantizer
from moeprune.quantization.nf4 import NF4Quantizer
from moeprune.surgery.prune import cut_layers, prune
from moeprune.types import Plan

HIDDEN, VOCAB = 32, 257

# Worked out from the configs of the tiny models, one line per part.
QWEN3_OTHERS = VOCAB * HIDDEN + HIDDEN + 2 * (  # embedding (also the head), last norm; per layer:
    2 * HIDDEN  # norms
    + 32 * HIDDEN + 2 * 16 * HIDDEN + HIDDEN * 32 + 2 * 16  # queries; keys and values; output; their norms
    + 8 * HIDDEN  # router
)  # fmt: skip
DEEPSEEK_OTHERS = (
    2 * VOCAB * HIDDEN + HIDDEN  # embedding, head, last norm
    + 3 * (2 * HIDDEN + 32 * HIDDEN + (16 + 8) * HIDDEN + 16 + 2 * (8 + 16) * 16 + HIDDEN * 32)  # norms, attention
    + 3 * 48 * HIDDEN  # dense layer
    + 2 * (6 * HIDDEN + 3 * 24 * HIDDEN)  # routers and shared experts
)  # fmt: skip
QWEN3_ROUTED = 2 * 8 * 3 * 16 * HIDDEN
DEEPSEEK_ROUTED = 2 * 6 * 3 * 24 * HIDDEN
COUNTS = {
    "qwen3_renormalised": Parameters(QWEN3_OTHERS + QWEN3_ROUTED, QWEN3_ROUTED, QWEN3_OTHERS + QWEN3_ROUTED // 4),
    "qwen3_plain_gates": Parameters(QWEN3_OTHERS + QWEN3_ROUTED, QWEN3_ROUTED, QWEN3_OTHERS + QWEN3_ROUTED // 4),
    "deepseek_v2": Parameters(
        DEEPSEEK_OTHERS + DEEPSEEK_ROUTED, DEEPSEEK_ROUTED, DEEPSEEK_OTHERS + DEEPSEEK_ROUTED // 3
    ),
}


def half_of_the_experts_narrow(model):
    """Even experts keep 8 channels, odd ones all."""
    layers = moe_layers(model)
    width = layers[0].widths[0]
    kept = tuple(
        tuple(torch.arange(width if expert % 2 else 8) for expert in range(layer.expert_count)) for layer in layers
    )
    return prune(model, Plan(kept, width))


def test_dense_parameters_are_those_counted_by_hand(tiny_model, model_name):
    assert count_parameters(tiny_model) == COUNTS[model_name]


def test_removed_channels_leave_three_rows_each(tiny_model, model_name):
    before, narrow = COUNTS[model_name], half_of_the_experts_narrow(tiny_model)
    width, experts = (24, 6) if model_name == "deepseek_v2" else (16, 8)
    removed = 2 * (experts // 2) * (width - 8) * 3 * HIDDEN
    after = count_parameters(narrow)
    assert (before.total - after.total, before.routed - after.routed) == (removed, removed)
    # A token uses 2 experts of the layer's mean width.
    assert before.active - after.active == removed * 2 // experts


def test_a_removed_expert_takes_its_router_row(tiny_model, model_name):
    before = COUNTS[model_name]
    layers = moe_layers(tiny_model)
    width = layers[0].widths[0]
    kept = tuple(tuple(torch.arange(width if e else 0) for e in range(layer.expert_count)) for layer in layers)
    after = count_parameters(prune(tiny_model, Plan(kept, width)))
    assert before.routed - after.routed == 2 * 3 * width * HIDDEN
    assert before.total - after.total == 2 * (3 * width + 1) * HIDDEN


def test_a_row_without_an_expert_stays_and_a_token_on_it_uses_nothing(tiny_model, model_name):
    before = COUNTS[model_name]
    layers = moe_layers(tiny_model)
    width, experts = layers[0].widths[0], layers[0].expert_count
    kept = tuple(tuple(torch.arange(width if e else 0) for e in range(experts)) for _ in layers)
    after = count_parameters(prune(tiny_model, Plan(kept, width), "keep_row"))
    removed = 2 * 3 * width * HIDDEN
    assert before.total - after.total == before.routed - after.routed == removed
    assert before.active - after.active == removed * 2 // experts


def test_biases_count_as_routed_experts_and_a_token_uses_those_of_its_rows(tiny_model):
    layers = moe_layers(tiny_model)
    width, experts = layers[0].widths[0], layers[0].expert_count
    plan = Plan(tuple(tuple(torch.arange(width) for _ in range(experts)) for _ in layers), width)
    before = count_parameters(tiny_model)
    run_through(
        cut_layers(tiny_model, plan, before_cut=lambda index, _: None if index else torch.ones(experts, HIDDEN))
    )
    after = count_parameters(tiny_model)
    assert after.total - before.total == after.routed - before.routed == experts * HIDDEN
    assert after.active - before.active == 2 * HIDDEN


def test_experts_that_rows_share_count_once_but_are_used_by_each_row(tiny_model):
    (first, _) = moe_layers(tiny_model)
    before = count_parameters(tiny_model)
    ragged = RaggedExperts([Expert(8, HIDDEN)], gated_activation(first.experts), [0] * first.expert_count)
    width = first.widths[0]
    tiny_model.set_submodule(first.name, ragged)
    after = count_parameters(tiny_model)
    assert before.routed - after.routed == 3 * HIDDEN * (first.expert_count * width - 8)
    assert before.active - after.active == 3 * HIDDEN * 2 * (width - 8)


@pytest.mark.parametrize("quantizer", [NF4Quantizer(), Int8Quantizer()], ids=["nf4", "int8"])
def test_quantising_does_not_change_parameter_counts(tiny_model, quantizer):
    narrow = half_of_the_experts_narrow(tiny_model)
    before = count_parameters(narrow)
    run_through(quantizer(narrow))
    assert count_parameters(narrow) == before


def file_sizes(folder) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, 32), (torch.bfloat16, 16)])
def test_unquantised_bytes_are_parameters_times_bits(tiny_model, byte_tokenizer, tmp_path, dtype, bits):
    model = half_of_the_experts_narrow(tiny_model)
    save_compressed(model, byte_tokenizer, tmp_path, dtype)
    size = count_bytes(tmp_path)
    assert size.ideal == size.with_overhead == count_parameters(model).total * bits // 8
    assert size.on_disk == file_sizes(tmp_path)


def test_a_dense_checkpoint_is_counted_as_it_lies_there(tiny_checkpoint, model_name):
    size = count_bytes(tiny_checkpoint)
    assert size.ideal == size.with_overhead == 4 * COUNTS[model_name].total
    assert size.on_disk == file_sizes(tiny_checkpoint)


@pytest.mark.parametrize(
    ("quantizer", "bits"),
    [(NF4Quantizer(), 4), (NF4Quantizer(double_quantization=True), 4), (Int8Quantizer(), 8)],
    ids=["nf4", "nf4 double", "int8"],
)
def test_quantised_bytes_are_ideal_bits_and_every_stored_tensor(tiny_model, byte_tokenizer, tmp_path, quantizer, bits):
    model = half_of_the_experts_narrow(tiny_model)
    parameters = count_parameters(model).total
    quantised = sum(linear.weight.numel() for linear in quantizable_linears(model).values())
    run_through(quantizer(model))
    save_compressed(model, byte_tokenizer, tmp_path, torch.bfloat16)
    size = count_bytes(tmp_path)
    assert size.ideal == (bits * quantised + 16 * (parameters - quantised)) // 8
    stored = [tensor for file in tmp_path.glob("*.safetensors") for tensor in load_file(file).values()]
    assert size.with_overhead == sum(tensor.nbytes for tensor in stored)
    assert size.on_disk == file_sizes(tmp_path)
    assert size.ideal < size.with_overhead < size.on_disk


def test_what_quantising_adds_is_told_by_name():
    names = ["a.weight", "a.weight.absmax", "a.weight.quant_state.bitsandbytes__nf4", "a.bias", "b.weight", "b.SCB"]
    names += ["b.weight_format", "c.weight", "c.weight.of_another_kind"]
    assert overhead_names(names) == [names[1], names[2], names[5], names[6]]
