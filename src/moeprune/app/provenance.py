"""What a result was made with: versions, git state, seeds, hardware."""

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

from moeprune.app.git import git_state

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
        "git": git_state(),
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
