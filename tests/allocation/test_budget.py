"""The budget: whole blocks, never less kept than asked, and errors that name what to change."""

import math
import re
from itertools import pairwise

import pytest
from allocation_strategies import budgets
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moeprune.allocation.budget import Budget
from moeprune.errors import BudgetError, InputError

VALID = {"ratio": 0.5, "layers": 2, "experts": 4, "width": 24, "top_k": 2, "alignment": 4, "minimum_width": 8}


def budget(**changes: object) -> Budget:
    return Budget(**{**VALID, **changes})


def sums_of_widths(budget: Budget) -> set[int]:
    """Every number of channels that experts of allowed widths can keep together, by trying them all."""
    widths = [0, *range(budget.minimum_width, budget.width + 1, budget.alignment)]
    sums = {0}
    for _ in range(budget.layers * budget.experts):
        sums = {total + width for total in sums for width in widths}
    return sums


@settings(deadline=None)
@given(budgets())
def test_kept_is_the_least_number_of_channels_not_below_what_was_asked_that_widths_can_sum_to(budget):
    asked = (1 - budget.ratio) * budget.total_channels
    assert budget.kept_channels == min(total for total in sums_of_widths(budget) if total >= asked - 1e-6)


@settings(deadline=None)
@given(budgets())
def test_kept_is_whole_blocks_within_one_block_of_what_was_asked_where_any_block_may_stand_alone(budget):
    free = Budget(**{**vars(budget), "minimum_width": budget.alignment})
    surplus = free.kept_channels - (1 - free.ratio) * free.total_channels
    assert free.kept_channels % free.alignment == 0
    assert -1e-6 <= surplus < free.alignment


@given(st.lists(st.floats(0, 0.75), min_size=2, max_size=10))
def test_a_larger_ratio_never_keeps_more(ratios):
    kept = [budget(ratio=ratio, minimum_width=4).kept_channels for ratio in sorted(ratios)]
    assert all(more >= less for more, less in pairwise(kept))


def test_a_ratio_that_is_not_exact_in_binary_does_not_cost_a_block():
    assert budget(ratio=0.9, experts=10, width=8, layers=1, top_k=1, minimum_width=8).kept_channels == 8


def test_ratio_zero_keeps_every_channel():
    assert budget(ratio=0).kept_channels == 2 * 4 * 24


@pytest.mark.parametrize("ratio", [-0.1, 1, 1.2, math.nan, math.inf])
def test_a_ratio_outside_zero_to_one_is_refused(ratio):
    with pytest.raises(
        InputError, match=re.escape(f"ratio={ratio} is not possible") + r"(?s:.*)for example ratio=0\.5"
    ):
        budget(ratio=ratio)


@pytest.mark.parametrize("alignment", [0, -4, 7, 48])
def test_an_alignment_that_does_not_divide_the_width_is_refused_with_those_that_do(alignment):
    with pytest.raises(InputError, match=r"(?s)width 24.*Possible: 1, 2, 3, 4, 6, 8, 12, 24\..*Set model\.alignment"):
        budget(alignment=alignment)


@pytest.mark.parametrize("minimum_width", [0, -8, 6, 28])
def test_a_minimum_width_that_does_not_fit_is_refused(minimum_width):
    with pytest.raises(InputError, match=rf"(?s)minimum_width={minimum_width} .*Set model\.minimum_width"):
        budget(minimum_width=minimum_width)


def test_a_budget_below_top_k_experts_is_refused_with_the_numbers_and_a_ratio_that_works():
    with pytest.raises(
        BudgetError, match=r"leaves 20 channels, but 2 layers x top-2 experts x minimum width 8 need 32"
    ):
        budget(ratio=0.9)
    with pytest.raises(BudgetError, match=r"ratio of at most 0\.8333, or a smaller model\.minimum_width"):
        budget(ratio=0.9)
    assert budget(ratio=0.8333).kept_channels >= 32
    assert budget(ratio=0.9, minimum_width=4).kept_channels == 20


@settings(deadline=None)
@given(budgets())
def test_the_ratio_that_the_error_recommends_works(valid):
    assume(valid.layers * valid.top_k > 1)
    with pytest.raises(BudgetError) as refused:
        Budget(**{**vars(valid), "ratio": 0.9999999})
    recommended = float(re.search(r"ratio of at most ([\d.]+),", str(refused.value))[1])
    assert Budget(**{**vars(valid), "ratio": recommended}).kept_channels >= valid.least_channels


def test_the_note_says_what_rounding_changed_and_is_empty_when_nothing():
    assert budget(ratio=0.5).rounding_note == ""
    note = budget(ratio=0.51).rounding_note
    assert "asked to remove 97.9 channels" in note
    assert "blocks of 4" in note
    assert note.endswith("make it 96")
