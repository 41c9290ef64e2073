"""What stands in an exported GGUF file, read back with the gguf package."""

import numpy as np
import pytest
import torch
from families import FAMILIES, build_family
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from moeprune.errors import InputError
from moeprune.export.checkpoint import open_checkpoint
from moeprune.export.shape import stock_shape
from moeprune.export.stock import StockModel, stock_model
from moeprune.models.adapter import moe_layers
from moeprune.models.families import to_contract

gguf = pytest.importorskip("gguf", reason="needs the extra 'export'")

from moeprune.export.gguf_families import GGUF_FAMILIES  # noqa: E402
from moeprune.export.gguf_files import ENCODINGS, write_gguf  # noqa: E402


@pytest.fixture
def stock_of(pruned_folder):
    """``stock_of(model, pad=)``: the stock model of a cut model."""

    def stock(model: PreTrainedModel, *, pad: bool = False) -> StockModel:
        checkpoint = open_checkpoint(pruned_folder(model))
        return stock_model(checkpoint, stock_shape(checkpoint, pad=pad))

    return stock


@pytest.fixture
def qwen3(cut_model):
    """Two layers of 8 experts, cut to 8 channels, head tied to the embedding; bfloat16."""
    model = build_family("qwen3_moe", torch.bfloat16, vocab_size=280, tie_word_embeddings=True)
    return cut_model(model, [[8] * 8] * 2)


@pytest.fixture
def byte_tokenizer(merging_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """What `pruned_folder` writes here."""
    return merging_tokenizer


def read(file):
    reader = gguf.GGUFReader(file)
    tensors = {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    return {name: field.contents() for name, field in reader.fields.items()}, tensors, kinds


def test_settings_and_weights(qwen3, stock_of, tmp_path):
    write_gguf(stock_of(qwen3), tmp_path / "a.gguf", "BF16", None)
    settings, tensors, kinds = read(tmp_path / "a.gguf")
    wanted = {"expert_count": 8, "expert_used_count": 3, "expert_feed_forward_length": 8, "block_count": 2}
    assert {name: settings[f"qwen3moe.{name}"] for name in wanted} == wanted
    experts = moe_layers(qwen3)[1].experts
    for part in ("gate", "up", "down"):
        stacked = torch.stack([getattr(expert, f"{part}_proj").weight for expert in experts])
        np.testing.assert_array_equal(tensors[f"blk.1.ffn_{part}_exps.weight"], stacked.float().detach().numpy())
    assert kinds["blk.1.ffn_down_exps.weight"] == "BF16"
    assert kinds["blk.1.ffn_gate_inp.weight"] == kinds["blk.1.attn_norm.weight"] == "F32"
    assert "output.weight" not in tensors  # tied to the embedding


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_encodings_are_as_exact_as_they_can_be(encoding, qwen3, stock_of, tmp_path):
    write_gguf(stock_of(qwen3), tmp_path / "a.gguf", encoding, None)
    _, tensors, kinds = read(tmp_path / "a.gguf")
    name = "blk.0.attn_q.weight"
    weight = qwen3.model.layers[0].self_attn.q_proj.weight.float().detach().numpy()
    scale = np.abs(weight).max() / 127
    assert kinds[name] == encoding
    assert np.abs(tensors[name] - weight).max() <= (scale if encoding == "Q8_0" else 0)
    # Rows of 8 channels are no whole blocks of Q8_0.
    assert kinds["blk.0.ffn_down_exps.weight"] == ("F16" if encoding == "Q8_0" else encoding)


def test_the_tokenizer(qwen3, stock_of, tmp_path):
    write_gguf(stock_of(qwen3), tmp_path / "a.gguf", "F32", None)
    settings, _, _ = read(tmp_path / "a.gguf")
    assert settings["tokenizer.ggml.model"] == "gpt2"
    assert settings["tokenizer.ggml.pre"] == "starcoder"
    assert settings["tokenizer.ggml.tokens"][0] == "<|endoftext|>"
    assert settings["tokenizer.ggml.merges"][0] == "a t"
    assert settings["tokenizer.ggml.token_type"][-1] == gguf.TokenType.UNUSED
    assert settings["tokenizer.ggml.token_type"][:2] == [gguf.TokenType.CONTROL, gguf.TokenType.NORMAL]
    assert settings["tokenizer.ggml.eos_token_id"] == 0
    assert settings["tokenizer.ggml.add_bos_token"] is False


def test_padding_fills_up_with_zeros(cut_model, stock_of, tmp_path):
    model = cut_model(build_family("qwen3_moe", torch.float32, vocab_size=280), [[8] * 8, [5] * 8])
    write_gguf(stock_of(model, pad=True), tmp_path / "a.gguf", "F32", None)
    _, tensors, _ = read(tmp_path / "a.gguf")
    down = tensors["blk.1.ffn_down_exps.weight"]
    assert down.shape == (8, 32, 8)
    assert (down[..., 5:] == 0).all() and (down[..., :5] != 0).all()


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("mixtral", {}, "convert_hf_to_gguf"),
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob=true"),
        ("gpt_oss", {}, "swiglu_limit=1.5"),
        ("olmoe", {}, "key-value heads"),
        ("qwen2_moe", {}, "has no tensor model.layers.0.mlp.gate_proj.weight"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(family, changes, message, cut_model, stock_of, tmp_path):
    model = build_family(family, torch.float32, vocab_size=280, **changes)
    to_contract(model)
    cut_model(model, [[8] * layer.expert_count for layer in moe_layers(model)])
    with pytest.raises(InputError, match=message):
        write_gguf(stock_of(model), tmp_path / "a.gguf", "F32", None)


def test_an_unknown_split_names_the_setting(qwen3, stock_of, tmp_path):
    stock = stock_of(qwen3)
    file = stock.checkpoint.folder / "tokenizer.json"
    file.write_text(file.read_text().replace(r"\\d", r"\\d\\d"))
    with pytest.raises(InputError, match="pre_tokenizer"):
        write_gguf(stock, tmp_path / "a.gguf", "F32", None)
    write_gguf(stock, tmp_path / "b.gguf", "F32", "qwen2")
    assert read(tmp_path / "b.gguf")[0]["tokenizer.ggml.pre"] == "qwen2"


def test_every_family_is_one_that_is_known():
    assert set(GGUF_FAMILIES) <= set(FAMILIES)
