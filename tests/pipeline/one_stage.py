"""A stage that any test of the cache may ask for: two files, one in a folder."""

from pathlib import Path

from moeprune.pipeline.cache import RECORD, StageCache
from moeprune.pipeline.identity import stage_key

SETTINGS = {"alpha": 0.9}
KEY = stage_key("scores", 1, SETTINGS, ["input"])
CONTENT = b"what the stage found" * 10


def write_result(folder: Path) -> None:
    (folder / "part").mkdir()
    (folder / "part" / "result.bin").write_bytes(CONTENT)
    (folder / "other.txt").write_text("second file")


def never(_folder: Path) -> None:
    raise AssertionError("a stored stage was computed again")


def get(cache: StageCache, compute=write_result):
    return cache.get("scores", 1, SETTINGS, ["input"], compute)


def left_behind(root: Path) -> list[str]:
    """Hidden folders: neither partial nor damaged results may stay."""
    return [path.name for path in root.rglob(".*")]


def is_whole(folder: Path) -> bool:
    return (folder / "part" / "result.bin").read_bytes() == CONTENT and (folder / RECORD).exists()
