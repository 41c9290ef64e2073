"""Token windows to train on: drawn from a mixture of texts, or with labels that say what counts."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Dataset

from moeprune.errors import InputError

NO_LABEL = -100  # transformers' and PyTorch's mark of a token that gives no loss


@dataclass(frozen=True)
class LabelledWindows(Dataset[dict[str, Tensor]]):
    """N windows of T tokens and their labels, both int64 [N, T]; -100 marks a token that gives no loss.

    A label stands at its own token's place, so the first of a window never counts. Padding has no label and comes last.

    Raises InputError when the shapes differ, or no label counts.
    """

    input_ids_NT: Tensor
    labels_NT: Tensor

    def __post_init__(self) -> None:
        if self.input_ids_NT.shape != self.labels_NT.shape or self.input_ids_NT.dim() != 2:
            raise InputError(
                f"Windows of shape {tuple(self.input_ids_NT.shape)} cannot have labels of shape "
                f"{tuple(self.labels_NT.shape)}.",
                change="Give one label per token, -100 where it gives no loss.",
            )
        if self.target_count == 0:
            raise InputError(
                "No token of the training windows gives a loss.", change="Use longer windows or more text."
            )

    def __len__(self) -> int:
        return len(self.input_ids_NT)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """``{"input_ids" [T], "labels" [T], "index" []}`` of one window."""
        if index >= len(self):
            raise IndexError(index)
        return {"input_ids": self.input_ids_NT[index], "labels": self.labels_NT[index], "index": torch.tensor(index)}

    @property
    def target_count(self) -> int:
        """Labels that count."""
        return int((self.labels_NT[:, 1:] != NO_LABEL).sum())

    def take(self, count: int) -> "LabelledWindows":
        """The first ``count`` windows; they keep their indices."""
        return LabelledWindows(self.input_ids_NT[:count], self.labels_NT[:count])

    def save(self, path: Path) -> None:
        save_file({"input_ids_NT": self.input_ids_NT.contiguous(), "labels_NT": self.labels_NT.contiguous()}, path)

    @classmethod
    def load(cls, path: Path) -> "LabelledWindows":
        return cls(**load_file(path))


class WindowMixture(Dataset[dict[str, Tensor]]):
    """Windows ``[begin token, L-1 tokens of one domain]`` drawn from several domains with fixed weights.

    Each domain's windows come in a seeded permutation, repeated when it is used up, so item i is the same in every
    process and after every restart. Items are ``{"input_ids": int64 [sequence_length]}``.
    """

    def __init__(
        self,
        tokens_of: Mapping[str, np.ndarray],
        weights: Mapping[str, float],
        *,
        count: int,
        sequence_length: int,
        begin_token: int,
        seed: int,
    ) -> None:
        rng = np.random.default_rng(seed)
        self._begin_token = begin_token
        body = sequence_length - 1
        self._windows = {name: ids[: len(ids) // body * body].reshape(-1, body) for name, ids in tokens_of.items()}
        names = list(self._windows)
        share = np.array([weights[name] for name in names])
        self._domain_of_item = [names[i] for i in rng.choice(len(names), size=count, p=share / share.sum())]
        used = dict.fromkeys(names, 0)
        order = {name: rng.permutation(len(self._windows[name])) for name in names}
        self._window_of_item = np.empty(count, dtype=np.int64)
        for item, name in enumerate(self._domain_of_item):
            self._window_of_item[item] = order[name][used[name] % len(order[name])]
            used[name] += 1

    def __len__(self) -> int:
        return len(self._domain_of_item)

    def __getitem__(self, item: int) -> dict[str, Tensor]:
        window = self._windows[self._domain_of_item[item]][self._window_of_item[item]]
        return {"input_ids": torch.cat([torch.tensor([self._begin_token]), torch.from_numpy(window.astype(np.int64))])}


def target_tokens(batch: Mapping[str, Tensor]) -> Tensor:
    """Which tokens of a batch but the first of each window are predicted and count; bool [B, T - 1]."""
    return batch.get("labels", batch["input_ids"])[:, 1:] != NO_LABEL


def read_tokens(batch: Mapping[str, Tensor]) -> Tensor | None:
    """Which tokens of a batch a label depends on, bool [B * T]: all but padding; None for all."""
    if "labels" not in batch:
        return None
    counts_BT = batch["labels"] != NO_LABEL
    return counts_BT.flip(1).cummax(dim=1).values.flip(1).flatten()
