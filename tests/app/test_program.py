"""The program itself, from outside, on a tiny random checkpoint: a run twice, a sweep, and a plug-in of a user."""

import csv
import json
from pathlib import Path

import pytest
import torch
import yaml

from moeprune.models.compressed.reader import load_compressed
from moeprune.models.shape import read_shape
from moeprune.types import Plan

PNG = b"\x89PNG\r\n\x1a\n"
VARIANTS = ["dense", "pruned", "pruned+nf4"]
STAGES = [
    "calibration", "statistics", "calibration_report", "scores", "plan", "diagnostics", "pruned", "quantized",
    "evaluation/dense", "evaluation/pruned", "evaluation/pruned-nf4",
]  # fmt: skip
FIGURES = ("kept_channels", "kept_widths", "router_entropy", "score_concentration")

PLUG_IN = '''
"""A scorer from outside."""

from dataclasses import dataclass

import torch

from moeprune.types import Scores


@dataclass(frozen=True)
class EarlierIsBetter:
    """Channels by their index, experts by theirs."""

    steepness: float = 1.0

    def __call__(self, statistics) -> Scores:
        layers, experts, width = statistics.channel_sum_LEC.shape
        channel_LEC = torch.arange(width, 0, -1, dtype=torch.float64).expand(layers, experts, width) ** self.steepness
        return Scores(channel_LEC, channel_LEC.sum(dim=-1), torch.ones(layers, dtype=torch.float64))
'''


def read(file: Path) -> dict:
    return json.loads(file.read_text())


def no_traceback(outcome) -> bool:
    return "Traceback" not in outcome.out + outcome.err


def left_half_written(place: Path) -> list[Path]:
    return [path for path in place.rglob(".*") if ".partial" in path.name or ".damaged" in path.name]


def without_cost(stages: list[dict]) -> list[tuple]:
    return [(stage["stage"], stage["key"]) for stage in stages]


def test_a_run_leaves_everything_in_its_directory_and_the_same_command_again_computes_nothing(
    program, here, tiny, checkpoint, tmp_path
):
    words = [*tiny, "quantizer=nf4", "ratio=0.5", "seed=3"]
    first = program(*words, WANDB_API_KEY="secret-of-wandb")
    assert first.code == 0, first.err
    assert no_traceback(first)
    (manifest,) = first.manifests
    run_dir = manifest.parent
    files = {file.name for file in run_dir.iterdir()}
    assert files == {
        "config.yaml", "manifest.json", "metrics.json", "moeprune.log", "plan.safetensors", "provenance.json",
        "table.md", ".hydra", "calibration.json", "diagnostics.json",
        *(f"{figure}.{suffix}" for figure in FIGURES for suffix in ("png", "svg")),
    }  # fmt: skip

    content = read(manifest)
    assert (content["status"], content["error"], content["overrides"]) == ("success", None, words)
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert (config["ratio"], config["seed"], config["calibration"]["seed"]) == (0.5, 3, 3)
    assert (config["model"]["path"], config["quantizer"]["name"]) == (str(checkpoint), "nf4")
    made_with = read(run_dir / "provenance.json")
    assert (made_with["seed"], made_with["command"]) == (3, ["moeprune", *words])

    metrics = read(run_dir / "metrics.json")
    assert (metrics["model"], metrics["scorer"], metrics["quantizer"]) == ("checkpoint", "attribution", "nf4")
    assert [variant["name"] for variant in metrics["variants"]] == VARIANTS
    assert [stage["stage"] for stage in metrics["stages"]] == STAGES
    assert not any(stage["cached"] for stage in metrics["stages"])
    plan, shape = Plan.load(run_dir / "plan.safetensors"), read_shape(checkpoint)
    assert plan.widths_LE.tolist() == metrics["plan"]["widths"]
    assert plan.total_channels == shape.layers * shape.experts * shape.width
    assert plan.removed_ratio == metrics["plan"]["removed_ratio"] == 0.5

    table = (run_dir / "table.md").read_text()
    for variant in VARIANTS:
        assert variant in table
        assert variant in first.out
    log = (run_dir / "moeprune.log").read_text()
    assert all(f"{stage} " in log for stage in STAGES)
    assert not any(b"secret-of-wandb" in file.read_bytes() for file in run_dir.rglob("*") if file.is_file())
    assert left_half_written(first.place) == []

    # In another process, which this one is.
    second = here(*words, f"save_model={tmp_path / 'small'}")
    assert second.code == 0, second.err
    card = (tmp_path / "small" / "README.md").read_text()
    assert all(word in card for word in ("AutoModelForCausalLM", "perplexity, text", "nf4", "0.5"))
    assert load_compressed(tmp_path / "small", torch.float32).config.num_experts_per_tok == shape.top_k
    (other,) = set(second.manifests) - {manifest}
    again = read(other.parent / "metrics.json")
    assert all(stage["cached"] for stage in again["stages"])
    assert again["variants"] == metrics["variants"]
    assert without_cost(again["stages"]) == without_cost(metrics["stages"])
    assert (other.parent / "plan.safetensors").read_bytes() == (run_dir / "plan.safetensors").read_bytes()


def test_a_sweep_shares_its_statistics_reports_every_job_and_a_failed_one_hides_no_other(program, tiny):
    # Whole experts cannot go as far as channels: at 0.9 only one of eight would stay, and a token is sent to two.
    outcome = program("--multirun", *tiny, "allocator=coverage,whole_experts", "ratio=0.5,0.9")
    assert outcome.code == 2
    assert no_traceback(outcome)
    assert "moeprune: ratio=0.9 removes 7 of 8 experts and leaves 1" in outcome.err

    jobs = {manifest.parent.name: read(manifest) for manifest in outcome.manifests}
    assert sorted(jobs) == ["0", "1", "2", "3"]
    failed = {name for name, job in jobs.items() if job["status"] == "failed"}
    assert {name for name, job in jobs.items() if job["status"] == "success"} == set(jobs) - failed
    (failed_job,) = failed
    assert jobs[failed_job]["overrides"][-2:] == ["allocator=whole_experts", "ratio=0.9"]
    assert jobs[failed_job]["error"]["type"] == "BudgetError"

    assert len(list(outcome.place.glob("cache/statistics/*"))) == 1
    assert len(list(outcome.place.glob("cache/evaluation/dense/size/*"))) == 1
    assert len(list(outcome.place.glob("cache/plan/*"))) == 3
    assert left_half_written(outcome.place) == []

    (sweep_dir,) = {manifest.parent.parent for manifest in outcome.manifests}
    report = (sweep_dir / "sweep.md").read_text()
    assert "whole_experts" in report
    assert "coverage" in report
    assert f"run {failed_job} (failed)" in report
    for told in (report, outcome.out):
        assert "lowest mean perplexity" in told
    rows = list(csv.DictReader((sweep_dir / "sweep.csv").open()))
    assert {row["status"] for row in rows} == {"success", "failed"}
    assert {row["run"] for row in rows} == set(jobs)
    assert (sweep_dir / "perplexity_vs_bytes.png").read_bytes().startswith(PNG)


def test_a_scorer_from_outside_the_package_is_used_by_its_target(program, tiny, tmp_path):
    package = tmp_path / "elsewhere" / "my_package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "scoring.py").write_text(PLUG_IN)
    choice = tmp_path / "my_conf" / "scorer" / "mine.yaml"
    choice.parent.mkdir(parents=True)
    choice.write_text("_target_: my_package.scoring.EarlierIsBetter\nsteepness: 2.0\n")

    words = ["--config-dir", "my_conf", *tiny, "scorer=mine", "allocator=uniform", "ratio=0.5", "scorer.steepness=3.0"]
    outcome = program(*words, PYTHONPATH=str(package.parent))
    assert outcome.code == 0, outcome.err
    (manifest,) = outcome.manifests
    assert read(manifest.parent / "metrics.json")["scorer"] == "mine"
    plan = Plan.load(manifest.parent / "plan.safetensors")
    assert all(channels.tolist() == list(range(8)) for layer in plan.kept for channels in layer)
    (record,) = outcome.place.glob("cache/scores/*/stage.json")
    settings = read(record)["settings"]["scorer"]
    assert (settings["type"], settings["steepness"]) == ("my_package.scoring.EarlierIsBetter", 3.0)


@pytest.mark.parametrize("flag", ["--help", "--cfg=job"])
def test_help_and_the_composed_config_are_for_reading(program, flag):
    outcome = program(flag)
    assert outcome.code == 0
    assert "ratio: 0.5" in outcome.out
    assert outcome.manifests == []
