"""`moeprune-export`: what it writes, what it refuses, and that nothing half-written stays."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM

from moeprune.app import export as export_module
from moeprune.app.export import run_export
from moeprune.app.main import config_folder
from moeprune.errors import InputError
from moeprune.models.adapter import moe_layers
from moeprune.models.compressed.writer import save_compressed
from moeprune.models.runtime.activations import gated_activation
from moeprune.models.runtime.ragged import Expert, RaggedExperts


@pytest.fixture
def pruned(build_model, byte_tokenizer, tmp_path) -> Path:
    """A checkpoint whose experts are all 8 wide, of random weights."""
    model = build_model("qwen3_renormalised", torch.float32)
    for layer in moe_layers(model):
        experts = [Expert(8, layer.hidden_size) for _ in layer.widths]
        model.set_submodule(layer.name, RaggedExperts(experts, gated_activation(layer.experts)))
    folder = tmp_path / "pruned"
    folder.mkdir()
    save_compressed(model, byte_tokenizer, folder, torch.float32)
    return folder


def settings(pruned: Path, out: Path, **changes):
    config = OmegaConf.load(config_folder() / "export.yaml")
    return OmegaConf.merge(config, {"checkpoint": str(pruned), "out": str(out)}, changes)


def test_it_writes_a_folder_and_says_what(pruned, tmp_path, capsys):
    out = tmp_path / "new" / "stock"
    run_export(settings(pruned, out))
    assert "8 experts of width 8" in capsys.readouterr().out
    assert AutoModelForCausalLM.from_pretrained(out).config.moe_intermediate_size == 8
    assert [path.name for path in out.parent.iterdir()] == ["stock"]


def test_what_is_there_is_kept(pruned, tmp_path):
    with pytest.raises(InputError, match="exists"):
        run_export(settings(pruned, pruned))


@pytest.mark.parametrize(
    ("changes", "name", "message"),
    [
        ({"format": "ggml"}, "a", "gguf"),
        ({"format": "gguf"}, "a", r"\.gguf"),
        ({"format": "transformers"}, "a.gguf", "folder"),
    ],
)
def test_wrong_settings_say_what_is_possible(changes, name, message, pruned, tmp_path):
    with pytest.raises(InputError, match=message):
        run_export(settings(pruned, tmp_path / name, **changes))


def test_a_missing_package_is_named(pruned, tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, "find_spec", lambda _name: None)
    with pytest.raises(InputError, match="pip install"):
        run_export(settings(pruned, tmp_path / "a.gguf", format="gguf"))


def test_nothing_half_written_stays(pruned, tmp_path, monkeypatch):
    def fail(_stock, folder):
        (folder / "config.json").write_text("{}")
        raise OSError("disk full")

    monkeypatch.setattr(export_module, "write_transformers", fail)
    with pytest.raises(OSError, match="disk full"):
        run_export(settings(pruned, tmp_path / "stock"))
    assert [path.name for path in tmp_path.iterdir()] == ["pruned"]


def test_a_mistake_ends_the_command_with_one_message(tmp_path):
    code = "from moeprune.app.main import export; export()"
    done = subprocess.run(
        [sys.executable, "-c", code, f"checkpoint={tmp_path}", "out=new"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2
    assert "is no checkpoint" in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
