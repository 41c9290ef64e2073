"""Text files: read by name, identified by content, refused with a reason."""

import pytest

from moeprune.calibration.text import EmbeddedText, TextFiles
from moeprune.errors import InputError


@pytest.fixture
def two_files(tmp_path):
    for name, text in {"first": "One text.\n", "second": "Another, with é.\n"}.items():
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
    return TextFiles({name: str(tmp_path / f"{name}.txt") for name in ("first", "second")})


def test_files_are_read_under_their_names(two_files):
    assert two_files.read() == {"first": "One text.\n", "second": "Another, with é.\n"}


def test_identity_follows_content_and_not_place(two_files, tmp_path):
    before = two_files.identity()
    moved = tmp_path / "moved.txt"
    moved.write_text("One text.\n")
    assert TextFiles({**two_files.files, "first": str(moved)}).identity() == before
    moved.write_text("One text!\n")
    assert TextFiles({**two_files.files, "first": str(moved)}).identity() != before


def test_a_missing_file_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match=r"Text 'mine': .*absent\.txt does not exist"):
        TextFiles({"mine": str(tmp_path / "absent.txt")}).read()


@pytest.mark.parametrize("content", ["", " \n\t\n"])
def test_an_empty_file_is_an_input_error(tmp_path, content):
    (tmp_path / "empty.txt").write_text(content)
    with pytest.raises(InputError, match=r"empty\.txt is empty"):
        TextFiles({"mine": str(tmp_path / "empty.txt")}).read()


def test_a_file_that_is_not_utf8_is_an_input_error(tmp_path):
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(InputError, match=r"latin\.txt is not UTF-8"):
        TextFiles({"mine": str(tmp_path / "latin.txt")}).read()


def test_a_folder_in_place_of_a_file_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="Text 'mine'"):
        TextFiles({"mine": str(tmp_path)}).read()


def test_embedded_text_keeps_the_held_out_part_apart():
    training, validation = (EmbeddedText(["code"], part).read()["code"] for part in ("training", "validation"))
    assert training and validation
    assert validation not in training
    assert EmbeddedText(["code"], "training").identity() != EmbeddedText(["code"], "validation").identity()
