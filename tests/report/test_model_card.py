"""Model cards: YAML that the hub can read, the numbers of the run, and nothing that only its machine knows."""

import re
import sys
from dataclasses import replace

import pytest
import yaml

from moeprune.report.model_card import Origin, model_card
from moeprune.report.runs.results import Metrics, load_run
from moeprune.report.runs.variants import PartPrecision

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


@pytest.mark.parametrize(("format_", "needed"), [("nf4 double", True), ("int8", True), ("gptq 4 bits", False)])
def test_formats_of_our_own_need_no_library(metrics, format_, needed):
    rows = tuple(replace(row, format=format_) for row in metrics.final.precision)
    final = replace(metrics.final, precision=rows)
    card = model_card(replace(metrics, variants=(metrics.dense, final)), SETTINGS, Origin(), "1.0")
    assert ("bitsandbytes" in card) is needed


@pytest.fixture
def recovered(write_run, tmp_path) -> Metrics:
    found = load_run(write_run(tmp_path / "recovered", recovery="dora", training_data="alpaca")).metrics
    assert found is not None
    return found


RECOVERY = {
    "recovery": {
        "name": "dora",
        "weights": {"_target_": "x.Adapters", "rank": 32, "alpha": 192},
        "data": {"path": "twice/told"},
        "merge": True,
    },
    "training_data": {
        "records": {"path": "tatsu-lab/alpaca", "files": {"more": "/home/someone/secret.json"}},
        "template": {"prompts": ["Below is an instruction.\n\n### Instruction:\n{instruction}" + 40 * " and so on"]},
    },
}


def test_the_recovery_is_told(recovered):
    card = model_card(recovered, SETTINGS | RECOVERY, Origin(), "1.0")
    found = rows(card)
    assert found["recovery"] == ["dora", "weights.rank=32, weights.alpha=192, merge=true"]
    assert found["training data"][0] == "alpaca"
    assert found["training data"][1].startswith("records.path=tatsu-lab/alpaca, records.files.more=secret.json, ")
    assert found["training data"][1].endswith("...]")
    assert found["order"] == ["prune > recover > quantize", ""]
    assert found["training tokens"] == ["200,000 that count in the loss"]
    assert found["adapters"] == ["none: what trained is in the weights"]
    assert "twice/told" not in card and "home" not in card
    assert "peft" not in card
    assert "on `alpaca`" in card


def test_adapters_beside_the_weights_are_loaded(recovered):
    kept = replace(recovered, recovery_details=replace(recovered.recovery_details, merged=False))
    card = model_card(kept, SETTINGS | RECOVERY, Origin(), "1.0")
    assert "bitsandbytes peft\n" in card
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    compile(code, "card", "exec")
    assert 'from_pretrained(model, folder, adapter_name="experts", subfolder="adapters/experts")' in code
    assert 'model.load_adapter(folder, adapter_name="routers", subfolder="adapters/routers")' in code
    assert 'set_adapter(["experts", "routers"])' in code


def test_what_is_in_how_many_bits_is_told(metrics):
    found = rows(model_card(metrics, SETTINGS, Origin(), "1.0"))
    assert found["routed experts"] == ["nf4", "2.06M", "4", "4.400", "1.14 MB (1.08 MiB)"]
    assert found["embeddings"][:3] == ["bf16", "0.52M", "16"]
    assert found["size, in memory"] == ["17.20 MB (16.40 MiB)", "2.58 MB (2.46 MiB)"]


def test_a_few_bytes_are_told_as_such(metrics):
    rows_of = (*metrics.final.precision, PartPrecision("other", "bf16", 16, 16.0, 0, 1984, 3968))
    final = replace(metrics.final, precision=rows_of)
    card = model_card(replace(metrics, variants=(metrics.dense, final)), SETTINGS, Origin(), "1.0")
    assert rows(card)["other"] == ["bf16", "1,984", "16", "16.000", "3,968 bytes"]


def test_a_run_from_before_has_no_such_sections(metrics):
    older = replace(metrics, variants=(metrics.dense, replace(metrics.final, precision=())))
    card = model_card(older, SETTINGS, Origin(), "1.0")
    assert "how many bits" not in card and "Training after" not in card
    assert "bitsandbytes" in card


def test_the_python_of_the_card_compiles(metrics):
    (code,) = re.findall(r"```python\n(.*?)```", model_card(metrics, SETTINGS, Origin(), "1.0"), re.DOTALL)
    compile(code, "card", "exec")
    assert "trust_remote_code=True" in code
    assert "torch" not in sys.modules["moeprune.report.model_card"].__dict__
