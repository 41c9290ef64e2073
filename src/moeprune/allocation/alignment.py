"""Alignment and reallocation: from ideal channel counts to hardware-friendly ones, at exactly the budget."""

import heapq

import torch
from torch import Tensor

from moeprune.allocation.budget import Budget


def align(counts_LE: Tensor, budget: Budget) -> Tensor:
    """Widths [L, E]: 0 or at least the minimum width, multiples of the alignment, summing to the budget.

    Experts below the minimum width m lose all channels, the others are rounded down to whole blocks of a, and the
    released channels go block by block to the experts that lost most (AAR of arXiv 2606.18304). An expert at 0 comes
    back only with m at once. The paper does not say what happens when a layer would keep fewer than top-k experts:
    here its top-k widest keep at least m, and the experts that lost least give back what that costs.
    """
    widths_LE = _rounded_down(counts_LE, budget)
    free = budget.kept_channels - int(widths_LE.sum())
    if free > 0:
        free = _hand_out(widths_LE, counts_LE - widths_LE, free, budget)
    if free < 0:
        _take_back(widths_LE, counts_LE - widths_LE, -free, budget)
    return widths_LE


def _rounded_down(counts_LE: Tensor, budget: Budget) -> Tensor:
    widest_LK = counts_LE.argsort(dim=1, descending=True, stable=True)[:, : budget.top_k]
    must_live_LE = torch.zeros_like(counts_LE, dtype=torch.bool).scatter_(1, widest_LK, True)
    raised_LE = torch.where(must_live_LE, counts_LE.clamp(min=budget.minimum_width), counts_LE)
    whole_LE = raised_LE // budget.alignment * budget.alignment
    return torch.where(raised_LE >= budget.minimum_width, whole_LE, torch.zeros_like(whole_LE))


def _hand_out(widths_LE: Tensor, lost_LE: Tensor, free: int, budget: Budget) -> int:
    """Give ``free`` channels to the experts that lost most; returns what is left, below 0 when the last expert to come
    back needed more than there was."""
    experts = widths_LE.shape[1]
    waiting = [(-int(lost), index) for index, lost in enumerate(lost_LE.flatten())]
    heapq.heapify(waiting)
    too_large: list[tuple[int, int]] = []
    while free > 0 and waiting:
        negative_lost, index = heapq.heappop(waiting)
        layer, expert = divmod(index, experts)
        width = int(widths_LE[layer, expert])
        step = budget.alignment if width else budget.minimum_width
        if step > free:
            too_large.append((negative_lost, index))
        elif width < budget.width:
            widths_LE[layer, expert] += step
            free -= step
            heapq.heappush(waiting, (negative_lost + step, index))
    if free > 0 and too_large:
        layer, expert = divmod(too_large[0][1], experts)
        widths_LE[layer, expert] = budget.minimum_width
        free -= budget.minimum_width
    return free


def _take_back(widths_LE: Tensor, lost_LE: Tensor, owed: int, budget: Budget) -> None:
    """Shorten experts above the minimum width, those that lost least first, until ``owed`` channels are back."""
    experts = widths_LE.shape[1]
    giving = [(int(lost), index) for index, lost in enumerate(lost_LE.flatten())]
    heapq.heapify(giving)
    while owed > 0 and giving:
        lost, index = heapq.heappop(giving)
        layer, expert = divmod(index, experts)
        if int(widths_LE[layer, expert]) > budget.minimum_width:
            widths_LE[layer, expert] -= budget.alignment
            owed -= budget.alignment
            heapq.heappush(giving, (lost + budget.alignment, index))
