"""The command that lists, checks and prunes the stage cache."""

import os
import sys
import time
from pathlib import Path

import pytest

from moeprune.app import main
from moeprune.pipeline.cache import RECORD, StageCache

DAY = 86400


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("MOEPRUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def command(root, monkeypatch, capsys):
    """``command("list")`` gives (exit code, what was printed, the error)."""

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["moeprune-cache", *words])
        with pytest.raises(SystemExit) as stop:
            main.cache()
        return stop.value.code, *capsys.readouterr()

    return run


def store(root: Path, stage: str, kilobytes: int = 1, days_ago: float = 0.0) -> Path:
    cache = StageCache(root, made_by={"run": "runs/7", "model": "tiny_qwen3_moe"})
    folder = cache.get(
        stage, 1, {}, [], lambda at: (at / "file.bin").write_bytes(bytes(1000 * kilobytes)) and None
    ).folder
    past = time.time() - days_ago * DAY
    os.utime(folder / RECORD, (past, past))
    return folder


def test_list_shows_each_stage_its_size_its_model_and_what_made_it(root, command):
    folder = store(root, "statistics", 20_000, days_ago=3)
    store(root, "evaluation/dense")
    code, out, _ = command("list")
    assert code == 0
    (row,) = [line for line in out.splitlines() if "statistics" in line]
    for text in (folder.name[:12], "stored", "tiny_qwen3_moe", "0.020", "3 d", "runs/7"):
        assert text in row
    assert f"2 in {root}, 0.020 GB" in out.replace("\n", "")
    code, out, _ = command("list", "--stage", "evaluation")
    assert "evaluation/dense" in out and "statistics" not in out


def test_brackets_and_colons_in_names_are_shown_as_they_are(root, command):
    cache = StageCache(root, made_by={"run": "/at/[/a]/:x:", "model": "[red]m"})
    cache.get("plan", 1, {}, [], lambda at: (at / "file.bin").write_bytes(b"1") and None)
    code, out, _ = command("list")
    assert code == 0
    assert "/at/[/a]/:x:" in out and "[red]m" in out


def test_verify_finds_a_flipped_byte_and_sets_the_stage_aside(root, command):
    folder = store(root, "scores")
    store(root, "plan")
    assert command("verify")[:2] == (0, "2 sound, 0 damaged.\n")
    (folder / "file.bin").write_bytes(bytes(999) + b"\1")
    code, out, _ = command("verify")
    assert code == 1
    assert f"damaged: scores {folder.name}: its files do not match their digests" in out
    assert not folder.exists()
    assert command("verify")[0] == 0


def test_prune_by_age_removes_what_was_not_used_for_so_long(root, command):
    old, new = store(root, "scores", days_ago=40), store(root, "plan", days_ago=20)
    code, out, _ = command("prune", "--older-than", "30d", "--dry-run")
    assert code == 0 and "Would remove 1" in out and old.exists()
    code, out, _ = command("prune", "--older-than", "30d")
    assert code == 0 and f"scores {old.name[:12]} stored, 0.000 GB" in out and "Removed 1" in out
    assert not old.exists() and new.exists()


def test_prune_by_size_removes_what_was_not_used_for_longest(root, command):
    folders = [store(root, f"stage{days}", 500, days_ago=days) for days in (3, 9, 1, 0)]
    assert command("prune", "--max-size", "1.2MB")[0] == 0
    assert [folder.exists() for folder in folders] == [False, False, True, True]
    assert command("prune", "--max-size", "0KB", "--stage", "stage0")[0] == 0
    assert folders[3].exists()  # used just now


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["list", "--stage", "score"], "Did you mean: scores"),
        (["list", "--cache-dir", "nowhere"], "There is no cache in nowhere"),
        (["prune"], "Use --older-than 30d"),
        (["prune", "--older-than", "soon"], "soon is no time"),
        (["prune", "--max-size", "50"], "50 is no size"),
        (["prune", "--max-size", "50GiB"], "50GiB is no size"),
        (["shrink"], "invalid choice"),
        ([], "required"),
    ],
)
def test_a_wrong_command_is_explained(root, command, words, said):
    store(root, "scores")
    code, _, error = command(*words)
    assert code == 2
    assert said in error


def test_what_may_not_be_removed_is_not_counted_as_removed(root, command, monkeypatch):
    """Files of another user, in a folder that only he may write."""
    folder = store(root, "statistics", 20_000, days_ago=90)
    monkeypatch.setattr("shutil.rmtree", lambda *_arguments, **_settings: None)
    code, out, _ = command("prune", "--older-than", "30d")
    assert code == 0
    assert f"statistics {folder.name[:12]} stays" in out
    assert "Removed 0, 0.000 GB; 0.020 GB left." in out
