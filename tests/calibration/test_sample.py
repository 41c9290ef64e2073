"""The calibration sample: the texts' equal shares, the same for the same seed."""

import pytest
import torch

from moeprune.calibration.sample import Calibration
from moeprune.calibration.text import TextFiles
from moeprune.errors import InputError


@pytest.fixture
def letters(tmp_path):
    """Three texts, each of one letter only, so that a window tells where it comes from."""
    for letter in "abc":
        (tmp_path / letter).write_text((letter * 9 + "\n") * 300)
    return TextFiles({letter: str(tmp_path / letter) for letter in "abc"})


def calibration(source, **changes):
    return Calibration(**{"source": source, "windows": 7, "sequence_length": 8, "batch_size": 2, "seed": 0} | changes)


@pytest.mark.parametrize(("windows", "expected"), [(6, "aabbcc"), (7, "aaabbcc"), (4, "aabc"), (2, "ab")])
def test_texts_share_the_windows_equally(letters, byte_tokenizer, windows, expected):
    sample = calibration(letters, windows=windows).sample(byte_tokenizer)
    texts = [byte_tokenizer.decode(row[1:]).replace("\n", "") for row in sample.input_ids_NT]
    assert [text[0] for text in texts] == list(expected)
    assert all(len(set(text)) == 1 for text in texts)
    assert (sample.mask_NT == 1).all()


def test_the_sample_depends_on_the_seed_only(tmp_path, byte_tokenizer):
    (tmp_path / "numbers").write_text("".join(f"{number}\n" for number in range(1000)))
    source = TextFiles({"numbers": str(tmp_path / "numbers")})
    first, again, other, other_batch = (
        calibration(source, **changes).sample(byte_tokenizer).input_ids_NT
        for changes in ({"seed": 4}, {"seed": 4}, {"seed": 5}, {"seed": 4, "batch_size": 7})
    )
    assert torch.equal(first, again)
    assert torch.equal(first, other_batch)
    assert not torch.equal(first, other)


def test_a_text_too_short_for_one_window_is_an_input_error(tmp_path, byte_tokenizer):
    (tmp_path / "short").write_text("abc")
    with pytest.raises(InputError, match="does not fill one window"):
        calibration(TextFiles({"short": str(tmp_path / "short")})).sample(byte_tokenizer)
