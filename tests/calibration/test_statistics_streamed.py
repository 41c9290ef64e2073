"""Statistics of a model whose layers come from disk: bit for bit those of one in memory, also after being killed."""

import math
import signal
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import fields

import pytest
import torch
from families import FAMILIES, build_family, save_as_the_hub_does
from transformers import AutoModelForCausalLM

from moeprune.calibration import statistics as statistics_module
from moeprune.calibration.recorder import LayerRecorder
from moeprune.calibration.statistics import Statistics, StoredStatistics, collect_statistics
from moeprune.calibration.windows import TokenWindows
from moeprune.models.adapter import decoder_layers, moe_layers
from moeprune.models.families import to_contract
from moeprune.models.layers.streaming import stream_dense
from moeprune.models.layers.workspace import Workspace

CPU = torch.device("cpu")
NAMES = [field.name for field in fields(Statistics)]

one_model = pytest.mark.parametrize("model_name", ["deepseek_v2"])


@pytest.fixture
def windows(random_windows) -> TokenWindows:
    """Five windows of 11 tokens, the last four of which are padding in one."""
    mask_NT = torch.ones_like(random_windows.mask_NT)
    mask_NT[3, 7:] = 0
    return TokenWindows(random_windows.input_ids_NT, mask_NT)


def assert_same(actual: Statistics, expected: Statistics) -> None:
    for name in NAMES:
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name


@torch.no_grad()
def recorded_at_once(model, windows, batch_size) -> list[dict[str, torch.Tensor]]:
    """The sums of each layer when the whole model runs, with a recorder on every layer."""
    recorders = [LayerRecorder(layer) for layer in moe_layers(model)]
    with ExitStack() as recordings:
        for recorder in recorders:
            recordings.enter_context(recorder.recording())
        for input_ids_BT, mask_BT in windows.batches(batch_size):
            for recorder in recorders:
                recorder.expect(mask_BT.flatten().bool())
            model.base_model(input_ids=input_ids_BT, attention_mask=mask_BT, use_cache=False)
    return [recorder.sums() for recorder in recorders]


def test_layer_by_layer_is_bit_for_bit_the_whole_model(tiny_model, windows):
    walked = collect_statistics(tiny_model, windows, batch_size=2)
    for index, sums in enumerate(recorded_at_once(tiny_model, windows, 2)):
        for name, values in sums.items():
            stem, _, axes = name.rpartition("_")
            field = f"{stem}_L{axes}" if axes in ("E", "EC", "EH", "EE") else f"{name}_L"
            assert torch.equal(getattr(walked, field)[index], values), name


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_streams_bit_for_bit(family, windows, tmp_path):
    save_as_the_hub_does(build_family(family, torch.float32), tmp_path)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    to_contract(whole)
    streamed = collect_statistics(stream_dense(tmp_path, torch.float32, (CPU,)), windows, batch_size=2)
    assert_same(streamed, collect_statistics(whole, windows, batch_size=2))


@one_model
@pytest.mark.parametrize("activations_gib", [0.0, math.inf], ids=["in files", "in memory"])
def test_where_hidden_states_are_kept_changes_no_bit(tiny_model, tiny_checkpoint, windows, tmp_path, activations_gib):
    streamed = stream_dense(tiny_checkpoint, torch.float32, (CPU,))
    workspace = Workspace(tmp_path / "walk", activations_gib)
    assert_same(
        collect_statistics(streamed, windows, 2, workspace), collect_statistics(tiny_model, windows, batch_size=2)
    )


def test_several_devices_agree_with_one(build_model, model_name, tiny_checkpoint, windows):
    """The sums of their batches are added in another order."""
    two = collect_statistics(stream_dense(tiny_checkpoint, torch.float64, (CPU, CPU)), windows, batch_size=1)
    whole = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float64).eval()
    one = collect_statistics(whole, windows, batch_size=1)
    for name in NAMES:
        torch.testing.assert_close(getattr(two, name), getattr(one, name), rtol=1e-12, atol=1e-15, msg=name)


KILLED_RUN = """
import os, signal, sys
import torch
from pathlib import Path
from moeprune.calibration import statistics
from moeprune.calibration.windows import TokenWindows
from moeprune.models.layers.streaming import stream_dense
from moeprune.models.layers.workspace import Workspace

checkpoint, windows, folder = sys.argv[1:]
keep, kept = statistics._KeptSums.keep, []

def killed(self, depth, sums):
    keep(self, depth, sums)
    kept.append(depth)
    if len(kept) == 2:
        os.kill(os.getpid(), signal.SIGKILL)

statistics._KeptSums.keep = killed
torch.set_num_threads(1)
model = stream_dense(Path(checkpoint), torch.float32, (torch.device("cpu"),))
statistics.collect_statistics(model, TokenWindows.load(Path(windows)), 2, Workspace(Path(folder), 0.0))
"""


def test_a_killed_run_goes_on_at_the_unfinished_layer(windows, tmp_path):
    """Killed when the sums of the second MoE layer are written, before it is finished."""
    save_as_the_hub_does(build_family("deepseek_v3", torch.float32), tmp_path / "model")
    windows.save(tmp_path / "windows.safetensors")
    arguments = [str(tmp_path / name) for name in ("model", "windows.safetensors", "walk")]
    killed = subprocess.run([sys.executable, "-c", KILLED_RUN, *arguments], check=False, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    workspace = Workspace(tmp_path / "walk", 0.0)
    streamed = stream_dense(tmp_path / "model", torch.float32, (CPU,))
    depth = workspace.depth
    assert 0 < depth < len(list(decoder_layers(streamed.model)))
    read, fill = [], streamed._fill
    streamed._fill = lambda depth, device: (read.append(depth), fill(depth, device))
    resumed = collect_statistics(streamed, windows, 2, workspace)
    assert read == list(range(depth, len(list(decoder_layers(streamed.model)))))
    fresh = stream_dense(tmp_path / "model", torch.float32, (CPU,))
    assert_same(resumed, collect_statistics(fresh, windows, batch_size=2))


@one_model
def test_a_run_that_failed_goes_on_in_the_same_process(tiny_checkpoint, windows, tmp_path, monkeypatch):
    workspace = Workspace(tmp_path / "walk")
    streamed = stream_dense(tiny_checkpoint, torch.float32, (CPU,))

    def fail(*_):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(statistics_module, "save_file", fail)
        with pytest.raises(OSError, match="no space left"):
            collect_statistics(streamed, windows, 2, workspace)
    assert workspace.depth == 1  # the dense layer
    assert_same(
        collect_statistics(streamed, windows, 2, workspace), collect_statistics(streamed, windows, batch_size=2)
    )


def test_stored_statistics_give_each_field_when_it_is_asked_for(tiny_model, random_windows, tmp_path):
    statistics = collect_statistics(tiny_model, random_windows, batch_size=2)
    statistics.save(tmp_path / "statistics.safetensors")
    stored = StoredStatistics(tmp_path / "statistics.safetensors")
    for field in fields(Statistics):
        assert torch.equal(getattr(stored, field.name), getattr(statistics, field.name)), field.name
    assert not set(vars(stored)) & {field.name for field in fields(Statistics)}
    with pytest.raises(AttributeError, match="no routed_token"):
        _ = stored.routed_token
