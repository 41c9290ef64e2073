"""Token sequences of any length -> windows of one length, as full as possible."""

from dataclasses import dataclass

import torch

from moeprune.training.data import NO_LABEL, LabelledWindows


@dataclass(frozen=True)
class Example:
    """Tokens in order; those from ``first_target`` (at least 1) on are labels."""

    token_ids: list[int]
    first_target: int


class Packing:
    """Windows that examples are put into one after the other, each whole and where the least room is left after it.

    (Best fit: for examples much shorter than a window little is left over.) In a window each example sees those
    before it, as is common where examples are packed. Where ``begin`` ends one example and begins the next, it is there
    once. With ``pack`` off each has a window of its own. Windows beyond ``most`` are not begun.
    """

    def __init__(self, length: int, *, most: int | None, pack: bool, begin: int) -> None:
        self._length, self._most, self._pack, self._begin = length, most, pack, begin
        self.windows: list[list[Example]] = []
        # By the room that is left: the windows with so much of it.
        self._with_room: list[list[int]] = [[] for _ in range(length + 1)]

    def add(self, example: Example) -> bool:
        """Put it into a window; False where there is none left for it. An example is at most a window long."""
        size = len(example.token_ids)
        room = next((room for room in range(size, self._length) if self._with_room[room]), None)
        if self._pack and room is not None:
            window = self._with_room[room].pop()
            if self.windows[window][-1].token_ids[-1] == example.token_ids[0] == self._begin:
                example = Example(example.token_ids[1:], example.first_target - 1)
            self.windows[window].append(example)
        elif len(self.windows) == self._most:
            return False
        else:
            window, room = len(self.windows), self._length
            self.windows.append([example])
        self._with_room[room - len(example.token_ids)].append(window)
        return True

    def labelled_windows(self, padding: int) -> LabelledWindows:
        """The windows, filled up with ``padding`` tokens that are no labels.

        Padding needs no mask: it comes last, and a token sees only those before it.
        """
        shape = len(self.windows), self._length
        input_ids_NT = torch.full(shape, padding, dtype=torch.int64)
        labels_NT = torch.full(shape, NO_LABEL, dtype=torch.int64)
        for window, examples in enumerate(self.windows):
            start = 0
            for example in examples:
                ids, end = torch.tensor(example.token_ids), start + len(example.token_ids)
                input_ids_NT[window, start:end] = ids
                labels_NT[window, start + example.first_target : end] = ids[example.first_target :]
                start = end
        return LabelledWindows(input_ids_NT, labels_NT)
