"""Paired comparisons, against closed forms."""

import json
import math

import numpy as np
import pytest
from scipy import stats

from moeprune.report.runs.paired import paired_comparisons, paired_sentences, paired_table
from moeprune.report.runs.results import load_sweep
from moeprune.report.runs.seeds import rows_of


def write(tmp_path, write_run, perplexities, **settings):
    """Runs with these mean perplexities: by method, by seed."""
    for method, values in perplexities.items():
        for seed, value in values.items():
            folder = write_run(tmp_path / f"{method}-{seed}-{len(settings)}", method=method, seed=seed, **settings)
            metrics = json.loads((folder / "metrics.json").read_text())
            metrics["variants"][-1]["mean_perplexity"] = value
            (folder / "metrics.json").write_text(json.dumps(metrics))


def test_t_and_holm_against_their_formulas(tmp_path, write_run):
    ours = {0: 20.0, 1: 22.0, 2: 21.0, 3: 19.5}
    others = {"reap": {0: 21.0, 1: 22.5, 2: 23.0, 3: 20.0}, "mone": {0: 30.0, 1: 33.5, 2: 31.0, 3: 29.0}}
    write(tmp_path, write_run, {"reap": others["reap"], "moe_slimming": ours, "mone": others["mone"]})
    found = {one.other.method: one for one in paired_comparisons(rows_of(load_sweep(tmp_path)))}
    p_of = {}
    for method, values in others.items():
        one = found[method]
        differences = np.log([ours[seed] for seed in range(4)]) - np.log([values[seed] for seed in range(4)])
        mean, std = differences.mean(), differences.std(ddof=1)
        assert (one.difference.mean, one.difference.std, one.wins) == (pytest.approx(mean), pytest.approx(std), 4)
        t = mean / (std / math.sqrt(4))
        p_of[method] = 2 * stats.t.sf(abs(t), df=3)
        assert one.p == pytest.approx(p_of[method])
    low, high = sorted(p_of, key=lambda method: p_of[method])
    assert found[low].adjusted == pytest.approx(min(1, 2 * p_of[low]))
    assert found[high].adjusted == pytest.approx(max(2 * p_of[low], p_of[high]))


def test_holm_of_three_never_falls(tmp_path, write_run):
    ours = {0: 20.0, 1: 21.0, 2: 22.0}
    noise = {"a": (1.0, 1.1, 1.2), "b": (0.1, 1.0, 0.3), "c": (0.1, 1.1, 0.3)}
    others = {method: {seed: ours[seed] + more[seed] for seed in ours} for method, more in noise.items()}
    write(tmp_path, write_run, {"moe_slimming": ours, **others})
    found = sorted(paired_comparisons(rows_of(load_sweep(tmp_path))), key=lambda one: one.p)
    raw = [one.p for one in found]
    expected = [3 * raw[0], max(3 * raw[0], 2 * raw[1]), max(3 * raw[0], 2 * raw[1], raw[2])]
    assert [one.adjusted for one in found] == pytest.approx([min(1.0, p) for p in expected])


def test_without_spread_or_seeds_there_is_no_p_and_a_reason(tmp_path, write_run):
    ours = {0: 20.0, 1: 20.0, 2: 20.0}
    others = {
        "same": {0: 25.0, 1: 25.0, 2: 25.0},
        "few": {0: 25.0, 1: 26.0},
        "elsewhere": {7: 25.0},
        "endless": {0: 25.0, 1: math.inf, 2: 24.0},
    }
    write(tmp_path, write_run, {"moe_slimming": ours, **others})
    found = paired_comparisons(rows_of(load_sweep(tmp_path)))
    assert {one.other.method: one.p for one in found} == {"same": None, "few": None, "endless": None}
    reasons = {one.other.method: one.reason for one in found}
    assert reasons["same"].startswith("the same difference on every seed")
    assert reasons["few"] == "2 of at least 3 seeds"
    assert reasons["endless"] == "a perplexity is not finite"
    assert paired_sentences(found) == []
    table = paired_table(found, tmp_path)
    assert {cell.text for column in table.columns[-2:] for cell in column.cells} == {"-"}


def test_only_rows_of_one_size_are_paired_and_ours_is_first_where_it_was_not_run(tmp_path, write_run):
    write(tmp_path, write_run, {"reap": {0: 20.0, 1: 21.0}, "mone": {0: 25.0, 1: 24.0}})
    write(tmp_path, write_run, {"moe_slimming": {0: 22.0, 1: 23.0}}, ratio=0.25)
    (one,) = paired_comparisons(rows_of(load_sweep(tmp_path)))
    assert (one.ours.method, one.other.method, one.seeds, one.wins) == ("mone", "reap", (0, 1), 0)


def test_one_seed_makes_no_table(tmp_path, write_run):
    write(tmp_path, write_run, {"reap": {0: 20.0}, "moe_slimming": {0: 25.0}})
    assert paired_table(paired_comparisons(rows_of(load_sweep(tmp_path))), tmp_path) is None


def test_sentences_say_who_is_better_for_sure(tmp_path, write_run):
    ours = {0: 20.0, 1: 21.0, 2: 22.0}
    worse, better = ({seed: value * by for seed, value in ours.items()} for by in (1.5, 0.5))
    for seed in ours:
        worse[seed] += 0.01 * seed
        better[seed] += 0.01 * seed
    write(tmp_path, write_run, {"moe_slimming": ours, "worse": worse, "better": better})
    (sentence,) = paired_sentences(paired_comparisons(rows_of(load_sweep(tmp_path))))
    assert "lower perplexity in 1 of 2 paired comparisons; 1 of these stay at p < 0.05" in sentence
    assert sentence.endswith("By the same test better than moe_slimming: better.")


def test_the_verdict_counts_what_could_not_be_tested(tmp_path, write_run):
    for seed in (0, 1, 2):
        write_run(tmp_path / f"1{seed}", method="moe_slimming", seed=seed, harm=1.0 + seed / 10)
        write_run(tmp_path / f"2{seed}", method="reap", seed=seed, harm=3.0 + seed / 20)
        if seed < 2:  # the third has not ended
            write_run(tmp_path / f"3{seed}", method="camera", seed=seed, harm=0.2)
    (sentence,) = paired_sentences(paired_comparisons(rows_of(load_sweep(tmp_path))))
    assert "moe_slimming has the lower perplexity in 1 of 2 paired comparisons; 1 of these stay" in sentence
    assert sentence.endswith("1 could not be tested.")
