"""Reading run directories."""

import json
import math

import pytest

from moeprune.errors import InputError
from moeprune.report.runs.results import RunError, load_run, load_runs, load_sweep
from moeprune.report.runs.settings import configured
from moeprune.report.runs.variants import Speed, TaskScore


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


def test_what_newer_runs_write_is_read(tmp_path, write_run):
    run_dir = write_run(tmp_path / "0", experiment="paper/top_k", experts_per_token=1)
    raw = json.loads((run_dir / "metrics.json").read_text())
    raw["variants"][0]["tasks"]["word_order"] |= {"metric": "acc,none", "fewshot": 5}
    raw["variants"][0]["speed"] = {
        "prefill_tokens_per_second": 10.0, "decode_tokens_per_second": 5.0, "batch_size": 2, "prompt_tokens": 32,
        "new_tokens": 8, "repeats": 3, "device": "cpu",
    }  # fmt: skip
    raw["variants"][1]["speed"] = None
    (run_dir / "metrics.json").write_text(json.dumps(raw))
    metrics = load_run(run_dir).metrics
    assert (metrics.experiment, metrics.experts_per_token) == ("paper/top_k", 1)
    assert metrics.dense.tasks["word_order"] == TaskScore(0.9, 0.02, 200, "acc,none", 5)
    assert metrics.dense.speed == Speed(10.0, 5.0, 2, 32, 8, 3, "cpu")
    assert (metrics.pruned.speed, metrics.pruned.tasks["word_order"].fewshot) == (None, None)
    older = load_run(write_run(tmp_path / "1")).metrics
    assert (older.experiment, older.experts_per_token, older.dense.speed) == (None, None, None)


def test_runs_are_found_at_any_depth_each_once_and_named_by_their_folders(tmp_path, write_run):
    for folder in ("2025-01-31/12-00-sweep/10", "2025-01-31/12-00-sweep/9", "2025-01-30/11-00"):
        write_run(tmp_path / folder)
    write_run(tmp_path / "2025-01-31/12-00-sweep/9/inside")  # what a run holds is its own
    write_run(tmp_path / ".hidden")
    names = ["2025-01-30/11-00", "2025-01-31/12-00-sweep/9", "2025-01-31/12-00-sweep/10"]
    assert [run.name for run in load_runs([tmp_path])] == names
    twice = [tmp_path / "2025-01-30", tmp_path / "2025-01-31", tmp_path / "2025-01-31/12-00-sweep"]
    assert [run.name for run in load_runs(twice)] == names
    assert [run.name for run in load_runs([tmp_path / "2025-01-30/11-00"])] == ["11-00"]
    with pytest.raises(InputError, match="no run in it"):
        load_runs([tmp_path / "2025-01-29"])


def test_jobs_that_have_not_begun_are_told_from_the_record_of_the_sweep(tmp_path, write_run):
    write_run(tmp_path / "0")
    jobs = [{"number": n, "folder": str(n), "overrides": [f"seed={n}"], "slurm_job_id": None} for n in (0, 1)]
    (tmp_path / "sweep.json").write_text(json.dumps({"command": [], "jobs": jobs}))
    runs = load_runs([tmp_path])
    assert [(run.name, run.state, run.overrides) for run in runs] == [
        ("0", "success", ()), ("1", "not started", ("seed=1",)),
    ]  # fmt: skip


def test_what_no_job_of_a_sweep_sets_is_known_of_those_that_have_not_begun(tmp_path, write_run):
    run_dir = write_run(tmp_path / "0")
    (run_dir / ".hydra").mkdir()
    (run_dir / ".hydra" / "config.yaml").write_text("ratio: 0.9\nseed: 0\n")
    choices = {"model": "tiny_qwen3_moe", "method": "reap", "scorer": "reap", "quantizer": "nf4"}
    (run_dir / ".hydra" / "hydra.yaml").write_text(json.dumps({"hydra": {"runtime": {"choices": choices}}}))
    jobs = [{"folder": str(n), "overrides": [f"seed={n}", f"method=m{n}"]} for n in (0, 1)]
    (tmp_path / "sweep.json").write_text(json.dumps({"jobs": jobs}))
    run = load_runs([tmp_path])[1]
    assert run.asked == {"model": "tiny_qwen3_moe", "quantizer": "nf4", "ratio": "0.9"}


def test_of_a_run_without_results_what_was_composed_for_it_is_read(tmp_path, write_run):
    run_dir = write_run(tmp_path / "0", error=("BudgetError", "too much\nless"))
    (run_dir / ".hydra").mkdir()
    (run_dir / ".hydra" / "config.yaml").write_text("ratio: 0.9\nseed: 3\nmodel: {name: x}\n")
    choices = {"model": "tiny_qwen3_moe", "method": None, "experiment": "demo", "hydra/launcher": "basic"}
    (run_dir / ".hydra" / "hydra.yaml").write_text(json.dumps({"hydra": {"runtime": {"choices": choices}}}))
    run = load_run(run_dir)
    assert run.asked == {"model": "tiny_qwen3_moe", "experiment": "demo", "ratio": "0.9", "seed": "3"}
    assert run.state == "failed: BudgetError: too much"
    (run_dir / ".hydra" / "hydra.yaml").write_text("hydra: [")
    assert load_run(run_dir).asked == {"ratio": "0.9", "seed": "3"}


def test_a_manifest_of_something_else_is_damaged(tmp_path, write_run):
    folder = write_run(tmp_path / "0")
    (folder / "manifest.json").write_text("[]")
    with pytest.raises(InputError, match=r"manifest\.json is damaged: it holds no object"):
        load_run(folder)


def test_a_task_list_that_is_null_is_told(tmp_path, write_run):
    folder = write_run(tmp_path / "0")
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics["variants"][0]["tasks"] = None
    (folder / "metrics.json").write_text(json.dumps(metrics))
    with pytest.raises(InputError, match=r"metrics\.json does not have the expected entries"):
        load_run(folder)


def test_a_damaged_config_is_told_when_a_setting_is_looked_up_in_it(tmp_path, write_run):
    folder = write_run(tmp_path / "0")
    (folder / "config.yaml").write_text("allocator: {smoothing: [")
    with pytest.raises(InputError, match=r"config\.yaml is damaged"):
        configured(load_run(folder), "allocator.smoothing")
