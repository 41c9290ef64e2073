"""Commands as a user gives them: inside this process, or in one of their own, on a tiny random checkpoint."""

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from moeprune.app.main import main

PROGRAM = Path(sys.executable).with_name("moeprune")


@dataclass(frozen=True)
class Outcome:
    """What a command left: exit code, what it printed, and the run directories below the place where it ran."""

    code: int
    out: str
    err: str
    place: Path

    @property
    def manifests(self) -> list[Path]:
        return sorted(self.place.glob("runs/**/manifest.json"))


Command = Callable[..., Outcome]


@pytest.fixture(scope="session")
def checkpoint(build_model, byte_tokenizer, tmp_path_factory) -> Path:
    """A random Qwen3-MoE checkpoint: 2 layers of 8 experts of width 16, top-2."""
    folder = tmp_path_factory.mktemp("checkpoint")
    build_model("qwen3_renormalised", torch.float32).save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("texts") / "squares.txt"
    file.write_text("\n".join(f"{n} and {n * n}" for n in range(300)))
    return file


@pytest.fixture(scope="session")
def tiny(checkpoint, text_file) -> list[str]:
    """Overrides for a run of a second on the tiny checkpoint."""
    return [
        "model=checkpoint", f"model.path={checkpoint}", "model.dtype=float32", "model.compute_dtype=float32",
        "model.device=cpu", "model.alignment=4", "model.minimum_width=4",
        "calibration=text_file", f"calibration.source.files.text={text_file}", "calibration.windows=6",
        "calibration.sequence_length=16", "evaluation=text_file", f"evaluation.source.files.text={text_file}",
        "evaluation.windows=6", "evaluation.sequence_length=16", "tracking=none",
    ]  # fmt: skip


@pytest.fixture
def here(tmp_path, monkeypatch, capfd) -> Iterator[Command]:
    """``here("ratio=0.5", ...)`` runs ``moeprune`` inside this process, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    for name, value in {"HYDRA_FULL_ERROR": "1", "TQDM_DISABLE": "1", "MOEPRUNE_CACHE": "cache"}.items():
        monkeypatch.setenv(name, value)
    root, terminate = logging.getLogger(), signal.getsignal(signal.SIGTERM)
    handlers, level = root.handlers[:], root.level

    def run(*words: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["moeprune", *words])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code
        out, err = capfd.readouterr()
        return Outcome(code, out, err, tmp_path)

    yield run
    root.handlers[:] = handlers
    root.setLevel(level)
    signal.signal(signal.SIGTERM, terminate)


@pytest.fixture
def program(tmp_path) -> Command:
    """``program("ratio=0.5", ...)`` runs ``moeprune`` in a process of its own, in a folder of its own."""

    def run(*words: str, **environment: str) -> Outcome:
        done = subprocess.run(
            [str(PROGRAM), *words],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1", "MOEPRUNE_CACHE": "cache", **environment},
            capture_output=True,
            text=True,
            timeout=300,
        )
        return Outcome(done.returncode, done.stdout, done.stderr, tmp_path)

    return run
