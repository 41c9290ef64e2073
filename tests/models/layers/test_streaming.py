"""Layers that come from disk one at a time are bit for bit those of the whole model, for every family."""

import gc
import json
import weakref

import pytest
import torch
from families import FAMILIES, build_family, save_as_the_hub_does
from quantising import quantised
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from moeprune.errors import ModelError
from moeprune.models.adapter import decoder_layers, moe_layers
from moeprune.models.compressed.four_bit import four_bit_linear
from moeprune.models.compressed.quantizable import QuantizedParts
from moeprune.models.compressed.reader import load_compressed
from moeprune.models.compressed.writer import save_compressed
from moeprune.models.families import to_contract
from moeprune.models.layers.streaming import StreamedModel, stream_compressed, stream_dense
from moeprune.quantization.gptq import GPTQQuantizer
from moeprune.quantization.int8 import Int8Quantizer
from moeprune.quantization.nf4 import NF4Quantizer
from moeprune.quantization.rtn import NearestQuantizer
from moeprune.surgery.prune import prune
from moeprune.types import Plan

CPU = (torch.device("cpu"),)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def tensors_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """All parameters and buffers, also those that checkpoints leave out."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def assert_same_tensors(actual: nn.Module, expected: nn.Module, prefix: str = "") -> None:
    got, wanted = tensors_of(actual), tensors_of(expected)
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert got[name].dtype == tensor.dtype, prefix + name
        assert got[name].device == tensor.device, prefix + name
        assert torch.equal(got[name], tensor), prefix + name


def assert_streams_the_same(streamed: StreamedModel, whole: nn.Module) -> None:
    """Every layer when it is resident, and everything outside the layers, is that of the model in memory."""
    layers = dict(decoder_layers(whole))
    assert [name for name, _ in decoder_layers(streamed.model)] == list(layers)
    for depth, (name, layer) in enumerate(layers.items()):
        with streamed.resident(depth) as resident:
            assert_same_tensors(resident, layer, f"{name}.")
        stored = set(resident.state_dict())
        assert all(tensor.is_meta for key, tensor in tensors_of(resident).items() if key in stored)
    outside = {key for key in tensors_of(whole) if not key.startswith(tuple(f"{name}." for name in layers))}
    for key in outside:
        assert torch.equal(tensors_of(streamed.model)[key], tensors_of(whole)[key]), key
    assert not streamed.model.training


@pytest.fixture
def family_checkpoint(tmp_path):
    """``make(name, dtype)``: the folder of a tiny model of a family in several files."""

    def make(name, dtype=torch.float32):
        save_as_the_hub_does(build_family(name, dtype), tmp_path / name)
        return tmp_path / name

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_those_of_the_whole_model_bit_for_bit(family, family_checkpoint):
    folder = family_checkpoint(family)
    for dtype in DTYPES:
        whole = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        to_contract(whole)
        assert_streams_the_same(stream_dense(folder, dtype, CPU), whole)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_checkpoints_in_every_precision_are_read_as_transformers_reads_them(stored, family_checkpoint):
    folder = family_checkpoint("deepseek_v3", stored)
    for dtype in DTYPES:
        whole = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        assert_streams_the_same(stream_dense(folder, dtype, CPU), whole)


def test_more_than_ten_experts_keep_their_order(tmp_path):
    """In the order of strings, expert 10 comes before expert 2."""
    save_as_the_hub_does(build_family("qwen3_moe", torch.float32, num_experts=12), tmp_path)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_streams_the_same(stream_dense(tmp_path, torch.float32, CPU), whole)


def test_moe_layers_found_before_see_the_weights(family_checkpoint):
    streamed = stream_dense(family_checkpoint("gpt_oss"), torch.float32, CPU)
    first, *_ = moe_layers(streamed.model)
    assert first.experts.down_proj.is_meta
    with streamed.resident(0) as layer:
        assert first.decoder_layer is layer
        assert first.experts.down_proj.abs().sum() > 0
        assert first.router.weight.abs().sum() > 0
    assert first.experts.down_proj.is_meta


def test_memory_is_freed_also_where_the_layer_was_cut_and_quantised(family_checkpoint):
    streamed = stream_dense(family_checkpoint("qwen3_moe"), torch.float32, CPU)
    found = moe_layers(streamed.model)
    with streamed.resident(0) as layer:
        cut = nn.ModuleList([nn.Linear(64, 64), four_bit_linear(torch.ones(64, 64), None, block_size=64, nested=False)])
        cut[1](torch.ones(1, 64))
        layer.mlp.experts = cut
        seen = [weakref.ref(tensor) for tensor in [*layer.parameters(), *found[0].experts.parameters()]]
        assert all(tensor() is not None for tensor in seen)
    assert layer.mlp.experts is cut
    gc.collect()
    assert all(tensor() is None for tensor in seen)
    assert found[0].experts.down_proj.is_meta


def test_memory_is_freed_after_an_error(family_checkpoint):
    streamed = stream_dense(family_checkpoint("qwen3_moe"), torch.float32, CPU)
    with pytest.raises(KeyboardInterrupt), streamed.resident(1):
        raise KeyboardInterrupt
    assert all(tensor.is_meta for _, layer in decoder_layers(streamed.model) for tensor in layer.parameters())


def test_a_layer_that_was_cut_is_not_read_again(family_checkpoint):
    streamed = stream_dense(family_checkpoint("qwen3_moe"), torch.float32, CPU)
    with streamed.resident(0) as layer:
        layer.mlp.experts = nn.Linear(4, 4)
    with pytest.raises(ModelError, match=r"mlp\.experts of the layer was changed"), streamed.resident(0):
        pass


def pruned_family(name: str) -> nn.Module:
    """Experts of widths 24, 22, 20, ...; expert 1 of the first MoE layer is gone."""
    model = build_family(name, torch.float32)
    to_contract(model)
    layers = moe_layers(model)
    kept = [[torch.arange(24 - 2 * expert) for expert in range(layer.expert_count)] for layer in layers]
    kept[0][1] = torch.arange(0)
    return prune(model, Plan(tuple(map(tuple, kept)), 24))


QUANTIZERS = {
    "pruned": None,
    "nf4": NF4Quantizer(),
    "int8": Int8Quantizer(),
    "nearest 3": NearestQuantizer("rtn3", bits=3, parts=QuantizedParts(embeddings=True, head=True)),
    "gptq 4": GPTQQuantizer("gptq4", bits=4, fewest_tokens=8),
}


@pytest.mark.parametrize("quantizer", QUANTIZERS.values(), ids=QUANTIZERS)
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "ernie4_5_moe"])
def test_compressed_layers_are_those_of_the_whole_model_bit_for_bit(family, quantizer, byte_tokenizer, tmp_path):
    model = pruned_family(family)
    if quantizer is not None:
        quantised(model, quantizer)
    save_compressed(model, byte_tokenizer, tmp_path, torch.bfloat16)
    for dtype in (torch.float32, torch.bfloat16):
        streamed = stream_compressed(tmp_path, dtype, CPU)
        whole = load_compressed(tmp_path, dtype)
        assert_streams_the_same(streamed, whole)
        assert_streams_the_same(streamed, whole)


class TestBrokenCheckpoints:
    """Each is refused at opening, before anything is computed."""

    @pytest.fixture
    def folder(self, family_checkpoint):
        return family_checkpoint("deepseek_v3")

    @staticmethod
    def change(folder, name, change):
        """``change(tensors)`` of the file that holds the tensor called ``name``."""
        file = folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, {"format": "pt"})

    @staticmethod
    def refused(folder, *parts):
        with pytest.raises(ModelError) as error:
            stream_dense(folder, torch.float32, CPU)
        for part in parts:
            assert part in str(error.value)

    def test_a_truncated_file(self, folder):
        file = sorted(folder.glob("*.safetensors"))[1]
        file.write_bytes(file.read_bytes()[:-10])
        self.refused(folder, file.name, "is damaged")

    def test_a_file_that_is_missing(self, folder):
        file = sorted(folder.glob("*.safetensors"))[1]
        file.unlink()
        self.refused(folder, file.name, "lacks")

    def test_a_missing_index(self, folder):
        (folder / "model.safetensors.index.json").unlink()
        self.refused(folder, "lacks model.safetensors")

    def test_a_missing_config(self, folder):
        (folder / "config.json").unlink()
        self.refused(folder, "cannot be read")

    def test_an_unknown_family(self, folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"model_type": "no_family"}))
        self.refused(folder, "no_family")

    def test_a_missing_tensor_of_a_layer(self, folder):
        name = "model.layers.1.self_attn.o_proj.weight"
        self.change(folder, name, lambda tensors: tensors.pop(name))
        self.refused(folder, "model.layers.1 has tensors that are missing", name)

    def test_a_missing_expert(self, folder):
        name = "model.layers.2.mlp.experts.3.down_proj.weight"
        self.change(folder, name, lambda tensors: tensors.pop(name))
        self.refused(folder, "model.layers.2", "experts.down_proj", "(7, 32, 24)", "(8, 32, 24)")

    def test_a_missing_tensor_outside_the_layers(self, folder):
        self.change(folder, "model.norm.weight", lambda tensors: tensors.pop("model.norm.weight"))
        self.refused(folder, "what is outside the decoder layers", "model.norm.weight")

    def test_an_expert_of_another_shape(self, folder):
        name = "model.layers.1.mlp.experts.3.gate_proj.weight"
        self.change(folder, name, lambda tensors: tensors.update({name: torch.ones(23, 32)}))
        self.refused(folder, "model.layers.1", "cannot be converted")

    def test_a_tensor_of_another_shape(self, folder):
        name = "model.norm.weight"
        self.change(folder, name, lambda tensors: tensors.update({name: torch.ones(5)}))
        self.refused(folder, "other shapes", "model.norm.weight ((5,), not (32,))")

    def test_weights_in_eight_bits(self, folder):
        name = "model.layers.1.self_attn.o_proj.weight"
        self.change(folder, name, lambda t: t.update({name: t[name].to(torch.float8_e4m3fn)}))
        self.refused(folder, "float8_e4m3fn", "bfloat16")

    def test_a_quantised_checkpoint(self, folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
        self.refused(folder, "quantised", "model.streaming=never")
