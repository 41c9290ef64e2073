"""Tensors are read from safetensors files as they were written, without mapping the files."""

import pytest
import torch
from safetensors.torch import save_file

from moeprune.errors import ModelError
from moeprune.models.layers.stored import DTYPES, stored_tensors


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("shape", [(3, 5), (7,), (), (0, 4), (2, 3, 4)], ids=str)
def test_every_kind_of_number_comes_back_bit_for_bit(tmp_path, dtype, shape):
    values = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 5).to(dtype)
    # A byte before it, so that it does not begin at a round address.
    save_file({"before": torch.ones(1, dtype=torch.uint8), "values": values}, tmp_path / "file.safetensors")
    stored = stored_tensors(tmp_path / "file.safetensors")["values"]
    assert (stored.dtype, stored.shape) == (dtype, shape)
    assert torch.equal(stored.read(), values)
    assert torch.equal(stored[...], values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_tensor_can_be_read_to_its_place(tmp_path, dtype):
    values = torch.randn(4, 6).to(torch.bfloat16)
    save_file({"values": values}, tmp_path / "file.safetensors")
    whole = torch.zeros(3, 8, 6, dtype=dtype)
    stored_tensors(tmp_path / "file.safetensors")["values"].read_into(whole[1, 2:6])
    assert torch.equal(whole[1, 2:6], values.to(dtype))
    assert whole.count_nonzero() == values.count_nonzero()


def test_a_place_that_is_not_contiguous_is_filled_too(tmp_path):
    values = torch.randn(4, 6)
    save_file({"values": values}, tmp_path / "file.safetensors")
    whole = torch.zeros(6, 4)
    stored_tensors(tmp_path / "file.safetensors")["values"].read_into(whole.T)
    assert torch.equal(whole.T, values)


def test_a_file_that_was_cut_after_opening_is_a_model_error(tmp_path):
    file = tmp_path / "file.safetensors"
    save_file({"values": torch.ones(100)}, file)
    stored = stored_tensors(file)["values"]
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ModelError, match="ends before its last tensor"):
        stored.read()
    with pytest.raises(ModelError, match="is damaged"):
        stored_tensors(file)


def test_numbers_of_an_unknown_type_are_a_model_error(tmp_path):
    file = tmp_path / "file.safetensors"
    save_file({"values": torch.ones(4)}, file)
    file.write_bytes(file.read_bytes().replace(b'"F32"', b'"Q32"'))
    with pytest.raises(ModelError, match="Q32"):
        stored_tensors(file)
