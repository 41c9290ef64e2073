"""A run that is killed, at any stage, goes on from its finished stages to the same numbers."""

import hashlib
import json
import multiprocessing
import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from moeprune.pipeline.cache import RECORD, StageCache
from moeprune.pipeline.run import run

LIMIT_SECONDS = 120


def walk(experiment, cache_dir: Path) -> None:
    """What each killed process does."""
    import torch

    torch.set_num_threads(1)
    run(experiment, StageCache(cache_dir))


@pytest.fixture(scope="module")
def server():
    """Processes that start at once, with everything heavy imported already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["moeprune.pipeline.run", "transformers.models.qwen3_moe.modeling_qwen3_moe"])
    return context


def kill_when(condition: Callable[[], bool], process, delay: float) -> None:
    """SIGKILL ``delay`` seconds after the condition holds."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while not condition() and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.0005)
    time.sleep(delay)
    process.kill()
    process.join()


def assert_finished_stages_are_whole(cache_dir: Path) -> None:
    """Every folder under a final name, which is a key, holds a record and the files that the record tells of."""
    for folder in cache_dir.rglob("*"):
        if re.fullmatch("[0-9a-f]{32}", folder.name):
            digests = json.loads((folder / RECORD).read_text())["files"]
            assert digests
            for name, digest in digests.items():
                assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest


def test_a_run_killed_during_every_stage_ends_with_the_numbers_of_an_undisturbed_one(server, experiment, tmp_path):
    undisturbed = run(experiment(), StageCache(tmp_path / "undisturbed"))
    cache_dir, rng, cut_short = tmp_path / "killed", random.Random(0), 0
    for artifact in undisturbed.stages:
        process = server.Process(target=walk, args=(experiment(), cache_dir))
        process.start()
        at_work = f"{artifact.stage}/.partial-{artifact.key}-*"
        kill_when(lambda at_work=at_work: any(cache_dir.glob(at_work)), process, rng.uniform(0, artifact.seconds))
        cut_short += process.exitcode == -signal.SIGKILL and any(cache_dir.glob(at_work))
        assert_finished_stages_are_whole(cache_dir)
    assert cut_short > 0

    resumed = run(experiment(), StageCache(cache_dir))
    assert resumed.variants == undisturbed.variants
    assert resumed.plan.widths_LE.tolist() == undisturbed.plan.widths_LE.tolist()
    assert [artifact.key for artifact in resumed.stages] == [artifact.key for artifact in undisturbed.stages]
    assert list(cache_dir.rglob(".*")) == []
    assert_finished_stages_are_whole(cache_dir)
