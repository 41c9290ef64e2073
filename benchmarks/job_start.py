"""Seconds until the command answers: help, a wrong choice, a run whose stages are all cached; against bare Python.

python benchmarks/job_start.py
"""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MOEPRUNE = str(Path(sys.executable).with_name("moeprune"))
ROUNDS = 3
IMPORTS = "import torch; from transformers import AutoModelForCausalLM"
QUICK = ["evaluation=quick", "evaluation.tasks=[]", "evaluation.windows=4", "tracking=none"]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = [MOEPRUNE, *QUICK, f"cache_dir={folder}/cache", f"hydra.run.dir={folder}/run"]
        subprocess.run(run, check=True, capture_output=True)
        works = {
            "python -c pass": [sys.executable, "-c", "pass"],
            "import torch, transformers": [sys.executable, "-c", IMPORTS],
            "moeprune --help": [MOEPRUNE, "--help"],
            "moeprune scorer=atribution (wrong)": [MOEPRUNE, "scorer=atribution"],
            "a run with every stage cached": run,
        }
        print("| command | seconds |\n|---|---|")
        for name, command in works.items():
            print(f"| {name} | {_median_seconds(command):.1f} |", flush=True)


def _median_seconds(command: list[str]) -> float:
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        subprocess.run(command, capture_output=True, check=False)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


if __name__ == "__main__":
    main()
