"""Reading run directories."""

import json
import math

import pytest

from moeprune.errors import InputError
from moeprune.report.results import RunError, TaskScore, load_run, load_sweep


def test_a_run_is_read_whole(tmp_path, write_run):
    run = load_run(write_run(tmp_path / "7", ratio=0.25, overrides=("ratio=0.25",)))
    assert (run.name, run.status, run.error, run.overrides) == ("7", "success", None, ("ratio=0.25",))
    assert run.metrics is not None
    assert run.results is run.metrics
    assert [variant.name for variant in run.metrics.variants] == ["dense", "pruned", "pruned+nf4"]
    assert run.metrics.dense.mean_perplexity == 25
    assert run.metrics.final.name == "pruned+nf4"
    assert run.metrics.dense.tasks["word_order"] == TaskScore(accuracy=0.9, stderr=0.02, n=200)
    assert run.metrics.stages[0].peak_memory_gib is None
    assert run.metrics.plan.live_experts == (16, 15, 12, 16)


def test_a_run_from_before_there_was_surgery_had_none(tmp_path, write_run):
    run_dir = write_run(tmp_path / "0", surgery="refit")
    assert load_run(run_dir).metrics.surgery == "refit"
    metrics = json.loads((run_dir / "metrics.json").read_text())
    del metrics["surgery"]
    (run_dir / "metrics.json").write_text(json.dumps(metrics))
    assert load_run(run_dir).metrics.surgery == "none"


def test_what_later_versions_wrote_down_may_lack(tmp_path, write_run):
    run_dir = write_run(tmp_path / "0", recovery="dora")
    metrics = load_run(run_dir).metrics
    assert metrics.order == "prune > recover > quantize"
    assert metrics.final.bytes.in_memory == 2_580_000
    assert [row.part for row in metrics.final.precision] == ["routed experts", "embeddings"]
    assert metrics.recovery_details.learning_rates == {"experts": 1e-4, "routers": 1e-6}
    raw = json.loads((run_dir / "metrics.json").read_text())
    del raw["order"], raw["recovery_details"]
    for variant in raw["variants"]:
        del variant["precision"], variant["bytes"]["in_memory"]
    (run_dir / "metrics.json").write_text(json.dumps(raw))
    older = load_run(run_dir).metrics
    assert (older.order, older.recovery_details) == ("prune > recover > quantize", None)
    assert (older.final.precision, older.final.bytes.in_memory) == ((), None)


def test_a_failed_run_keeps_status_and_error(tmp_path, write_run):
    run = load_run(write_run(tmp_path / "0", error=("BudgetError", "too much"), overrides=("ratio=0.99",)))
    assert (run.status, run.metrics) == ("failed", None)
    assert run.error == RunError("BudgetError", "too much")


def test_metrics_of_an_earlier_try_are_not_results(tmp_path, write_run):
    run_dir = write_run(tmp_path / "0")
    (run_dir / "manifest.json").write_text(json.dumps({"status": "interrupted", "error": None, "overrides": []}))
    run = load_run(run_dir)
    assert run.metrics is not None
    assert run.results is None


def test_a_run_that_stopped_where_it_was_asked_to_says_so_and_has_no_results(tmp_path, write_run):
    run_dir = write_run(tmp_path / "0")  # with the metrics of an earlier run in the same directory
    (run_dir / "manifest.json").write_text(json.dumps({"status": "success", "error": None, "until": "score"}))
    run = load_run(run_dir)
    assert (run.status, run.metrics, run.results) == ("stopped after score", None, None)


def test_entries_of_later_versions_are_passed_over(tmp_path, write_run):
    run_dir = write_run(tmp_path / "0")
    metrics = json.loads((run_dir / "metrics.json").read_text())
    metrics["variants"][0]["bytes"]["on_tape"] = 1
    metrics["stages"][0]["shape"] = [2, 3]
    metrics["variants"][-1]["mean_perplexity"] = math.inf
    (run_dir / "metrics.json").write_text(json.dumps(metrics))
    run = load_run(run_dir)
    assert run.metrics is not None
    assert run.metrics.final.mean_perplexity == math.inf


def test_runs_come_in_numeric_order_and_other_folders_are_passed_over(tmp_path, write_run):
    for name in ("10", "9", "0", "trial-2", "trial-11"):
        write_run(tmp_path / name)
    (tmp_path / "logs").mkdir()
    assert [run.name for run in load_sweep(tmp_path)] == ["0", "9", "10", "trial-2", "trial-11"]


def test_a_folder_without_runs_is_an_error(tmp_path):
    with pytest.raises(InputError, match="holds no runs"):
        load_sweep(tmp_path)
    with pytest.raises(InputError, match=r"not a run directory: it has no manifest\.json"):
        load_run(tmp_path)


@pytest.mark.parametrize(("text", "message"), [('{"model": ', "damaged"), ('{"model": "tiny"}', "'variants'")])
def test_unreadable_metrics_name_the_file(tmp_path, write_run, text, message):
    run_dir = write_run(tmp_path / "0")
    (run_dir / "metrics.json").write_text(text)
    with pytest.raises(InputError, match=f"metrics.json .*{message}"):
        load_run(run_dir)


@pytest.mark.parametrize("manifest", [{"overrides": []}, {"status": "failed", "error": {"type": "ValueError"}}])
def test_a_manifest_that_lacks_an_entry_is_named(tmp_path, manifest):
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"manifest\.json does not have the expected entries"):
        load_run(tmp_path)


def test_metrics_without_the_dense_model_are_an_error(tmp_path, write_run):
    run_dir = write_run(tmp_path / "0")
    metrics = json.loads((run_dir / "metrics.json").read_text())
    metrics["variants"].pop(0)
    (run_dir / "metrics.json").write_text(json.dumps(metrics))
    with pytest.raises(InputError, match="a variant named dense"):
        load_run(run_dir)
