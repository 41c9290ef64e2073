"""What stock transformers makes of an exported checkpoint: the same outputs, with its own classes and file names."""

import json
from pathlib import Path

import pytest
import torch
from families import FAMILIES, build_family
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from moeprune.errors import InputError, ModelError
from moeprune.export.checkpoint import open_checkpoint
from moeprune.export.shape import StockShape, stock_shape
from moeprune.export.stock import stock_model
from moeprune.export.transformers_files import write_transformers
from moeprune.models.adapter import moe_layers
from moeprune.models.families import to_contract


def exported(pruned: Path, *, pad: bool = False) -> Path:
    checkpoint = open_checkpoint(pruned)
    folder = pruned.with_name("exported")
    folder.mkdir()
    write_transformers(stock_model(checkpoint, stock_shape(checkpoint, pad=pad)), folder)
    return folder


def stock(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(folder)
    config._experts_implementation = "eager"
    model, report = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=dtype, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


def family_model(family: str) -> PreTrainedModel:
    model = build_family(family, torch.float32)
    to_contract(model)
    return model


def uniform_widths(model: PreTrainedModel, width: int) -> list[list[int]]:
    return [[width] * layer.expert_count for layer in moe_layers(model)]


@pytest.mark.parametrize("family", FAMILIES)
def test_one_width_in_the_familys_own_files(family, cut_model, pruned_folder, logits_of):
    model = family_model(family)
    type_of_dense = type(model)
    cut_model(model, uniform_widths(model, 12))
    expected = logits_of(model)
    folder = pruned_folder(model)
    if family == "llama4":  # its shared experts are as wide as the routed ones
        with pytest.raises(InputError, match="allocator=whole_experts"):
            stock_shape(open_checkpoint(folder), pad=False)
        return
    again = stock(exported(folder))
    assert type(again) is type_of_dense
    torch.testing.assert_close(logits_of(again), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_gives_any_widths_the_same_outputs(family, cut_model, pruned_folder, logits_of):
    model = family_model(family)
    counts = [layer.expert_count for layer in moe_layers(model)]
    widths = [[5 + (3 * layer + 7 * row) % 11 for row in range(count)] for layer, count in enumerate(counts)]
    cut_model(model, widths)
    expected = logits_of(model)
    again = stock(exported(pruned_folder(model), pad=True))
    torch.testing.assert_close(logits_of(again), expected, rtol=1e-4, atol=1e-5)


def test_whole_experts_of_every_layer(tiny_model, cut_model, pruned_folder, logits_of):
    model = cut_model(tiny_model, [[0, *layer.widths[1:]] for layer in moe_layers(tiny_model)])
    expected = logits_of(model)
    again = stock(exported(pruned_folder(model)))
    torch.testing.assert_close(logits_of(again), expected, rtol=1e-4, atol=1e-5)


def test_kept_rows_and_merged_experts_are_written_out(tiny_model, cut_model, pruned_folder, logits_of):
    slots = [min(row, 3) for row in range(moe_layers(tiny_model)[0].expert_count)]
    model = cut_model(tiny_model, uniform_widths(tiny_model, 8), slot_of_row=slots)
    expected = logits_of(model)
    again = stock(exported(pruned_folder(model)))
    torch.testing.assert_close(logits_of(again), expected, rtol=1e-4, atol=1e-5)


def test_rows_without_an_expert_get_one_of_zeros(tiny_model, cut_model, pruned_folder, logits_of):
    widths = [[0, 3, *layer.widths[2:]] for layer in moe_layers(tiny_model)]
    model = cut_model(tiny_model, widths, keep_rows=True)
    expected = logits_of(model)
    folder = pruned_folder(model)
    with pytest.raises(InputError, match="pad=true"):
        exported(folder)
    (folder.with_name("exported")).rmdir()
    torch.testing.assert_close(logits_of(stock(exported(folder, pad=True))), expected, rtol=1e-4, atol=1e-5)


def test_names_shards_and_tokenizer_are_those_of_a_published_checkpoint(build_model, cut_model, pruned_folder):
    model = build_model("qwen3_renormalised", torch.bfloat16)
    folder = exported(pruned_folder(cut_model(model, uniform_widths(model, 8))))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    tensors = {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}
    assert set(index["weight_map"]) == set(tensors)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert tensors["model.layers.1.mlp.experts.7.down_proj.weight"].shape == (32, 8)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert len(list(folder.glob("*.safetensors"))) == 3
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("qwen3_moe", ["Qwen3MoeForCausalLM"])
    assert config["moe_intermediate_size"] == 8
    assert not {"pruned", "auto_map"} & set(config)
    assert not list(folder.glob("*.py"))
    assert AutoTokenizer.from_pretrained(folder).encode("ab") == [65, 66]


def test_shared_experts_keep_their_channels(build_model, cut_model, pruned_folder, logits_of):
    # Their width in the family's config is a multiple of the routed width: 24 becomes 3 x 10 with six zeros.
    model = build_model("deepseek_v2", torch.float32)
    cut_model(model, uniform_widths(model, 10))
    again = stock(exported(pruned_folder(model)))
    assert again.config.n_shared_experts == 3
    torch.testing.assert_close(logits_of(again), logits_of(model), rtol=1e-4, atol=1e-5)


def test_what_stock_engines_cannot_express_names_what_they_could(tiny_model, cut_model, pruned_folder):
    counts = [layer.expert_count for layer in moe_layers(tiny_model)]
    widths = [[8] * (counts[0] - 1) + [0], [7] * counts[1]]
    folder = pruned_folder(cut_model(tiny_model, widths))
    with pytest.raises(InputError, match="allocator=whole_experts"):
        stock_shape(open_checkpoint(folder), pad=True)


def test_several_widths_name_the_allocator_that_gives_one(tiny_model, cut_model, pruned_folder):
    widths = [[8, 9, *[8] * (layer.expert_count - 2)] for layer in moe_layers(tiny_model)]
    checkpoint = open_checkpoint(pruned_folder(cut_model(tiny_model, widths)))
    with pytest.raises(InputError, match=r"2 widths from 8 to 9 channels(.|\n)*allocator=uniform"):
        stock_shape(checkpoint, pad=False)
    assert stock_shape(checkpoint, pad=True) == StockShape(len(widths[0]), 9)


def test_constants_are_refused(tiny_model, cut_model, pruned_folder):
    folder = pruned_folder(cut_model(tiny_model, uniform_widths(tiny_model, 8), bias=True))
    with pytest.raises(InputError, match="surgery=none"):
        stock_shape(open_checkpoint(folder), pad=True)


def test_quantised_checkpoints_are_refused(tiny_model, cut_model, pruned_folder):
    folder = pruned_folder(cut_model(tiny_model, uniform_widths(tiny_model, 8)))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {}}))
    with pytest.raises(InputError, match="quantizer=none"):
        stock_shape(open_checkpoint(folder), pad=False)


def test_other_folders_and_damaged_checkpoints_are_refused(tiny_checkpoint, tiny_model, cut_model, pruned_folder):
    with pytest.raises(InputError, match=r"has no config\.json"):
        open_checkpoint(tiny_checkpoint.parent)
    with pytest.raises(InputError, match="did not prune"):
        open_checkpoint(tiny_checkpoint)
    folder = pruned_folder(cut_model(tiny_model, uniform_widths(tiny_model, 8)))
    next(folder.glob("model-layer-00001*")).write_bytes(b"12345678")
    with pytest.raises(ModelError, match="damaged"):
        open_checkpoint(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match="damaged"):
        open_checkpoint(folder)
