"""The saved model: whole, with its card and licence, linked rather than copied, never over something else."""

import json
import os

import pytest
import yaml

from moeprune.app import saved_model
from moeprune.app.saved_model import check_destination, origin, save_model
from moeprune.errors import InputError
from moeprune.report.runs.results import Metrics, load_run


def variant(name: str, perplexity: float) -> dict:
    return {
        "name": name,
        "perplexity": {"prose": perplexity},
        "perplexity_tokens": {"prose": 100},
        "mean_perplexity": perplexity,
        "tasks": {},
        "parameters": {"total": 10, "routed": 8, "active": 4},
        "bytes": {"ideal": 20, "with_overhead": 20, "on_disk": 24},
    }


@pytest.fixture
def metrics(tmp_path) -> Metrics:
    settings = dict.fromkeys(("scorer", "allocator", "surgery", "quantizer", "recovery", "calibration"), "none")
    plan = {"removed_channels": 1, "total_channels": 2, "removed_ratio": 0.5, "live_experts": [1], "note": ""}
    variants = [variant("dense", 20.0), variant("pruned", 30.0)]
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "manifest.json").write_text(json.dumps({"status": "success"}))
    found = {"model": "tiny", "method": None, "ratio": 0.5, "seed": 0, "variants": variants, "plan": plan, "stages": []}
    (run_dir / "metrics.json").write_text(json.dumps(settings | found))
    metrics = load_run(run_dir).metrics
    assert metrics is not None
    return metrics


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "stage"
    folder.mkdir()
    for name in ("config.json", "modeling_pruned_x.py", "model-rest.safetensors", "stage.json"):
        (folder / name).write_text(name)
    (folder / "walk").mkdir()
    (folder / "adapters" / "experts").mkdir(parents=True)
    (folder / "adapters" / "experts" / "adapter_model.safetensors").write_text("adapter")
    (folder / "loss_curve.jsonl").write_text("of the training, not of the model")
    return folder


@pytest.fixture
def dense(tmp_path):
    folder = tmp_path / "dense"
    folder.mkdir()
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# The dense model\n")
    (folder / "LICENSE").write_text("MIT License")
    return folder


@pytest.fixture
def settings(dense) -> dict:
    return {"model": {"path": str(dense), "revision": None}}


def test_the_folder_holds_the_checkpoint_the_card_and_the_licence(checkpoint, dense, metrics, settings, tmp_path):
    save_model(checkpoint, tmp_path / "new" / "model", metrics, settings, dense)
    names = sorted(file.name for file in (tmp_path / "new" / "model").iterdir())
    model_files = ["config.json", "model-rest.safetensors", "modeling_pruned_x.py"]
    assert names == ["LICENSE", "README.md", "adapters", *model_files]
    adapter = tmp_path / "new" / "model" / "adapters" / "experts" / "adapter_model.safetensors"
    assert adapter.read_text() == "adapter"
    card = (tmp_path / "new" / "model" / "README.md").read_text()
    assert yaml.safe_load(card.split("---\n")[1])["license"] == "mit"
    assert "| perplexity, prose | 20.00 | 30.00 |" in card
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["model"]


def test_weights_are_linked_and_texts_are_copied(checkpoint, dense, metrics, settings, tmp_path):
    save_model(checkpoint, tmp_path / "model", metrics, settings, dense)
    assert os.path.samefile(tmp_path / "model" / "model-rest.safetensors", checkpoint / "model-rest.safetensors")
    assert not os.path.samefile(tmp_path / "model" / "config.json", checkpoint / "config.json")


def test_weights_are_copied_where_they_cannot_be_linked(checkpoint, dense, metrics, settings, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("another file system")

    monkeypatch.setattr(saved_model.os, "link", refuse)
    save_model(checkpoint, tmp_path / "model", metrics, settings, dense)
    assert (tmp_path / "model" / "model-rest.safetensors").read_text() == "model-rest.safetensors"


def test_a_failure_leaves_nothing(checkpoint, dense, metrics, settings, tmp_path, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(saved_model, "model_card", fail)
    with pytest.raises(KeyboardInterrupt):
        save_model(checkpoint, tmp_path / "new" / "model", metrics, settings, dense)
    assert list((tmp_path / "new").iterdir()) == []


def test_what_is_there_already_is_never_overwritten(checkpoint, dense, metrics, settings, tmp_path):
    (tmp_path / "model").mkdir()
    check_destination(tmp_path / "model")  # empty: fine
    (tmp_path / "model" / "mine").write_text("mine")
    with pytest.raises(InputError, match="is there already"):
        save_model(checkpoint, tmp_path / "model", metrics, settings, dense)
    with pytest.raises(InputError, match="is there already"):
        check_destination(tmp_path / "model" / "mine")
    assert (tmp_path / "model" / "mine").read_text() == "mine"


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        (None, None),
        ("# No YAML\n", None),
        ("---\nlicense: apache-2.0\ntags: [a]\n---\ntext", "apache-2.0"),
        ("---\ntags: [a]\n---\ntext", None),
        ("---\nlicense: [broken\n---\ntext", None),
        ("---\nnever ended", None),
    ],
)
def test_the_licence_is_what_the_dense_models_card_says(tmp_path, card, licence):
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert origin({"path": str(tmp_path)}, tmp_path).licence == licence


def test_only_hub_names_are_told(tmp_path):
    assert origin({"path": str(tmp_path), "revision": "x"}, tmp_path).hub_name is None
    from_hub = origin({"path": "Qwen/Qwen3-30B-A3B", "revision": "abc"}, tmp_path)
    assert (from_hub.hub_name, from_hub.revision) == ("Qwen/Qwen3-30B-A3B", "abc")
