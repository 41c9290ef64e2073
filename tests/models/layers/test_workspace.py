"""A walk keeps its state where it is told to, and goes on from there as if nothing had happened."""

import errno
import math
from pathlib import Path

import pytest
import torch

from moeprune.errors import InputError
from moeprune.models.layers.workspace import HiddenStates, Workspace

SHAPE = (2, 8, 16)
BYTES = math.prod(SHAPE) * 4


def states(layer: int) -> list[torch.Tensor]:
    """Three batches as they leave a layer."""
    generator = torch.Generator().manual_seed(layer)
    return [torch.randn(SHAPE, generator=generator) for _ in range(3)]


def pass_layer(hidden: HiddenStates, layer: int) -> None:
    for batch, values in enumerate(states(layer)):
        hidden.write(batch, values)
    hidden.finish_layer()


def assert_enters(hidden: HiddenStates, layer: int) -> None:
    for batch, values in enumerate(states(layer)):
        assert torch.equal(hidden.read(batch), values)
        assert torch.equal(hidden.read(batch), values)


@pytest.mark.parametrize("gib", [0.0, 1.5 * BYTES / 2**30, math.inf], ids=["files", "one batch in memory", "memory"])
def test_what_left_a_layer_enters_the_next_wherever_it_was_kept(tmp_path, gib):
    hidden = HiddenStates(Workspace(tmp_path, gib))
    for layer in range(4):
        pass_layer(hidden, layer)
        assert_enters(hidden, layer)
    assert [folder.name for folder in tmp_path.iterdir()] == ["layers-4"]


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hidden = HiddenStates(Workspace())
    pass_layer(hidden, 0)
    assert_enters(hidden, 0)
    assert not list(tmp_path.iterdir())
    assert Workspace().depth == 0


def test_memory_holds_no_more_than_its_limit(tmp_path):
    hidden = HiddenStates(Workspace(tmp_path, 2 * BYTES / 2**30))
    for layer in range(3):
        pass_layer(hidden, layer)
        assert len(hidden._entering) == 2
        assert_enters(hidden, layer)


def test_what_entered_stays_while_it_is_not_replaced(tmp_path):
    """A layer may be run twice."""
    hidden = HiddenStates(Workspace(tmp_path))
    pass_layer(hidden, 0)
    hidden.write(0, states(1)[0])
    assert torch.equal(hidden.read(1), states(0)[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_files_keep_every_bit(tmp_path, dtype):
    values = torch.randn(SHAPE, dtype=torch.float64).to(dtype)
    hidden = HiddenStates(Workspace(tmp_path, 0))
    hidden.write(0, values)
    hidden.finish_layer()
    assert hidden.read(0).dtype == dtype
    assert torch.equal(hidden.read(0), values)


def test_another_process_goes_on_at_the_first_unfinished_layer(tmp_path):
    hidden = HiddenStates(Workspace(tmp_path))
    for layer in range(2):
        pass_layer(hidden, layer)
    hidden.write(0, states(2)[0])  # killed while the third layer ran
    again = Workspace(tmp_path)
    assert again.depth == 2
    hidden = HiddenStates(again)
    assert_enters(hidden, 1)
    pass_layer(hidden, 2)
    assert_enters(hidden, 2)
    assert again.depth == 3


def test_a_folder_that_is_not_there_yet_has_no_finished_layer(tmp_path):
    assert Workspace(tmp_path / "walk").depth == 0


def test_the_state_of_another_walk_is_refused(tmp_path):
    Workspace(tmp_path).begin(["statistics", torch.float32])
    Workspace(tmp_path).begin(["statistics", torch.float32])
    with pytest.raises(InputError, match="another"):
        Workspace(tmp_path).begin(["statistics", torch.bfloat16])


def test_a_disk_that_was_full_at_the_begin_does_not_spoil_the_folder(tmp_path, monkeypatch):
    def leave_an_empty_file(file, _text):
        file.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(Path, "write_text", leave_an_empty_file)
        with pytest.raises(OSError, match="No space left"):
            Workspace(tmp_path).begin(["statistics"])
    Workspace(tmp_path).begin(["statistics"])
    Workspace(tmp_path).begin(["statistics"])


def test_a_folder_that_another_process_took_is_not_made_again(tmp_path):
    workspace = Workspace(tmp_path / "walk")
    workspace.begin(["statistics"])
    hidden = HiddenStates(workspace)
    pass_layer(hidden, 0)
    (tmp_path / "walk").rename(tmp_path / "taken")
    with pytest.raises(FileNotFoundError):
        hidden.write(0, states(1)[0])
    assert not (tmp_path / "walk").exists()


@pytest.mark.parametrize("gib", [-1, math.nan])
def test_a_limit_that_is_no_amount_is_an_input_error(tmp_path, gib):
    with pytest.raises(InputError, match="activations_gib"):
        Workspace(tmp_path, gib)


def test_a_limit_without_a_folder_is_an_input_error():
    with pytest.raises(InputError, match="folder"):
        Workspace(None, 4.0)
