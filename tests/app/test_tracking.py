"""Weights & Biases: what is logged under which name, where it goes, and that it never makes a run fail."""

import logging
from pathlib import Path

import pytest
import wandb

from moeprune.app.tracking import WandbTracker, summary_metrics

METRICS = {
    "model": "tiny_qwen3_moe", "scorer": "attribution", "allocator": "coverage", "quantizer": "nf4", "ratio": 0.5,
    "plan": {"removed_ratio": 0.5, "widths": [[4, 8]], "note": ""},
    "variants": [
        {
            "name": name,
            "perplexity": {"prose": 20.0 + index},
            "mean_perplexity": 20.5 + index,
            "tasks": {"cloze": {"accuracy": 0.5, "stderr": 0.01, "n": 1200}},
            "parameters": {"total": 1000},
            "bytes": {"on_disk": 2000},
        }
        for index, name in enumerate(("dense", "pruned", "pruned+nf4"))
    ],
    "stages": [{"stage": "plan", "key": "ab", "cached": False, "seconds": 0.1, "peak_memory_gib": 0.5}],
}  # fmt: skip
CONFIG = {"ratio": 0.5, "model": {"name": "tiny_qwen3_moe"}}


@pytest.fixture
def run_dir(tmp_path, monkeypatch) -> Path:
    """A run directory with a plan; nothing of W&B goes anywhere else, and nobody is logged in."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "WANDB_ARTIFACT_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb_home"))
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "plan.safetensors").write_bytes(b"a plan")
    return folder


@pytest.fixture
def init_settings(monkeypatch) -> dict:
    """What ``wandb.init`` is called with; it then fails."""
    seen: dict = {}

    def init(**settings: object) -> None:
        seen.update(settings)
        raise RuntimeError("the network is down")

    monkeypatch.setattr(wandb, "init", init)
    return seen


def test_summary_names_are_variant_and_metric():
    flat = summary_metrics(METRICS)
    assert set(flat) == {"plan/removed_ratio"} | {
        f"{variant}/{metric}"
        for variant in ("dense", "pruned", "pruned+nf4")
        for metric in (
            "perplexity/prose", "mean_perplexity", "tasks/cloze/accuracy", "tasks/cloze/stderr", "tasks/cloze/n",
            "parameters/total", "bytes/on_disk",
        )
    }  # fmt: skip
    assert (flat["plan/removed_ratio"], flat["pruned+nf4/perplexity/prose"]) == (0.5, 22.0)


def test_an_offline_run_is_written_into_the_run_directory(run_dir, caplog):
    with caplog.at_level(logging.WARNING, logger="moeprune"):
        WandbTracker("moeprune-test", mode="offline").log_run(CONFIG, METRICS, run_dir)
    assert caplog.messages == []
    (written,) = run_dir.glob("wandb/offline-run-*/run-*.wandb")
    content = written.read_bytes()
    for name in (b"plan/removed_ratio", b"pruned+nf4/mean_perplexity", b"tiny_qwen3_moe"):
        assert name in content


def test_w_and_b_that_fails_is_a_warning(run_dir, init_settings, caplog):
    with caplog.at_level(logging.WARNING, logger="moeprune"):
        WandbTracker("moeprune-test").log_run(CONFIG, METRICS, run_dir)
    assert caplog.messages == ["W&B logging failed and is left out: the network is down"]
    assert init_settings["project"] == "moeprune-test"


def test_w_and_b_that_fails_does_not_fail_the_command(here, tiny, init_settings):
    outcome = here(*tiny, "tracking=wandb", "ratio=0.25")
    assert outcome.code == 0
    assert "W&B logging failed and is left out: the network is down" in outcome.out + outcome.err
    assert init_settings["config"]["cfg"]["ratio"] == 0.25
    assert list(outcome.place.glob("runs/**/metrics.json")) != []


def test_settings_go_under_one_key_and_choices_become_tags(run_dir, init_settings):
    tracker = WandbTracker("project", entity="team", group="sweep", tags=["mine"], mode="online")
    tracker.log_run(CONFIG, METRICS, run_dir)
    assert init_settings["config"] == {"cfg": CONFIG}
    assert init_settings["tags"] == ["mine", "tiny_qwen3_moe", "attribution", "coverage", "nf4"]
    assert (init_settings["entity"], init_settings["group"], init_settings["mode"]) == ("team", "sweep", "online")
    assert Path(init_settings["dir"]) == run_dir


def test_auto_is_offline_until_a_key_is_set_up(run_dir, init_settings, monkeypatch):
    tracker = WandbTracker("project")

    def mode() -> str:
        tracker.log_run(CONFIG, METRICS, run_dir)
        return init_settings["mode"]

    assert mode() == "offline"
    netrc = Path.home() / ".netrc"
    netrc.write_text("machine api.wandb.ai\n  login user\n  password " + "0" * 40 + "\n")
    netrc.chmod(0o600)
    assert mode() == "online"
    netrc.write_text("not a netrc file at all {")
    assert mode() == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert mode() == "online"
