"""What a sweep takes beyond the work that nobody could spare it: a grid of 4 scorers x 4 allocators x 3 ratios by one
multirun command with the basic launcher, against a bare loop over the same library calls in one process.

The bare loop runs the statistics pass once, then makes 48 plans, prunes 48 times in memory and evaluates 48 pruned
models and the dense one; it writes nothing, caches nothing, draws nothing and reports nothing, and the seconds in which
it reads its settings do not count. Both ends must find the same numbers. Seconds include the start of both processes.
On a machine that other work shares, compare the processor seconds, of all threads.

python benchmarks/sweep_overhead.py [--small] [evaluation=quick]
"""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

Result = TypeVar("Result")

SCORERS = ("attribution", "activation", "magnitude", "random")
ALLOCATORS = ("coverage", "uniform", "channel_ranking", "optimal_coverage")
RATIOS = (0.25, 0.5, 0.75)
SMALL = (SCORERS[:2], ALLOCATORS[:2], RATIOS[1:2])
CHOICES = ("model=tiny_qwen3_moe", "tracking=none", *(word for word in sys.argv[1:] if "=" in word))


def main() -> None:
    grid = SMALL if "--small" in sys.argv else (SCORERS, ALLOCATORS, RATIOS)
    if "--bare" in sys.argv:
        print(json.dumps(_bare_loop(*grid)))
        return
    with TemporaryDirectory() as folder:
        swept, wall, busy = _timed(_sweep, Path(folder), *grid)
    (settings_seconds, bare), bare_wall, bare_busy = _timed(_bare_loop_in_a_process)
    assert swept == bare, "the sweep and the bare loop found different perplexities"
    jobs = len(bare)
    print(f"| {jobs} jobs | bare loop | multirun | ratio | multirun beyond it, a job |")
    print("|---|---|---|---|---|")
    for kind, took, least in (("seconds", wall, bare_wall), ("processor seconds", busy, bare_busy)):
        least -= settings_seconds
        print(f"| {kind} | {least:.1f} | {took:.1f} | {took / least:.3f} | {(took - least) / jobs:.2f} |")


def _timed(work: Callable[..., Result], *arguments: Any) -> tuple[Result, float, float]:
    """What ``work`` found in its child processes, the seconds that it took, and their processor seconds."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    found = work(*arguments)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return found, seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _sweep(folder: Path, *grid: tuple) -> list[float]:
    """The mean perplexity of each job in order, by the whole command."""
    keys = ("scorer", "allocator", "ratio")
    swept = [f"{key}={','.join(map(str, values))}" for key, values in zip(keys, grid, strict=True)]
    command = [str(Path(sys.executable).with_name("moeprune")), "--multirun", *CHOICES, *swept, "hydra.sweep.dir=sweep"]
    environment = {**os.environ, "MOEPRUNE_CACHE": str(folder / "cache")}
    subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
    jobs = sorted((folder / "sweep").glob("*/metrics.json"), key=lambda file: int(file.parent.name))
    return [json.loads(job.read_text())["variants"][-1]["mean_perplexity"] for job in jobs]


def _bare_loop_in_a_process() -> tuple[float, list[float]]:
    again = [sys.executable, __file__, "--bare", *sys.argv[1:]]
    done = subprocess.run(again, capture_output=True, text=True, check=True)
    settings_seconds, found = json.loads(done.stdout.splitlines()[-1])
    return settings_seconds, found


def _bare_loop(*grid: tuple) -> tuple[float, list[float]]:
    """Seconds spent on reading settings, and the mean perplexity of each point of the grid, by library calls alone."""
    from hydra import compose, initialize_config_dir

    from moeprune.app.build import build_experiment
    from moeprune.app.main import config_folder
    from moeprune.calibration.statistics import collect_statistics
    from moeprune.models.layers.workspace import IN_MEMORY
    from moeprune.scoring.weights import with_expert_weights

    settings_seconds, found, scores = 0.0, [], {}
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        first = build_experiment(compose("config", list(CHOICES)))
        tokenizer = first.model.tokenizer()
        windows = first.calibration.sample(tokenizer)
        statistics = collect_statistics(first.model.load(), windows, first.calibration.batch_size)
        first.evaluation(first.model.load(), tokenizer)
        for scorer, allocator, ratio in product(*grid):
            point = [f"scorer={scorer}", f"allocator={allocator}", f"ratio={ratio}"]
            start = time.perf_counter()
            experiment = build_experiment(compose("config", [*CHOICES, *point]))
            settings_seconds += time.perf_counter() - start
            if scorer not in scores:
                scores[scorer] = with_expert_weights(experiment.scorer(statistics), statistics)
            plan = experiment.allocator(scores[scorer], experiment.budget())
            model = experiment.model.load()
            list(experiment.surgery(model, plan, statistics, windows, experiment.calibration.batch_size, IN_MEMORY))
            found.append(experiment.evaluation(model, tokenizer)["mean_perplexity"])
    return settings_seconds, found


if __name__ == "__main__":
    main()
