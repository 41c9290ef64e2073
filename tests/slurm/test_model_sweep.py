"""A sweep of embedded-model jobs on a real SLURM, one of them preempted; beside it, a job that runs out of time."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from live_cluster import PATIENCE_SECONDS, Cluster, manifest_of, wait_for

LIGHT_JOB = Path(__file__).with_name("light_job.py")
LAUNCHER = "slurm"
RATIOS = ("0.25", "0.5", "0.75")
SMALL = ["evaluation=quick", "evaluation.tasks=[]", "evaluation.windows=4", "calibration.windows=16", "tracking=wandb"]


def test_jobs_of_a_sweep_share_their_work_and_outlive_preemption(
    cluster: Cluster, tmp_path: Path, subtests: pytest.Subtests
) -> None:
    sweep_dir, limited = tmp_path / "sweep", tmp_path / "limited"
    runs = [sweep_dir / str(number) for number in range(len(RATIOS))]
    short = [*_command(limited, "timeout_min=1", "max_num_timeout=5"), "+do=again-limit", f"+at={tmp_path}"]
    short[1:3] = [str(LIGHT_JOB)]  # in the place of -m moeprune
    variables = {"PYTHONPATH": str(LIGHT_JOB.parent)}
    grid = [f"ratio={','.join(RATIOS)}", *SMALL]
    with (
        cluster.started(short, tmp_path / "limited.log", **variables) as limited_driver,
        cluster.started([*_command(sweep_dir, "timeout_min=60"), *grid], tmp_path / "driver.log") as driver,
    ):
        nodes = wait_for("all jobs begin", lambda: _nodes_of(cluster, runs))
        wait_for("statistics are there", lambda: list(tmp_path.glob("cache/statistics/*/stage.json")))
        wait_for("the W&B run is open", lambda: _wandb_runs(runs[-1]))
        cluster.signal(manifest_of(runs[-1])["slurm_job_id"], "USR2")
        exit_code = driver.wait(PATIENCE_SECONDS)
        limited_driver.wait(PATIENCE_SECONDS)

    log = (tmp_path / "driver.log").read_text()
    with subtests.test("sweep"):
        assert exit_code == 0, log
        assert nodes == {"n1", "n2"}
        assert [manifest_of(run)["status"] for run in runs] == ["success"] * len(runs)
    with subtests.test("preempted"):
        assert [manifest_of(run)["attempt"] for run in runs] == [0, 0, 1]
        assert manifest_of(runs[-1])["earlier"][0]["status"] == "preempted"
    with subtests.test("one W&B run"):
        assert [len(_wandb_runs(run)) for run in runs] == [1, 1, 2]
        assert len(set(_wandb_runs(runs[-1]))) == 1
    with subtests.test("one statistics pass"):
        logs = "".join((run / "moeprune.log").read_text() for run in runs)
        assert len(re.findall(r"statistics \w+: computing", logs)) == 1
    with subtests.test("metrics"):
        for run, ratio in zip(runs, RATIOS, strict=True):
            metrics = json.loads((run / "metrics.json").read_text())
            assert metrics["ratio"] == float(ratio)
            assert [variant["name"] for variant in metrics["variants"]] == ["dense", "pruned"]
    with subtests.test("status"):
        asked = [sys.executable, "-c", "from moeprune.app.main import status; status()", str(sweep_dir)]
        done = subprocess.run(asked, env=cluster.environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("success") >= len(runs)
    with subtests.test("time limit"):
        assert manifest_of(limited / "0").get("status") == "success", (tmp_path / "limited.log").read_text()
        assert "has timed out" in (limited / "0/job.out").read_text()


def _command(sweep_dir: Path, *settings: str) -> list[str]:
    of_launcher = [f"hydra.launcher.{setting}" for setting in ("cpus_per_task=4", "mem_gb=1", *settings)]
    where = [f"hydra.sweep.dir={sweep_dir}", f"cache_dir={sweep_dir.parent / 'cache'}"]
    return [sys.executable, "-m", "moeprune", "--multirun", f"hydra/launcher={LAUNCHER}", *of_launcher, *where]


def _nodes_of(cluster: Cluster, runs: list[Path]) -> set[str]:
    """Where the jobs run; empty until all have begun."""
    manifests = [manifest_of(run) for run in runs]
    return {cluster.node_of(manifest["slurm_job_id"]) for manifest in manifests} if all(manifests) else set()


def _wandb_runs(run_dir: Path) -> list[str]:
    """The ids of the offline W&B runs in a run directory, one for each attempt."""
    return [path.stem.removeprefix("run-") for path in run_dir.glob("wandb/offline-run-*/run-*.wandb")]
