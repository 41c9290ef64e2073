"""A price per block at which experts choose their own widths: nearly a plan, and a bound on every plan."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class BlockProblem:
    """Choose blocks n_le, 0 or ``least <= n_le <= B``, with ``sum n = total`` and at least ``top_k`` experts of a layer
    above 0, so that ``sum_le sum_{b < n_le} gain_leb`` is largest.

    ``gain_LEB`` (at least 0) never increases along an expert's blocks.
    """

    gain_LEB: Tensor
    least: int
    top_k: int
    total: int

    @cached_property
    def held_LEK(self) -> Tensor:
        """The gain of an expert's first n blocks, n = 0..B [L, E, B + 1]."""
        return torch.nn.functional.pad(self.gain_LEB.cumsum(dim=-1), (1, 0))

    @cached_property
    def falling_LEB(self) -> Tensor:
        return -self.gain_LEB

    def value(self, blocks_LE: Tensor) -> float:
        """The objective."""
        return float(self.held_LEK.gather(-1, blocks_LE.unsqueeze(-1)).sum())

    def best_at(self, price: float) -> tuple[Tensor, float]:
        """The fewest blocks that maximise ``gain - price * blocks`` [L, E], and the dual bound

            max_n (sum gain(n) - price * sum n) + price * total,

        which no plan exceeds, whatever the price (at least 0). Experts are independent here, but for the best top-k of
        each layer, which are open even at a loss.
        """
        asked_LE1 = torch.full((*self.gain_LEB.shape[:2], 1), -price, dtype=torch.float64)
        open_LE1 = torch.searchsorted(self.falling_LEB, asked_LE1).clamp(min=self.least)
        worth_LE = (self.held_LEK.gather(-1, open_LE1) - price * open_LE1.double()).squeeze(-1)
        best_LK = worth_LE.argsort(dim=1, descending=True, stable=True)[:, : self.top_k]
        is_open_LE = (worth_LE > 0).scatter(1, best_LK, True)
        blocks_LE = torch.where(is_open_LE, open_LE1.squeeze(-1), 0)
        return blocks_LE, float(worth_LE[is_open_LE].sum()) + price * self.total


@dataclass(frozen=True)
class Relaxed:
    """Best blocks at two prices next to each other: ``few_LE`` sums to at most the total, ``many_LE`` to at least it;
    ``bound`` is the lower of the dual bounds."""

    few_LE: Tensor
    many_LE: Tensor
    bound: float


def relax(problem: BlockProblem) -> Relaxed:
    """Bisection on the price, to the last bit (Lagrangian relaxation of the budget, Everett 1963)."""
    few_LE, bound = problem.best_at(0.0)
    if int(few_LE.sum()) <= problem.total:
        return Relaxed(few_LE, torch.full_like(few_LE, problem.gain_LEB.shape[-1]), bound)
    # Above every gain, so only the experts that must be open are.
    low, high = 0.0, 2 * float(problem.gain_LEB.max())
    many_LE = few_LE
    few_LE, _ = problem.best_at(high)
    while low < (middle := (low + high) / 2) < high:
        blocks_LE, dual = problem.best_at(middle)
        bound = min(bound, dual)
        if int(blocks_LE.sum()) == problem.total:
            return Relaxed(blocks_LE, blocks_LE, bound)
        if int(blocks_LE.sum()) < problem.total:
            high, few_LE = middle, blocks_LE
        else:
            low, many_LE = middle, blocks_LE
    return Relaxed(few_LE, many_LE, bound)
