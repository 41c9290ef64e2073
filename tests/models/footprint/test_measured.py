"""Parameters against counts by hand, and bytes against the tensors and files they claim to count."""

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from quantising import quantised
from safetensors.torch import load_file, save_file

from moeprune.models.adapter import moe_layers
from moeprune.models.compressed.quantizable import QuantizedParts
from moeprune.models.compressed.reader import load_compressed
from moeprune.models.compressed.writer import save_compressed
from moeprune.models.footprint.measured import Parameters, count_bytes, count_parameters, overhead_names
from moeprune.models.layers.streaming import stream_compressed, stream_dense
from moeprune.models.layers.walk import run_through
from moeprune.models.runtime.activations import gated_activation
from moeprune.models.runtime.ragged import Expert, RaggedExperts
from moeprune.quantization.int8 import Int8Quantizer
from moeprune.quantization.nf4 import NF4Quantizer
from moeprune.quantization.rtn import NearestQuantizer
from moeprune.surgery.prune import cut_layers, prune
from moeprune.types import Plan

HIDDEN, VOCAB = 32, 257
EVERYWHERE = QuantizedParts(embeddings=True, head=True)
QUANTIZERS = {
    "nf4": NF4Quantizer(),
    "nf4 double": NF4Quantizer(double_quantization=True),
    "int8": Int8Quantizer(),
    "nearest 3": NearestQuantizer("rtn3", bits=3, group_size=20),
    "nearest 8 everywhere": NearestQuantizer("rtn8", bits=8, parts=EVERYWHERE),
    "nf4 everywhere": NF4Quantizer(parts=EVERYWHERE),
}
each_quantizer = pytest.mark.parametrize("quantizer", QUANTIZERS.values(), ids=QUANTIZERS)

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


@each_quantizer
def test_quantising_does_not_change_parameter_counts(tiny_model, quantizer):
    narrow = half_of_the_experts_narrow(tiny_model)
    before = count_parameters(narrow)
    quantised(narrow, quantizer)
    assert count_parameters(narrow) == before


def file_sizes(folder) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, 32), (torch.bfloat16, 16)])
def test_unquantised_bytes_are_parameters_times_bits(tiny_model, byte_tokenizer, tmp_path, dtype, bits):
    model = half_of_the_experts_narrow(tiny_model)
    save_compressed(model, byte_tokenizer, tmp_path, dtype)
    size = count_bytes(tmp_path, model)
    assert size.ideal == size.with_overhead == count_parameters(model).total * bits // 8
    assert size.on_disk == file_sizes(tmp_path)


def test_a_dense_checkpoint_is_counted_as_it_lies_there(tiny_model, tiny_checkpoint, model_name):
    size = count_bytes(tiny_checkpoint, tiny_model)
    assert size.ideal == size.with_overhead == 4 * COUNTS[model_name].total
    assert size.on_disk == file_sizes(tiny_checkpoint)


@each_quantizer
def test_quantised_bytes_are_ideal_bits_and_every_stored_tensor(tiny_model, byte_tokenizer, tmp_path, quantizer):
    model = half_of_the_experts_narrow(tiny_model)
    parameters = count_parameters(model).total
    # A tied head is the embedding.
    matrices = {id(matrix.weight): matrix.weight.numel() for matrix in quantizer.parts.names(model).values()}
    chosen, bits = sum(matrices.values()), quantizer.bits
    quantised(model, quantizer)
    save_compressed(model, byte_tokenizer, tmp_path, torch.bfloat16)
    size = count_bytes(tmp_path, model)
    assert size.ideal == (bits * chosen + 16 * (parameters - chosen)) // 8
    stored = [tensor for file in tmp_path.glob("*.safetensors") for tensor in load_file(file).values()]
    assert size.with_overhead == sum(tensor.nbytes for tensor in stored)
    assert size.on_disk == file_sizes(tmp_path)
    assert size.ideal < size.with_overhead < size.on_disk


def tensors_in_memory(module) -> dict[int, torch.Tensor]:
    """Everything that a module and those below hold, looked up object by object."""
    found = {}
    for part in module.modules():
        own = [*part._parameters.values(), *part._buffers.values()]
        if isinstance(part, Linear4bit):
            state = part.weight.quant_state
            own += [state.absmax, state.code, state.offset]
            own += [state.state2.absmax, state.state2.code] if state.nested else []
        if isinstance(part, Linear8bitLt):
            own.append(part.weight.SCB)
        found |= {id(tensor): tensor for tensor in own if tensor is not None}
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantizer", [None, *QUANTIZERS.values()], ids=["plain", *QUANTIZERS])
def test_bytes_in_memory_are_those_of_all_tensors_of_the_loaded_model(
    tiny_model, byte_tokenizer, tmp_path, quantizer, dtype
):
    model = half_of_the_experts_narrow(tiny_model)
    save_compressed(quantised(model, quantizer) if quantizer else model, byte_tokenizer, tmp_path, torch.bfloat16)
    loaded = load_compressed(tmp_path, dtype)
    held = sum(tensor.nbytes for tensor in tensors_in_memory(loaded).values())
    assert count_bytes(tmp_path, loaded).in_memory == held
    streamed = stream_compressed(tmp_path, dtype, (torch.device("cpu"),))
    assert count_bytes(tmp_path, streamed).in_memory == held


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_in_memory_of_a_dense_model(tiny_model, tiny_checkpoint, dtype):
    model = tiny_model.to(dtype)
    held = sum(tensor.nbytes for tensor in tensors_in_memory(model).values())
    assert count_bytes(tiny_checkpoint, model).in_memory == held
    streamed = stream_dense(tiny_checkpoint, dtype, (torch.device("cpu"),))
    assert streamed.model.model.rotary_emb.inv_freq.dtype == torch.float32
    rotary = sum(buffer.nbytes for buffer in streamed.model.model.rotary_emb.buffers())
    own = sum(buffer.nbytes for buffer in model.model.rotary_emb.buffers())
    assert count_bytes(tiny_checkpoint, streamed).in_memory == held - own + rotary


def test_adapters_beside_the_weights_are_counted(tiny_model, byte_tokenizer, tmp_path):
    model = half_of_the_experts_narrow(tiny_model)
    save_compressed(model, byte_tokenizer, tmp_path, torch.float32)
    before = count_bytes(tmp_path, model)
    for adapter in ("experts", "router"):
        folder = tmp_path / "adapters" / adapter
        folder.mkdir(parents=True)
        save_file({"base_model.model.x.lora_A.weight": torch.zeros(4, 8)}, folder / "adapter_model.safetensors")
    after = count_bytes(tmp_path, model)
    assert after.ideal - before.ideal == after.with_overhead - before.with_overhead == 2 * 4 * 4 * 8
    assert after.on_disk == sum(file.stat().st_size for file in tmp_path.rglob("*.safetensors"))


def test_what_quantising_adds_is_told_by_name():
    names = ["a.weight", "a.weight.absmax", "a.weight.quant_state.bitsandbytes__nf4", "a.bias", "b.weight", "b.SCB"]
    names += ["b.weight_format", "c.weight", "c.weight.of_another_kind", "d.codes", "d.scales", "d.zeros", "e.scales"]
    assert overhead_names(names) == [names[1], names[2], names[5], names[6], names[10], names[11]]
