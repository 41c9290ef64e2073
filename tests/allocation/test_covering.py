"""Counts by coverage against an exhaustive search for the level, in exact fractions."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeprune.allocation.covering import cover

Rows = list[list[int]]


def tensor(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def coverage(row: list[int], count: int) -> Fraction:
    """What the ``count`` best channels of a row hold of its positive scores."""
    scores = sorted((max(score, 0) for score in row), reverse=True)
    return Fraction(sum(scores[:count]), sum(scores)) if sum(scores) else Fraction(1)


def counts_at(level: Fraction, rows: Rows, weights: list[Fraction], least: int) -> list[int]:
    """The fewest channels of each row that reach its target, by trying every count."""
    counts = []
    for row, weight in zip(rows, weights, strict=True):
        target = min(Fraction(1), level * weight)
        reaching = (count for count in range(1, len(row) + 1) if coverage(row, count) >= target)
        counts.append(max(least, next(reaching) if target > 0 else 0))
    return counts


def every_level(rows: Rows, weights: list[Fraction]) -> list[Fraction]:
    """Level 0, and every level at which some row's count changes."""
    levels = {
        coverage(row, count) / weight
        for row, weight in zip(rows, weights, strict=True)
        for count in range(1, len(row) + 1)
        if weight
    }
    return [Fraction(0), *sorted(levels)]


@st.composite
def problems(draw):
    width = draw(st.integers(1, 5))
    rows = draw(st.lists(st.lists(st.integers(-2, 9), min_size=width, max_size=width), min_size=1, max_size=4))
    # The two last ones are of the order of an expert that next to nothing is routed to.
    weight = st.sampled_from([Fraction(0), *map(Fraction, (1, 2, 3)), Fraction(1, 2**70), Fraction(1, 2**200)])
    weights = draw(st.lists(weight, min_size=len(rows), max_size=len(rows)))
    return rows, weights, draw(st.integers(0, width))


@settings(deadline=None, max_examples=50)
@given(problems(), st.data())
def test_counts_are_those_at_the_level_that_an_exhaustive_search_finds(problem, data):
    rows, weights, least = problem
    effective = weights if any(weights) else [Fraction(1)] * len(rows)
    level = data.draw(st.sampled_from(every_level(rows, effective)))
    expected = counts_at(level, rows, effective, least)
    assert cover(tensor(rows), tensor([float(w) for w in weights]), sum(expected), least=least).tolist() == expected


@settings(deadline=None, max_examples=50)
@given(problems(), st.data())
def test_counts_sum_exactly_to_any_target_between_least_and_everything(problem, data):
    rows, weights, least = problem
    width = len(rows[0])
    target = data.draw(st.integers(least * len(rows), width * len(rows)))
    counts = cover(tensor(rows), tensor([float(w) for w in weights]), target, least=least)
    assert counts.dtype == torch.int64
    assert int(counts.sum()) == target
    assert int(counts.min()) >= least
    assert int(counts.max()) <= width


def test_without_any_positive_score_one_channel_covers_a_row_and_the_rest_goes_by_index():
    assert cover(torch.zeros(3, 4).double(), torch.ones(3), 6, least=0).tolist() == [4, 1, 1]
    assert cover(torch.zeros(3, 4).double(), torch.ones(3), 9, least=2).tolist() == [4, 3, 2]


def test_equal_scores_and_weights_are_shared_equally():
    assert cover(torch.ones(4, 6).double(), torch.ones(4), 12, least=0).tolist() == [3, 3, 3, 3]


def test_twice_the_weight_reaches_twice_the_coverage():
    assert cover(torch.ones(2, 12).double(), tensor([2, 1]), 12, least=0).tolist() == [8, 4]


def test_one_row_takes_the_target():
    assert cover(tensor([[3, 1, 2, 0]]), tensor([0.2]), 3, least=0).tolist() == [3]


def test_a_row_of_weight_zero_gets_only_what_the_others_have_no_room_for():
    scores_NC = torch.ones(3, 4).double()
    assert cover(scores_NC, tensor([1, 0, 1]), 8, least=0).tolist() == [4, 0, 4]
    assert cover(scores_NC, tensor([1, 0, 1]), 10, least=0).tolist() == [4, 2, 4]
    assert cover(scores_NC, tensor([1, 0, 1]), 7, least=1).tolist() == [3, 1, 3]


@pytest.mark.parametrize("weight", [0.0, 1e-12, 1e-25, 1e-150])
def test_a_row_of_hardly_any_weight_does_not_blur_how_the_others_share(weight):
    scores_NC = tensor([[8, 4, 2, 1], [4, 3, 2, 2], [1, 1, 1, 1]])
    counts = cover(scores_NC, tensor([1, 0.5, weight]), 5 + bool(weight), least=0)
    assert counts.tolist() == [3, 2, bool(weight)]
