"""Experiments on tiny random checkpoints with text files of the test's own, and a place for a cache."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moeprune.allocation.coverage import CoverageAllocator
from moeprune.calibration.sample import Calibration
from moeprune.calibration.text import TextFiles
from moeprune.evaluation.evaluate import Evaluation
from moeprune.models.source import ModelSource
from moeprune.pipeline.experiment import Experiment
from moeprune.scoring.attribution import AttributionScorer


@pytest.fixture
def root(tmp_path) -> Path:
    """Where a cache may be; nothing is there."""
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def checkpoints(build_model, byte_tokenizer, tmp_path_factory) -> Callable[[str], Path]:
    """``checkpoints(name)``: the folder of a tiny model in float32, saved once."""

    def folder_of(name: str) -> Path:
        folder = tmp_path_factory.getbasetemp() / f"checkpoint_{name}"
        if not folder.exists():
            build_model(name, torch.float32).save_pretrained(folder)
            byte_tokenizer.save_pretrained(folder)
        return folder

    return folder_of


@pytest.fixture(scope="session")
def texts(tmp_path_factory) -> TextFiles:
    """Two small text files."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "numbers.txt").write_text("\n".join(f"{n} and {n * n}" for n in range(200)))
    (folder / "letters.txt").write_text("\n".join(chr(97 + n % 26) * (n % 7 + 1) for n in range(300)))
    return TextFiles({name: str(folder / f"{name}.txt") for name in ("numbers", "letters")})


@pytest.fixture
def experiment(checkpoints, texts) -> Callable[..., Experiment]:
    """``experiment(name, ratio=0.25, ...)``: a small experiment on a tiny model, with any of its parts replaced."""

    def make(name: str = "qwen3_renormalised", **parts: object) -> Experiment:
        path = str(checkpoints(name))
        defaults = {
            "model": ModelSource(name, path, "float32", "float32", alignment=4, minimum_width=4, device="cpu"),
            "calibration": Calibration(texts, windows=6, sequence_length=16, batch_size=3, seed=0),
            "scorer": AttributionScorer(),
            "allocator": CoverageAllocator(),
            "ratio": 0.5,
            "evaluation": Evaluation(texts, windows=6, sequence_length=16, batch_size=4),
        }
        return Experiment(**{**defaults, **parts})

    return make
