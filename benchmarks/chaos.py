"""Does a sweep end with the same numbers when every one of its jobs is killed, preempted or loses its node on the way?

30 jobs on two small embedded-model grids run first undisturbed in one process, then as two sweeps with one cache on a
private SLURM of two nodes (`slurm/cluster/up`; root, Debian), where each job meets at least one of these at a random
moment, and may meet more when it starts again:

    kill       kill -9 of its Python; SLURM does not start it again, `moeprune-rerun` does
    preempt    USR2, as SLURM sends it before it preempts or at the time limit
    requeue    scontrol requeue: ended without a word and started again
    crash      kill -9 of the node's daemons and of everything on it; the node comes back after a second

In the end every metrics.json is compared with its undisturbed twin, all but what was measured with a clock, and every
file of the cache with its digest. The exit code says whether all is equal and sound. The table counts the starts that
came as far as writing a manifest.

    python benchmarks/chaos.py              # about 15 minutes on two cores
    python benchmarks/chaos.py --quick      # 4 jobs
    python benchmarks/chaos.py --seed 1     # other moments
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

SCRIPTS = Path(__file__).resolve().parents[1] / "slurm/cluster"
COMMANDS = Path(sys.executable).parent
KINDS = ("kill", "preempt", "requeue", "crash")
COMMON = ["evaluation=quick", "evaluation.tasks=[]", "calibration.windows=32", "tracking=none"]
SWEEPS = {
    "pruned": ["scorer=attribution,activation,magnitude", "allocator=coverage,uniform,global", "ratio=0.25,0.5"],
    "recovered": [
        "scorer=attribution,activation,magnitude", "ratio=0.25,0.5", "quantizer=none,nf4", "recovery=lora",
        "training_data.windows=64", "recovery.training.batch_size=16", "recovery.training.checkpoint_every_steps=1",
    ],
}  # fmt: skip
QUICK_SWEEPS = {
    "pruned": ["scorer=attribution,magnitude"],
    "recovered": ["quantizer=none,nf4", *SWEEPS["recovered"][3:]],
}
LAST_STAGE = 6  # of 9 or more on every road; what follows takes longer than LONGEST_AT_WORK_SECONDS
LONGEST_START_SECONDS = 6.0
LONGEST_AT_WORK_SECONDS = 1.0
BLOWS_AT_MOST = 3
ROUNDS_AT_MOST = 6
_ONE_CRASH = threading.Lock()  # at a time, so that a node that comes back is not that of a later crash


@dataclass
class Job:
    """A job of the disturbed sweep, and what it has met. The next blow falls ``seconds`` after the attempt has finished
    ``stages`` stages, or, with no stages, after SLURM started it."""

    folder: Path
    overrides: str
    blows: list[str] = field(default_factory=list)
    kind: str | None = None
    stages: int = 0
    seconds: float = 0.0
    due: float | None = None

    @property
    def manifest(self) -> dict[str, Any]:
        try:
            content: dict[str, Any] = json.loads((self.folder / "manifest.json").read_text())
        except FileNotFoundError:
            return {}
        return content

    def draw(self, chance: random.Random) -> None:
        """Decide what the coming attempt meets, and when."""
        self.due = None
        spared = self.blows and (len(self.blows) >= BLOWS_AT_MOST or chance.random() < 0.7)
        self.kind = None if spared else chance.choice(KINDS)
        # Before it is at work a job takes no notice of USR2, and nothing would have happened.
        at_start = self.kind != "preempt" and chance.random() < 0.3
        self.stages = 0 if at_start else chance.randint(1, LAST_STAGE)
        self.seconds = chance.uniform(0, LONGEST_AT_WORK_SECONDS if self.stages else LONGEST_START_SECONDS)

    def struck(self, kind: str, chance: random.Random) -> None:
        self.blows.append(kind)
        self.draw(chance)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument(
        "--folder", type=Path, default=None, help="a new folder for everything; default: a temporary one"
    )
    asked = parser.parse_args()
    folder = asked.folder or Path(tempfile.mkdtemp(prefix="chaos."))
    os.environ.update(OMP_NUM_THREADS="1", MOEPRUNE_CACHE="")
    sweeps = QUICK_SWEEPS if asked.quick else SWEEPS
    calm, chaos = folder / "calm", folder / "chaos"
    for name, grid in sweeps.items():
        subprocess.run(sweep_command(calm, name, grid), check=True, stdout=subprocess.DEVNULL)
    start = time.monotonic()
    with private_slurm() as environment:
        jobs = disturbed(chaos, sweeps, environment, random.Random(asked.seed))
    print(f"{len(jobs)} jobs and {sum(len(job.blows) for job in jobs)} blows in {time.monotonic() - start:.0f} s\n")
    sound = subprocess.run([COMMANDS / "moeprune-cache", "verify", "--cache-dir", chaos / "cache"], check=False)
    all_equal = print_table(jobs, calm, chaos)
    print(f"\nEverything lies in {folder}.")
    sys.exit(not (all_equal and sound.returncode == 0))


def sweep_command(folder: Path, name: str, grid: list[str], *launcher: str) -> list[str]:
    where = [f"cache_dir={folder / 'cache'}", f"hydra.sweep.dir={folder / name}"]
    return [str(COMMANDS / "moeprune"), "--multirun", *COMMON, *grid, *where, *launcher]


@contextmanager
def private_slurm() -> Iterator[dict[str, str]]:
    """The environment of its users."""
    up = subprocess.run([SCRIPTS / "up"], check=True, capture_output=True, text=True).stdout
    exported = dict(line.removeprefix("export ").split("=", 1) for line in up.splitlines())
    environment = {**os.environ, **exported, "PATH": exported["PATH"].replace("$PATH", os.environ["PATH"])}
    try:
        yield environment
    finally:
        subprocess.run([SCRIPTS / "down"], env=environment, check=True)


def disturbed(
    folder: Path, sweeps: dict[str, list[str]], environment: dict[str, str], chance: random.Random
) -> list[Job]:
    """Run the sweeps on the cluster and their jobs again until all have succeeded, while the blows fall."""
    jobs: dict[Path, Job] = {}
    launcher = (
        "hydra/launcher=slurm",
        "hydra.launcher.timeout_min=60",
        "hydra.launcher.mem_gb=1",
        "hydra.launcher.cpus_per_task=2",
        # Sums come out in another order with other threads, and these are to be those of the undisturbed run.
        "hydra.launcher.setup=['export OMP_NUM_THREADS=1']",
    )
    commands = {name: sweep_command(folder, name, grid, *launcher) for name, grid in sweeps.items()}
    folder.mkdir(parents=True)
    for attempt in range(ROUNDS_AT_MOST):
        with (folder / f"drivers-{attempt}.log").open("w") as log:
            drivers = [
                subprocess.Popen(command, env=environment, stdout=log, stderr=log) for command in commands.values()
            ]
            while any(driver.poll() is None for driver in drivers):
                trouble(folder, list(sweeps), jobs, environment, chance)
                time.sleep(0.1)
        unfinished = {job.folder.parent.name for job in jobs.values() if job.manifest.get("status") != "success"}
        commands = {name: [str(COMMANDS / "moeprune-rerun"), str(folder / name)] for name in sorted(unfinished)}
        if not commands:
            break
    return list(jobs.values())


def trouble(
    folder: Path, sweeps: list[str], jobs: dict[Path, Job], environment: dict[str, str], chance: random.Random
) -> None:
    """Strike every running job whose moment has come."""
    nodes = dict(line.split() for line in client(environment, "squeue", "-h", "-t", "R", "-o", "%i %N").splitlines())
    running: dict[str, Job] = {}
    for name in sweeps:
        for slurm_id, job in submitted(folder / name).items():
            known = jobs.setdefault(job.folder, job)
            if known is job:
                job.draw(chance)
            if slurm_id in nodes:
                running[slurm_id] = known
    for slurm_id, job in running.items():
        if slurm_id not in nodes or not moment_has_come(job, slurm_id):
            continue
        kind = str(job.kind)
        hit = [
            other for other in running if nodes.get(other) == nodes[slurm_id] and (kind == "crash" or other == slurm_id)
        ]
        strike(kind, slurm_id, nodes[slurm_id], environment)
        for other in hit:
            running[other].struck(kind, chance)
            del nodes[other]


def submitted(sweep_dir: Path) -> dict[str, Job]:
    """The jobs of a sweep by their SLURM ids."""
    try:
        record = json.loads((sweep_dir / "sweep.json").read_text())
    except FileNotFoundError:
        return {}
    return {
        job["slurm_job_id"]: Job(sweep_dir / job["folder"], " ".join(job["overrides"]))
        for job in record["jobs"]
        if job["slurm_job_id"] is not None
    }


def moment_has_come(job: Job, slurm_id: str) -> bool:
    if job.kind is None:
        return False
    if job.due is None:
        manifest = job.manifest
        # A manifest of an earlier attempt counts its stages, not this one's.
        at_work = manifest.get("status") == "running" and psutil.pid_exists(manifest["pid"])
        if job.stages == 0 or (at_work and manifest["stages_done"] >= job.stages):
            job.due = time.monotonic() + job.seconds
    return job.due is not None and time.monotonic() >= job.due and bool(pythons_of(slurm_id) or job.kind != "kill")


def strike(kind: str, slurm_id: str, node: str, environment: dict[str, str]) -> None:
    if kind == "kill":
        for process in pythons_of(slurm_id):
            process.kill()
    elif kind == "preempt":
        # Not waited for: scancel goes on to ask about a job that has left for the queue.
        subprocess.Popen(["scancel", "--signal=USR2", slurm_id], env=environment, stderr=subprocess.DEVNULL)
    elif kind == "requeue":
        client(environment, "scontrol", "requeue", slurm_id)
    else:
        # Beside the others: a crash takes ten seconds, in which jobs end.
        threading.Thread(target=crash, args=(node, environment)).start()


def crash(node: str, environment: dict[str, str]) -> None:
    """Let a node die with everything on it, and come back."""
    with _ONE_CRASH:
        subprocess.run([SCRIPTS / "disturb", "crash", node], env=environment, check=True)
        time.sleep(1)
        subprocess.run([SCRIPTS / "disturb", "revive", node], env=environment, check=True)


def pythons_of(slurm_id: str) -> list[psutil.Process]:
    """The processes of a job that run its Python."""
    array, _, task = slurm_id.partition("_")
    wanted = {"SLURM_ARRAY_JOB_ID": array, "SLURM_ARRAY_TASK_ID": task} if task else {"SLURM_JOB_ID": array}
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if "submitit.core._submit" not in (process.info["cmdline"] or []):
            continue
        try:
            environment = process.environ()
        except psutil.Error:
            continue
        if "SLURM_PROCID" in environment and wanted.items() <= environment.items():
            found.append(process)
    return found


def client(environment: dict[str, str], *command: str) -> str:
    """What a SLURM command prints; nothing while the cluster does not answer."""
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=30).stdout


def print_table(jobs: list[Job], calm: Path, chaos: Path) -> bool:
    """Whether all jobs succeeded, were struck, and have the numbers of the undisturbed ones."""
    print("| job | what | met | starts | numbers equal |\n|---|---|---|---|---|")
    all_well = bool(jobs)
    for job in sorted(jobs, key=lambda job: (job.folder.parent.name, int(job.folder.name))):
        place = job.folder.relative_to(chaos)
        equal = job.manifest.get("status") == "success" and numbers(job.folder) == numbers(calm / place)
        all_well = all_well and equal and bool(job.blows)
        what = " ".join(word for word in job.overrides.split() if word.partition("=")[0] in VARIED)
        starts = job.manifest.get("attempt", -1) + 1
        print(f"| {place} | {what} | {', '.join(job.blows) or 'nothing'} | {starts} | {'yes' if equal else '**no**'} |")
    return all_well


VARIED = ("scorer", "allocator", "ratio", "quantizer")


def numbers(run_dir: Path) -> dict[str, Any]:
    """A run's metrics without what a clock or the memory's size says, and without who computed a stage."""
    metrics: dict[str, Any] = json.loads((run_dir / "metrics.json").read_text())
    metrics["stages"] = [(stage["stage"], stage["key"]) for stage in metrics["stages"]]
    if metrics.get("recovery_details"):
        del metrics["recovery_details"]["seconds"]
    return metrics


if __name__ == "__main__":
    main()
