"""Alignment and reallocation: from ideal channel counts to hardware-friendly ones, at exactly the budget."""

import heapq
from collections.abc import Callable

import torch
from torch import Tensor

from moeprune.allocation.budget import Budget
from moeprune.allocation.selection import put_back, score_order, take_experts

# What the expert of this flat index has lost when it keeps this many channels.
Lost = Callable[[int, int], float]


def align(counts_LE: Tensor, budget: Budget, expert_LE: Tensor, held_LEK: Tensor | None = None) -> Tensor:
    """Widths [L, E]: 0 or at least the minimum width, multiples of the alignment, summing to the budget.

    Experts below the minimum width m lose all channels, the others are rounded down to whole blocks of a, and the
    released channels go block by block to the experts that lost most (AAR of arXiv 2606.18304). An expert at 0 comes
    back only with m at once. The paper does not say what happens when a layer would keep fewer than top-k experts:
    here its top-k widest keep at least m, and the experts that lost least give back what that costs. Among equals the
    expert of higher score ``expert_LE`` is favoured, then the lower index.

    What an expert lost is counted in channels, or, with ``held_LEK`` (the score in its best k = 0..C channels), in
    score. Each layer must hold at least ``top_k * minimum_width`` of the counts.
    """
    widths = _rounded_down(counts_LE, budget, expert_LE).flatten().tolist()
    rank = expert_LE.flatten().argsort(descending=True, stable=True).argsort().tolist()
    lost = _lost_since(counts_LE, held_LEK)
    free = budget.kept_channels - sum(widths)
    if free > 0:
        free = _hand_out(widths, rank, lost, free, budget)
    if free < 0:
        _take_back(widths, rank, lost, -free, budget)
    return torch.tensor(widths).view_as(counts_LE)


def _lost_since(counts_LE: Tensor, held_LEK: Tensor | None) -> Lost:
    counts = counts_LE.flatten().tolist()
    if held_LEK is None:
        return lambda index, width: counts[index] - width
    held_NK = held_LEK.flatten(0, 1).numpy()
    return lambda index, width: float(held_NK[index, counts[index]] - held_NK[index, width])


def _rounded_down(counts_LE: Tensor, budget: Budget, expert_LE: Tensor) -> Tensor:
    order_LE = score_order(expert_LE)
    widest_LK = take_experts(counts_LE, order_LE).argsort(dim=1, descending=True, stable=True)[:, : budget.top_k]
    must_live_LE = put_back(torch.zeros_like(counts_LE).scatter_(1, widest_LK, 1), order_LE).bool()
    raised_LE = torch.where(must_live_LE, counts_LE.clamp(min=budget.minimum_width), counts_LE)
    whole_LE = raised_LE // budget.alignment * budget.alignment
    return torch.where(raised_LE >= budget.minimum_width, whole_LE, torch.zeros_like(whole_LE))


def _hand_out(widths: list[int], rank: list[int], lost: Lost, free: int, budget: Budget) -> int:
    """Give ``free`` channels to the experts that lost most; returns what is left, below 0 when the last expert to come
    back needed more than there was."""
    waiting = [(-lost(index, width), rank[index], index) for index, width in enumerate(widths)]
    heapq.heapify(waiting)
    too_large: list[int] = []
    while free > 0 and waiting:
        _, _, index = heapq.heappop(waiting)
        step = budget.alignment if widths[index] else budget.minimum_width
        if step > free:
            too_large.append(index)
        elif widths[index] < budget.width:
            widths[index] += step
            free -= step
            heapq.heappush(waiting, (-lost(index, widths[index]), rank[index], index))
    if free > 0 and too_large:
        widths[too_large[0]] = budget.minimum_width
        free -= budget.minimum_width
    return free


def _take_back(widths: list[int], rank: list[int], lost: Lost, owed: int, budget: Budget) -> None:
    """Shorten experts above the minimum width, those that lost least first, until ``owed`` channels are back."""
    giving = [(lost(index, width), -rank[index], index) for index, width in enumerate(widths)]
    heapq.heapify(giving)
    while owed > 0 and giving:
        _, _, index = heapq.heappop(giving)
        if widths[index] > budget.minimum_width:
            widths[index] -= budget.alignment
            owed -= budget.alignment
            heapq.heappush(giving, (lost(index, widths[index]), -rank[index], index))
