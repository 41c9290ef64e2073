"""Model cards: YAML that the hub can read, the numbers of the run, and nothing that only its machine knows."""

import re
import sys
from dataclasses import replace

import pytest
import yaml

from moeprune.report.model_card import Origin, model_card
from moeprune.report.results import Metrics, load_run

SETTINGS = {
    "model": {"path": "/data/models/dense"},
    "calibration": {
        "_target_": "moeprune.calibration.sample.Calibration",
        "source": {"_target_": "x.Y", "files": {"mine": "/home/someone/secret/my.txt"}, "domains": ["prose", "code"]},
        "windows": 160,
    },
    "scorer": {
        "_target_": "moeprune.scoring.attribution.AttributionScorer",
        "alpha": 0.9,
        "usage": False,
        "clip": None,
    },
    "allocator": {"_target_": "x.Z"},
    "quantizer": {"_target_": "x.NF4", "name": "nf4", "block_size": 64},
    "recovery": None,
}


@pytest.fixture
def metrics(write_run, tmp_path) -> Metrics:
    found = load_run(write_run(tmp_path / "run")).metrics
    assert found is not None
    return found


def front_matter(card: str) -> dict:
    _, text, _ = card.split("---\n", 2)
    return yaml.safe_load(text)


def test_the_hub_can_read_the_front_matter(metrics):
    origin = Origin("Qwen/Qwen3-30B-A3B", "abc", "apache-2.0")
    assert front_matter(model_card(metrics, SETTINGS, origin, "1.0")) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "Qwen/Qwen3-30B-A3B",
        "license": "apache-2.0",
        "tags": ["mixture-of-experts", "pruned", "custom_code", "moeprune", "nf4"],
    }


def test_what_is_not_known_is_left_out(metrics):
    found = front_matter(model_card(metrics, SETTINGS, Origin(), "1.0"))
    assert "base_model" not in found and "license" not in found


def test_a_name_that_is_no_plain_yaml_does_not_break_it(metrics):
    origin = Origin('some/name: "with" #signs', None, "other: \n---")
    assert front_matter(model_card(metrics, SETTINGS, origin, "1.0"))["base_model"] == origin.hub_name


def rows(card: str) -> dict[str, list[str]]:
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in card.splitlines() if line[:1] == "|"]
    return {name: values for name, *values in found}


def test_numbers_stand_beside_those_of_the_dense_model(metrics):
    card = model_card(metrics, SETTINGS, Origin(), "1.0")
    found = rows(card)
    assert found["perplexity, prose"] == ["50.00", "65.00"]
    assert found["perplexity, mean"] == ["25.00", "32.50"]
    assert found["word_order, % correct"] == ["90.0 ± 2.0", "83.0 ± 2.0"]
    assert found["parameters, total"] == ["4.30M", "2.58M"]
    assert found["size, ideal"] == ["8.60 MB (8.20 MiB)", "1.29 MB (1.23 MiB)"]
    assert found["size, on disk"] == ["8.60 MB (8.20 MiB)", "1.55 MB (1.48 MiB)"]
    assert "tokens: prose 8128, code 4064" in card
    assert "examples: word_order 200, arithmetic 400" in card


def test_how_it_was_made_is_said_with_its_settings(metrics):
    found = rows(model_card(metrics, SETTINGS, Origin(), "1.0"))
    assert found["scorer"] == ["attribution", "alpha=0.9, usage=false"]
    assert found["calibration"] == ["mixed", "source.files.mine=my.txt, source.domains=[prose, code], windows=160"]
    assert found["quantizer"] == ["nf4", "block_size=64"]
    assert found["ratio"][0] == "0.5" and "0.5000 after rounding" in found["ratio"][1]
    assert found["allocator"] == ["coverage", ""] and found["recovery"] == ["none", ""] and found["seed"] == ["0", ""]


def test_no_path_of_the_machine_is_told(metrics):
    """A model from a folder is named by its path in the metrics."""
    card = model_card(replace(metrics, model="/data/models/dense"), SETTINGS, Origin(), "1.0")
    assert "# dense, 50% of its expert channels removed" in card and rows(card)["model"] == ["dense", ""]
    assert "secret" not in card and "/home" not in card and "/data" not in card


def test_what_it_needs_follows_from_the_quantizer(write_run, metrics, tmp_path):
    plain = load_run(write_run(tmp_path / "plain", quantizer="none")).metrics
    assert "bitsandbytes" in model_card(metrics, SETTINGS, Origin(), "1.0")
    assert "bitsandbytes" not in model_card(plain, SETTINGS, Origin(), "1.0")


def test_the_python_of_the_card_compiles(metrics):
    (code,) = re.findall(r"```python\n(.*?)```", model_card(metrics, SETTINGS, Origin(), "1.0"), re.DOTALL)
    compile(code, "card", "exec")
    assert "trust_remote_code=True" in code
    assert "torch" not in sys.modules["moeprune.report.model_card"].__dict__
