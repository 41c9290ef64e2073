"""A sweep on a real SLURM while its jobs fail, are killed, preempted or lose their node, their disk, the controller."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from live_cluster import PATIENCE_SECONDS, Cluster, ended, manifest_of, wait_for

from moeprune.pipeline.cache import StageCache

LIGHT_JOB = Path(__file__).with_name("light_job.py")
LAUNCHER = "slurm"
AGAIN = ("again-signal", "again-requeue", "again-crash", "again-preempt")
LEAD = ("lead-1", "lead-2")
SHARE = tuple(f"share-{number}" for number in range(8))
DISKS = ("fill_disk", "missing_from_read_only", "stored_in_read_only")
JOBS = (*AGAIN, *LEAD, "fail", "be_killed", *DISKS, *SHARE)


def test_a_sweep_survives_what_clusters_do(cluster: Cluster, tmp_path: Path, subtests: pytest.Subtests) -> None:
    notes, sweep_dir, log = tmp_path / "notes", tmp_path / "sweep", tmp_path / "driver.log"
    notes.mkdir()
    runs = {job: sweep_dir / str(number) for number, job in enumerate(JOBS)}
    with _other_disks(notes) as no_disks:
        with cluster.started(_sweep(tmp_path), log, PYTHONPATH=str(LIGHT_JOB.parent)) as driver:
            leader = _disturb(cluster, notes, runs)
            exit_code = driver.wait(PATIENCE_SECONDS)
        first = {job: manifest_of(run_dir) for job, run_dir in runs.items()}
        (notes / "mended").touch()
        rerun = [sys.executable, str(LIGHT_JOB), "rerun", str(sweep_dir)]
        with cluster.started(rerun, tmp_path / "rerun.log", PYTHONPATH=str(LIGHT_JOB.parent)) as driver:
            driver.wait(PATIENCE_SECONDS)
    second = {job: manifest_of(run_dir) for job, run_dir in runs.items()}

    for name, check in CHECKS.items():
        with subtests.test(name):
            check(first, notes, leader)
    with subtests.test("disks"):
        _check_disks(first, notes, no_disks)
    with subtests.test("driver"):
        assert exit_code not in (0, None)
        said = log.read_text()
        assert "as it was asked to" in said and "moeprune-rerun" in said
    with subtests.test("rerun"):
        for job in ("fail", "be_killed", *LEAD):
            assert second[job]["status"] == "success", job
        untouched = (*AGAIN, *SHARE)
        assert {job: second[job] for job in untouched} == {job: first[job] for job in untouched}


def _sweep(folder: Path) -> list[str]:
    return [
        sys.executable, str(LIGHT_JOB), "--multirun", f"hydra/launcher={LAUNCHER}", "hydra.launcher.partition=low",
        "hydra.launcher.timeout_min=60", "hydra.launcher.cpus_per_task=1", "hydra.launcher.mem_gb=1",
        f"+do={','.join(JOBS)}", f"+at={folder / 'notes'}", f"cache_dir={folder / 'cache'}",
        f"hydra.sweep.dir={folder / 'sweep'}",
    ]  # fmt: skip


def _disturb(cluster: Cluster, notes: Path, runs: dict[str, Path]) -> int:
    """Do to each job of AGAIN what its name says, and kill the one of LEAD that computes; its pid."""
    ids = {job: wait_for(f"{job} begins", lambda job=job: manifest_of(runs[job]))["slurm_job_id"] for job in AGAIN}
    cluster.signal(ids["again-signal"], "USR2")
    cluster.client("scontrol", "requeue", ids["again-requeue"])
    wait_for("one waits for the other", lambda: "waiting" in [_stage_state(runs[job]) for job in LEAD])
    leader = int(_lines(notes / "computed-lead")[0])
    os.kill(leader, signal.SIGKILL)
    cluster.disturb("stop-controller")
    cluster.disturb("start-controller")
    # What now ends or preempts whole nodes is to hit no other job.
    wait_for("the others end", lambda: all(ended(runs[job]) for job in JOBS if job not in AGAIN))
    crashing, preempted = cluster.node_of(ids["again-crash"]), cluster.node_of(ids["again-preempt"])
    assert {crashing, preempted} == {"n1", "n2"}
    cluster.disturb("crash", crashing)
    whole_node = ["--partition=main", "--exclusive", f"--nodelist={preempted}"]
    cluster.client("sbatch", *whole_node, "--output=/dev/null", "--wrap=true")
    cluster.disturb("revive", crashing)
    return leader


Manifests = dict[str, dict[str, Any]]


def _check_again(manifests: Manifests, _notes: Path, _leader: int) -> None:
    for job in AGAIN:
        assert manifests[job]["status"] == "success", job
        assert manifests[job]["attempt"] >= 1, job
    told = {job: manifests[job]["earlier"][0]["status"] for job in AGAIN}
    assert told.pop("again-requeue") in ("preempted", "killed")  # whether it had the time to say so
    assert told == {"again-signal": "preempted", "again-crash": "killed", "again-preempt": "preempted"}


def _check_share(manifests: Manifests, notes: Path, _leader: int) -> None:
    assert {manifests[job]["status"] for job in SHARE} == {"success"}
    assert len(_lines(notes / "computed-share")) == 1


def _check_lead(manifests: Manifests, notes: Path, leader: int) -> None:
    by_pid = {manifests[job]["pid"]: manifests[job]["status"] for job in LEAD}
    assert by_pid.pop(leader) == "killed"  # the driver says so in its place
    assert list(by_pid.values()) == ["success"]
    assert len(_lines(notes / "computed-lead")) == 2


def _check_failures(manifests: Manifests, _notes: Path, _leader: int) -> None:
    assert manifests["fail"]["status"] == "failed"
    assert manifests["fail"]["error"]["message"] == "as it was asked to"
    assert manifests["be_killed"]["status"] == "killed"


CHECKS: dict[str, Callable[[Manifests, Path, int], None]] = {
    "again": _check_again,
    "share": _check_share,
    "lead": _check_lead,
    "failures": _check_failures,
}


def _check_disks(manifests: Manifests, notes: Path, no_disks: str) -> None:
    if no_disks:
        pytest.skip(no_disks)
    for job in ("fill_disk", "missing_from_read_only"):
        assert manifests[job]["status"] == "failed"
        assert manifests[job]["error"]["type"] == "CacheError", manifests[job]["error"]
    assert manifests["stored_in_read_only"]["status"] == "success"
    assert not list(notes.glob("computed-missing")) and not list(notes.glob("computed-stored"))


def _lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []


def _stage_state(run_dir: Path) -> str | None:
    stage = manifest_of(run_dir).get("stage")
    return stage["state"] if stage else None


@contextmanager
def _other_disks(notes: Path) -> Iterator[str]:
    """``small``, of one megabyte, and ``read_only``, where one stage is stored; yields why not, where that fails."""
    small, read_only = notes / "small", notes / "read_only"
    small.mkdir()
    StageCache(read_only).get("stored", 1, {}, [], lambda folder: (folder / "result.txt").touch())
    mounts = (
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)],
        ["mount", "--bind", str(read_only), str(read_only)],
        ["mount", "-o", "remount,ro,bind", str(read_only)],
    )
    try:
        failed = [
            done for done in (subprocess.run(one, capture_output=True, text=True) for one in mounts) if done.returncode
        ]
        yield failed[0].stderr if failed else ""
    finally:
        for folder in (small, read_only):
            subprocess.run(["umount", "--lazy", folder], check=False, capture_output=True)
