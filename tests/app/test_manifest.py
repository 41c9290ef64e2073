"""The manifest: true while a run runs and after it ended, however it ended, and never half-written."""

import json
import os
from pathlib import Path

import pytest

from moeprune.app.manifest import MANIFEST, manifest, write_atomically
from moeprune.errors import BudgetError


def read(run_dir: Path) -> dict:
    return json.loads((run_dir / MANIFEST).read_text())


def test_it_says_running_while_the_run_runs_and_success_after(tmp_path):
    with manifest(tmp_path, ["ratio=0.5"]):
        content = read(tmp_path)
        assert (content["status"], content["error"], content["pid"]) == ("running", None, os.getpid())
        assert content["overrides"] == ["ratio=0.5"]
        assert "ended" not in content
    content = read(tmp_path)
    assert (content["status"], content["error"]) == ("success", None)
    assert content["started"] <= content["ended"]


def test_an_error_that_the_user_can_act_on_is_told_without_a_traceback_and_passes_on(tmp_path):
    with pytest.raises(BudgetError, match="too much"), manifest(tmp_path, []):
        raise BudgetError("too much")
    content = read(tmp_path)
    assert content["status"] == "failed"
    assert content["error"] == {"type": "BudgetError", "message": "too much"}
    assert "ended" in content


@pytest.mark.parametrize("error", [ValueError("a bug"), SystemExit(3), MemoryError()])
def test_any_other_error_is_told_with_its_traceback_and_passes_on(tmp_path, error):
    with pytest.raises(type(error)), manifest(tmp_path, []):
        raise error
    content = read(tmp_path)
    assert content["status"] == "failed"
    assert content["error"]["type"] == type(error).__name__
    assert "test_manifest.py" in content["error"]["traceback"]


def test_an_interruption_is_told_as_one(tmp_path):
    with pytest.raises(KeyboardInterrupt), manifest(tmp_path, []):
        raise KeyboardInterrupt
    assert read(tmp_path)["status"] == "interrupted"


def test_a_run_that_starts_again_in_the_same_directory_replaces_the_manifest(tmp_path):
    with pytest.raises(BudgetError), manifest(tmp_path, ["ratio=0.9"]):
        raise BudgetError("too much")
    with manifest(tmp_path, ["ratio=0.5"]):
        assert read(tmp_path)["status"] == "running"
    assert (read(tmp_path)["status"], read(tmp_path)["error"]) == ("success", None)


def test_a_write_that_breaks_off_leaves_the_old_text(tmp_path, monkeypatch):
    file = tmp_path / "metrics.json"
    write_atomically(file, "old")
    write_text = Path.write_text

    def break_off(path: Path, text: str) -> None:
        write_text(path, text[: len(text) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", break_off)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(file, "newer")
    assert file.read_text() == "old"
    monkeypatch.undo()
    write_atomically(file, "newer")
    assert file.read_text() == "newer"
    assert os.listdir(tmp_path) == ["metrics.json"]
