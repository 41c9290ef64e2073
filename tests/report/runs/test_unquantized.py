"""A run that quantised its model last measured it before that too: a row of its own."""

from moeprune.report.runs.results import load_sweep
from moeprune.report.runs.seeds import rows_of
from moeprune.report.runs.unquantized import with_unquantized


def test_a_quantised_run_is_a_row_in_16_bits_too(tmp_path, write_run):
    for seed in (0, 1):
        write_run(tmp_path / str(seed), seed=seed, harm=1 + seed, ratio=0.5, quantizer="nf4")
    rows = rows_of(with_unquantized(load_sweep(tmp_path)))
    assert [(row.quantizer, row.bits, row.seeds) for row in rows] == [
        ("none", 16.0, (0, 1)), ("none", 16.0, (0, 1)), ("nf4", 4, (0, 1)),
    ]  # fmt: skip
    dense, plain, quantized = rows
    assert dense.is_dense and [run.name for run in dense.runs] == ["0", "1"]
    assert [metrics.final.mean_perplexity for metrics in plain.results] == [25 * 1.25, 25 * 1.5]
    assert [metrics.final.mean_perplexity for metrics in quantized.results] == [25 * 1.25 * 1.04, 25 * 1.5 * 1.04]


def test_a_run_of_its_own_goes_before_it_and_settings_of_quantizers_tell_nothing_apart(tmp_path, write_run):
    write_run(tmp_path / "0", quantizer="nf4", overrides=("quantizer=nf4",))
    write_run(tmp_path / "1", quantizer="rtn8", overrides=("quantizer=rtn8", "quantizer.parts.attention=false"))
    assert [run.name for run in with_unquantized(load_sweep(tmp_path))] == ["1", "0", "1"]
    write_run(tmp_path / "2", quantizer="none", overrides=("quantizer=none",))
    assert [run.name for run in with_unquantized(load_sweep(tmp_path))] == ["0", "1", "2"]


def test_what_was_not_cut_or_not_quantised_last_is_left_as_it_is(tmp_path, write_run):
    write_run(tmp_path / "0", ratio=0, quantizer="nf4")
    write_run(tmp_path / "1", recovery="dora", order=["prune", "quantize", "recover"], quantizer="nf4")
    write_run(tmp_path / "2", error=("OSError", "disk"))
    runs = load_sweep(tmp_path)
    assert with_unquantized(runs) == list(runs)
