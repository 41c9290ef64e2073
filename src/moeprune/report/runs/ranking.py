"""Which cells of a column are best and second best among their rivals."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import replace

from moeprune.report.tables.formats import MISSING
from moeprune.report.tables.table import Cell


def with_ranks(cells: Sequence[Cell], rivals: Sequence[Hashable | None], lowest: bool) -> list[Cell]:
    """The cells of a column, best and second best among those of equal ``rivals`` marked; None is rival of none.

    Numbers count as they are shown, so that values which read the same share a rank. One value has no rank, and of two
    only the best is marked.
    """
    numbers = [_leading_number(cell.text) for cell in cells]
    seen: dict[Hashable, set[float]] = {}
    for of, number in zip(rivals, numbers, strict=True):
        if of is not None and number is not None:
            seen.setdefault(of, set()).add(number)
    ranked = {of: sorted(found, reverse=not lowest) for of, found in seen.items() if len(found) > 1}
    return [_marked(cell, number, ranked.get(of, ())) for cell, of, number in zip(cells, rivals, numbers, strict=True)]


def _marked(cell: Cell, number: float | None, ranks: Sequence[float]) -> Cell:
    if number is None or not ranks:
        return cell
    return replace(cell, best=number == ranks[0], second=len(ranks) > 2 and number == ranks[1])


def _leading_number(text: str) -> float | None:
    """The number as it is shown; None where nothing was measured."""
    number = math.nan if text == MISSING else float(text.split()[0])
    return None if math.isnan(number) else number
