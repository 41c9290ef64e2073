"""Writes labels beside the points of a panel, where they cover neither points nor each other."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from matplotlib.axes import Axes

from moeprune.report.figures.labels import POINT_RADIUS, Box, Label, Point, place_labels
from moeprune.report.figures.style import DOTS_PER_INCH, TEXT_COLOUR

LABEL_SIZE = 8.5
LEADER_COLOUR = "#777777"
LEADER_FROM = 12.0
LINE_STEP = 6.0


@dataclass(frozen=True)
class Group:
    """Points under one label, such as the runs of one ratio and quantizer."""

    text: str
    points: Sequence[Point]
    size: float = LABEL_SIZE
    colour: str = TEXT_COLOUR
    weight: str = "normal"


def write_labels(
    panel: Axes, groups: Sequence[Group], lines: Sequence[Sequence[Point]], others: Sequence[Point] = ()
) -> None:
    """Write each group's text at the nearest free place; a thin line leads to a distant point.

    ``lines`` through points of the data are kept free too, and so are ``others``, points without a label. The panel
    must be laid out already.
    """
    pixels = DOTS_PER_INCH / 72
    texts = [
        panel.text(0, 0, group.text, fontsize=group.size, color=group.colour, fontweight=group.weight)
        for group in groups
    ]
    for text in texts:
        text.set(ha="center", va="center", transform=panel.transAxes)
    labels = []
    for text, group in zip(texts, groups, strict=True):
        extent = text.get_window_extent()
        points = [tuple(panel.transData.transform(point) / pixels) for point in group.points]
        labels.append(Label(extent.width / pixels, extent.height / pixels, points))
    left, bottom, right, top = (edge / pixels for edge in panel.get_window_extent().extents)
    drawn = [[tuple(panel.transData.transform(point) / pixels) for point in line] for line in lines]
    obstacles = [box for line in drawn for box in _covered_by_line(line)]
    for x, y in (panel.transData.transform(point) / pixels for point in others):
        obstacles.append(Box(x - POINT_RADIUS, y - POINT_RADIUS, x + POINT_RADIUS, y + POINT_RADIUS))
    for text, place in zip(texts, place_labels(labels, obstacles, Box(left, bottom, right, top)), strict=True):
        ends = [place.box.centre, place.box.nearest(place.point), place.point]
        centre, start, end = panel.transAxes.inverted().transform([(x * pixels, y * pixels) for x, y in ends])
        text.set_position(centre)
        if math.dist(place.box.nearest(place.point), place.point) > LEADER_FROM:
            panel.plot(
                *zip(start, end, strict=True), transform=panel.transAxes, color=LEADER_COLOUR, linewidth=0.7, zorder=2
            )


def _covered_by_line(line: Sequence[Point]) -> Iterator[Box]:
    for start, end in pairwise(line):
        steps = math.ceil(math.dist(start, end) / LINE_STEP)
        for step in range(steps):
            (left, right), (bottom, top) = (
                sorted(a + (b - a) * part / steps for part in (step, step + 1)) for a, b in zip(start, end, strict=True)
            )
            yield Box(left - 1, bottom - 1, right + 1, top + 1)
