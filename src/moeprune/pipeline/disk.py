"""What can be wrong with the disk under the cache, in words."""

import errno
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from moeprune.errors import CacheError

GIGABYTE = 1e9


@contextmanager
def disk_errors(stage_folder: Path, written: Path) -> Iterator[None]:
    """Within the context a disk that is full or cannot be written, for what goes to ``stage_folder``, is a CacheError;
    ``written`` is where the stage has written so far. What names a file elsewhere, such as an input, passes."""
    try:
        yield
    except Exception as error:
        if _is_elsewhere(error, stage_folder):
            raise
        message = str(error)
        number = getattr(error, "errno", None)
        # safetensors reports a full disk as an error of its own.
        quota = number == errno.EDQUOT or "quota exceeded" in message
        if quota or number == errno.ENOSPC or "No space left" in message:
            raise CacheError(_full(stage_folder, size(written), quota)) from error
        if isinstance(error, (PermissionError, NotADirectoryError)) or number == errno.EROFS:
            raise CacheError(
                f"The cache {stage_folder} cannot be written: {message}.\nChoose another place with cache_dir=/path."
            ) from error
        raise


def _is_elsewhere(error: Exception, folder: Path) -> bool:
    """Whether the error names a file that is neither in the folder nor one of those above it."""
    name = getattr(error, "filename", None)
    if not isinstance(name, str):
        return False
    file, here = Path(os.path.abspath(name)), Path(os.path.abspath(folder))
    return not (file.is_relative_to(here) or here.is_relative_to(file))


def _full(stage_folder: Path, bytes_written: int, quota: bool) -> str:
    limit = "Your quota is used up. " if quota else ""
    with suppress(OSError):
        limit += f"{shutil.disk_usage(stage_folder).free / GIGABYTE:.2f} GB of the disk are free; "
    return (
        f"No disk space left while writing {stage_folder}: {limit}this stage had written "
        f"{bytes_written / GIGABYTE:.2f} GB and needs more.\nFree some space (moeprune-cache prune), or choose another "
        "place with cache_dir=/path; the next run goes on from the finished stages."
    )


def size(folder: Path) -> int:
    """Bytes of all files in the folder."""
    return sum(found.st_size for found in _entries(folder) if stat.S_ISREG(found.st_mode))


def last_written(folder: Path) -> float:
    """Seconds since the epoch by the clock of the file system; 0 for an empty or missing folder."""
    return max((found.st_mtime for found in _entries(folder)), default=0.0)


def _entries(folder: Path) -> Iterator[os.stat_result]:
    """Of everything in the folder that is not renamed or removed while one looks."""
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            with suppress(OSError):
                yield os.stat(os.path.join(place, name))
