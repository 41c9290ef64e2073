"""The mixture of windows: the same at every start, weights respected, nothing used twice before all is used once."""

import numpy as np
import pytest
import torch

from moeprune.training.data import WindowMixture

LENGTH = 5  # begin token and 4 tokens


def mixture(count=300, seed=3, weights=None, sizes=None):
    """Domain d holds the token numbers 1000 * (d + 1) + position, so that a window tells where it comes from."""
    sizes = sizes or {"first": 80, "second": 43}
    tokens = {
        name: np.arange(1000 * (d + 1), 1000 * (d + 1) + size).astype(np.uint16)
        for d, (name, size) in enumerate(sizes.items())
    }
    weights = weights or {"first": 3.0, "second": 1.0}
    windows = WindowMixture(tokens, weights, count=count, sequence_length=LENGTH, begin_token=7, seed=seed)
    return [window["input_ids"] for window in windows]


def domain_of(window) -> int:
    return int(window[1]) // 1000 - 1


def test_windows_are_the_begin_token_and_consecutive_tokens_of_one_domain():
    for window in mixture(40):
        assert window.dtype == torch.int64
        assert window[0] == 7
        start = int(window[1])
        assert window[1:].tolist() == list(range(start, start + LENGTH - 1))
        assert start % 1000 % (LENGTH - 1) == 0


def test_the_same_seed_gives_the_same_items_in_any_order():
    first, second = mixture(), mixture()
    backwards = {item: second[item] for item in reversed(range(len(second)))}
    assert all(torch.equal(first[item], backwards[item]) for item in range(len(first)))


def test_another_seed_gives_other_items():
    first, second = mixture(seed=1), mixture(seed=2)
    assert any(not torch.equal(first[item], second[item]) for item in range(20))


def test_weights_are_respected():
    windows = mixture(4000)
    share = np.mean([domain_of(windows[item]) == 0 for item in range(len(windows))])
    assert share == pytest.approx(0.75, abs=0.03)  # four standard errors


def test_weights_need_not_sum_to_one():
    scaled = mixture(100, weights={"first": 30, "second": 10})
    assert all(torch.equal(scaled[item], window) for item, window in enumerate(mixture(100)))


def test_a_domain_of_weight_zero_is_never_used():
    windows = mixture(200, weights={"first": 1.0, "second": 0.0})
    assert {domain_of(windows[item]) for item in range(200)} == {0}


def test_all_windows_of_a_domain_are_used_before_any_comes_again():
    windows = mixture(25, sizes={"first": 40}, weights={"first": 1.0})
    starts = [int(windows[item][1]) for item in range(25)]
    assert sorted(starts[:10]) == sorted(starts[10:20]) == [1000 + 4 * window for window in range(10)]
    assert starts[:10] == starts[10:20]
