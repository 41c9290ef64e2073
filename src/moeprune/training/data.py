"""Token windows in a seeded order that can be entered at any step."""

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler


class WindowMixture(Dataset[Tensor]):
    """Windows ``[begin token, L-1 tokens of one domain]`` drawn from several domains with fixed weights.

    Each domain's windows come in a seeded permutation, repeated when it is used up, so item i is the same in every
    process and after every restart. Items are int64 [sequence_length].
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

    def __getitem__(self, item: int) -> Tensor:
        window = self._windows[self._domain_of_item[item]][self._window_of_item[item]]
        return torch.cat([torch.tensor([self._begin_token]), torch.from_numpy(window.astype(np.int64))])


class ResumedOrder(Sampler[int]):
    """Yields items from ``first`` on but keeps the full length, as Lightning counts skipped batches as fetched."""

    def __init__(self, length: int, first: int) -> None:
        self._length, self._first = length, first

    def __iter__(self) -> Iterator[int]:
        return iter(range(self._first, self._length))

    def __len__(self) -> int:
        return self._length
