"""Label placement."""

from itertools import combinations

from moeprune.report.figures.labels import Box, Label, place_labels

BOUNDS = Box(0, 0, 400, 300)


def test_a_lone_label_stands_above_its_highest_point():
    (place,) = place_labels([Label(40, 10, [(200, 100), (200, 150)])], [], BOUNDS)
    assert place.point == (200, 150)
    assert place.box.centre[0] == 200
    assert place.box.bottom > 150


def test_labels_of_crowded_points_cover_neither_points_nor_each_other():
    points = [(150 + 9 * (i % 4), 120 + 11 * (i // 4)) for i in range(12)]
    places = place_labels([Label(50, 10, [point]) for point in points], [], BOUNDS)
    for one, other in combinations(places, 2):
        assert one.box.overlap(other.box) == 0
    for place in places:
        assert BOUNDS.contains(place.box)
        assert all(place.box.overlap(Box(x - 3, y - 3, x + 3, y + 3)) == 0 for x, y in points)


def test_a_label_stays_inside_and_off_obstacles():
    wall = Box(0, 0, 400, 290)
    (place,) = place_labels([Label(50, 10, [(395, 295)])], [], BOUNDS)
    assert BOUNDS.contains(place.box)
    (place,) = place_labels([Label(20, 4, [(200, 280)])], [wall], BOUNDS)
    assert place.box.overlap(wall) == 0
