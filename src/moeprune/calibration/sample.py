"""What a user chooses about calibration: which text, how many windows, how long."""

from dataclasses import dataclass
from typing import Protocol

import torch
from transformers import PreTrainedTokenizerBase

from moeprune.calibration.windows import TokenWindows, windows_of_text
from moeprune.errors import require_positive


class TextSource(Protocol):
    """Named texts, and what their content depends on."""

    def read(self) -> dict[str, str]: ...

    def identity(self) -> dict[str, object]: ...


@dataclass(frozen=True)
class Calibration:
    """``windows`` windows of ``sequence_length`` tokens, shared equally by the texts of ``source``.

    ``seed`` chooses the sample; ``batch_size`` windows go through the model at once and do not change the result
    beyond rounding.
    """

    source: TextSource
    windows: int
    sequence_length: int
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        require_positive(self, "windows", "sequence_length", "batch_size")

    def sample(self, tokenizer: PreTrainedTokenizerBase) -> TokenWindows:
        """The calibration windows. Raises InputError when a text is missing, empty or too short for one window."""
        texts = self.source.read()
        # What does not divide goes one window each to the first texts.
        shares = [(self.windows + after) // len(texts) for after in reversed(range(len(texts)))]
        parts = [
            windows_of_text(tokenizer, text, name=name, count=share, length=self.sequence_length, seed=self.seed)
            for (name, text), share in zip(texts.items(), shares, strict=True)
            if share
        ]
        input_ids_NT = torch.cat([part.input_ids_NT for part in parts])
        return TokenWindows(input_ids_NT, torch.ones_like(input_ids_NT))
