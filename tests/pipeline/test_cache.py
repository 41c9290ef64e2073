"""The stage cache: what is reused, what is computed again, and what is left behind when something goes wrong."""

import json
import logging
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
from one_stage import CONTENT, KEY, SETTINGS, get, is_whole, left_behind, never, write_result

from moeprune.pipeline import record as record_module
from moeprune.pipeline.cache import RECORD, StageCache
from moeprune.pipeline.identity import stage_key
from moeprune.pipeline.lease import Owner, Timing, holder, lease_folder, take
from moeprune.pipeline.process import Process
from moeprune.pipeline.record import write_record
from moeprune.pipeline.workplace import Workplace


def dead_process() -> Process:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    return replace(Process.this(), pid=ended.pid)


@pytest.fixture
def cache(tmp_path) -> StageCache:
    return StageCache(tmp_path / "cache")


def test_a_stage_is_computed_once_and_then_reused_with_its_cost(cache):
    first, second = get(cache), get(cache, never)
    assert (first.cached, second.cached) == (False, True)
    assert first.folder == second.folder == cache.root / "scores" / KEY
    assert (first.key, first.stage) == (KEY, "scores")
    assert (second.seconds, second.peak_memory_gib) == (first.seconds, first.peak_memory_gib)
    assert first.seconds >= 0
    assert first.peak_memory_gib > 0
    assert is_whole(first.folder)
    assert left_behind(cache.root) == []


def test_a_second_process_reuses_what_the_first_one_finished(cache):
    get(cache)
    assert get(StageCache(cache.root), never).cached


@pytest.mark.parametrize(
    "other",
    [("scores", 2, SETTINGS, ["input"]), ("scores", 1, {"alpha": 0.8}, ["input"]), ("scores", 1, SETTINGS, ["else"])],
)
def test_another_version_settings_or_input_is_another_stage(cache, other):
    stored = get(cache)
    assert cache.get(*other, write_result).folder != stored.folder
    assert get(cache, never).cached


def test_the_record_says_what_made_the_stage(cache):
    record = json.loads((get(cache).folder / RECORD).read_text())
    assert (record["stage"], record["key"], record["version"]) == ("scores", KEY, 1)
    assert (record["settings"], record["inputs"]) == (SETTINGS, ["input"])
    assert sorted(record["files"]) == ["other.txt", "part/result.bin"]


def flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


DAMAGES = {
    "flipped byte": lambda folder: flip_a_byte(folder / "part" / "result.bin"),
    "truncated file": lambda folder: truncate(folder / "part" / "result.bin"),
    "missing file": lambda folder: (folder / "other.txt").unlink(),
    "additional file": lambda folder: (folder / "third.txt").write_text("not ours"),
    "missing record": lambda folder: (folder / RECORD).unlink(),
    "truncated record": lambda folder: truncate(folder / RECORD),
    "empty record": lambda folder: (folder / RECORD).write_text(""),
    "record without entries": lambda folder: (folder / RECORD).write_text("{}"),
    "record of another kind": lambda folder: (folder / RECORD).write_text("[]"),
    "record of bytes": lambda folder: (folder / RECORD).write_bytes(b"\xff\xfe\x00"),
    "empty folder": lambda folder: [shutil.rmtree(folder), folder.mkdir()],
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_stage_is_computed_again_with_a_warning(cache, damage, caplog):
    damage(get(cache).folder)
    with caplog.at_level(logging.WARNING):
        again = get(cache)
    assert not again.cached
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f"{again.folder} is damaged" in caplog.text
    assert is_whole(again.folder)
    assert left_behind(cache.root) == []
    assert get(cache, never).cached


def test_a_flipped_byte_of_the_record_gives_the_stored_stage_or_a_new_one(cache):
    record = get(cache).folder / RECORD
    sound = record.read_bytes()
    for position in range(0, len(sound), 5):
        damaged = bytearray(sound)
        damaged[position] ^= 4
        record.write_bytes(damaged)
        assert is_whole(get(cache).folder)


@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt()], ids=["error", "interruption"])
def test_a_stage_that_fails_leaves_nothing_behind_and_its_error_passes(cache, error):
    def fail(folder: Path) -> None:
        write_result(folder)
        raise error

    with pytest.raises(type(error)) as raised:
        get(cache, fail)
    assert raised.value is error
    assert [path for path in cache.root.rglob("*") if path.is_file()] == []
    assert left_behind(cache.root) == []
    assert is_whole(get(cache).folder)


def left_by(cache: StageCache, process: Process, key: str = KEY, lease: bool = True) -> Path:
    """What a process that was killed while it computed a stage leaves: its lease, and half of the result."""
    owner = Owner(process)
    work = Workplace(cache.root / "scores" / key, owner)
    work.open()
    (work.content / "half.bin").write_bytes(b"half")
    if lease:
        assert take(lease_folder(cache.root / "scores" / key), owner)
    return work.content.parent


def test_what_a_dead_process_left_is_removed_and_what_is_of_another_stage_is_kept(cache):
    of_the_dead, other_stage = left_by(cache, dead_process()), left_by(cache, dead_process(), "0" * 32)
    get(cache)
    assert not of_the_dead.exists()
    assert other_stage.exists()


def test_what_an_earlier_version_left_is_removed(cache):
    (cache.root / "scores" / f".partial-{KEY}-a-host-17" / "walk").mkdir(parents=True)
    get(cache)
    assert left_behind(cache.root) == []


def finished_part(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_a_resumable_stage_goes_on_from_what_a_failed_run_of_the_same_process_wrote(cache):
    def first(folder):
        (folder / "layer-0").write_text("done")
        raise RuntimeError("killed")

    def second(folder):
        assert finished_part(folder) == ["layer-0"]
        (folder / "layer-1").write_text("done")

    with pytest.raises(RuntimeError, match="killed"):
        cache.get("scores", 1, {}, [], first, resumable=True)
    assert cache.get("scores", 1, {}, [], second, resumable=True).folder.exists()
    assert not left_behind(cache.root)


@pytest.mark.parametrize("dead_on_this_host", [True, False])
def test_a_resumable_stage_goes_on_from_what_a_dead_process_wrote_last(cache, dead_on_this_host):
    key = stage_key("scores", 1, {}, [])
    process = dead_process() if dead_on_this_host else Process("node-17", 1, "another boot")
    older, newer = (left_by(cache, process, key, lease=False) for _ in range(2))
    for age, (name, folder) in enumerate((("older", older), ("newer", newer))):
        (folder / "content" / name).write_text("done")
        for path in (folder / "content").iterdir():
            os.utime(path, (10**9 + age, 10**9 + age))

    def compute(folder):
        assert finished_part(folder) == ["half.bin", "newer"]

    cache.get("scores", 1, {}, [], compute, resumable=True)
    assert not left_behind(cache.root)


def counter(cache: StageCache) -> bytes:
    held = holder(lease_folder(cache.root / "scores" / KEY))
    assert held is not None
    return held.content


@pytest.mark.parametrize("resumable", [True, False])
def test_a_process_that_computes_long_without_writing_shows_that_it_lives(tmp_path, resumable):
    cache = StageCache(tmp_path, timing=Timing(beat=0.01, abandoned_after=10))

    def compute(folder: Path) -> None:
        write_result(folder)
        seen = {counter(cache)}
        deadline = time.monotonic() + 10
        while len(seen) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
            seen.add(counter(cache))
        assert len(seen) == 4

    threads = threading.active_count()
    assert is_whole(cache.get("scores", 1, SETTINGS, ["input"], compute, resumable).folder)
    assert threading.active_count() == threads
    assert left_behind(cache.root) == []


def test_what_a_stage_needs_to_go_on_is_there_until_all_digests_are_made(cache, monkeypatch):
    """Digests of a large checkpoint take minutes, in which a process may be killed."""

    def compute(folder: Path) -> None:
        (folder / "walk" / "layers-3").mkdir(parents=True, exist_ok=True)
        (folder / "walk" / "layers-3" / "0.bin").write_bytes(CONTENT)
        (folder / "result.bin").write_bytes(CONTENT)

    def interrupted(_file: Path) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as killed:
        killed.setattr(record_module, "_digest", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cache.get("scores", 1, {}, [], compute, resumable=True)
    assert [path.name for path in cache.root.rglob("layers-*")] == ["layers-3"]
    found = cache.get("scores", 1, {}, [], compute, resumable=True)
    assert sorted(path.name for path in found.folder.iterdir()) == ["result.bin", RECORD]
    assert cache.get("scores", 1, {}, [], never, resumable=True).cached


def test_where_another_process_published_first_its_result_stays(cache, tmp_path):
    def compute_while_another_finishes(folder: Path) -> None:
        other = get(StageCache(tmp_path / "other")).folder
        (other / "first").touch()
        write_record(other, {"seconds": 1.0, "peak_memory_gib": 1.0})
        other.rename(cache.root / "scores" / KEY)
        write_result(folder)

    ours = get(cache, compute_while_another_finishes)
    assert (ours.folder / "first").exists()
    assert is_whole(ours.folder)
    assert left_behind(cache.root) == []
    assert get(cache, never).cached


def test_the_record_says_for_people_what_made_the_stage(tmp_path):
    cache = StageCache(tmp_path, made_by={"run": "runs/1", "model": "tiny"})
    made_by = json.loads((get(cache).folder / RECORD).read_text())["made_by"]
    assert made_by == {"moeprune": version("moeprune"), "host": platform.node(), "run": "runs/1", "model": "tiny"}
    assert get(StageCache(tmp_path, made_by={"run": "runs/2"}), never).cached


@pytest.mark.parametrize("published", [True, False])
def test_what_a_process_left_that_was_killed_around_publishing_goes_with_the_next_use(cache, published):
    if published:
        left_by(cache, dead_process())
    else:
        lease_folder(cache.root / "scores" / KEY).mkdir(parents=True)
    (made,) = [get(StageCache(cache.root.parent / "other")).folder]
    made.rename(cache.root / "scores" / KEY)
    assert get(cache, never).cached
    assert left_behind(cache.root) == []
