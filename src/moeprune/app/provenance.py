"""What a result was made with: versions, git state, seeds, hardware."""

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

import moeprune

PACKAGES = (
    "moeprune", "torch", "transformers", "safetensors", "tokenizers", "bitsandbytes", "lm-eval", "lightning", "peft",
    "hydra-core", "omegaconf", "numpy",
)  # fmt: skip


def provenance(seed: int) -> dict[str, object]:
    """Plain values for ``provenance.json``."""
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "seed": seed,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "git": _git_state(),
        "hardware": {
            "host": platform.node(),
            "system": platform.platform(),
            "cores": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
            "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        },
        "slurm": {name: value for name, value in os.environ.items() if name in ("SLURM_JOB_ID", "SLURM_ARRAY_TASK_ID")},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_state() -> dict[str, object] | None:
    """Commit of the source tree and whether it had changes; None for an installed package."""

    def git(*words: str) -> str:
        source = Path(moeprune.__file__).parent
        return subprocess.run(
            ["git", "-C", str(source), *words], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        if not git("ls-files", "__init__.py"):
            return None
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None
