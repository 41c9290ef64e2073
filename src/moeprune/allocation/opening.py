"""From the relaxation to a plan of exactly the budget: which experts keep anything at all.

Once that is decided the rest is exact: every open expert has its minimum, and the largest of the further gains, which
never increase along an expert, fill the budget.
"""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from moeprune.allocation.relaxation import BlockProblem, relax
from moeprune.allocation.selection import largest

# Where the plan is this close to its bound, relative, it is not searched further.
CLOSE_ENOUGH = 1e-4
# How many experts on each side of the border the search tries to open or close, and how often it may improve.
BORDER, ROUNDS = 4, 30


def solve(problem: BlockProblem) -> tuple[Tensor, float]:
    """Blocks [L, E] that meet the total exactly, and an upper bound on the value of any such blocks.

    With a minimum of one block the blocks are optimal. With a larger one, opening costs make the problem a knapsack;
    the plan is then the best that a search around the relaxation finds, and the bound says how far it can be off.
    """
    relaxed = relax(problem)
    guesses = _first_guesses(problem, relaxed.few_LE, relaxed.many_LE)
    tried = [best_with_open(problem, is_open_LE) for is_open_LE in guesses]
    blocks_LE = max((blocks_LE for blocks_LE in tried if blocks_LE is not None), key=problem.value)
    for _ in range(ROUNDS):
        value = problem.value(blocks_LE)
        if value >= (1 - CLOSE_ENOUGH) * relaxed.bound:
            break
        changed = [best_with_open(problem, is_open_LE) for is_open_LE in _neighbours(problem, blocks_LE)]
        better = max((other for other in changed if other is not None), key=problem.value, default=blocks_LE)
        if problem.value(better) <= value:
            break
        blocks_LE = better
    return blocks_LE, max(relaxed.bound, problem.value(blocks_LE))


def best_with_open(problem: BlockProblem, is_open_LE: Tensor) -> Tensor | None:
    """The best blocks [L, E] with exactly these experts open; None when they cannot meet the total."""
    gain_NB = problem.gain_LEB[is_open_LE]
    spare = problem.total - len(gain_NB) * problem.least
    further_NB = gain_NB[:, problem.least :]
    if not 0 <= spare <= further_NB.numel():
        return None
    chosen_NB = largest(further_NB.flatten(), spare).view_as(further_NB)
    blocks_LE = torch.zeros_like(is_open_LE, dtype=torch.int64)
    blocks_LE[is_open_LE] = problem.least + chosen_NB.sum(dim=-1)
    return blocks_LE


def _first_guesses(problem: BlockProblem, few_LE: Tensor, many_LE: Tensor) -> Iterator[Tensor]:
    """The experts open at the higher price, and with them as many as fit of those that the price is about to open; also
    one more, because the last to fit may leave too little room. One of the two can always meet the total."""
    is_open_LE = few_LE > 0
    waiting_N = ((many_LE > 0) & ~is_open_LE).flatten().nonzero().squeeze(-1)
    room = problem.total - int(few_LE.sum())
    fitting = int((many_LE.flatten()[waiting_N].cumsum(dim=0) <= room).sum())
    for count in (fitting, fitting + 1):
        guess_N = is_open_LE.flatten().clone()
        guess_N[waiting_N[:count]] = True
        yield guess_N.view_as(is_open_LE)


def _neighbours(problem: BlockProblem, blocks_LE: Tensor) -> Iterator[Tensor]:
    """Open sets that differ by opening one expert of the border, closing one, or both."""
    is_open_LE = blocks_LE > 0
    first_LE = problem.held_LEK[..., problem.least]
    promising = first_LE.masked_fill(is_open_LE, -torch.inf).flatten().argsort(descending=True, stable=True)
    held_LE = problem.held_LEK.gather(-1, blocks_LE.unsqueeze(-1)).squeeze(-1)
    weakest = held_LE.masked_fill(~is_open_LE, torch.inf).flatten().argsort(stable=True)
    closed_count = int((~is_open_LE).sum())
    opening = [None, *promising[: min(BORDER, closed_count)].tolist()]
    closing = [None, *weakest[: min(BORDER, is_open_LE.numel() - closed_count)].tolist()]
    for opened, closed in itertools.product(opening, closing):
        changed_N = is_open_LE.flatten().clone()
        if opened is not None:
            changed_N[opened] = True
        if closed is not None:
            changed_N[closed] = False
        changed_LE = changed_N.view_as(is_open_LE)
        if int(changed_LE.sum(dim=1).min()) >= problem.top_k:
            yield changed_LE
