"""The calibration report, against counts by hand and sets of tuples."""

import logging
from dataclasses import replace

import pytest
import torch

from moeprune.calibration.report import calibration_report, log_warnings, shared_ngrams
from moeprune.calibration.statistics import collect_statistics
from moeprune.calibration.windows import TokenWindows


@pytest.fixture
def statistics(build_model, random_windows):
    model = build_model("qwen3_renormalised", torch.float64)
    found = collect_statistics(model, random_windows, batch_size=2)
    routed_LE = torch.tensor([[5.0, 1, 9, 7, 3, 2, 8, 6], [40, 50, 60, 70, 80, 90, 100, 0]], dtype=torch.float64)
    return replace(found, routed_tokens_LE=routed_LE)


def windows(*rows, padding=0):
    """Windows of token ids, the last ``padding`` of each row being padding."""
    input_ids_NT = torch.tensor(rows)
    mask_NT = torch.ones_like(input_ids_NT)
    if padding:
        mask_NT[:, -padding:] = 0
    return TokenWindows(input_ids_NT, mask_NT)


def test_tokens_per_expert_are_told_by_quartiles_and_the_scarce_experts_by_number(statistics):
    report = calibration_report(statistics, fewest_tokens=4)
    assert (report["tokens"], report["fewest_tokens"]) == (55, 4)
    first, second = report["layers"]
    assert first == {
        "min": 1, "lower_quartile": 2.75, "median": 5.5, "upper_quartile": 7.25, "max": 9, "scarce_experts": [1, 4, 5]
    }  # fmt: skip
    assert (second["min"], second["max"], second["scarce_experts"]) == (0, 100, [7])


def test_a_warning_names_layers_and_experts(statistics, caplog):
    with caplog.at_level(logging.WARNING):
        shared = {"prose": 0.0, "code": None, "verse": 0.125}
        log_warnings({**calibration_report(statistics, fewest_tokens=4), "shared_ngrams": shared})
    scarce, shared = [record.getMessage() for record in caplog.records]
    assert scarce.startswith("4 experts in 2 of 2 MoE layers saw fewer than 4 calibration tokens")
    assert "(layer 0: 1, 4, 5; layer 1: 7)" in scarce
    assert shared.startswith("12.5% of the 13-grams of evaluation text verse are in the calibration text")


def test_nothing_is_said_where_nothing_is_wrong(statistics, caplog):
    log_warnings({**calibration_report(statistics, fewest_tokens=0), "shared_ngrams": {"prose": 0.0, "verse": 0.009}})
    assert not caplog.records


def tuples(source: TokenWindows, n: int) -> set[tuple[int, ...]]:
    """The slow way: every run of n counted tokens."""
    found = set()
    for ids, mask in zip(source.input_ids_NT.tolist(), source.mask_NT.tolist(), strict=True):
        for start in range(len(ids) - n + 1):
            if all(mask[start : start + n]):
                found.add(tuple(ids[start : start + n]))
    return found


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_shared_ngrams_are_those_of_two_sets(n):
    generator = torch.Generator().manual_seed(n)
    # Few distinct tokens, 0 and large ones among them, so that many n-grams are shared; more windows than one chunk.
    vocabulary = torch.tensor([0, 1, 256, 65536, 151935])
    drawn = [vocabulary[torch.randint(0, 5, (rows, 9), generator=generator)] for rows in (70, 66)]
    masks = [(torch.rand(ids.shape, generator=generator) > 0.1).long() for ids in drawn]
    calibration, evaluation = (TokenWindows(ids, mask) for ids, mask in zip(drawn, masks, strict=True))
    asked, there = tuples(evaluation, n), tuples(calibration, n)
    assert shared_ngrams(calibration, evaluation, n) == len(asked & there) / len(asked)


def test_windows_are_separate_and_padding_does_not_count():
    evaluation = windows([1, 2, 3, 4])
    assert shared_ngrams(windows([7, 8, 1, 2], [3, 4, 7, 8]), evaluation, n=4) == 0
    assert shared_ngrams(windows([1, 2, 3, 4]), evaluation, n=4) == 1
    assert shared_ngrams(windows([1, 2, 3, 4], padding=1), evaluation, n=4) == 0
    assert shared_ngrams(windows([1, 2, 3, 4]), windows([1, 2, 3, 9], padding=1), n=3) == 1


def test_a_repeated_ngram_counts_once():
    assert shared_ngrams(windows([5, 5, 5]), windows([5, 5, 5, 5, 6, 7]), n=2) == pytest.approx(1 / 3)


def test_windows_too_short_for_an_ngram_have_none_to_share():
    assert shared_ngrams(windows([1, 2, 3, 4]), windows([1, 2])) is None
    assert shared_ngrams(windows([1, 2]), windows([1, 2, 3, 4]), n=3) == 0
