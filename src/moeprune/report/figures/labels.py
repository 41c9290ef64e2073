"""Places text labels beside points so that they cover neither the points nor each other; lengths are in points."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

Point = tuple[float, float]

REACHES = (7.0, 10.0, 14.0, 20.0, 28.0, 38.0, 50.0, 64.0, 80.0, 100.0)
DIRECTIONS = ((0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (-1, 1), (1, -1), (-1, -1))
POINT_RADIUS = 5.0
LABEL_GAP = 2.0


@dataclass(frozen=True)
class Box:
    """An upright rectangle."""

    left: float
    bottom: float
    right: float
    top: float

    @property
    def centre(self) -> Point:
        return (self.left + self.right) / 2, (self.bottom + self.top) / 2

    def overlap(self, other: "Box") -> float:
        """The area that both cover."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.top, other.top) - max(self.bottom, other.bottom)
        return max(0.0, width) * max(0.0, height)

    def contains(self, other: "Box") -> bool:
        across = self.left <= other.left and other.right <= self.right
        return across and self.bottom <= other.bottom and other.top <= self.top

    def nearest(self, point: Point) -> Point:
        """The point of the box that is nearest to ``point``."""
        return min(max(point[0], self.left), self.right), min(max(point[1], self.bottom), self.top)


@dataclass(frozen=True)
class Label:
    """A text of a known size, and the points that it names."""

    width: float
    height: float
    points: Sequence[Point]


@dataclass(frozen=True)
class Place:
    """Where a label goes, and which of its points it stands beside."""

    box: Box
    point: Point


def place_labels(labels: Sequence[Label], obstacles: Sequence[Box], bounds: Box) -> list[Place]:
    """The nearest free place inside ``bounds`` for each label in turn; where none is free, the one that covers least.

    Every label's points, and the lines that join them from bottom to top, are kept free for all labels.
    """
    taken = [*obstacles, *(box for label in labels for box in _covered_by_points(label.points))]
    places = []
    for label in labels:
        candidates = [place for place in _candidates(label) if bounds.contains(place.box)] or list(_candidates(label))
        place = min(candidates, key=lambda place: sum(place.box.overlap(other) for other in taken))
        taken.append(place.box)
        places.append(place)
    return places


def _covered_by_points(points: Sequence[Point]) -> Iterator[Box]:
    upwards = sorted(points, key=lambda point: point[1])
    for x, y in upwards:
        yield Box(x - POINT_RADIUS, y - POINT_RADIUS, x + POINT_RADIUS, y + POINT_RADIUS)
    for start, end in pairwise(upwards):
        steps = math.ceil(math.dist(start, end) / POINT_RADIUS)
        for step in range(1, steps):
            x = start[0] + (end[0] - start[0]) * step / steps
            y = start[1] + (end[1] - start[1]) * step / steps
            yield Box(x - 1, y - POINT_RADIUS / 2, x + 1, y + POINT_RADIUS / 2)


def _candidates(label: Label) -> Iterator[Place]:
    """Boxes around the label's points, nearest first; at each distance, the highest and the lowest point come first."""
    upwards = sorted(label.points, key=lambda point: point[1])
    half_width, half_height = label.width / 2 + LABEL_GAP, label.height / 2 + LABEL_GAP / 2
    for reach in REACHES:
        for point in dict.fromkeys([upwards[-1], upwards[0], *upwards]):
            for right, up in DIRECTIONS:
                away = reach / math.hypot(right, up)
                x, y = point[0] + right * (away + half_width), point[1] + up * (away + half_height)
                yield Place(Box(x - half_width, y - half_height, x + half_width, y + half_height), point)
