"""Packing: every example whole and once, nothing overlaps, padding is no label."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from moeprune.recovery.packing import Example, Packing
from moeprune.training.data import NO_LABEL

LENGTH, END, PADDING = 12, 1, 99


@st.composite
def example_lists(draw):
    """Examples of 3 to LENGTH tokens: the same begin and end in all, which may be one token; all others differ."""
    begin, names = draw(st.sampled_from([END, 2])), iter(range(1000, 10_000))
    sizes = draw(st.lists(st.integers(3, LENGTH), min_size=1, max_size=30))
    return [
        Example([begin, *(next(names) for _ in range(size - 2)), END], draw(st.integers(1, size - 1))) for size in sizes
    ]


@given(example_lists(), st.booleans())
def test_every_example_is_whole_and_once_with_its_labels(examples, pack):
    packing = Packing(LENGTH, most=None, pack=pack, begin=END)
    assert all(packing.add(example) for example in examples)
    windows = packing.labelled_windows(PADDING)
    ids_NT, labels_NT = windows.input_ids_NT.tolist(), windows.labels_NT.tolist()
    for example in examples:
        ((row, start),) = [
            (row, ids_T.index(example.token_ids[1]))
            for row, ids_T in enumerate(ids_NT)
            if example.token_ids[1] in ids_T
        ]
        end = start + len(example.token_ids) - 1
        assert ids_NT[row][start - 1 : end] == example.token_ids
        before = [NO_LABEL] * (example.first_target - 1)
        assert labels_NT[row][start:end] == before + example.token_ids[example.first_target :]
    assert windows.target_count == sum(len(each.token_ids) - each.first_target for each in examples)
    assert len(windows) == len(examples) or pack


def test_examples_go_where_the_least_room_is_left():
    packing = Packing(10, most=None, pack=True, begin=0)
    for name, size in enumerate([6, 7, 3, 4, 10, 2]):
        packing.add(Example([name] * size, 1))
    assert [[each.token_ids[0] for each in window] for window in packing.windows] == [[0, 3], [1, 2], [4], [5]]


def test_windows_beyond_the_limit_are_not_begun_and_the_others_go_on_taking():
    packing = Packing(10, most=1, pack=True, begin=0)
    assert packing.add(Example([1] * 6, 1))
    assert not packing.add(Example([2] * 5, 1))
    assert packing.add(Example([3] * 4, 1))
    assert torch.equal(packing.labelled_windows(0).input_ids_NT, torch.tensor([[1] * 6 + [3] * 4]))


def test_an_end_that_is_the_next_begin_is_there_once():
    packing = Packing(10, most=None, pack=True, begin=0)
    for example in [Example([0, 5, 0], 1), Example([0, 6, 7, 0], 2)]:
        packing.add(example)
    windows = packing.labelled_windows(9)
    assert windows.input_ids_NT.tolist() == [[0, 5, 0, 6, 7, 0, 9, 9, 9, 9]]
    assert windows.labels_NT.tolist() == [[-100, 5, 0, -100, 7, 0, *[-100] * 4]]


def test_another_token_that_ends_one_example_and_begins_the_next_is_there_twice():
    packing = Packing(10, most=None, pack=True, begin=0)
    for example in [Example([3, 5, 3], 1), Example([3, 6, 3], 1)]:
        packing.add(example)
    windows = packing.labelled_windows(9)
    assert windows.input_ids_NT.tolist() == [[3, 5, 3, 3, 6, 3, 9, 9, 9, 9]]
    assert windows.target_count == 4
