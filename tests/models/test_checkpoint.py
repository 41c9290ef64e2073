"""Compressed checkpoints: what is read back is bit for bit what was written, and broken ones are refused readably."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from moeprune.errors import ModelError
from moeprune.models.adapter import moe_layers
from moeprune.models.checkpoint import STRUCTURE, WEIGHTS, load_compressed, save_compressed, structure_of
from moeprune.models.ragged import PackedWeights, RaggedExperts
from moeprune.quantization.nf4 import NF4Quantizer
from moeprune.surgery.prune import prune
from moeprune.types import Plan

# For what does not depend on the family.
one_model = pytest.mark.parametrize("model_name", ["deepseek_v2"])


@pytest.fixture
def pruned(tiny_model):
    """Widths that differ, and the first layer's expert 1 removed with its router row."""
    layers = moe_layers(tiny_model)
    width = layers[0].widths[0]
    kept = [[torch.arange(width - 2 * expert) for expert in range(layer.expert_count)] for layer in layers]
    kept[0][1] = torch.arange(0)
    return prune(tiny_model, Plan(tuple(map(tuple, kept)), width))


@pytest.fixture
def saved(pruned, byte_tokenizer, tmp_path):
    save_compressed(pruned, byte_tokenizer, tmp_path, torch.float32)
    return tmp_path


def assert_same_state(loaded, model) -> None:
    expected, actual = model.state_dict(), loaded.state_dict()
    assert set(actual) == set(expected)
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


@torch.no_grad()
def test_a_pruned_model_comes_back_bit_for_bit(pruned, saved, random_windows):
    loaded = load_compressed(saved, torch.float32)
    assert_same_state(loaded, pruned)
    assert structure_of(loaded) == structure_of(pruned)
    assert [layer.expert_count for layer in moe_layers(loaded)] == [layer.expert_count for layer in moe_layers(pruned)]
    ids = random_windows.input_ids_NT
    assert torch.equal(loaded(ids).logits, pruned(ids).logits)
    assert not loaded.training


@pytest.mark.parametrize("double_quantization", [False, True], ids=["plain scales", "double quantisation"])
@torch.no_grad()
def test_a_quantised_model_comes_back_bit_for_bit(
    pruned, byte_tokenizer, random_windows, tmp_path, double_quantization
):
    model = NF4Quantizer(double_quantization=double_quantization)(pruned)
    save_compressed(model, byte_tokenizer, tmp_path, torch.float32)
    loaded = load_compressed(tmp_path, torch.float32)
    assert_same_state(loaded, model)
    assert structure_of(loaded) == structure_of(model)
    ids = random_windows.input_ids_NT
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@torch.no_grad()
def test_bfloat16_storage_rounds_once_and_then_keeps_every_bit(pruned, byte_tokenizer, random_windows, tmp_path):
    folders = [tmp_path / "first", tmp_path / "second"]
    model = pruned
    for folder in folders:
        folder.mkdir()
        save_compressed(model, byte_tokenizer, folder, torch.bfloat16)
        model = load_compressed(folder, torch.float32)
    first, second = (load_file(folder / WEIGHTS) for folder in folders)
    assert {tensor.dtype for tensor in first.values()} == {torch.bfloat16}
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, pruned.state_dict()[name].bfloat16()), name
        assert torch.equal(tensor, second[name]), name
    ids = random_windows.input_ids_NT
    assert torch.equal(load_compressed(folders[0], torch.float32)(ids).logits, model(ids).logits)


@torch.no_grad()
def test_a_quantised_model_stored_in_bfloat16_keeps_its_four_bit_weights(
    pruned, byte_tokenizer, random_windows, tmp_path
):
    model = NF4Quantizer()(pruned)
    for parameter in model.parameters():
        if parameter.dtype.is_floating_point:
            parameter.copy_(parameter.bfloat16())
    save_compressed(model, byte_tokenizer, tmp_path, torch.bfloat16)
    loaded = load_compressed(tmp_path, torch.float32)
    assert_same_state(loaded, model)
    ids = random_windows.input_ids_NT
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@one_model
@torch.no_grad()
def test_a_model_computes_in_the_dtype_it_is_loaded_in(saved, random_windows):
    model = load_compressed(saved, torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model(random_windows.input_ids_NT).logits.dtype == torch.bfloat16


def test_tied_weights_are_stored_once_and_stay_tied(saved, model_name):
    stored = [name for name in load_file(saved / WEIGHTS) if name in ("lm_head.weight", "model.embed_tokens.weight")]
    model = load_compressed(saved, torch.float32)
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    assert (len(stored), tied) == ((2, False) if model_name == "deepseek_v2" else (1, True))


def test_structure_says_widths_and_shapes_of_four_bit_matrices(pruned):
    widths = {layer.name: layer.widths for layer in moe_layers(pruned)}
    assert structure_of(pruned).widths == widths
    assert structure_of(pruned).quantized == {}
    quantized = structure_of(NF4Quantizer()(pruned)).quantized
    for name, layer_widths in widths.items():
        for expert, width in enumerate(layer_widths):
            assert quantized[f"{name}.weights.gate_up.{expert}"] == (2 * width, 32)
            assert quantized[f"{name}.weights.down.{expert}"] == (32, width)


@pytest.fixture
def rerouted(tiny_model):
    """Rows that share an expert, rows without one, and a bias in the first layer; no expert at all in the second."""
    first, second = moe_layers(tiny_model)
    generator = torch.Generator().manual_seed(0)
    bias_EH = torch.randn(first.expert_count, first.hidden_size, generator=generator)
    weights = PackedWeights((8, 3), first.hidden_size)
    for parameter in weights.parameters():
        parameter.data.normal_(generator=generator)
    slot_of_row = (1, -1, 0, *[1] * (first.expert_count - 3))
    tiny_model.set_submodule(first.name, RaggedExperts(weights, (8, 3), first.experts.act_fn, slot_of_row, bias_EH))
    none = PackedWeights((), second.hidden_size)
    tiny_model.set_submodule(second.name, RaggedExperts(none, (), second.experts.act_fn, [-1] * second.expert_count))
    return tiny_model


@pytest.mark.parametrize("quantizer", [None, NF4Quantizer()], ids=["plain", "nf4"])
@torch.no_grad()
def test_where_rows_lead_and_biases_come_back(rerouted, byte_tokenizer, random_windows, tmp_path, quantizer):
    model = quantizer(rerouted) if quantizer else rerouted
    save_compressed(model, byte_tokenizer, tmp_path, torch.float32)
    loaded = load_compressed(tmp_path, torch.float32)
    assert_same_state(loaded, model)
    assert structure_of(loaded) == structure_of(model)
    first, second = moe_layers(loaded)
    structure = json.loads((tmp_path / STRUCTURE).read_text())
    assert structure["slot_of_row"][first.name] == list(first.experts.slot_of_row)
    assert structure["biased"] == [first.name]
    assert first.widths == (3, 0, 8, *[3] * (first.expert_count - 3))
    assert second.widths == (0,) * first.expert_count
    ids = random_windows.input_ids_NT
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@torch.no_grad()
def test_a_structure_from_before_rows_and_biases_still_loads(pruned, saved, random_windows):
    structure = json.loads((saved / STRUCTURE).read_text())
    assert (structure["slot_of_row"], structure["biased"]) == ({}, [])
    change_structure(saved, lambda s: (s.pop("slot_of_row"), s.pop("biased")))
    ids = random_windows.input_ids_NT
    assert torch.equal(load_compressed(saved, torch.float32)(ids).logits, pruned(ids).logits)


@one_model
@pytest.mark.parametrize("file", [STRUCTURE, WEIGHTS, "config.json"])
def test_a_missing_file_is_a_model_error(saved, file):
    (saved / file).unlink()
    with pytest.raises(ModelError, match="missing or damaged"):
        load_compressed(saved, torch.float32)


@one_model
@pytest.mark.parametrize("file", [STRUCTURE, WEIGHTS, "config.json"])
def test_a_truncated_file_is_a_model_error(saved, file):
    (saved / file).write_bytes((saved / file).read_bytes()[:50])
    with pytest.raises(ModelError, match="missing or damaged"):
        load_compressed(saved, torch.float32)


def change_structure(folder, change):
    structure = json.loads((folder / STRUCTURE).read_text())
    change(structure)
    (folder / STRUCTURE).write_text(json.dumps(structure))


def change_weights(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


MISFITS = {
    "structure without widths": lambda folder: change_structure(folder, lambda s: s.pop("widths")),
    "structure without a layer": lambda folder: change_structure(folder, lambda s: s["widths"].popitem()),
    "wider experts than stored": lambda folder: change_structure(
        folder, lambda s: next(iter(s["widths"].values())).__setitem__(0, 99)
    ),
    "row to an expert that is not there": lambda folder: change_structure(
        folder, lambda s: s["slot_of_row"].__setitem__(next(iter(s["widths"])), [99, *range(4)])
    ),
    "bias not stored": lambda folder: change_structure(folder, lambda s: s["biased"].append(next(iter(s["widths"])))),
    "four-bit matrix not stored": lambda folder: change_structure(
        folder, lambda s: s["quantized"].__setitem__("model.layers.0.self_attn.q_proj", [32, 32])
    ),
    "weight gone": lambda folder: change_weights(folder, lambda w: w.pop("model.norm.weight")),
    "weight too many": lambda folder: change_weights(folder, lambda w: w.__setitem__("more", torch.zeros(1))),
    "weight of another shape": lambda folder: change_weights(
        folder, lambda w: w.__setitem__("model.norm.weight", torch.zeros(31))
    ),
}


@one_model
@pytest.mark.parametrize("misfit", MISFITS.values(), ids=MISFITS)
def test_files_that_do_not_fit_each_other_are_a_model_error(saved, misfit):
    misfit(saved)
    with pytest.raises(ModelError, match=str(saved)):
        load_compressed(saved, torch.float32)
