"""Weights & Biases: names, what is hidden, where a run goes, and that the next start goes on with it."""

import logging
from pathlib import Path

import pytest
import wandb

from moeprune.app.tracking import NoTracker, WandbTracker, summary_metrics
from moeprune.app.tracking.names import stage_metrics
from moeprune.app.tracking.shown import HIDDEN, shown
from moeprune.app.tracking.tracker import chosen_mode
from moeprune.errors import InputError

METRICS = {
    "model": "tiny_qwen3_moe", "ratio": 0.5,
    "plan": {"removed_ratio": 0.5, "widths": [[4, 8]], "note": ""},
    "variants": [
        {
            "name": name,
            "perplexity": {"prose": 20.0 + index},
            "mean_perplexity": 20.0 + index,
            "tasks": {"cloze": {"accuracy": 0.5, "stderr": 0.01, "n": 1200}},
            "parameters": {"total": 1000},
            "bytes": {"with_overhead": 2000 - 500 * index},
            "precision": [{"part": "experts", "bits": 4.5}],
        }
        for index, name in enumerate(("dense", "pruned", "pruned+nf4"))
    ],
    "recovery_details": {"steps": 60, "final_loss": 2.5, "learning_rates": {"experts": 1e-4}},
    "stages": [
        {"stage": "plan", "key": "ab", "cached": False, "seconds": 0.25, "peak_memory_gib": 0.5},
        {"stage": "evaluation/dense", "key": "cd", "cached": True, "seconds": 4.0, "peak_memory_gib": 0.5},
    ],
}  # fmt: skip
CONFIG = {"ratio": 0.5, "until": None, "model": {"name": "tiny_qwen3_moe"}}
CHOICES = {"model": "tiny_qwen3_moe", "method": None, "allocator": "coverage", "surgery": "none", "evaluation": "quick"}


@pytest.fixture
def run_dir(tmp_path, monkeypatch) -> Path:
    """A run directory; nobody is logged in, and no setting of W&B comes from outside."""
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("API_KEY", "BASE_URL", "MODE", "RUN_ID", "SWEEP_ID", "RUN_GROUP"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    monkeypatch.delenv("NETRC", raising=False)
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


@pytest.fixture
def init(monkeypatch) -> dict:
    """What ``wandb.init`` is called with; it then fails."""
    seen: dict = {}

    def fail(**arguments: object) -> None:
        seen.clear()
        seen.update(arguments)
        raise RuntimeError("the disk is gone")

    monkeypatch.setattr(wandb, "init", fail)
    return seen


def opened(tracker: WandbTracker, run_dir: Path, sweep: str | None = None, config: dict | None = None) -> None:
    with tracker.open(config or CONFIG, run_dir, CHOICES, sweep):
        pass


def test_summary_names_are_variant_and_metric():
    flat = summary_metrics(METRICS)
    of_variants = {
        f"{variant}/{metric}"
        for variant in ("dense", "pruned", "pruned+nf4", "final")
        for metric in (
            "perplexity/prose", "mean_perplexity", "tasks/cloze/accuracy", "tasks/cloze/stderr", "tasks/cloze/n",
            "parameters/total", "bytes/with_overhead",
        )
    }  # fmt: skip
    others = {
        "plan/removed_ratio",
        "final/perplexity_increase",
        "final/compression",
        "recovery/steps",
        "recovery/final_loss",
    }
    assert set(flat) == of_variants | others
    assert (flat["pruned+nf4/perplexity/prose"], flat["final/mean_perplexity"]) == (22.0, 22.0)
    assert flat["final/perplexity_increase"] == pytest.approx(0.1)
    assert flat["final/compression"] == 2.0


def test_stage_times_are_told_apart_by_the_cache():
    flat = stage_metrics(METRICS["stages"])
    assert flat["stages/evaluation/dense/seconds"] == 4.0
    assert (flat["stages/computed_seconds"], flat["stages/reused_seconds"]) == (0.25, 4.0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("api_key", "anything"), ("hub.token", "x"), ("WANDB_API_KEY", "x"), ("password", "x"), ("client-secret", "x"),
        ("url", "hf_" + "a" * 30), ("note", "sk-" + "B" * 24), ("note", "AKIA" + "A" * 16), ("note", "0123456789" * 4),
        ("header", "Bearer " + "c" * 20), ("note", "ghp_" + "d" * 36), ("pem", "-----BEGIN RSA PRIVATE KEY-----"),
    ],
)  # fmt: skip
def test_secrets_are_hidden(name, value):
    found = str(shown({"outer": [{name: value}]}))
    assert HIDDEN in found
    assert f"'{value}'" not in found


def test_the_password_of_an_address_is_hidden_and_the_address_stays():
    assert shown({"proxy": "https://me:geheim@host/x"}) == {"proxy": f"https://{HIDDEN}host/x"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("fewest_tokens", 32), ("tokens", "all"), ("tokenizer", "byte"), ("revision", "0123456789" * 4),
        ("num_key_value_heads", 8), ("key", ""), ("keep_rows", "yes"), ("token", None), ("path", "/data/" + "0" * 40),
    ],
)  # fmt: skip
def test_what_is_no_secret_stays(name, value):
    assert shown({name: value}) == {name: value}


def test_the_home_directory_is_not_named(run_dir):
    home = str(Path.home())
    assert shown({"a": home, "b": f"{home}/models", "c": f"{home}2"}) == {"a": "~", "b": "~/models", "c": f"{home}2"}


def test_every_setting_of_the_default_config_is_shown():
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    with initialize_config_dir(str(Path(__file__).parents[2] / "conf"), version_base="1.3"):
        config = OmegaConf.to_container(compose("config", ["model=qwen3_30b_a3b", "recovery=dora"]), resolve=True)
    assert HIDDEN not in str(shown(config))


def test_choices_become_tags_and_config_lies_under_one_key(run_dir, init):
    tracker = WandbTracker("project", entity="team", tags=["mine"], mode="online")
    opened(tracker, run_dir, sweep="2026-01-31/12-00-00-sweep")
    assert init["config"] == {"cfg": CONFIG | {"choices": {name: choice or "none" for name, choice in CHOICES.items()}}}
    assert init["tags"] == ["mine", "model=tiny_qwen3_moe", "allocator=coverage"]
    assert (init["entity"], init["group"], init["job_type"]) == ("team", "2026-01-31/12-00-00-sweep", "prune")
    assert (init["mode"], init["resume"], init["dir"]) == ("online", "allow", str(run_dir))
    assert init["name"] == "tiny_qwen3_moe coverage 0.5"


def test_a_run_that_stops_early_is_a_job_of_its_own_kind(run_dir, init):
    opened(WandbTracker("project"), run_dir, config=CONFIG | {"until": "score"})
    assert init["job_type"] == "until-score"


def test_what_wandb_finds_out_by_itself_stays_here(run_dir, init):
    opened(WandbTracker("project"), run_dir)
    settings = init["settings"]
    assert (settings.console, settings.host, settings.save_code) == ("off", "hidden", False)
    assert (
        settings.disable_git and settings.disable_code and settings.x_disable_meta and not settings.x_save_requirements
    )


def test_the_id_stays_the_same_in_a_run_directory_and_differs_between_them(run_dir, init):
    ids = []
    for folder in (run_dir, run_dir, run_dir.parent):
        opened(WandbTracker("project"), folder)
        ids.append(init["id"])
    assert ids[0] == ids[1] != ids[2]
    assert all(identity.isalnum() for identity in ids)


def test_the_agents_own_id_is_respected(run_dir, init, monkeypatch):
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep1")
    monkeypatch.setenv("WANDB_RUN_ID", "of-the-agent")
    opened(WandbTracker("project", entity="team"), run_dir)
    assert not {"id", "project", "entity"} & set(init)  # wandb takes them from the environment
    opened(WandbTracker("project"), run_dir, sweep="a-sweep")
    assert init.get("id") != "of-the-agent"


def test_an_id_of_the_environment_is_not_shared_by_the_jobs_of_a_sweep(run_dir, init, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    opened(WandbTracker("project"), run_dir)
    assert init["id"] == "mine"
    (run_dir / "other").mkdir()
    opened(WandbTracker("project"), run_dir / "other", sweep="a-sweep")
    assert init["id"] != "mine"


def test_auto_is_offline_until_a_key_is_set_up(run_dir, monkeypatch):
    assert chosen_mode("auto") == "offline"
    netrc = Path.home() / ".netrc"
    netrc.write_text("machine api.wandb.ai\n  login user\n  password " + "0" * 40 + "\n")
    netrc.chmod(0o600)
    assert chosen_mode("auto") == "online"
    netrc.write_text("machine ml.company.com\n  login user\n  password " + "0" * 40 + "\n")
    assert chosen_mode("auto") == "offline"
    monkeypatch.setenv("WANDB_BASE_URL", "https://ml.company.com:8443")
    assert chosen_mode("auto") == "online"
    netrc.rename(run_dir / "elsewhere")
    assert chosen_mode("auto") == "offline"
    monkeypatch.setenv("NETRC", str(run_dir / "elsewhere"))
    assert chosen_mode("auto") == "online"
    (run_dir / "elsewhere").write_text("not a netrc file at all {")
    assert chosen_mode("auto") == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert chosen_mode("auto") == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert (chosen_mode("auto"), chosen_mode("offline")) == ("disabled", "offline")


def test_the_command_that_sends_an_offline_run_is_one_for_the_shell(run_dir, init, caplog):
    folder = run_dir / "a b"
    folder.mkdir()
    with caplog.at_level(logging.INFO, logger="moeprune"):
        opened(WandbTracker("project", mode="offline"), folder)
    assert f"wandb sync '{folder}/wandb'/offline-run-*" in caplog.text


def test_disabled_and_none_call_nothing(run_dir, init):
    for tracker in (WandbTracker("project", mode="disabled"), NoTracker()):
        with tracker.open(CONFIG, run_dir, CHOICES) as tracked:
            tracked.evaluated("dense", METRICS["variants"][0])
            tracked.log_results(METRICS)
    assert init == {}
    assert list(run_dir.iterdir()) == []


@pytest.mark.parametrize("settings", [{"mode": "on"}, {"log_artifacts": ["model"]}, {"finish_timeout_s": 0}])
def test_settings_that_do_not_exist_are_errors(settings):
    with pytest.raises(InputError):
        WandbTracker("project", **settings)


def test_w_and_b_that_fails_is_one_warning(run_dir, init, caplog):
    with (
        caplog.at_level(logging.WARNING, logger="moeprune"),
        WandbTracker("project").open(CONFIG, run_dir, CHOICES) as tracked,
    ):
        tracked.evaluated("dense", METRICS["variants"][0])
        tracked.log_results(METRICS)
    assert caplog.messages == ["W&B logging failed and is left out: the disk is gone"]


def test_a_server_that_cannot_be_reached_makes_the_run_an_offline_one(run_dir, monkeypatch, caplog):
    modes = []

    monkeypatch.setattr(wandb, "teardown", lambda: modes.append("new service"))

    def init(**arguments: object) -> None:
        modes.append(arguments["mode"])
        raise wandb.errors.CommError("timed out") if arguments["mode"] == "online" else RuntimeError("enough")

    monkeypatch.setattr(wandb, "init", init)
    with caplog.at_level(logging.WARNING, logger="moeprune"):
        opened(WandbTracker("project", mode="online"), run_dir)
    # The service that could not reach the server still holds the run's id.
    assert modes[:3] == ["online", "new service", "offline"]
    assert "kept offline: timed out" in caplog.text


def test_a_directory_that_cannot_be_written_is_a_warning(run_dir, caplog):
    with caplog.at_level(logging.WARNING, logger="moeprune"):
        opened(WandbTracker("project"), run_dir / "missing")
    assert len(caplog.messages) == 1 and "is left out" in caplog.text


def test_the_error_of_the_run_is_not_hidden(run_dir, init):
    with pytest.raises(KeyError, match="of the run"), WandbTracker("project").open(CONFIG, run_dir, CHOICES):
        raise KeyError("of the run")


def test_w_and_b_that_fails_does_not_fail_the_command(here, tiny, init):
    outcome = here(*tiny, "tracking=wandb", "ratio=0.25")
    assert outcome.code == 0
    assert "W&B logging failed and is left out: the disk is gone" in outcome.out + outcome.err
    assert init["config"]["cfg"]["ratio"] == 0.25
    assert list(outcome.place.glob("runs/**/metrics.json")) != []
