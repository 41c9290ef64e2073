"""Compressed checkpoints: what is read back is bit for bit what was written, and broken ones are refused readably."""

import json

import pytest
import torch
from families import build_family
from quantising import quantised
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from moeprune.errors import InputError, ModelError
from moeprune.models.adapter import decoder_layers, moe_layers
from moeprune.models.compressed.files import CONFIG, INDEX, REST, layer_file, structure_of
from moeprune.models.compressed.quantizable import QuantizedParts
from moeprune.models.compressed.reader import (
    checkpoint_tensors,
    fill_layer,
    fill_rest,
    load_compressed,
    pruned_model_on_meta,
)
from moeprune.models.compressed.writer import CheckpointWriter, save_compressed
from moeprune.models.families import to_contract
from moeprune.models.layers.streaming import drop_tensors
from moeprune.models.runtime.activations import gated_activation
from moeprune.models.runtime.grouped import GroupedEmbedding, GroupedWeight, TiedHead
from moeprune.models.runtime.ragged import Expert, RaggedExperts
from moeprune.quantization.gptq import GPTQQuantizer
from moeprune.quantization.hqq import HQQQuantizer
from moeprune.quantization.int8 import Int8Quantizer
from moeprune.quantization.nf4 import NF4Quantizer
from moeprune.quantization.rtn import NearestQuantizer
from moeprune.surgery.prune import prune
from moeprune.types import Plan

# For what does not depend on the family.
one_model = pytest.mark.parametrize("model_name", ["deepseek_v2"])
ALL_PARTS = QuantizedParts(embeddings=True, head=True)
QUANTIZERS = {
    "nf4": NF4Quantizer(),
    "nf4 double": NF4Quantizer(double_quantization=True),
    "int8": Int8Quantizer(),
    "nearest 8": NearestQuantizer("rtn8", bits=8),
    "nearest 2 in groups of 20": NearestQuantizer("rtn2", bits=2, group_size=20),
    "hqq 3": HQQQuantizer("hqq3", bits=3, group_size=16),
    "gptq 4": GPTQQuantizer("gptq4", bits=4, fewest_tokens=8),
    "nf4 everywhere": NF4Quantizer(parts=ALL_PARTS),
    "int8 everywhere": Int8Quantizer(parts=ALL_PARTS),
    "nearest 3 everywhere": NearestQuantizer("rtn3", bits=3, parts=ALL_PARTS),
    "experts alone": HQQQuantizer("hqq2", bits=2, parts=QuantizedParts(True, False, False, False)),
}
quantizers = pytest.mark.parametrize("quantizer", QUANTIZERS.values(), ids=QUANTIZERS)
SCHEMES = {"plain": None} | {name: QUANTIZERS[name] for name in ("nf4", "int8", "nearest 3 everywhere", "gptq 4")}
schemes = pytest.mark.parametrize("quantizer", SCHEMES.values(), ids=SCHEMES)


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


def all_stored(folder):
    return {name: tensor.read() for name, tensor in checkpoint_tensors(folder).items()}


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


@quantizers
@torch.no_grad()
def test_a_quantised_model_comes_back_bit_for_bit(pruned, byte_tokenizer, random_windows, tmp_path, quantizer):
    model = quantised(pruned, quantizer)
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
    first, second = map(all_stored, folders)
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
    model = quantised(pruned, NF4Quantizer())
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


@pytest.mark.parametrize("family", ["minimax", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_weights_and_buffers_have_the_precision_that_transformers_gives_them(
    family, dtype, byte_tokenizer, random_windows, tmp_path
):
    """Also those of a model that was pruned in float32: buffers of linear attention, correction biases, norms."""
    dense, folder = build_family(family, torch.float32), tmp_path / "pruned"
    dense.save_pretrained(tmp_path / "dense")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=dtype).state_dict()
    to_contract(dense)
    kept = tuple(tuple(torch.arange(8) for _ in range(layer.expert_count)) for layer in moe_layers(dense))
    folder.mkdir()
    save_compressed(prune(dense, Plan(kept, moe_layers(dense)[0].widths[0])), byte_tokenizer, folder, torch.bfloat16)
    loaded, empty = load_compressed(folder, dtype), pruned_model_on_meta(folder, dtype)
    for model in (loaded, empty):
        found = {name: tensor.dtype for name, tensor in model.state_dict().items() if name in expected}
        assert len(found) > 10
        assert found == {name: expected[name].dtype for name in found}
    assert torch.isfinite(loaded(random_windows.input_ids_NT).logits).all()


def test_tied_weights_are_stored_once_and_stay_tied(saved, model_name):
    stored = [name for name in all_stored(saved) if name in ("lm_head.weight", "model.embed_tokens.weight")]
    model = load_compressed(saved, torch.float32)
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    assert (len(stored), tied) == ((2, False) if model_name == "deepseek_v2" else (1, True))


def test_tensors_are_named_as_the_modules_and_have_their_true_widths(saved, pruned):
    config, stored = json.loads((saved / CONFIG).read_text()), all_stored(saved)
    widths = {layer.name: list(layer.widths) for layer in moe_layers(pruned)}
    assert config["pruned"]["widths"] == widths
    assert config["model_type"] == f"pruned_{pruned.config.model_type}"
    for name, layer_widths in widths.items():
        for expert, width in enumerate(layer_widths):
            assert stored[f"{name}.{expert}.gate_proj.weight"].shape == (width, 32)
            assert stored[f"{name}.{expert}.up_proj.weight"].shape == (width, 32)
            assert stored[f"{name}.{expert}.down_proj.weight"].shape == (32, width)
        assert f"{name}.{len(layer_widths)}.down_proj.weight" not in stored


def test_every_decoder_layer_has_a_file_of_its_own(saved, pruned):
    for depth, (name, _) in enumerate(decoder_layers(pruned)):
        assert all(tensor.startswith(f"{name}.") for tensor in load_file(saved / layer_file(depth)))
    assert not any(".layers." in tensor for tensor in load_file(saved / REST))


@pytest.fixture
def rerouted(tiny_model):
    """Rows that share an expert, rows without one, and a bias in the first layer; no expert at all in the second."""
    first, second = moe_layers(tiny_model)
    generator = torch.Generator().manual_seed(0)
    bias_EH = torch.randn(first.expert_count, first.hidden_size, generator=generator)
    experts = [Expert(width, first.hidden_size, bias=True) for width in (8, 3)]
    for expert in experts:
        for parameter in expert.parameters():
            parameter.data.normal_(generator=generator)
    slot_of_row = (1, -1, 0, *[1] * (first.expert_count - 3))
    ragged = RaggedExperts(experts, gated_activation(first.experts), slot_of_row, bias_EH, gates_inputs=True)
    tiny_model.set_submodule(first.name, ragged)
    none = RaggedExperts([], ragged.activation, [-1] * second.expert_count)
    tiny_model.set_submodule(second.name, none)
    return tiny_model


@schemes
@torch.no_grad()
def test_where_rows_lead_and_biases_come_back(rerouted, byte_tokenizer, random_windows, tmp_path, quantizer):
    model = quantised(rerouted, quantizer) if quantizer else rerouted
    save_compressed(model, byte_tokenizer, tmp_path, torch.float32)
    loaded = load_compressed(tmp_path, torch.float32)
    assert_same_state(loaded, model)
    assert structure_of(loaded) == structure_of(model)
    first, second = moe_layers(loaded)
    said = json.loads((tmp_path / CONFIG).read_text())["pruned"]
    assert said["slot_of_row"][first.name] == list(first.experts.slot_of_row)
    assert said["biased"] == said["expert_biases"] == said["gates_inputs"] == [first.name]
    assert first.widths == (3, 0, 8, *[3] * (first.expert_count - 3))
    assert second.widths == (0,) * first.expert_count
    ids = random_windows.input_ids_NT
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@one_model
@schemes
def test_layers_may_come_in_any_order_from_several_processes_and_twice(
    pruned, build_model, byte_tokenizer, tmp_path, quantizer
):
    """The last process knows the layers that others wrote only as the family's dense ones, without weights."""
    model = quantised(pruned, quantizer) if quantizer else pruned
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    for folder in (whole, pieces):
        folder.mkdir()
    save_compressed(model, byte_tokenizer, whole, torch.float32)
    layers = list(enumerate(decoder_layers(model)))
    for depth, (name, layer) in [*reversed(layers), layers[0]]:
        CheckpointWriter(pieces, torch.float32).add_layer(depth, name, layer)
    last = build_model("deepseek_v2", torch.float32)
    last.set_input_embeddings(model.get_input_embeddings())
    last.set_output_embeddings(model.get_output_embeddings())
    for _, layer in decoder_layers(last):
        drop_tensors(layer.modules())
    CheckpointWriter(pieces, torch.float32).finish(last, byte_tokenizer)
    names = sorted(file.name for file in whole.iterdir())
    assert sorted(file.name for file in pieces.iterdir()) == names
    # safetensors writes metadata in any order, so that the layers' files are compared by what they hold.
    texts = [name for name in names if not name.endswith(".safetensors")]
    assert [name for name in texts if (pieces / name).read_bytes() != (whole / name).read_bytes()] == []
    expected, actual = all_stored(whole), all_stored(pieces)
    assert expected.keys() == actual.keys()
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


@one_model
def test_a_layer_that_was_never_written_is_a_model_error(pruned, byte_tokenizer, tmp_path):
    writer = CheckpointWriter(tmp_path, torch.float32)
    writer.add_layer(0, *next(decoder_layers(pruned)))
    with pytest.raises(ModelError, match=r"no sound model-layer-00001.safetensors of model\.layers\.1"):
        writer.finish(pruned, byte_tokenizer)
    assert not (tmp_path / CONFIG).exists()


@one_model
def test_a_layer_of_another_name_is_a_model_error(pruned, byte_tokenizer, tmp_path):
    writer = CheckpointWriter(tmp_path, torch.float32)
    for depth, (name, layer) in enumerate(reversed(list(decoder_layers(pruned)))):
        writer.add_layer(depth, name, layer)
    with pytest.raises(ModelError, match=r"holds model\.layers\.2, not model\.layers\.0"):
        writer.finish(pruned, byte_tokenizer)


@one_model
def test_a_killed_write_leaves_nothing_under_a_final_name(pruned, tmp_path, monkeypatch):
    def killed(tensors, file, metadata):
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("moeprune.models.compressed.files.save_file", killed)
    with pytest.raises(KeyboardInterrupt):
        CheckpointWriter(tmp_path, torch.float32).add_layer(0, *next(decoder_layers(pruned)))
    assert not (tmp_path / layer_file(0)).exists()


@one_model
def test_experts_that_are_not_cut_are_refused(tiny_model, tmp_path):
    with pytest.raises(InputError, match="allocator=keep_all"):
        CheckpointWriter(tmp_path, torch.float32).add_layer(1, *list(decoder_layers(tiny_model))[1])


@one_model
def test_weights_that_are_not_in_memory_are_refused(pruned, tmp_path):
    name, layer = next(decoder_layers(pruned))
    drop_tensors(layer.modules())
    with pytest.raises(ModelError, match="not in memory"):
        CheckpointWriter(tmp_path, torch.float32).add_layer(0, name, layer)


@schemes
@torch.no_grad()
def test_layers_can_be_dropped_and_filled_again_one_by_one(pruned, byte_tokenizer, random_windows, tmp_path, quantizer):
    model = quantised(pruned, quantizer) if quantizer else pruned
    save_compressed(model, byte_tokenizer, tmp_path, torch.float32)
    loaded = pruned_model_on_meta(tmp_path, torch.float32)
    assert all(parameter.is_meta for parameter in loaded.parameters())
    assert not any(buffer.is_meta for _, buffer in loaded.model.rotary_emb.named_buffers())
    assert structure_of(loaded) == structure_of(model)
    stored = all_stored(tmp_path)
    fill_rest(loaded, {name: tensor for name, tensor in stored.items() if ".layers." not in name}, torch.float32)
    for _ in range(2):
        for name, layer in decoder_layers(loaded):
            inside = {key: tensor for key, tensor in stored.items() if key.startswith(f"{name}.")}
            fill_layer(layer, name, inside, torch.float32)
        ids = random_windows.input_ids_NT
        assert torch.equal(loaded(ids).logits, model(ids).logits)
        for _, layer in decoder_layers(loaded):
            drop_tensors(layer.modules())


@one_model
@pytest.mark.parametrize("file", [INDEX, REST, layer_file(1), CONFIG])
def test_a_missing_file_is_a_model_error(saved, file):
    (saved / file).unlink()
    with pytest.raises(ModelError, match=str(saved)):
        load_compressed(saved, torch.float32)


@one_model
@pytest.mark.parametrize("file", [INDEX, REST, layer_file(1), CONFIG])
@pytest.mark.parametrize("length", [50, -1])
def test_a_truncated_file_is_a_model_error(saved, file, length):
    (saved / file).write_bytes((saved / file).read_bytes()[:length])
    with pytest.raises(ModelError, match=str(saved)):
        load_compressed(saved, torch.float32)


def change_config(folder, change):
    config = json.loads((folder / CONFIG).read_text())
    change(config["pruned"])
    (folder / CONFIG).write_text(json.dumps(config))


def widen_badly(folder):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"hidden_size": "wide"}))


def change_weights(folder, change, file=REST):
    """Change a file's tensors, and the index with them."""
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file)
    index = json.loads((folder / INDEX).read_text())
    others = {name: other for name, other in index["weight_map"].items() if other != file}
    (folder / INDEX).write_text(json.dumps({"weight_map": {**others, **dict.fromkeys(tensors, file)}}))


EXPERT = "model.layers.1.mlp.experts.0.gate_proj.weight"
MISFITS = {
    "setting of another type": widen_badly,
    "no structure": lambda folder: change_config(folder, lambda s: s.clear()),
    "structure without widths": lambda folder: change_config(folder, lambda s: s.pop("widths")),
    "structure without a layer": lambda folder: change_config(folder, lambda s: s["widths"].popitem()),
    "structure of more layers": lambda folder: change_config(folder, lambda s: s["widths"].update(x=[3])),
    "wider experts than stored": lambda folder: change_config(
        folder, lambda s: next(iter(s["widths"].values())).__setitem__(0, 99)
    ),
    "row to an expert that is not there": lambda folder: change_config(
        folder, lambda s: s["slot_of_row"].__setitem__(next(iter(s["widths"])), [99, *range(4)])
    ),
    "bias not stored": lambda folder: change_config(folder, lambda s: s["biased"].append(next(iter(s["widths"])))),
    "weight gone": lambda folder: change_weights(folder, lambda w: w.pop("model.norm.weight")),
    "weight too many": lambda folder: change_weights(folder, lambda w: w.__setitem__("more", torch.zeros(1))),
    "weight of another shape": lambda folder: change_weights(
        folder, lambda w: w.__setitem__("model.norm.weight", torch.zeros(31))
    ),
    "expert of another width": lambda folder: change_weights(
        folder, lambda w: w.__setitem__(EXPERT, torch.zeros(3, 32)), layer_file(1)
    ),
    "four bits that were not expected": lambda folder: change_weights(
        folder, lambda w: w.__setitem__("x.weight.quant_state.bitsandbytes__nf4", torch.zeros(1, dtype=torch.uint8))
    ),
    "index of more weights than there are": lambda folder: (folder / INDEX).write_text(
        json.dumps({"weight_map": {**json.loads((folder / INDEX).read_text())["weight_map"], "more": REST}})
    ),
}


@one_model
@pytest.mark.parametrize("misfit", MISFITS.values(), ids=MISFITS)
def test_files_that_do_not_fit_each_other_are_a_model_error(saved, misfit):
    misfit(saved)
    with pytest.raises(ModelError, match=r"config\.json|index\.json"):
        load_compressed(saved, torch.float32)


@one_model
def test_a_four_bit_matrix_that_lost_its_scales_is_a_model_error(pruned, byte_tokenizer, tmp_path):
    save_compressed(quantised(pruned, NF4Quantizer()), byte_tokenizer, tmp_path, torch.float32)
    lost = EXPERT.replace(".weight", ".weight.absmax")
    change_weights(tmp_path, lambda weights: weights.pop(lost), layer_file(1))
    with pytest.raises(ModelError, match="does not fit the model"):
        load_compressed(tmp_path, torch.float32)


@pytest.mark.parametrize("quantizer", [QUANTIZERS["nearest 3 everywhere"], QUANTIZERS["int8 everywhere"]])
def test_a_grouped_table_is_stored_once_and_a_head_tied_to_it_computes_with_it(
    pruned, byte_tokenizer, tmp_path, model_name, quantizer
):
    save_compressed(quantised(pruned, quantizer), byte_tokenizer, tmp_path, torch.float32)
    model = load_compressed(tmp_path, torch.float32)
    tied = model_name != "deepseek_v2"
    assert isinstance(model.get_input_embeddings(), GroupedEmbedding)
    assert isinstance(model.lm_head, TiedHead) == tied
    assert any(name.startswith("lm_head.") for name in all_stored(tmp_path)) != tied
    x_TH = torch.randn(3, 32)
    model.tie_weights()  # as transformers does at any time
    if tied:
        torch.testing.assert_close(model.lm_head(x_TH), x_TH @ model.model.embed_tokens.weight.T)


@one_model
def test_one_entry_says_how_a_layer_is_grouped_and_one_more_what_differs(pruned, byte_tokenizer, tmp_path):
    model = quantised(pruned, NearestQuantizer("rtn4", bits=4))
    for module in model.model.layers[1].mlp.experts[2].children():
        module.rounding = "gptq"
    save_compressed(model, byte_tokenizer, tmp_path, torch.float32)
    settings = {"bits": 4, "group_size": 64}
    assert json.loads((tmp_path / CONFIG).read_text())["pruned"]["grouped"] == {
        "model.layers.0": {**settings, "rounding": "nearest"},
        "model.layers.1": {**settings, "rounding": "nearest"},
        "model.layers.1.mlp.experts.2": {**settings, "rounding": "gptq"},
        "model.layers.2": {**settings, "rounding": "nearest"},
    }


@one_model
def test_a_checkpoint_of_before_there_were_groups_is_read(pruned, saved):
    change_config(saved, lambda structure: structure.pop("grouped"))
    assert_same_state(load_compressed(saved, torch.float32), pruned)


GROUPED_MISFITS = {
    "of other bits than stored": lambda s: s["model.layers.1"].update(bits=3),
    "of other groups than stored": lambda s: s["model.layers.1"].update(group_size=8),
    "of impossible bits": lambda s: s["model.layers.1"].update(bits=9),
    "of unknown settings": lambda s: s["model.layers.1"].update(colour="red"),
    "not named": lambda s: s.pop("model.layers.1"),
    "of a module that is not there": lambda s: s.update({"model.layers.9": s["model.layers.1"]}),
}


@one_model
@pytest.mark.parametrize("misfit", GROUPED_MISFITS.values(), ids=GROUPED_MISFITS)
def test_groups_that_do_not_fit_are_a_model_error(pruned, byte_tokenizer, tmp_path, misfit):
    save_compressed(quantised(pruned, NearestQuantizer("rtn4", bits=4)), byte_tokenizer, tmp_path, torch.float32)
    change_config(tmp_path, lambda structure: misfit(structure["grouped"]))
    with pytest.raises(ModelError, match=r"config\.json"):
        load_compressed(tmp_path, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_no_precision_rounds_scales(pruned, byte_tokenizer, tmp_path, dtype):
    model = quantised(pruned, QUANTIZERS["nearest 3 everywhere"])
    before = {
        name: value.clone() for name, value in model.named_buffers() if name.endswith(("codes", "scales", "zeros"))
    }
    assert before
    save_compressed(model, byte_tokenizer, tmp_path, dtype)
    loaded = load_compressed(tmp_path, dtype).to(torch.float16).to(dtype)
    after = dict(loaded.named_buffers())
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert {part.dtype for part in loaded.modules() if isinstance(part, GroupedWeight)} == {dtype}
    assert loaded(torch.arange(1, 9)[None]).logits.dtype == dtype


@one_model
def test_a_dense_checkpoint_is_no_compressed_one(tiny_checkpoint):
    with pytest.raises(ModelError, match="not of a compressed model"):
        load_compressed(tiny_checkpoint, torch.float32)


@one_model
def test_code_in_the_folder_is_not_run(saved):
    for file in saved.glob("*.py"):
        file.write_text("raise SystemExit('code from the folder was run')")
    load_compressed(saved, torch.float32)


def test_quantisation_is_said_as_transformers_reads_it(pruned, byte_tokenizer, tmp_path):
    model = quantised(pruned, NF4Quantizer(double_quantization=True))
    model.model.layers[1].extra = nn.Linear(32, 32)
    save_compressed(model, byte_tokenizer, tmp_path, torch.bfloat16)
    said = json.loads((tmp_path / CONFIG).read_text())["quantization_config"]
    assert said["load_in_4bit"] and said["bnb_4bit_use_double_quant"]
    assert (said["bnb_4bit_quant_type"], said["bnb_4bit_compute_dtype"]) == ("nf4", "bfloat16")
    assert said["llm_int8_skip_modules"] == ["lm_head", "model.layers.1.extra"]
