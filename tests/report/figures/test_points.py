"""Points of figures, and the front among them."""

from hypothesis import given
from hypothesis import strategies as st

from moeprune.report.figures.points import bar_length, compressed, front
from moeprune.report.runs.results import load_sweep
from moeprune.report.runs.seeds import Spread, rows_of

coordinates = st.integers(0, 8).map(float)


def test_seeds_are_averaged_and_dense_rows_left_out(tmp_path, write_run):
    for seed in range(3):
        write_run(tmp_path / str(seed), seed=seed, harm=1.0 + seed / 10, ratio=0.5)
    write_run(tmp_path / "3", method="frequency", allocator="whole_experts", quantizer="none", ratio=0.5)
    theirs, ours = compressed(rows_of(load_sweep(tmp_path)))  # the most bits come first
    assert (ours.perplexity.n, theirs.perplexity.n) == (3, 1)
    assert ours.perplexity.mean == 1.04 * (1 + 0.25 * 1.1)
    assert abs(bar_length(ours.perplexity) - 1.04 * 0.25 * 0.1) < 1e-12
    assert bar_length(theirs.perplexity) == 0
    assert (ours.size_name, theirs.size_name) == ("50% nf4", "50%")
    assert (ours.whole_experts, theirs.whole_experts) == (False, True)
    assert ours.accuracy is not None and ours.accuracy.mean < 0
    assert ours.prefill is None


def test_a_deviation_that_is_not_finite_has_no_bar():
    assert bar_length(Spread(1.0, float("nan"), 2)) == 0


@given(st.lists(st.tuples(coordinates, coordinates), max_size=12))
def test_the_front_is_what_nothing_beats(points):
    def beats(one, other):
        return one[0] <= other[0] and one[1] <= other[1] and one != other

    alone = [point for point in set(points) if not any(beats(other, point) for other in points)]
    assert front(points) == sorted(alone)


def test_a_trifle_in_size_does_not_save_a_bad_point_from_the_front():
    points = [(1.0, 6.0), (1.01, 3.0), (2.0, 1.5)]
    assert front(points) == points
    assert front(points, about=1.02) == points[1:]
