"""The tokenizer inside a GGUF file: byte-level BPE, by a name for the way it splits text that llama.cpp knows."""

import json
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, SpecialVocab, TokenType
from tokenizers import Tokenizer

from moeprune.errors import InputError

TOKENIZER = "tokenizer.json"
GPT2 = "ByteLevel with regex"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# How a tokenizer.json splits text before merging, by what llama.cpp calls it (src/llama-vocab.cpp names the patterns).
# Its "starcoder" isolates every number, "\d" only decimal digits: they differ on characters such as ½.
SPLITS = {
    (GPT2,): "gpt-2",
    (r"\d", GPT2): "starcoder",
    (_WORDS + r"\p{N}" + _REST,): "qwen2",
    (_WORDS + r"\p{N}{1,3}" + _REST,): "llama-bpe",
}


def add_vocabulary(writer: GGUFWriter, folder: Path, vocabulary_size: int, pre_tokenizer: str | None) -> None:
    """Tokens, merges, special tokens and chat template of the tokenizer in ``folder``.

    ``pre_tokenizer`` is llama.cpp's name of how text is split; None finds it in `SPLITS`. Ids without a token up to
    ``vocabulary_size`` are marked unused. Raises InputError for what llama.cpp would not split as the tokenizer does.
    """
    tokenizer = _byte_level_bpe(folder)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer or _pre_tokenizer(tokenizer["pre_tokenizer"]))
    added = {entry["id"]: entry for entry in tokenizer["added_tokens"]}
    tokens = {index: token for token, index in tokenizer["model"]["vocab"].items()}
    tokens |= {index: entry["content"] for index, entry in added.items()}
    kinds = []
    for index in range(vocabulary_size):
        if index not in tokens:
            kinds.append(TokenType.UNUSED)
        elif index in added:
            kinds.append(TokenType.CONTROL if added[index]["special"] else TokenType.USER_DEFINED)
        else:
            kinds.append(TokenType.NORMAL)
    writer.add_token_list([tokens.get(index, f"[PAD{index}]") for index in range(vocabulary_size)])
    writer.add_token_types(kinds)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]]
    writer.add_token_merges(merges)
    special = SpecialVocab(folder, load_merges=False, n_vocab=vocabulary_size)
    # Said in any case: llama.cpp takes it from the name of the split otherwise.
    special.add_special_token["bos"] = _adds_first_token(folder)
    special.add_to_gguf(writer, quiet=True)


def _adds_first_token(folder: Path) -> bool:
    tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
    return tokenizer.encode("a").ids[0] != tokenizer.encode("a", add_special_tokens=False).ids[0]


def _byte_level_bpe(folder: Path) -> dict[str, Any]:
    file = folder / TOKENIZER
    if not file.exists():
        raise InputError(f"{folder} has no {TOKENIZER}; a GGUF file holds the tokenizer.")
    tokenizer: dict[str, Any] = json.loads(file.read_text())
    model = tokenizer["model"]
    is_plain = tokenizer.get("normalizer") in (None, {"type": "NFC"}) and not model.get("byte_fallback")
    if model["type"] != "BPE" or not model["merges"] or not is_plain:
        raise InputError(
            "Only byte-level BPE tokenizers are written as GGUF.",
            change="Export with format=transformers, and convert that with llama.cpp's convert_hf_to_gguf.py.",
        )
    return tokenizer


def _pre_tokenizer(steps: dict[str, Any]) -> str:
    """llama.cpp's name. Raises InputError with what to set when the steps are none of `SPLITS`."""
    splits = []
    for step in steps["pretokenizers"] if steps["type"] == "Sequence" else [steps]:
        if step["type"] == "Split":
            splits.append(step["pattern"].get("Regex", "a fixed text"))
        elif step["type"] == "ByteLevel" and not step["add_prefix_space"]:
            splits += [GPT2] if step.get("use_regex", True) else []
        else:
            splits.append(step["type"])
    name = SPLITS.get(tuple(splits))
    if name is None:
        raise InputError(
            f"How this tokenizer splits text is not known by a name of llama.cpp's: {splits}.",
            change="Set pre_tokenizer to the name that llama.cpp's convert_hf_to_gguf.py gives the dense model, "
            "such as deepseek-llm or gpt-4o.",
        )
    return name
