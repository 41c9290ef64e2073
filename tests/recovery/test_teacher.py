"""The teacher's logits: those of the model, streamed or not, whole after a kill, refused with a reason."""

import logging
import shutil
from types import SimpleNamespace

import pytest
import torch

from moeprune.errors import InputError, ModelError, NumericalError
from moeprune.models.layers.streaming import stream_dense
from moeprune.recovery import teacher
from moeprune.recovery.teacher import teacher_logits
from moeprune.training.data import NO_LABEL, LabelledWindows

SETTINGS = {"temperature": 2.0, "top_k": 6}


@pytest.fixture
def windows(random_windows):
    """Five windows of 11 tokens; window i has labels from token 2 i on."""
    labels_NT = random_windows.input_ids_NT.clone()
    for row, labels_T in enumerate(labels_NT):
        labels_T[: max(1, 2 * row)] = NO_LABEL
    return LabelledWindows(random_windows.input_ids_NT, labels_NT)


@pytest.fixture
def two_at_a_time(monkeypatch):
    monkeypatch.setattr(teacher, "LOGITS_AT_ONCE", 2 * 11 * 257)


def open_streamed(folder):
    return stream_dense(folder, torch.float32, (torch.device("cpu"),))


def refuse():
    raise AssertionError("the dense model was asked for")


@torch.no_grad()
def test_they_are_the_largest_logits_and_the_mass_of_all_others(tiny_model, windows, tmp_path):
    kept = teacher_logits(windows, lambda: tiny_model, tmp_path, **SETTINGS)
    for row in range(5):
        buckets_MB, kept_MK = kept.read([row])
        places = [place for place in range(1, 11) if windows.labels_NT[row, place] != NO_LABEL]
        assert buckets_MB.shape == (len(places), 7) and buckets_MB.dtype == torch.float32
        logits_TV = tiny_model(windows.input_ids_NT[row : row + 1]).logits[0].double() / 2.0
        for place, kept_K, buckets_B in zip(places, kept_MK.tolist(), buckets_MB.double(), strict=True):
            logits_V = logits_TV[place - 1]
            assert kept_K == sorted(range(257), key=lambda token, of=logits_V: -float(of[token]))[:6]
            torch.testing.assert_close(buckets_B[:6], logits_V[kept_K], rtol=1e-5, atol=1e-5)
            others = torch.stack([logits_V[token] for token in range(257) if token not in kept_K])
            torch.testing.assert_close(buckets_B[6], others.exp().sum().log(), rtol=1e-5, atol=1e-5)


def test_several_windows_are_read_one_after_the_other(tiny_model, windows, tmp_path):
    kept = teacher_logits(windows, lambda: tiny_model, tmp_path, **SETTINGS)
    whole, parts = kept.read([3, 0]), [kept.read([3]), kept.read([0])]
    for tensor, *pieces in zip(whole, *parts, strict=True):
        assert torch.equal(tensor, torch.cat(pieces))


def test_a_streamed_model_gives_the_same_bit_for_bit(tiny_model, tiny_checkpoint, windows, two_at_a_time, tmp_path):
    in_memory = teacher_logits(windows, lambda: tiny_model, tmp_path / "a", **SETTINGS)
    streamed = teacher_logits(windows, lambda: open_streamed(tiny_checkpoint), tmp_path / "b", **SETTINGS)
    for one, other in zip(in_memory.read(range(5)), streamed.read(range(5)), strict=True):
        assert torch.equal(one, other)
    assert not list(streamed.folder.glob("*/"))  # no hidden states are left


def cut_after(model, calls, monkeypatch):
    """Let the model fail when it is called once more than ``calls`` times."""
    forward, left = model.forward, iter(range(calls))

    def counted(*arguments, **keywords):
        if next(left, None) is None:
            raise ConnectionAbortedError
        return forward(*arguments, **keywords)

    monkeypatch.setattr(model, "forward", counted)


def test_a_pass_that_was_killed_goes_on(tiny_model, windows, two_at_a_time, tmp_path, monkeypatch):
    expected = teacher_logits(windows, lambda: tiny_model, tmp_path / "whole", **SETTINGS).read(range(5))
    with monkeypatch.context() as patch, pytest.raises(ConnectionAbortedError):
        cut_after(tiny_model, 2, patch)
        teacher_logits(windows, lambda: tiny_model, tmp_path / "cut", **SETTINGS)
    with monkeypatch.context() as patch:  # one of three batches is left
        cut_after(tiny_model, 1, patch)
        kept = teacher_logits(windows, lambda: tiny_model, tmp_path / "cut", **SETTINGS)
    assert all(torch.equal(one, other) for one, other in zip(kept.read(range(5)), expected, strict=True))
    assert teacher_logits(windows, refuse, tmp_path / "cut", **SETTINGS) == kept


@pytest.mark.parametrize("model_name", ["deepseek_v2"])
@pytest.mark.parametrize("layers", [1, 2], ids=["in the second layer", "in the last layer"])
def test_a_streamed_pass_goes_on_at_its_layer(tiny_model, tiny_checkpoint, windows, two_at_a_time, layers, tmp_path):
    expected = teacher_logits(windows, lambda: tiny_model, tmp_path / "whole", **SETTINGS).read(range(5))
    model, read = open_streamed(tiny_checkpoint), []
    fill = model._fill

    def counted(depth, device):
        if len(read) == layers:
            raise ConnectionAbortedError
        read.append(depth)
        fill(depth, device)

    model._fill = counted
    with pytest.raises(ConnectionAbortedError):
        teacher_logits(windows, lambda: model, tmp_path / "cut", **SETTINGS)
    model, rest = open_streamed(tiny_checkpoint), []
    fill_again = model._fill
    model._fill = lambda depth, device: (rest.append(depth), fill_again(depth, device))
    kept = teacher_logits(windows, lambda: model, tmp_path / "cut", **SETTINGS)
    assert read + rest == [0, 1, 2]
    assert all(torch.equal(one, other) for one, other in zip(kept.read(range(5)), expected, strict=True))


def test_other_windows_and_settings_have_other_files(tiny_model, windows, tmp_path):
    others = LabelledWindows(windows.input_ids_NT[:4], windows.labels_NT[:4])
    folders = {
        teacher_logits(of, lambda: tiny_model, tmp_path, temperature=temperature, top_k=top_k).folder
        for of, temperature, top_k in [(windows, 2.0, 6), (windows, 1.0, 6), (windows, 2.0, 5), (others, 2.0, 6)]
    }
    assert len(folders) == 4


def test_what_the_files_take_is_said_before(tiny_model, windows, tmp_path, caplog, monkeypatch):
    with caplog.at_level(logging.INFO):
        teacher_logits(windows, lambda: tiny_model, tmp_path / "a", **SETTINGS)
    assert f"6 logits for each of {windows.target_count} labels" in caplog.text
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(InputError, match=r"0\.0 GB are free"):
        teacher_logits(windows, refuse, tmp_path / "b", **SETTINGS)


def test_more_logits_than_tokens_are_an_input_error(tiny_model, windows, tmp_path):
    with pytest.raises(InputError, match="top_k=258 is more than the 257 tokens"):
        teacher_logits(windows, lambda: tiny_model, tmp_path, temperature=1.0, top_k=258)


def test_tokens_that_the_teacher_does_not_know_are_a_model_error(tiny_model, windows, tmp_path):
    unknown = LabelledWindows(windows.input_ids_NT + 200, windows.labels_NT)
    with pytest.raises(ModelError, match="teacher knows 257 tokens"):
        teacher_logits(unknown, lambda: tiny_model, tmp_path, **SETTINGS)


def test_a_teacher_that_computes_nan_is_a_numerical_error(tiny_model, windows, tmp_path):
    with torch.no_grad():
        tiny_model.get_output_embeddings().weight.fill_(float("nan"))
    with pytest.raises(NumericalError, match="NaN or infinity"):
        teacher_logits(windows, lambda: tiny_model, tmp_path, **SETTINGS)
