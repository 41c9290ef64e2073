"""Parameters against counts by hand, and bytes against the tensors and files they claim to count."""

import pytest
import torch
from safetensors.torch import load_file

from moeprune.models.adapter import moe_layers
from moeprune.models.checkpoint import save_compressed, structure_of
from moeprune.models.footprint import Parameters, count_bytes, count_parameters
from moeprune.models.ragged import PackedWeights, RaggedExperts
from moeprune.quantization.nf4 import NF4Quantizer
from moeprune.surgery.prune import prune
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
    after = count_parameters(prune(tiny_model, plan, biases=[torch.ones(experts, HIDDEN), None]))
    assert after.total - before.total == after.routed - before.routed == experts * HIDDEN
    assert after.active - before.active == 2 * HIDDEN


def test_experts_that_rows_share_count_once_but_are_used_by_each_row(tiny_model):
    (first, _) = moe_layers(tiny_model)
    before = count_parameters(tiny_model)
    ragged = RaggedExperts(PackedWeights((8,), HIDDEN), (8,), first.experts.act_fn, [0] * first.expert_count)
    width = first.widths[0]
    tiny_model.set_submodule(first.name, ragged)
    after = count_parameters(tiny_model)
    assert before.routed - after.routed == 3 * HIDDEN * (first.expert_count * width - 8)
    assert before.active - after.active == 3 * HIDDEN * 2 * (width - 8)


def test_quantising_does_not_change_parameter_counts(tiny_model):
    narrow = half_of_the_experts_narrow(tiny_model)
    before = count_parameters(narrow)
    assert count_parameters(NF4Quantizer()(narrow)) == before


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, 32), (torch.bfloat16, 16)])
def test_unquantised_bytes_are_parameters_times_bits(tiny_model, byte_tokenizer, tmp_path, dtype, bits):
    model = half_of_the_experts_narrow(tiny_model)
    save_compressed(model, byte_tokenizer, tmp_path, dtype)
    size = count_bytes(tmp_path)
    assert size.ideal == size.with_overhead == count_parameters(model).total * bits // 8
    assert size.on_disk == (tmp_path / "model.safetensors").stat().st_size


def test_a_dense_checkpoint_is_counted_as_it_lies_there(tiny_checkpoint, model_name):
    size = count_bytes(tiny_checkpoint)
    assert size.ideal == size.with_overhead == 4 * COUNTS[model_name].total
    assert size.on_disk == sum(file.stat().st_size for file in tiny_checkpoint.glob("*.safetensors"))


@pytest.mark.parametrize("double_quantization", [False, True])
def test_quantised_bytes_are_ideal_four_bits_and_every_stored_tensor(
    tiny_model, byte_tokenizer, tmp_path, double_quantization
):
    model = half_of_the_experts_narrow(tiny_model)
    parameters = count_parameters(model).total
    model = NF4Quantizer(double_quantization=double_quantization)(model)
    save_compressed(model, byte_tokenizer, tmp_path, torch.bfloat16)
    size = count_bytes(tmp_path)
    quantised = sum(outputs * inputs for outputs, inputs in structure_of(model).quantized.values())
    assert size.ideal == (4 * quantised + 16 * (parameters - quantised)) // 8
    stored = load_file(tmp_path / "model.safetensors").values()
    assert size.with_overhead == sum(tensor.nbytes for tensor in stored)
    assert size.on_disk == (tmp_path / "model.safetensors").stat().st_size
    assert size.ideal < size.with_overhead < size.on_disk
