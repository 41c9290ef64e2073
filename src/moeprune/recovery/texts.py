"""Plain text as training data: every token is a label."""

import random
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedTokenizerBase

from moeprune.calibration.sample import Calibration, TextSource
from moeprune.errors import require_positive
from moeprune.training.data import NO_LABEL, LabelledWindows


@dataclass(frozen=True)
class TextData:
    """``windows`` windows of ``sequence_length`` tokens, shared equally by the texts of ``source``, in mixed order.

    They are sampled as calibration windows are, with other random numbers: the same ``seed`` gives other windows.
    """

    source: TextSource
    windows: int
    sequence_length: int
    seed: int

    def __post_init__(self) -> None:
        require_positive(self, "windows", "sequence_length")

    def check(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise InputError for what is bound to fail."""
        replace(self, windows=len(self.source.read()))(tokenizer)

    def __call__(self, tokenizer: PreTrainedTokenizerBase) -> LabelledWindows:
        """The windows; fewer, with a warning, where a text is short. Raises InputError as `Calibration.sample` does."""
        own_seed = random.Random(f"training data {self.seed}").getrandbits(32)
        sample = Calibration(self.source, self.windows, self.sequence_length, batch_size=1, seed=own_seed)
        input_ids_NT = sample.sample(tokenizer).input_ids_NT
        order_N = torch.randperm(len(input_ids_NT), generator=torch.Generator().manual_seed(own_seed))
        input_ids_NT = input_ids_NT[order_N]
        labels_NT = input_ids_NT.clone()
        labels_NT[:, 0] = NO_LABEL  # nothing predicts the begin token
        return LabelledWindows(input_ids_NT, labels_NT)
