"""Text as training data: shares, labels, other windows than calibration's."""

import pytest
import torch

from moeprune.calibration.sample import Calibration
from moeprune.calibration.text import EmbeddedText, TextFiles
from moeprune.errors import InputError
from moeprune.recovery.texts import TextData


@pytest.fixture
def numbers(tmp_path):
    (tmp_path / "numbers").write_text("".join(f"{number}\n" for number in range(2000)))
    return TextFiles({"numbers": str(tmp_path / "numbers")})


def test_all_tokens_but_the_first_are_labels(numbers, byte_tokenizer):
    windows = TextData(numbers, windows=5, sequence_length=16, seed=0)(byte_tokenizer)
    assert windows.input_ids_NT.shape == (5, 16)
    assert torch.equal(windows.labels_NT[:, 1:], windows.input_ids_NT[:, 1:])
    assert (windows.labels_NT[:, 0] == -100).all()
    assert (windows.input_ids_NT[:, 0] == byte_tokenizer.bos_token_id).all()


def test_the_windows_depend_on_the_seed_and_are_not_those_of_calibration(numbers, byte_tokenizer):
    first, again, other = (
        TextData(numbers, windows=8, sequence_length=16, seed=seed)(byte_tokenizer).input_ids_NT for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    calibration = Calibration(numbers, windows=8, sequence_length=16, batch_size=8, seed=0).sample(byte_tokenizer)
    rows = {tuple(row) for row in calibration.input_ids_NT.tolist()}
    assert len(rows & {tuple(row) for row in first.tolist()}) < 2


def test_the_texts_share_the_windows_in_mixed_order(byte_tokenizer, tmp_path):
    for letter in "ab":
        (tmp_path / letter).write_text((letter * 9 + "\n") * 500)
    source = TextFiles({letter: str(tmp_path / letter) for letter in "ab"})
    windows = TextData(source, windows=40, sequence_length=8, seed=0)(byte_tokenizer)
    letters = ["a" in byte_tokenizer.decode(row) for row in windows.input_ids_NT]
    assert sum(letters) == 20
    assert 5 < sum(letters[:20]) < 15


def test_embedded_text_is_training_text(byte_tokenizer):
    windows = TextData(EmbeddedText(["arithmetic"], "training"), windows=4, sequence_length=16, seed=0)(byte_tokenizer)
    text = EmbeddedText(["arithmetic"], "training").read()["arithmetic"]
    assert all(byte_tokenizer.decode(row[1:]) in text for row in windows.input_ids_NT)


def test_check_and_settings_say_what_cannot_work(numbers, byte_tokenizer, tmp_path):
    TextData(numbers, windows=5, sequence_length=16, seed=0).check(byte_tokenizer)
    with pytest.raises(InputError, match="does not fill one window"):
        TextData(numbers, windows=5, sequence_length=60_000, seed=0).check(byte_tokenizer)
    with pytest.raises(InputError, match="absent does not exist"):
        TextData(TextFiles({"a": str(tmp_path / "absent")}), windows=5, sequence_length=16, seed=0).check(
            byte_tokenizer
        )
    with pytest.raises(InputError, match="windows=0"):
        TextData(numbers, windows=0, sequence_length=16, seed=0)
