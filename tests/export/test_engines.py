"""Stock engines compute what the pruned model computes. Each test is skipped where its engine is not installed.

The engines live in environments of their own; these variables name the interpreters there:

    MOEPRUNE_LLAMA_CPP=/path/to/python    has llama-cpp-python
    MOEPRUNE_VLLM=/path/to/python         has vllm
"""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from families import build_family
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from moeprune.export.checkpoint import open_checkpoint
from moeprune.export.shape import stock_shape
from moeprune.export.stock import StockModel, stock_model
from moeprune.export.transformers_files import write_transformers
from moeprune.models.adapter import moe_layers
from moeprune.models.compressed.writer import save_compressed
from moeprune.models.families import to_contract
from moeprune.models.shape import local_folder

ENGINES = Path(__file__).parent / "engines"
SECONDS = 300
TEXT = "In the beginning, 1234 people\n\n  came: 'We'll see 12 + 30.'\ndef add(a, b):\n\treturn a + b  # naïve 東京\n"
# What the families' tiny models must have for llama.cpp to compute as they do.
CHANGES: dict[str, dict[str, object]] = {
    "qwen2_moe": {"mlp_only_layers": []},
    "olmoe": {"num_key_value_heads": 4},
    "gpt_oss": {"swiglu_limit": 7.0, "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}},
}
YARN = {
    "rope_theta": 1e4, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "beta_fast": 32,
    "beta_slow": 1,
}  # fmt: skip
MSCALE = {"mscale": 0.707, "mscale_all_dim": 0.707}


def interpreter(engine: str) -> str:
    path = os.environ.get(f"MOEPRUNE_{engine}")
    if path is None:
        pytest.skip(f"MOEPRUNE_{engine} names no interpreter that has the engine")
    return path


def run(engine: str, script: str, *arguments: Path) -> np.ndarray:
    out = arguments[0].with_suffix(".npy")
    command = [interpreter(engine), ENGINES / script, *arguments, out]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, cwd=arguments[0].parent)
    assert done.returncode == 0, done.stderr[-2000:]
    return np.load(out)


def cut_to_one_width(model: PreTrainedModel, cut_model: Callable[..., PreTrainedModel], share: float) -> None:
    cut_model(model, [[int(width * share) for width in layer.widths] for layer in moe_layers(model)])


def stock_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path, *, pad: bool) -> StockModel:
    (folder / "pruned").mkdir()
    save_compressed(model, tokenizer, folder / "pruned", torch.float32)
    checkpoint = open_checkpoint(folder / "pruned")
    return stock_model(checkpoint, stock_shape(checkpoint, pad=pad))


def tokens_and_logits(model: PreTrainedModel, file: Path) -> torch.Tensor:
    """Logits [T, V] of random tokens, which are written to ``file``."""
    tokens_T = torch.randint(1, 257, (40,), generator=torch.Generator().manual_seed(3))
    np.save(file, tokens_T.numpy())
    with torch.no_grad():
        return model(tokens_T[None]).logits[0]


@pytest.fixture(params=["tiny_qwen3_moe", "tiny_deepseek_v2"])
def embedded(request):
    """A trained embedded model and its tokenizer."""
    folder = local_folder(f"embedded:{request.param}")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


class TestLlamaCpp:
    """Logits equal up to float32 rounding."""

    @pytest.fixture(autouse=True)
    def needs(self):
        interpreter("LLAMA_CPP")
        pytest.importorskip("gguf")

    @pytest.fixture
    def parity(self, tmp_path):
        from moeprune.export.gguf_files import write_gguf

        def check(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, *, pad: bool = False) -> Path:
            file = tmp_path / "model.gguf"
            write_gguf(stock_of(model, tokenizer, tmp_path, pad=pad), file, "F32", None)
            expected = tokens_and_logits(model, tmp_path / "tokens.npy").numpy()
            logits = run("LLAMA_CPP", "llama_cpp_logits.py", file, tmp_path / "tokens.npy")
            np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
            return file

        return check

    @pytest.mark.parametrize(
        "family", ["qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "deepseek", "deepseek_v2", "deepseek_v3"]
    )
    def test_every_family(self, family, cut_model, merging_tokenizer, parity):
        model = build_family(family, torch.float32, vocab_size=280, **CHANGES.get(family, {}))
        to_contract(model)
        cut_to_one_width(model, cut_model, 0.5)
        parity(model, merging_tokenizer)

    @pytest.mark.parametrize(
        ("family", "rotary"),
        [
            ("qwen3_moe", YARN),
            ("qwen3_moe", {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}),
            ("deepseek_v2", YARN | MSCALE),
            ("deepseek_v3", YARN | MSCALE),
        ],
    )
    def test_scaled_rotary_embeddings(self, family, rotary, cut_model, merging_tokenizer, parity):
        model = build_family(family, torch.float32, vocab_size=280, rope_parameters=rotary)
        cut_to_one_width(model, cut_model, 0.5)
        parity(model, merging_tokenizer)

    def test_any_widths_padded_and_rows_without_experts(self, cut_model, merging_tokenizer, parity):
        model = build_family("qwen3_moe", torch.float32, vocab_size=280)
        cut_model(model, [[0, 3, 5, 7, 11, 13, 17, 19], [8] * 8], keep_rows=True)
        parity(model, merging_tokenizer, pad=True)

    def test_fewer_experts(self, cut_model, merging_tokenizer, parity):
        model = build_family("qwen2_moe", torch.float32, vocab_size=280, mlp_only_layers=[])
        cut_model(model, [[0, 24, 24, 0, 24, 24, 24, 24]] * 2)
        parity(model, merging_tokenizer)

    def test_embedded_models_and_their_tokenizer(self, embedded, cut_model, tmp_path, parity):
        model, tokenizer = embedded
        cut_to_one_width(model, cut_model, 0.5)
        file = parity(model, tokenizer)
        (tmp_path / "text").write_text(TEXT)
        assert run("LLAMA_CPP", "llama_cpp_tokens.py", file, tmp_path / "text").tolist() == tokenizer(TEXT).input_ids

    def test_every_split_that_is_known_by_name(self, cut_model, tmp_path):
        from moeprune.export.gguf_files import write_gguf
        from moeprune.export.gguf_vocabulary import GPT2, SPLITS

        (tmp_path / "text").write_text(TEXT)
        for number, split in enumerate(SPLITS):
            folder = tmp_path / str(number)
            folder.mkdir()
            model = build_family("qwen3_moe", torch.float32, vocab_size=400)
            cut_to_one_width(model, cut_model, 0.5)
            tokenizer = _trained_with(split, GPT2)
            file = folder / "model.gguf"
            write_gguf(stock_of(model, tokenizer, folder, pad=False), file, "F32", None)
            tokens = run("LLAMA_CPP", "llama_cpp_tokens.py", file, tmp_path / "text").tolist()
            assert tokens == tokenizer(TEXT).input_ids, SPLITS[split]


def _trained_with(split: tuple[str, ...], gpt2: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 380 tokens that splits text in these steps."""
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in split if pattern != gpt2]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=gpt2 in split))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=380, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT, "12 123 1234  12345 people's WE'LL see"], trainer=trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


class TestVllm:
    """Log probabilities equal up to float32 rounding. vLLM on a CPU takes about a minute per model to start."""

    @pytest.fixture(autouse=True)
    def needs(self):
        interpreter("VLLM")

    @pytest.mark.parametrize("pad", [False, True])
    def test_the_embedded_model(self, pad, cut_model, tmp_path):
        folder = local_folder("embedded:tiny_qwen3_moe")
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        cut_model(model, [[40 + 2 * row * pad for row in range(16)]] * 4)
        exported = tmp_path / "exported"
        exported.mkdir()
        write_transformers(stock_of(model, AutoTokenizer.from_pretrained(folder), tmp_path, pad=pad), exported)
        expected = tokens_and_logits(model, tmp_path / "tokens.npy").log_softmax(-1)[:-1].numpy()
        logs = run("VLLM", "vllm_log_probabilities.py", exported, tmp_path / "tokens.npy")
        np.testing.assert_allclose(logs, expected, atol=1e-4 * np.abs(expected).max())
