"""The stage cache on a disk that is full or cannot be written, and errors that only look like that."""

import errno
from pathlib import Path

import pytest
from one_stage import SETTINGS, get, left_behind, never
from safetensors import SafetensorError

from moeprune.errors import CacheError
from moeprune.pipeline.cache import StageCache


@pytest.fixture
def cache(tmp_path) -> StageCache:
    return StageCache(tmp_path / "cache")


FULL = {
    "no space": OSError(errno.ENOSPC, "No space left on device"),
    "no quota": OSError(errno.EDQUOT, "Disk quota exceeded"),
    "safetensors": SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
}


@pytest.mark.parametrize("error", FULL.values(), ids=FULL)
def test_a_full_disk_is_a_cache_error_and_nothing_half_written_stays(cache, error):
    def fill(folder: Path) -> None:
        (folder / "half.bin").write_bytes(b"half")
        raise error

    with pytest.raises(CacheError, match=r"(?s)No disk space left while writing .* GB .*free.*cache_dir=/path"):
        get(cache, fill)
    assert [path for path in cache.root.rglob("*") if path.is_file()] == []
    assert left_behind(cache.root) == []


@pytest.mark.parametrize(
    "error",
    [PermissionError(errno.EACCES, "Permission denied"), OSError(errno.EROFS, "Read-only file system")],
    ids=["no permission", "read-only file system"],
)
def test_a_folder_that_cannot_be_written_is_a_cache_error_but_what_it_holds_is_used(cache, monkeypatch, error):
    get(cache)

    def refuse(*_args: object, **_settings: object) -> None:
        raise error

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert get(cache, never).cached
    with pytest.raises(CacheError, match=r"(?s)cannot be written: .*cache_dir=/path"):
        cache.get("scores", 2, SETTINGS, ["input"], never)


def test_a_cache_that_is_a_file_is_a_cache_error(tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(CacheError, match=r"(?s)cannot be written.*cache_dir=/path"):
        get(StageCache(tmp_path / "cache"))


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(errno.EACCES, "Permission denied", "/data/text.jsonl"),
        NotADirectoryError(errno.ENOTDIR, "Not a directory", "/data/file/text.jsonl"),
        OSError(errno.ENOSPC, "No space left on device", "/tmp/shard"),
    ],
    ids=["no permission", "no folder", "no space"],
)
def test_what_is_wrong_with_a_file_elsewhere_is_not_told_of_the_cache(cache, error):
    def fail(_folder: Path) -> None:
        raise error

    with pytest.raises(type(error)) as raised:
        get(cache, fail)
    assert raised.value is error
    assert left_behind(cache.root) == []


def test_a_file_of_the_cache_that_cannot_be_written_is_a_cache_error(cache):
    def fail(folder: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(folder / "result.bin"))

    with pytest.raises(CacheError, match=r"(?s)cannot be written: .*cache_dir=/path"):
        get(cache, fail)


def test_a_folder_above_the_cache_that_cannot_be_written_is_a_cache_error(cache, monkeypatch):
    def refuse(*_args: object, **_settings: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(cache.root.parent))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(CacheError, match=r"(?s)cannot be written: .*cache_dir=/path"):
        get(cache, never)
