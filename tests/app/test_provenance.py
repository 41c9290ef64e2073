"""What a result was made with: enough to make it again, and nothing that is secret."""

import json
import subprocess
import sys

import pytest

from moeprune.app import provenance as module
from moeprune.app.git import git_state
from moeprune.app.provenance import PACKAGES, provenance

SECRETS = {
    "WANDB_API_KEY": "secret-of-wandb",
    "HF_TOKEN": "secret-of-the-hub",
    "AWS_SECRET_ACCESS_KEY": "secret-of-the-cloud",
    "SLURM_JWT": "secret-of-slurm",
    "PASSWORD": "secret-of-mine",
}


def test_it_names_command_seed_versions_and_hardware(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/a/place/bin/moeprune", "ratio=0.5"])
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    made_with = provenance(seed=3)
    assert made_with["command"] == ["moeprune", "ratio=0.5"]
    assert made_with["seed"] == 3
    assert made_with["python"] == sys.version.split()[0]
    assert set(made_with["packages"]) == set(PACKAGES)
    assert made_with["packages"]["moeprune"]
    assert made_with["hardware"]["cores"] >= 1
    assert made_with["hardware"]["memory_gib"] > 0
    assert made_with["slurm"] == {"SLURM_JOB_ID": "17"}


def test_it_holds_no_secrets_of_the_environment(monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    text = json.dumps(provenance(seed=0))
    assert not [word for secret in SECRETS.items() for word in secret if word in text]


def test_a_package_that_is_not_installed_has_no_version(monkeypatch):
    monkeypatch.setattr(module, "PACKAGES", ("no-such-package",))
    assert provenance(seed=0)["packages"] == {"no-such-package": None}


@pytest.mark.parametrize("error", [FileNotFoundError("git"), subprocess.CalledProcessError(128, "git")])
def test_without_git_or_outside_a_repository_there_is_no_git_state(monkeypatch, error):
    def fail(*_args: object, **_settings: object) -> None:
        raise error

    monkeypatch.setattr(subprocess, "run", fail)
    assert git_state() is None
