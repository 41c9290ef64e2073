"""The table of what is in how many bits: every byte is in it, in the row of its part."""

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from families import FAMILIES, build_family, save_as_the_hub_does
from peft import LoraConfig
from quantising import quantised

from moeprune.models.adapter import moe_layers
from moeprune.models.compressed.adapters import attach_adapters
from moeprune.models.compressed.quantizable import QuantizedParts
from moeprune.models.compressed.reader import load_compressed, pruned_model_on_meta
from moeprune.models.compressed.writer import save_compressed
from moeprune.models.families import to_contract
from moeprune.models.footprint.measured import count_bytes, count_parameters
from moeprune.models.footprint.precision import PrecisionRow, precision_table
from moeprune.models.footprint.prediction import empty_model
from moeprune.models.runtime.grouped import GroupedWeight
from moeprune.quantization.int8 import Int8Quantizer
from moeprune.quantization.nf4 import NF4Quantizer
from moeprune.quantization.rtn import NearestQuantizer
from moeprune.surgery.prune import prune
from moeprune.types import Plan

HIDDEN, VOCAB = 32, 257
QUANTIZERS = {
    "nf4": NF4Quantizer(parts=QuantizedParts(attention=False)),
    "nf4 double": NF4Quantizer(double_quantization=True),
    "int8": Int8Quantizer(parts=QuantizedParts(embeddings=True, head=True)),
    "nearest 3": NearestQuantizer("rtn3", bits=3, group_size=20),
}


@pytest.fixture
def pruned(tiny_model):
    """Experts 1, 3, ... keep 8 channels, the others all."""
    layers = moe_layers(tiny_model)
    width = layers[0].widths[0]
    kept = [[torch.arange(8 if e % 2 else width) for e in range(layer.expert_count)] for layer in layers]
    return prune(tiny_model, Plan(tuple(map(tuple, kept)), width))


def described(rows: list[PrecisionRow]) -> dict[tuple[str, str], tuple[int, int, int]]:
    return {(row.part, row.format): (row.matrices, row.parameters, row.bytes) for row in rows}


def test_a_plain_checkpoint_row_by_row(build_model, byte_tokenizer, tmp_path):
    """Counted by hand: two layers of 8 experts of width 16; queries, keys, values, output; 257 embeddings, the head."""
    model = build_model("qwen3_renormalised", torch.float32)
    kept = tuple(tuple(torch.arange(16) for _ in range(8)) for _ in range(2))
    save_compressed(prune(model, Plan(kept, 16)), byte_tokenizer, tmp_path, torch.bfloat16)
    experts, attention = 2 * 8 * 3 * 16 * HIDDEN, 2 * (32 + 16 + 16 + 32) * HIDDEN
    router, table, norms = 2 * 8 * HIDDEN, VOCAB * HIDDEN, 2 * (2 * HIDDEN + 2 * 16) + HIDDEN
    assert precision_table(tmp_path, pruned_model_on_meta(tmp_path, torch.float32)) == [
        PrecisionRow("routed experts", "bf16", 16, 16.0, 48, experts, 2 * experts),
        PrecisionRow("attention", "bf16", 16, 16.0, 8, attention, 2 * attention),
        PrecisionRow("router", "bf16", 16, 16.0, 2, router, 2 * router),
        PrecisionRow("embeddings", "bf16", 16, 16.0, 1, table, 2 * table),
        PrecisionRow("other", "bf16", 16, 16.0, 0, norms, 2 * norms),
    ]


@pytest.mark.parametrize("quantizer", QUANTIZERS.values(), ids=QUANTIZERS)
def test_rows_of_a_quantised_checkpoint(pruned, byte_tokenizer, tmp_path, quantizer, model_name):
    model = quantised(pruned, quantizer)
    save_compressed(model, byte_tokenizer, tmp_path, torch.bfloat16)
    rows = precision_table(tmp_path, pruned_model_on_meta(tmp_path, torch.float32))
    assert sum(row.bytes for row in rows) == count_bytes(tmp_path, model).with_overhead
    assert sum(row.parameters for row in rows) == count_parameters(model).total
    kinds = Linear4bit | Linear8bitLt | GroupedWeight
    assert sum(row.matrices for row in rows if row.bits < 16) == sum(isinstance(m, kinds) for m in model.modules())
    assert all(row.bits_with_overhead == pytest.approx(8 * row.bytes / row.parameters) for row in rows)
    assert all(row.bits_with_overhead > row.bits for row in rows if row.bits < 16)
    by_part = {(row.part, row.format): row for row in rows}
    word = {"nf4": "nf4", "int8": "int8", "rtn3": "nearest 3 bits"}[quantizer.name]
    word = "nf4 double" if getattr(quantizer, "double_quantization", False) else word
    routed = by_part["routed experts", word]
    assert (routed.bits, routed.matrices) == (quantizer.bits, 36 if model_name == "deepseek_v2" else 48)
    assert ("attention", word if quantizer.parts.attention else "bf16") in by_part
    assert ("embeddings", "nearest 8 bits" if quantizer.parts.embeddings else "bf16") in by_part
    assert ("router", "bf16") in by_part and ("other", "bf16") in by_part
    assert (("shared experts", word) in by_part) == (("dense mlp", word) in by_part) == (model_name == "deepseek_v2")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_byte_of_a_dense_checkpoint_of_every_family(family, tmp_path):
    model = build_family(family, torch.float32)
    save_as_the_hub_does(model, tmp_path)
    to_contract(model)
    rows = precision_table(tmp_path, empty_model(model.config, torch.bfloat16))
    assert sum(row.bytes for row in rows) == count_bytes(tmp_path, model).with_overhead
    counts, experts = count_parameters(model), sum(layer.expert_count for layer in moe_layers(model))
    sizes = {row.part: row for row in rows}
    assert sizes["routed experts"].parameters == counts.routed
    assert sizes["routed experts"].matrices in (2 * experts, 3 * experts)
    assert sizes["embeddings"].parameters == VOCAB * HIDDEN
    assert sizes["router"].matrices == len(moe_layers(model))
    assert sizes["head"].matrices == 1


def test_biases_of_quantised_matrices_have_rows_of_their_own(byte_tokenizer, tmp_path):
    model = build_family("gpt_oss", torch.float32)
    to_contract(model)
    layers = moe_layers(model)
    width = layers[0].widths[0]
    plan = Plan(tuple(tuple(torch.arange(width) for _ in range(layer.expert_count)) for layer in layers), width)
    model = quantised(prune(model, plan), NearestQuantizer("rtn4", bits=4))
    save_compressed(model, byte_tokenizer, tmp_path, torch.bfloat16)
    rows = precision_table(tmp_path, pruned_model_on_meta(tmp_path, torch.float32))
    experts = sum(layer.expert_count for layer in layers)
    biases = experts * (2 * width + HIDDEN)
    assert described(rows)["routed experts", "bf16"] == (0, biases, 2 * biases)
    assert described(rows)["routed experts", "nearest 4 bits"][:2] == (3 * experts, experts * 3 * width * HIDDEN)


@pytest.mark.parametrize("quantizer", QUANTIZERS.values(), ids=QUANTIZERS)
def test_adapters_on_a_quantised_model_have_rows_of_their_own(pruned, byte_tokenizer, tmp_path, quantizer):
    model = quantised(pruned, quantizer)
    before = count_parameters(model).total
    config = LoraConfig(r=4, use_dora=True, target_modules=[f"{moe_layers(model)[0].name}.1.up_proj"])
    attach_adapters(model, {"experts": config})
    save_compressed(model, byte_tokenizer, tmp_path, torch.float32)
    loaded = load_compressed(tmp_path, torch.float32)
    added = count_parameters(loaded).total - before
    assert added == 4 * (HIDDEN + 8) + 8
    rows, size = precision_table(tmp_path, loaded), count_bytes(tmp_path, loaded)
    assert described(rows)["routed experts", "fp32 adapter"] == (2, added, 4 * added)
    assert sum(row.bytes for row in rows) == size.with_overhead
    assert sum(row.parameters for row in rows) == count_parameters(loaded).total
