"""Searches for the experts of a layer that lose least when kept together, given what any subset loses."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from math import comb
from random import Random

from moeprune.errors import require_positive

Loss = Callable[[list[int]], float]  # of the experts kept, in ascending order
Found = tuple[float, list[int]]  # (loss, kept)
Combination = tuple[int, ...]  # experts removed together, in ascending order


def best_of_all(loss: Loss, experts: int, least: int) -> Iterator[Found]:
    """The best subset of each size from ``least`` to all but one; the first in lexical order among equals."""
    for size in range(least, experts):
        yield _best_of_size(loss, experts, size)


def eliminated(loss: Loss, experts: int, least: int) -> Iterator[Found]:
    """What is left after each elimination of the expert that costs least, down to ``least``.

    Among equals the expert of the smallest index goes.
    """
    kept = list(range(experts))
    while len(kept) > least:
        lost, gone = min((loss(without(kept, gone)), gone) for gone in kept)
        kept = without(kept, gone)
        yield lost, kept


@dataclass(frozen=True)
class GeneticSearch:
    """Breeds good combinations of experts to remove, for every size by itself (MoE-I2, arXiv 2411.01016).

    The first population is the result of `eliminated` and random combinations, all different. In each generation as
    many children as the population is large are bred from its better half: a child draws its experts from the union of
    two parents, and every second one, by chance, has one of them exchanged for an expert that would have stayed. The
    best of old and new live on, so the result never loses more than the elimination's. The paper starts from random
    combinations only. A size with no more combinations than a population is searched exhaustively.

    Every size of every layer starts from ``seed``, so its result depends on nothing else that is searched.
    """

    population: int = 24
    generations: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        require_positive(self, "population", "generations")

    def __call__(self, loss: Loss, experts: int, least: int) -> Iterator[Found]:
        """(loss, kept) of each size from all but one down to ``least``."""
        for _, kept in eliminated(loss, experts, least):
            if comb(experts, len(kept)) <= self.population:
                yield _best_of_size(loss, experts, len(kept))
            else:
                yield self._evolved(loss, experts, kept)

    def _evolved(self, loss: Loss, experts: int, start: list[int]) -> Found:
        @cache
        def found(gone: Combination) -> Found:
            kept = without(range(experts), *gone)
            return loss(kept), kept

        rng = Random(self.seed)
        first = tuple(without(range(experts), *start))
        living = {first}
        while len(living) < self.population:
            living.add(tuple(sorted(rng.sample(range(experts), len(first)))))
        ranked = sorted(living, key=found)
        for _ in range(self.generations):
            parents = ranked[: (self.population + 1) // 2]
            children = {_child(rng.choices(parents, k=2), experts, rng) for _ in range(self.population)}
            ranked = sorted(children.union(ranked), key=found)[: self.population]
        return found(ranked[0])


def without(experts: Iterable[int], *gone: int) -> list[int]:
    return [expert for expert in experts if expert not in gone]


def _best_of_size(loss: Loss, experts: int, size: int) -> Found:
    return min((loss(kept), kept) for kept in map(list, combinations(range(experts), size)))


def _child(parents: list[Combination], experts: int, rng: Random) -> Combination:
    """As many experts as a parent removes, from any of them; perhaps one exchanged."""
    gone = rng.sample(sorted(set().union(*parents)), len(parents[0]))
    if rng.random() < 0.5:
        gone[0] = rng.choice(without(range(experts), *gone))
    return tuple(sorted(gone))
