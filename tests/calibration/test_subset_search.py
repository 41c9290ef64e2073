"""Searches for subsets against all subsets, with losses from tables of chance numbers and from quadratic forms."""

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeprune.calibration.subset_search import GeneticSearch, best_of_all, eliminated
from moeprune.errors import InputError


def chance_losses(experts: int, seed: int):
    """Every subset has a number of its own, so nothing is learnt from its neighbours."""
    return looked_up(torch.rand(2**experts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


def quadratic_losses(experts: int, seed: int):
    """``||sum of the vectors of those that go||``: what goes together may cancel, as experts' outputs do."""
    vectors_EH = torch.randn(experts, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    stays_SE = torch.arange(2**experts).unsqueeze(1) // 2 ** torch.arange(experts) % 2
    return looked_up(((1 - stays_SE).double() @ vectors_EH).norm(dim=1))


def looked_up(loss_S):
    """Entry sum_e 2^e over the experts kept."""
    numbers = loss_S.tolist()
    return lambda kept: numbers[sum(2**expert for expert in kept)]


def by_size(found) -> dict[int, tuple[float, list[int]]]:
    found = list(found)
    assert len({len(kept) for _, kept in found}) == len(found)
    return {len(kept): (loss, kept) for loss, kept in found}


def smallest(loss, experts: int, size: int) -> float:
    return min(loss(list(kept)) for kept in combinations(range(experts), size))


losses = st.builds(
    lambda kind, experts, seed: (kind(experts, seed), experts),
    st.sampled_from([chance_losses, quadratic_losses]),
    st.integers(2, 9),
    st.integers(0, 2**31),
)


@settings(deadline=None, max_examples=50)
@given(losses, st.integers(1, 8), st.integers(1, 8), st.integers(1, 4), st.integers(0, 99))
def test_breeding_finds_a_subset_of_each_size_that_is_never_worse_than_elimination(case, least, size, rounds, seed):
    loss, experts = case
    least = min(least, experts - 1)
    bred = by_size(GeneticSearch(population=size, generations=rounds, seed=seed)(loss, experts, least))
    greedy = by_size(eliminated(loss, experts, least))
    assert set(bred) == set(greedy) == set(range(least, experts))
    for count, (lost, kept) in bred.items():
        assert kept == sorted(set(kept)) and set(kept) <= set(range(experts))
        assert lost == loss(kept)
        assert smallest(loss, experts, count) <= lost <= greedy[count][0]


@settings(deadline=None, max_examples=20)
@given(losses)
def test_the_exhaustive_search_finds_the_smallest_loss_of_every_size(case):
    loss, experts = case
    for size, (lost, kept) in by_size(best_of_all(loss, experts, 1)).items():
        assert lost == loss(kept) == smallest(loss, experts, size)


def test_among_equals_the_exhaustive_search_keeps_and_elimination_drops_the_first():
    assert [kept for _, kept in best_of_all(lambda _kept: 0.0, 4, 2)] == [[0, 1], [0, 1, 2]]
    assert [kept for _, kept in eliminated(lambda _kept: 0.0, 4, 2)] == [[1, 2, 3], [2, 3]]


def test_breeding_mostly_finds_the_best_subset_of_few_experts():
    """A population of 8 is far below the 70 subsets of 4 of 8."""
    cases = [(quadratic_losses(experts, seed), experts) for experts in (6, 7, 8) for seed in range(10)]
    search = GeneticSearch(population=8, generations=12)
    assert optimal_share(search, cases) > 0.9 > optimal_share(eliminated, cases)


def optimal_share(search, cases) -> float:
    """Of all sizes of all cases, how many end in the smallest loss there is."""
    optimal = [
        lost == smallest(loss, experts, len(kept)) for loss, experts in cases for lost, kept in search(loss, experts, 2)
    ]
    return sum(optimal) / len(optimal)


def test_breeding_leaves_the_trap_of_elimination():
    """Expert 0 costs least alone, so elimination drops it first; 10 and 11 together cost nothing."""
    vectors = [1.0, *(4.0 + index for index in range(9)), 2.0, -2.0]

    def loss(kept: list[int]) -> float:
        return abs(sum(vector for expert, vector in enumerate(vectors) if expert not in kept))

    assert by_size(eliminated(loss, 12, 10))[10] == (1, list(range(1, 11)))
    assert by_size(GeneticSearch()(loss, 12, 10))[10] == (0, list(range(10)))


def test_a_seed_decides_the_result_and_sizes_do_not_depend_on_each_other():
    loss = chance_losses(12, 0)
    search = GeneticSearch(population=6, generations=3, seed=1)
    found = by_size(search(loss, 12, 2))
    assert by_size(search(loss, 12, 2)) == found
    assert by_size(search(loss, 12, 6)) == {size: each for size, each in found.items() if size >= 6}
    assert by_size(GeneticSearch(population=6, generations=3, seed=2)(loss, 12, 2)) != found


def test_sizes_with_few_combinations_are_searched_exhaustively():
    loss = chance_losses(9, 3)
    found = by_size(GeneticSearch(population=36, generations=1)(loss, 9, 1))
    for size in (1, 2, 7, 8):
        assert found[size][0] == smallest(loss, 9, size)


def test_breeding_costs_at_most_a_population_per_generation_beyond_elimination():
    calls = []
    loss = quadratic_losses(10, 0)

    def counted(kept: list[int]) -> float:
        calls.append(tuple(kept))
        return loss(kept)

    list(eliminated(counted, 10, 3))
    elimination = len(calls)
    list(GeneticSearch(population=5, generations=4)(counted, 10, 3))
    sizes = 7
    assert len(calls) - elimination <= elimination + sizes * 5 * (4 + 1)


def test_more_generations_never_find_worse():
    loss = chance_losses(12, 5)
    short = by_size(GeneticSearch(population=6, generations=2)(loss, 12, 2))
    longer = by_size(GeneticSearch(population=6, generations=9)(loss, 12, 2))
    assert all(longer[size][0] <= short[size][0] for size in short)
    assert any(longer[size][0] < short[size][0] for size in short)


@pytest.mark.parametrize("setting", ["population", "generations"])
def test_nothing_to_breed_is_refused(setting):
    with pytest.raises(InputError, match=f"{setting}=0"):
        GeneticSearch(**{setting: 0})
