"""Text -> fixed token windows, each starting with the tokenizer's begin token, as the models were trained on."""

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from moeprune.errors import InputError

log = logging.getLogger(__name__)

# Enough characters per requested token for any tokenizer met so far; a shorter text is used whole.
CHARACTERS_PER_TOKEN = 8
# So many sampled passages with too few tokens, and longer ones are tried.
MISSES_PER_PASSAGE = 100


class WindowBatches(Sequence[tuple[Tensor, Tensor]]):
    """Batches ``(input_ids [B, T], attention_mask [B, T])`` of consecutive windows."""

    def __init__(self, windows: "TokenWindows", batch_size: int) -> None:
        self._windows, self._batch_size = windows, batch_size

    def __len__(self) -> int:
        return -(-len(self._windows.input_ids_NT) // self._batch_size)

    def __getitem__(self, index: Any) -> Any:
        if index >= len(self):
            raise IndexError(index)
        rows = slice(index * self._batch_size, (index + 1) * self._batch_size)
        return self._windows.input_ids_NT[rows], self._windows.mask_NT[rows]


@dataclass(frozen=True)
class TokenWindows:
    """N windows of T tokens, int64; ``mask_NT`` is 1 for tokens that count and 0 for padding."""

    input_ids_NT: Tensor
    mask_NT: Tensor

    @property
    def token_count(self) -> int:
        return int(self.mask_NT.sum())

    def batches(self, batch_size: int) -> WindowBatches:
        return WindowBatches(self, batch_size)

    def save(self, path: Path) -> None:
        save_file({"input_ids_NT": self.input_ids_NT.contiguous(), "mask_NT": self.mask_NT.contiguous()}, path)

    @classmethod
    def load(cls, path: Path) -> "TokenWindows":
        return cls(**load_file(path))


def windows_of_text(
    tokenizer: PreTrainedTokenizerBase, text: str, *, name: str, count: int, length: int, seed: int | None = None
) -> TokenWindows:
    """``count`` windows of ``length`` tokens: the first ones of the text, or with a seed a random sample. Fewer if the
    text is shorter.

    Raises InputError when the text does not fill one window, or a window is too short to predict anything.
    """
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    prefix = [] if begin is None else [begin]
    body = length - len(prefix)
    if body < 2:
        raise InputError(f"sequence_length={length} leaves nothing to predict.", change="Use 128 or more.")
    enough = count * body * CHARACTERS_PER_TOKEN
    if seed is None or len(text) <= enough:
        bodies = _consecutive(tokenizer, text[:enough], body)
        if seed is not None and len(bodies) > count:
            bodies = random.Random(seed).sample(bodies, count)
    else:
        bodies = _sampled(tokenizer, text, body, count, seed)
    if not bodies:
        raise InputError(
            f"The text {name!r} does not fill one window of {body} tokens.",
            change="Use a longer text or a smaller sequence_length.",
        )
    if len(bodies) < count:
        log.warning("text %s fills %d windows of %d tokens; %d were asked for", name, len(bodies), length, count)
    input_ids_NT = torch.tensor([prefix + window for window in bodies[:count]])
    return TokenWindows(input_ids_NT, torch.ones_like(input_ids_NT))


def _consecutive(tokenizer: PreTrainedTokenizerBase, text: str, body: int) -> list[list[int]]:
    token_ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return [token_ids[start : start + body] for start in range(0, len(token_ids) - body + 1, body)]


def _sampled(tokenizer: PreTrainedTokenizerBase, text: str, body: int, count: int, seed: int) -> list[list[int]]:
    """Windows that start at random lines; only the sampled passages are tokenised, so a large text costs nothing."""
    rng = random.Random(seed)
    passage = body * CHARACTERS_PER_TOKEN
    bodies: list[list[int]] = []
    misses = 0
    while len(bodies) < count:
        line_break = text.find("\n", rng.randrange(len(text) - passage))
        start = line_break + 1 if 0 <= line_break < len(text) - passage else rng.randrange(len(text) - passage)
        token_ids = tokenizer(text[start : start + passage], add_special_tokens=False, verbose=False)["input_ids"]
        if len(token_ids) >= body:
            bodies.append(token_ids[:body])
            continue
        misses += 1
        if misses % MISSES_PER_PASSAGE == 0:
            if passage == len(text) - 1:
                break
            passage = min(2 * passage, len(text) - 1)
    return bodies
