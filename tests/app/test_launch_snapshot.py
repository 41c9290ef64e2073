"""The code of a sweep's jobs: copied once, linked where it is large, and checked when a job starts."""

import json
import os
import shutil
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import moeprune
from moeprune.app.git import git_state
from moeprune.app.launching.snapshot import Code, own_plug_ins, python_path, take_snapshot
from moeprune.errors import InputError

PACKAGE = Path(moeprune.__file__).parent


@pytest.fixture
def code(tmp_path, monkeypatch) -> Code:
    """Of a job that runs from its snapshot."""
    snapshot, files = take_snapshot(tmp_path)
    monkeypatch.setattr(moeprune, "__file__", str(snapshot / "moeprune/__init__.py"))
    return Code(snapshot, files, {})


def test_a_snapshot_has_code_config_and_plug_ins_and_links_the_embedded_models(tmp_path):
    snapshot, files = take_snapshot(tmp_path)
    assert {name: (snapshot / name).exists() for name in files} == dict.fromkeys(files, True)
    assert {"moeprune/app/main.py", "moeprune/conf/config.yaml", "hydra_plugins/moeprune/launchers.py"} <= set(files)
    assert (snapshot / "moeprune/resources").readlink() == (PACKAGE / "resources").resolve()
    assert not (snapshot / "hydra_plugins/__init__.py").exists()
    assert sum(file.stat().st_size for file in snapshot.rglob("*") if not file.is_symlink()) < 5e6


def test_the_same_code_is_copied_once_and_other_code_beside_it(tmp_path, monkeypatch):
    first, _ = take_snapshot(tmp_path)
    assert take_snapshot(tmp_path)[0] == first
    changed = tmp_path / "changed/moeprune"
    shutil.copytree(first / "moeprune", changed, symlinks=True)
    (changed / "errors.py").write_text("# edited\n")
    monkeypatch.setattr(moeprune, "__file__", str(changed / "__init__.py"))
    assert take_snapshot(tmp_path)[0] != first
    assert not list(tmp_path.glob(".snapshot*"))


def test_a_snapshot_that_was_damaged_is_left_and_another_taken(tmp_path):
    damaged, files = take_snapshot(tmp_path)
    (damaged / "moeprune/errors.py").unlink()
    whole, _ = take_snapshot(tmp_path)
    assert whole != damaged and not (damaged / "moeprune/errors.py").exists()
    assert all((whole / name).exists() for name in files)


def test_a_job_that_runs_what_was_submitted_passes(code):
    code.check()


def test_a_snapshot_knows_the_git_state_of_its_origin(tmp_path, monkeypatch):
    snapshot, _ = take_snapshot(tmp_path)
    (snapshot / "copied_from.json").write_text(json.dumps({"git": {"commit": "abc", "changed": True}}))
    monkeypatch.setattr(moeprune, "__file__", str(snapshot / "moeprune/__init__.py"))
    assert git_state() == {"commit": "abc", "changed": True}


def test_a_file_that_was_edited_or_removed_later_is_named(code):
    (code.snapshot / "moeprune/errors.py").write_text("# edited\n")
    (code.snapshot / "moeprune/types.py").unlink()
    with pytest.raises(InputError, match="Changed since this job was submitted: ") as caught:
        code.check()
    assert "moeprune/errors.py" in str(caught.value) and "moeprune/types.py" in str(caught.value)


def test_a_job_that_runs_other_code_is_told_which(tmp_path):
    snapshot, files = take_snapshot(tmp_path)
    with pytest.raises(InputError, match=f"runs the code in {PACKAGE}, but what was submitted is in {snapshot}"):
        Code(snapshot, files, {}).check()


def test_plug_ins_of_ones_own_are_checked_with_all_of_their_package(code, tmp_path, monkeypatch):
    package = tmp_path / "own_scorers"
    package.mkdir()
    for name in ("__init__", "best", "helper"):
        (package / f"{name}.py").write_text("")
    (tmp_path / "single_module.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    config = OmegaConf.create(
        {
            "scorer": {"_target_": "own_scorers.best.Best", "inner": [{"_target_": "single_module.make"}]},
            "allocator": {"_target_": "moeprune.allocation.Coverage"},
            "quantizer": {"_target_": "yaml.YAMLObject", "missing": "???", "of": "${nowhere}"},
            "surgery": {"_target_": "not_there.Anything"},
            "evaluation": {"_target_": "collections.OrderedDict"},
            "hydra": {"launcher": {"_target_": "own_launchers.Launcher"}},
            "ratio": 0.5,
        }
    )
    found = own_plug_ins(config)
    assert {path.relative_to(tmp_path).as_posix() for path in found} == {
        "own_scorers/__init__.py", "own_scorers/best.py", "own_scorers/helper.py", "single_module.py",
    }  # fmt: skip
    with_plug_ins = replace(code, plug_ins=found)
    with_plug_ins.check()
    (package / "helper.py").write_text("changed = True")
    with pytest.raises(InputError, match=r"own_scorers/helper\.py"):
        with_plug_ins.check()


def test_modules_that_are_not_installed_are_found_by_jobs_too_but_after_the_snapshot(tmp_path, monkeypatch):
    own = tmp_path / "own"
    own.mkdir()
    monkeypatch.chdir(tmp_path)
    installed = sysconfig.get_path("purelib")
    monkeypatch.setattr(
        sys, "path", ["", str(own), str(tmp_path / "missing"), installed, str(PACKAGE.parent), str(own)]
    )
    assert python_path(tmp_path / "snap").split(os.pathsep) == [str(tmp_path / "snap"), str(tmp_path), str(own)]
