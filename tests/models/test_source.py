"""A model as the user names it: loading, identity by content, and errors before anything is computed."""

import dataclasses
import logging
import shutil

import psutil
import pytest
import torch
from families import build_family, save_as_the_hub_does
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from moeprune.errors import InputError, ModelError
from moeprune.evaluation.perplexity import perplexity
from moeprune.models import source as source_module
from moeprune.models.adapter import moe_layers
from moeprune.models.compressed.writer import save_compressed
from moeprune.models.layers.streaming import StreamedModel
from moeprune.models.source import ModelSource
from moeprune.surgery.prune import prune
from moeprune.types import Plan

# For what does not depend on the family.
one_model = pytest.mark.parametrize("model_name", ["deepseek_v2"])


@pytest.fixture
def source(tiny_checkpoint):
    return ModelSource("tiny", str(tiny_checkpoint), "bfloat16", "float32", alignment=8, minimum_width=8, device="cpu")


@torch.no_grad()
def test_a_loaded_model_is_the_saved_one(source, tiny_model, random_windows):
    loaded = source.load()
    ids = random_windows.input_ids_NT
    torch.testing.assert_close(loaded(ids).logits, tiny_model(ids).logits, rtol=1e-5, atol=1e-5)
    assert not loaded.training
    assert next(loaded.parameters()).dtype == torch.float32


@one_model
def test_a_model_computes_in_its_compute_dtype(source):
    model = dataclasses.replace(source, compute_dtype="bfloat16").load()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@one_model
def test_the_tokenizer_comes_with_the_checkpoint(source, byte_tokenizer):
    assert source.tokenizer()("text")["input_ids"] == byte_tokenizer("text")["input_ids"]


@one_model
def test_identity_follows_content_and_precision_and_not_place_or_storage(source, tiny_checkpoint, tmp_path):
    moved = shutil.copytree(tiny_checkpoint, tmp_path / "moved")
    elsewhere = dataclasses.replace(source, path=str(moved), dtype="float32", alignment=4)
    assert elsewhere.identity() == source.identity()
    assert dataclasses.replace(source, compute_dtype="bfloat16").identity() != source.identity()
    tensors = load_file(moved / "model.safetensors")
    tensors["model.norm.weight"][3] += 1
    save_file(tensors, moved / "model.safetensors", {"format": "pt"})
    assert elsewhere.identity() != source.identity()


@one_model
def test_a_truncated_checkpoint_is_a_model_error(source, tiny_checkpoint):
    file = tiny_checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        source.load()


@one_model
def test_a_missing_checkpoint_is_a_model_error(source, tiny_checkpoint):
    (tiny_checkpoint / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        source.load()


@one_model
def test_weights_that_do_not_fit_the_config_are_a_model_error(source, tiny_checkpoint):
    tensors = load_file(tiny_checkpoint / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(5)
    save_file(tensors, tiny_checkpoint / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="cannot be loaded"):
        source.load()


@one_model
def test_a_hub_name_that_cannot_be_had_is_a_model_error(source):
    with pytest.raises(ModelError, match="neither a local folder nor to be had from the hub"):
        dataclasses.replace(source, path="nobody/no-such-model").load()


@one_model
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_an_input_error(source):
    with pytest.raises(InputError, match="no GPU is available"):
        _ = dataclasses.replace(source, device="cuda").placement
    assert dataclasses.replace(source, device="auto").placement == torch.device("cpu")


@one_model
@pytest.mark.parametrize("device", ["gpu", "cuda:x", ""])
def test_what_is_no_device_is_an_input_error(source, device):
    with pytest.raises(InputError, match=f"model.device={device}"):
        _ = dataclasses.replace(source, device=device).placement


class TestStreaming:
    @pytest.fixture
    def free_bytes(self, monkeypatch):
        """``set_free(bytes)``: what the device is said to have left."""
        return lambda count: monkeypatch.setattr(source_module, "free_bytes", lambda _device: count)

    @one_model
    def test_a_model_is_streamed_when_it_takes_too_much_of_the_memory(self, source, tiny_model, free_bytes, caplog):
        caplog.set_level(logging.INFO)
        takes = sum(tensor.nbytes for tensor in tiny_model.state_dict().values())
        free_bytes(int(takes / 0.59))
        assert isinstance(source.load(), PreTrainedModel)
        free_bytes(int(takes / 0.61))
        assert isinstance(source.load(), StreamedModel)
        # Half the bytes in half the precision.
        assert isinstance(dataclasses.replace(source, compute_dtype="bfloat16").load(), PreTrainedModel)
        assert "fits in memory" in caplog.text
        assert "is streamed" in caplog.text

    @one_model
    def test_always_and_never_do_not_ask_for_the_memory(self, source, free_bytes):
        free_bytes(None)
        assert isinstance(dataclasses.replace(source, streaming="always").load(), StreamedModel)
        assert isinstance(dataclasses.replace(source, streaming="never").load(), PreTrainedModel)

    @one_model
    def test_compressed_models_are_streamed_alike(self, source, tiny_model, byte_tokenizer, tmp_path, random_windows):
        layers = moe_layers(tiny_model)
        kept = tuple(tuple(torch.arange(8) for _ in range(layer.expert_count)) for layer in layers)
        save_compressed(prune(tiny_model, Plan(kept, layers[0].widths[0])), byte_tokenizer, tmp_path, torch.float32)
        streamed = dataclasses.replace(source, streaming="always").load_compressed(tmp_path)
        whole = dataclasses.replace(source, streaming="never").load_compressed(tmp_path)
        assert isinstance(streamed, StreamedModel)
        values = [perplexity(model, random_windows, 2, "text") for model in (streamed, whole)]
        assert values[0] == values[1]

    @one_model
    def test_how_a_model_is_loaded_does_not_change_its_identity(self, source):
        other = dataclasses.replace(source, streaming="always", activations_gib=0.0, device="cpu")
        assert other.identity() == source.identity()

    @one_model
    @pytest.mark.parametrize(
        ("setting", "value"), [("streaming", "sometimes"), ("streaming", True), ("activations_gib", -1.0)]
    )
    def test_settings_that_do_not_exist_are_input_errors(self, source, setting, value):
        with pytest.raises(InputError, match=f"model.{setting}={value}"):
            dataclasses.replace(source, **{setting: value})

    @one_model
    def test_streaming_stays_on_the_device_that_was_named(self, source):
        assert source.placements == (torch.device("cpu"),)

    @pytest.mark.parametrize("groups", ["0::/", "0::/slurm/job_7/step_0", "4:memory:/slurm/job_7\n3:cpuset:/"])
    def test_the_limit_of_a_container_or_job_counts(self, groups, tmp_path, monkeypatch):
        """The limit may be that of the process's own group, or of one around it."""
        version_1 = "memory" in groups
        folder = tmp_path / "memory/slurm" if version_1 else tmp_path if groups == "0::/" else tmp_path / "slurm/job_7"
        folder.mkdir(parents=True, exist_ok=True)
        limit = folder / ("memory.limit_in_bytes" if version_1 else "memory.max")
        own = tmp_path / "own"
        own.write_text(f"{groups}\n")
        monkeypatch.setattr(source_module, "CONTROL_GROUPS", tmp_path)
        monkeypatch.setattr(source_module, "OWN_GROUPS", own)
        unlimited = source_module.free_bytes(torch.device("cpu"))
        limit.write_text("max\n")
        assert source_module.free_bytes(torch.device("cpu")) == pytest.approx(unlimited, rel=0.5)
        limit.write_text(f"{psutil.Process().memory_info().rss + 2**26}\n")
        assert source_module.free_bytes(torch.device("cpu")) < 2**27

    def test_without_control_groups_what_is_available_counts(self, tmp_path, monkeypatch):
        monkeypatch.setattr(source_module, "OWN_GROUPS", tmp_path / "none")
        assert source_module.free_bytes(torch.device("cpu")) > 0


def test_weights_in_memory_lie_as_streamed_ones_do(tmp_path, byte_tokenizer, random_windows):
    """At addresses that depend on the file, matrix products would round otherwise."""
    save_as_the_hub_does(build_family("qwen2_moe", torch.float32), tmp_path)
    byte_tokenizer.save_pretrained(tmp_path)
    source = ModelSource("tiny", str(tmp_path), "float32", "float32", alignment=8, minimum_width=8, device="cpu")
    whole, streamed = (dataclasses.replace(source, streaming=how).load() for how in ("never", "always"))
    assert all(parameter.data_ptr() % 64 == 0 for parameter in whole.parameters())
    values = [perplexity(model, random_windows, 2, "text") for model in (whole, streamed)]
    assert values[0] == values[1]


@one_model
@pytest.mark.parametrize("streaming", ["always", "never"])
def test_a_missing_tensor_is_a_model_error(source, tiny_checkpoint, streaming):
    tensors = load_file(tiny_checkpoint / "model.safetensors")
    del tensors["model.layers.0.self_attn.o_proj.weight"]
    save_file(tensors, tiny_checkpoint / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.layers\.0\.self_attn\.o_proj\.weight"):
        dataclasses.replace(source, streaming=streaming).load()
