"""Token windows: the same every time, each with the begin token, and a clear error for a text that is too short."""

import pytest
import torch

from moeprune.calibration.windows import TokenWindows, windows_of_text
from moeprune.embedded.tokenizer import train_tokenizer
from moeprune.errors import InputError

LINES = "".join(f"line {number} of a text that is long enough to sample from\n" for number in range(400))


def test_first_windows_are_the_text_cut_in_order(byte_tokenizer):
    windows = windows_of_text(byte_tokenizer, LINES, name="lines", count=3, length=16)
    body = byte_tokenizer(LINES[:45])["input_ids"]
    assert windows.input_ids_NT[:, 1:].flatten().tolist() == body
    assert windows.input_ids_NT.dtype == torch.int64


def test_every_window_starts_with_the_begin_token_and_counts_in_full(byte_tokenizer):
    windows = windows_of_text(byte_tokenizer, LINES, name="lines", count=5, length=16, seed=3)
    assert windows.input_ids_NT.shape == windows.mask_NT.shape == (5, 16)
    assert (windows.input_ids_NT[:, 0] == byte_tokenizer.bos_token_id).all()
    assert (windows.mask_NT == 1).all()
    assert windows.token_count == 5 * 16


def test_end_token_stands_in_where_there_is_no_begin_token(byte_tokenizer, monkeypatch):
    monkeypatch.setattr(type(byte_tokenizer), "bos_token_id", None, raising=False)
    windows = windows_of_text(byte_tokenizer, LINES, name="lines", count=1, length=16)
    assert windows.input_ids_NT[0, 0] == byte_tokenizer.eos_token_id


def test_a_seed_gives_the_same_sample_every_time(byte_tokenizer):
    samples = [
        windows_of_text(byte_tokenizer, LINES, name="lines", count=6, length=16, seed=seed).input_ids_NT
        for seed in (1, 1, 2)
    ]
    assert torch.equal(samples[0], samples[1])
    assert not torch.equal(samples[0], samples[2])


def test_sampled_windows_start_at_lines_of_the_text(byte_tokenizer):
    windows = windows_of_text(byte_tokenizer, LINES, name="lines", count=6, length=16, seed=1)
    for window in windows.input_ids_NT:
        assert f"\n{byte_tokenizer.decode(window[1:])}" in "\n" + LINES


def test_a_text_with_fewer_windows_than_asked_gives_what_it_has(byte_tokenizer):
    windows = windows_of_text(byte_tokenizer, "x" * 40, name="short", count=10, length=11, seed=1)
    assert windows.input_ids_NT.shape == (4, 11)


def test_a_text_shorter_than_one_window_is_an_input_error(byte_tokenizer):
    with pytest.raises(InputError, match="'short' does not fill one window of 15 tokens"):
        windows_of_text(byte_tokenizer, "too short", name="short", count=1, length=16)


@pytest.fixture
def long_token_line():
    """A line of 40 characters, and a tokenizer for which it is two tokens."""
    line = "abcdefghijklmnopqrstuvwxyzabcdefghijklm\n"
    tokenizer = train_tokenizer([line.strip()] * 50, vocab_size=400)
    assert len(tokenizer(line)["input_ids"]) == 2
    return line, tokenizer


@pytest.mark.parametrize("lines", [50, 2000])
def test_sampling_finds_windows_where_tokens_are_longer_than_foreseen(long_token_line, lines):
    line, tokenizer = long_token_line
    windows = windows_of_text(tokenizer, line * lines, name="long", count=4, length=32, seed=0)
    assert windows.input_ids_NT.shape == (4, 32)


def test_sampling_ends_where_the_whole_text_holds_no_window(long_token_line):
    line, tokenizer = long_token_line
    with pytest.raises(InputError, match="does not fill one window"):
        windows_of_text(tokenizer, line * 8, name="long", count=1, length=32, seed=0)


def test_batches_cover_all_windows_once_in_order(random_windows):
    batches = list(random_windows.batches(2))
    assert [len(ids) for ids, _ in batches] == [2, 2, 1]
    assert len(random_windows.batches(2)) == 3
    assert torch.equal(torch.cat([ids for ids, _ in batches]), random_windows.input_ids_NT)
    assert torch.equal(torch.cat([mask for _, mask in batches]), random_windows.mask_NT)


def test_token_count_leaves_out_padding():
    mask_NT = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert TokenWindows(torch.zeros_like(mask_NT), mask_NT).token_count == 3


def test_windows_survive_a_round_trip(random_windows, tmp_path):
    random_windows.save(tmp_path / "windows.safetensors")
    loaded = TokenWindows.load(tmp_path / "windows.safetensors")
    assert torch.equal(loaded.input_ids_NT, random_windows.input_ids_NT)
    assert torch.equal(loaded.mask_NT, random_windows.mask_NT)


def test_fewer_windows_than_asked_are_said(byte_tokenizer, caplog):
    windows = windows_of_text(byte_tokenizer, "a" * 40, name="short", count=50, length=9)
    assert len(windows.input_ids_NT) < 50
    assert "text short fills" in caplog.text


def test_a_window_that_leaves_nothing_to_predict_is_refused(byte_tokenizer):
    with pytest.raises(InputError, match="sequence_length=1 leaves nothing to predict"):
        windows_of_text(byte_tokenizer, "a" * 40, name="text", count=1, length=1)


def test_a_seed_also_samples_a_text_that_holds_few_windows_more_than_asked(byte_tokenizer):
    text = "".join(f"{number:04d}" for number in range(100))
    first, second = (
        windows_of_text(byte_tokenizer, text, name="small", count=20, length=11, seed=seed).input_ids_NT
        for seed in (1, 2)
    )
    all_of_it = windows_of_text(byte_tokenizer, text, name="small", count=40, length=11).input_ids_NT.tolist()
    assert not torch.equal(first, second)
    assert all(window in all_of_it for window in first.tolist())
    assert len({tuple(window) for window in first.tolist()}) == 20
