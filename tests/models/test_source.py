"""A model as the user names it: loading, identity by content, and errors before anything is computed."""

import dataclasses
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from moeprune.errors import InputError, ModelError
from moeprune.models.source import ModelSource

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
    with pytest.raises(ModelError, match="cannot be loaded"):
        source.load()


@one_model
def test_a_missing_checkpoint_is_a_model_error(source, tiny_checkpoint):
    (tiny_checkpoint / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot be loaded"):
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
