"""The whole road with layers on disk: the same files as in memory, and killed runs that go on where they were."""

import os
import signal
from dataclasses import dataclass, replace

import pytest
import torch
from preempting import lines_of, preempted_again_and_again
from safetensors.torch import load_file

from moeprune.calibration.loss_gradients import LossGradientPass
from moeprune.errors import InputError
from moeprune.models.compressed.writer import CheckpointWriter
from moeprune.models.layers.workspace import IN_MEMORY
from moeprune.pipeline.cache import WALK, StageCache
from moeprune.pipeline.run import run
from moeprune.quantization.nf4 import NF4Quantizer
from moeprune.scoring.gradient import EndToEndScorer, SnipScorer
from moeprune.surgery.cut import Cut
from moeprune.surgery.refit import Refit

FAMILIES = ("qwen3_renormalised", "deepseek_v2")


def with_layers_on_disk(experiment, activations_gib=0.0):
    return replace(experiment, model=replace(experiment.model, streaming="always", activations_gib=activations_gib))


def written_tensors(result) -> dict:
    """The stage's name and file -> tensors of every weight file that the run wrote."""
    stages = [artifact for artifact in result.stages if artifact.stage in ("pruned", "quantized")]
    return {
        (artifact.stage, file.name): load_file(file)
        for artifact in stages
        for file in sorted(artifact.folder.glob("*.safetensors"))
    }


def assert_same_files(one, other):
    first, second = written_tensors(one), written_tensors(other)
    assert first.keys() == second.keys()
    for name, tensors in first.items():
        assert tensors.keys() == second[name].keys()
        for key, tensor in tensors.items():
            assert torch.equal(tensor, second[name][key]), (name, key)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("surgery", [Cut(), Refit(), Refit(propagate="changed")], ids=["cut", "refit", "changed"])
def test_a_run_with_layers_on_disk_writes_and_measures_what_one_in_memory_does(family, surgery, experiment, tmp_path):
    in_memory = experiment(family, surgery=surgery, quantizer=NF4Quantizer())
    expected = run(in_memory, StageCache(tmp_path / "in_memory"))
    streamed = run(with_layers_on_disk(in_memory), StageCache(tmp_path / "streamed"))
    assert streamed.plan.widths_LE.tolist() == expected.plan.widths_LE.tolist()
    assert_same_files(streamed, expected)
    assert streamed.variants == expected.variants
    assert [artifact.key for artifact in streamed.stages] == [artifact.key for artifact in expected.stages]
    assert not list((tmp_path / "streamed").rglob("walk"))
    assert not list((tmp_path / "streamed").rglob(".partial-*"))


@dataclass(frozen=True)
class KilledAfter:
    """A surgery whose process dies without a word when ``layers`` layers are finished."""

    surgery: object
    layers: int

    def identity(self):
        return {"surgery": type(self.surgery).__name__}

    def __call__(self, *arguments):
        for count, finished in enumerate(self.surgery(*arguments)):
            if count == self.layers:
                os.kill(os.getpid(), signal.SIGKILL)
            yield finished


@pytest.mark.parametrize("surgery", [Cut(), Refit(propagate="changed")], ids=["cut", "refit"])
def test_a_killed_run_goes_on_at_the_layer_where_it_was(surgery, experiment, tmp_path, monkeypatch):
    plain = with_layers_on_disk(experiment("deepseek_v2", surgery=KilledAfter(surgery, 10)))
    expected = run(plain, StageCache(tmp_path / "whole"))

    child = os.fork()
    if child == 0:
        run(replace(plain, surgery=KilledAfter(surgery, 2)), StageCache(tmp_path / "killed"))
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL

    added = []
    add_layer = CheckpointWriter.add_layer
    monkeypatch.setattr(
        CheckpointWriter, "add_layer", lambda self, *layer: (added.append(layer[0]), add_layer(self, *layer))
    )
    resumed = run(plain, StageCache(tmp_path / "killed"))
    assert added == [2]
    assert_same_files(resumed, expected)
    assert resumed.variants == expected.variants


WALK_FILES = ("layers/walk.py", "layers/workspace.py", "compressed/writer.py", "compressed/files.py")


def test_walks_preempted_at_any_line_end_as_ones_that_were_not(experiment, tmp_path):
    """As by Submitit's handler, which raises SystemExit wherever the main thread is: statistics, cut, quantiser."""
    plain = with_layers_on_disk(experiment("deepseek_v2", surgery=Refit(), quantizer=NF4Quantizer()))
    lines = lines_of(lambda: run(plain, StageCache(tmp_path / "whole")), WALK_FILES, tmp_path / "lines")
    expected = run(plain, StageCache(tmp_path / "whole"))
    killed = tmp_path / "preempted"
    assert preempted_again_and_again(lambda: run(plain, StageCache(killed)), WALK_FILES, lines // 3, seed=0) > 2
    resumed = run(plain, StageCache(killed))
    assert_same_files(resumed, expected)
    assert resumed.variants == expected.variants


def test_a_pass_keeps_no_more_hidden_states_in_memory_than_asked_for(experiment, tmp_path, monkeypatch):
    given = []
    plain = LossGradientPass.__call__
    monkeypatch.setattr(
        LossGradientPass, "__call__", lambda self, *arguments: (given.append(arguments[-1]), plain(self, *arguments))[1]
    )
    in_memory = experiment(scorer=SnipScorer())
    run(in_memory, StageCache(tmp_path / "in_memory"))
    run(with_layers_on_disk(in_memory, activations_gib=0.5), StageCache(tmp_path / "streamed"))
    assert given[0] == IN_MEMORY
    assert (given[1].folder.name, given[1].activations_gib) == (WALK, 0.5)
    assert not list((tmp_path / "streamed").rglob(WALK))


def test_a_scorer_that_needs_the_whole_model_is_refused_before_anything_is_computed(experiment, tmp_path):
    wrong = with_layers_on_disk(experiment(scorer=EndToEndScorer()))
    with pytest.raises(InputError, match="does not fit in memory"):
        run(wrong, StageCache(tmp_path))
    assert not list(tmp_path.iterdir())
