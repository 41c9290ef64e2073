"""Offline W&B runs, written by the real SDK and read back: against metrics.json, after a requeue, after W&B died."""

import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from offline_runs import OfflineRun, offline_runs, read
from wandb_server import stand_in

from moeprune.app.tracking import WandbTracker, summary_metrics

CONFIG, CHOICES = {"ratio": 0.5}, {"model": "tiny_qwen3_moe"}


@dataclass(frozen=True)
class Stage:
    """Stands for an artifact of the cache."""

    stage: str
    folder: Path
    seconds: float = 1.0
    key: str = "ab"


@pytest.fixture(autouse=True)
def at_home(tmp_path, monkeypatch):
    """Nothing of W&B goes anywhere but below the test's folder."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("RUN_ID", "SWEEP_ID", "RUN_GROUP", "DATA_DIR"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)


def curve(folder: Path, steps: range, ending: str = "") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        {"step": step, "loss": 5.0 / step, "gradient_norm": None, "learning_rate": {"experts": 1e-4}, "tokens": step}
        for step in steps
    ]
    (folder / "loss_curve.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines) + ending)


def recovery_steps(run: OfflineRun) -> list[int]:
    return [row["recovery/step"] for row in run.history if "recovery/step" in row]


def test_an_offline_run_holds_what_metrics_json_holds(here, tiny, text_file):
    recovery = ["recovery=lora", "training_data=text_file", f"training_data.source.files.text={text_file}"]
    small = ["training_data.windows=16", "training_data.sequence_length=16", "recovery.training.batch_size=4"]
    words = [
        "tracking=wandb",
        "tracking.log_artifacts=[plan,scores]",
        "recovery.training.epochs=1",
        "hydra.run.dir=run",
    ]
    outcome = here(*tiny, *recovery, *small, *words)
    assert outcome.code == 0, outcome.err
    run_dir = outcome.place / "run"
    metrics = json.loads((run_dir / "metrics.json").read_text())
    (run,) = offline_runs(run_dir)

    expected = summary_metrics(metrics)
    assert {name: run.summary[name] for name in expected} == pytest.approx(expected)
    assert run.summary["stages/now"] == "done"
    assert run.config["cfg"]["ratio"] == metrics["ratio"]
    assert run.config["cfg"]["choices"]["recovery"] == "lora"
    lines = [json.loads(line) for line in (run_dir / "loss_curve.jsonl").read_text().splitlines()]
    assert recovery_steps(run) == [line["step"] for line in lines]
    losses = [row["recovery/loss"] for row in run.history if "recovery/loss" in row]
    assert losses == pytest.approx([line["loss"] for line in lines])
    assert run.step_metrics["recovery/*"] == "recovery/step"
    rows = {name for row in run.history for name in row}
    assert {"dense/mean_perplexity", "pruned/mean_perplexity", "pruned+lora/mean_perplexity"} <= rows
    media = {name.split(".")[0] for name in rows}
    assert {"tables/variants", "tables/stages", "tables/precision", "plots/kept_channels", "plots/loss_curve"} <= media
    assert {"plan", "scores"} <= set(run.artifacts)
    assert "weights" not in run.artifacts
    assert run.exit_code == 0
    (table,) = run_dir.glob("wandb/offline-run-*/files/media/table/tables/variants*.json")
    shown = json.loads(table.read_text())
    perplexity = shown["columns"].index("mean_perplexity")
    assert [row[perplexity] for row in shown["data"]] == [row["mean_perplexity"] for row in metrics["variants"]]


def test_what_is_logged_names_neither_home_nor_host_nor_command(tmp_path, monkeypatch):
    secret = "hf_" + "x" * 30
    monkeypatch.setenv("MY_TOKEN", secret)
    monkeypatch.setattr(sys, "argv", ["moeprune", f"hub.token={secret}"])
    with WandbTracker("p").open(CONFIG | {"hub": {"token": secret}}, tmp_path, CHOICES):
        pass
    (run,) = offline_runs(tmp_path)
    content = run.path.read_bytes()
    for private in (secret, socket.gethostname(), sys.executable, "git@", "https://"):
        assert private.encode() not in content
    assert list(run.path.parent.glob("files/*.txt")) == []
    assert list(run.path.parent.glob("files/wandb-metadata.json")) == []


def requeue(run_dir: Path) -> None:
    """Two attempts of one job: one is preempted in a recovery, the other goes on from the checkpoint of step 4."""
    cache = run_dir / "cache"
    tracker = WandbTracker("p", mode="offline")
    with pytest.raises(SystemExit), tracker.open(CONFIG, run_dir, CHOICES) as tracked:
        tracked.evaluated("dense", {"mean_perplexity": 20.0})
        tracked.computing("recovered", "ab", cache / "first")
        curve(cache / "first" / "walk" / "training", range(1, 7), ending='{"step": 7, "lo')
        raise SystemExit(1)
    with tracker.open(CONFIG, run_dir, CHOICES) as tracked:
        tracked.evaluated("dense", {"mean_perplexity": 20.0})
        tracked.computing("recovered", "ab", cache / "second")
        curve(cache / "second", range(1, 11))
        tracked.finished(Stage("recovered", cache / "second"))


def test_a_requeued_job_goes_on_with_the_same_run(tmp_path):
    requeue(tmp_path)
    first, second = offline_runs(tmp_path)
    assert first.run.run_id == second.run.run_id
    assert first.run.resume and second.run.resume
    assert (first.exit_code, second.exit_code) == (1, 0)
    assert (first.summary["stages/now"], second.summary["stages/now"]) == ("recovered", "done")
    assert (first.summary["attempts"], second.summary["attempts"]) == (1, 2)
    assert recovery_steps(first) + recovery_steps(second) == list(range(1, 11))
    rows = [row["_step"] for run in (first, second) for row in run.history]
    assert rows == sorted(set(rows))


def test_both_attempts_of_a_requeued_job_are_sent_to_one_run(tmp_path):
    """By the real `wandb sync`, to a stand-in for the server."""
    requeue(tmp_path)
    runs = offline_runs(tmp_path)
    with stand_in() as server:
        key = {"WANDB_MODE": "online", "WANDB_BASE_URL": server.address, "WANDB_API_KEY": "0123456789" * 4}
        program = str(Path(sys.executable).with_name("wandb"))
        words = [program, "sync", *(str(run.path.parent) for run in runs)]
        done = subprocess.run(words, capture_output=True, text=True, timeout=90, env=without_service() | key)
    assert done.returncode == 0, done.stderr
    (rows,) = server.rows.values()
    assert list(rows) == list(range(12))  # the second attempt's lines follow the first's, none is sent over another
    assert [row["_step"] for row in rows.values()] == list(range(12))
    assert [row["recovery/step"] for row in rows.values() if "recovery/step" in row] == list(range(1, 11))


def without_service() -> dict[str, str]:
    """The environment, without the service that this process may have started for other tests."""
    return {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}


def test_a_recovery_that_another_run_trained_has_its_curve_too(tmp_path):
    curve(tmp_path / "stage", range(1, 4))
    with pytest.raises(SystemExit), WandbTracker("p").open(CONFIG, tmp_path, CHOICES) as tracked:
        tracked.waiting("recovered", "ab", "job 7 on node 3")
        tracked.finished(Stage("recovered", tmp_path / "stage", seconds=30.0))
        raise SystemExit(1)
    (run,) = offline_runs(tmp_path)
    assert recovery_steps(run) == [1, 2, 3]
    assert run.summary["stages/now"] == "recovered: waits for job 7 on node 3"
    assert run.summary["stages/recovered/seconds"] == 30.0


DIES = """
import sys, time
from pathlib import Path
import psutil
from moeprune.app.tracking import WandbTracker, tracker

tracker.INIT_TIMEOUT_S = 2.0
with WandbTracker("p", finish_timeout_s=1.0).open({"ratio": 0.5}, Path(sys.argv[1]), {}) as tracked:
    while tracked._run.run is None:
        time.sleep(0.05)
    service = next(child for child in psutil.Process().children() if "wandb-core" in child.name())
    getattr(service, sys.argv[2])()
    for step in range(20):
        tracked.evaluated("dense", {"mean_perplexity": 20.0 + step})
        time.sleep(0.01)
print("the run has ended well")
"""


@pytest.mark.parametrize("fate", ["kill", "suspend"])
def test_a_service_that_dies_or_hangs_does_not_stop_the_run(tmp_path, fate):
    words = [sys.executable, "-c", DIES, str(tmp_path), fate]
    done = subprocess.run(words, capture_output=True, text=True, timeout=90, env=without_service())
    assert (done.returncode, done.stdout) == (0, "the run has ended well\n"), done.stderr
    assert "Traceback" not in done.stderr
    assert "is left out" in done.stderr


KILLED = """
import os, signal, sys, time
from pathlib import Path
from moeprune.app.tracking import WandbTracker

with WandbTracker("p").open({"ratio": 0.5}, Path(sys.argv[1]), {}) as tracked:
    tracked.evaluated("dense", {"mean_perplexity": 20.0})
    while tracked._run.state.next_row == 0:
        time.sleep(0.05)
    time.sleep(3)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_was_logged_seconds_before_a_kill_is_in_the_file(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], timeout=90, env=without_service())
    assert done.returncode == -signal.SIGKILL
    (path,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert [row["dense/mean_perplexity"] for row in read(path).history] == [20.0]
