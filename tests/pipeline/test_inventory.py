"""What the cache holds is listed, checked and removed beside runs that use it."""

import json
import math
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from sharing import KEY, assert_one_sound_result, computations, in_process, outcome_of, wait_until, want, writes

from moeprune.errors import CacheError
from moeprune.pipeline import inventory as inventory_module
from moeprune.pipeline import use as use_module
from moeprune.pipeline.cache import RECORD, StageCache
from moeprune.pipeline.inventory import COMPUTING, STORED, UNFINISHED, Entry, inventory, remove, to_prune, why_damaged
from moeprune.pipeline.use import UsedStages, last_used, now

DAY = 86400.0


def not_used_for(folder: Path, seconds: float) -> None:
    past = now(folder.parent) - seconds
    os.utime(folder / RECORD, (past, past))


def entries(root: Path) -> dict[str, str]:
    return {entry.key: entry.state for entry in inventory(root)}


def test_stages_are_listed_with_size_and_what_made_them(root):
    made_by = {"run": "runs/1", "model": "tiny"}
    stored = want(root, writes("stored"), made_by=made_by)
    StageCache(root).get("pass/other", 1, {}, [], writes("other"))
    other, shared = inventory(root)
    assert (other.stage, shared.stage, shared.key, shared.state) == ("pass/other", "shared", KEY, STORED)
    assert shared.folder == stored.folder
    assert shared.bytes == sum(file.stat().st_size for file in stored.folder.iterdir())
    assert shared.record["made_by"] == {**shared.record["made_by"], **made_by}
    with pytest.raises(CacheError, match="no cache in"):
        inventory(root / "nowhere")


def test_using_a_stage_is_noted(root):
    folder = want(root, writes("stored")).folder
    not_used_for(folder, 30 * DAY)
    assert now(root) - last_used(folder) == pytest.approx(30 * DAY, abs=60)
    want(root, writes("again"))
    assert now(root) - last_used(folder) < 60


def test_a_run_notes_what_it_has_used_as_long_as_it_works(root, monkeypatch):
    folder = want(root, writes("stored")).folder
    not_used_for(folder, DAY)
    used = UsedStages()
    used.add(folder)
    used.mark()
    assert now(root) - last_used(folder) > DAY / 2
    monkeypatch.setattr(use_module, "MARK_EVERY_SECONDS", 0.0)
    used.mark()
    assert now(root) - last_used(folder) < 60


def entry(key: str, used: float, size: int = 10, state: str = STORED) -> Entry:
    return Entry("stage", key, Path(key), state, size, used, {})


ENTRIES = [
    entry("old", 0),
    entry("older", -DAY),
    entry("lately", 9.5 * DAY),
    entry("now", 10 * DAY - 60),
    entry("at work", 0, state=COMPUTING),
    entry("left", 5 * DAY, state=UNFINISHED),
    entry("aside", 10 * DAY, state="set aside"),
]


@pytest.mark.parametrize(
    ("older_than", "limit", "expected"),
    [
        (7 * DAY, math.inf, ["old", "older", "aside"]),
        (math.inf, math.inf, ["aside"]),
        (math.inf, 45, ["aside", "older", "old"]),
        (math.inf, 0, ["aside", "older", "old", "left", "lately"]),
        (7 * DAY, 35, ["old", "older", "aside", "left"]),
    ],
)
def test_what_may_go_is_what_was_not_used_for_longest_and_never_what_is_in_use(older_than, limit, expected):
    assert [chosen.key for chosen in to_prune(ENTRIES, 10 * DAY, older_than, limit)] == expected


def test_a_removed_stage_is_gone_whole_and_computed_again(root):
    folder = want(root, writes("first")).folder
    not_used_for(folder, DAY)
    (stored,) = inventory(root)
    assert remove(stored)
    assert not folder.exists()
    assert list(root.rglob(".*")) == []
    assert not want(root, writes("second")).cached
    assert_one_sound_result(root, "second")


def test_a_stage_that_somebody_used_since_it_was_listed_stays(root):
    folder = want(root, writes("stored")).folder
    not_used_for(folder, DAY)
    (stored,) = inventory(root)
    want(root, writes("again"))
    assert not remove(stored)
    assert want(root, writes("again")).cached


def test_a_stage_that_somebody_begins_to_use_in_the_very_moment_is_put_back(root, monkeypatch):
    folder = want(root, writes("stored")).folder
    not_used_for(folder, DAY)
    (stored,) = inventory(root)
    set_aside = inventory_module.set_aside

    def used_before(final: Path) -> Path:
        os.utime(final / RECORD)
        return set_aside(final)

    monkeypatch.setattr(inventory_module, "set_aside", used_before)
    assert not remove(stored)
    assert_one_sound_result(root, "stored")


def test_what_is_being_computed_is_listed_and_stays(root):
    owner = in_process(root, writes("theirs", 0.5), resumable=True)
    wait_until(lambda: bool(list(root.rglob("first.txt"))))
    (at_work,) = inventory(root)
    assert (at_work.state, at_work.key) == (COMPUTING, KEY)
    assert to_prune([at_work], now(root) + 100 * DAY, DAY, 0) == []
    assert not remove(at_work)
    assert not outcome_of(owner, root)["cached"]
    assert computations(root) == 1


def test_what_an_interrupted_run_left_can_go(root):
    owner = in_process(root, writes("killed", 60), resumable=True)
    wait_until(lambda: bool(list(root.rglob("first.txt"))))
    owner.kill()
    owner.join()
    (left,) = inventory(root)
    assert left.state == UNFINISHED
    assert remove(left)
    assert list(root.rglob("first.txt")) == []
    want(root, writes("new"), resumable=True)
    assert_one_sound_result(root, "new")


def test_runs_go_on_while_everything_unused_is_removed_again_and_again(root, monkeypatch):
    """With no time of grace at all, so that stages go under the hands of those who ask for them."""
    monkeypatch.setattr(inventory_module, "IN_USE_SECONDS", 0.0)

    def ask() -> None:
        until = time.monotonic() + 1.5
        while time.monotonic() < until:
            want(root, writes("same"))

    processes = [in_process(root, writes("same"), before=ask) for _ in range(3)]
    removed = 0
    while any(process.is_alive() for process in processes):
        if root.exists():
            removed += sum(remove(entry) for entry in to_prune(inventory(root), time.time() + DAY, 0, 0))
    assert removed > 3
    for process in processes:
        assert set(outcome_of(process, root)["content"].values()) <= {"same"}
    want(root, writes("same"))
    assert_one_sound_result(root, "same")


def test_a_flipped_byte_is_found_and_its_stage_set_aside(root):
    folder = want(root, writes("stored")).folder
    (stored,) = inventory(root)
    assert why_damaged(stored) is None
    content = bytearray((folder / "first.txt").read_bytes())
    content[2] ^= 1
    (folder / "first.txt").write_bytes(content)
    assert why_damaged(stored) == "its files do not match their digests"
    assert entries(root) == {KEY: "set aside"}
    assert not want(root, writes("new")).cached
    assert_one_sound_result(root, "new")


def test_a_damaged_record_is_listed_and_found(root):
    folder = want(root, writes("stored")).folder
    for damaged in ("{", "[]", json.dumps({"files": {}, "made_by": 3}), json.dumps({"files": {}, "created": "never"})):
        (folder / RECORD).write_text(damaged)
        (stored,) = inventory(root)
        assert (stored.state, stored.made_by, stored.created) == (STORED, {}, stored.used)
    assert why_damaged(stored)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one megabyte of its own."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = os.geteuid() == 0 and shutil.which("mount")
    if not mounted or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", place]).returncode:
        pytest.skip("needs to be root and to mount")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_full_disk_is_named_and_nothing_stays_of_what_filled_it(small_disk):
    def fill(folder: Path) -> None:
        (folder / "large.bin").write_bytes(bytes(3 * 10**6))

    with pytest.raises(CacheError, match=r"No disk space left.*0\.00 GB of the disk are free; this stage had written"):
        StageCache(small_disk).get("large", 1, {}, [], fill)
    assert list(small_disk.rglob(".*")) == []
    assert StageCache(small_disk).get("small", 1, {}, [], lambda folder: (folder / "a").touch()).folder.exists()


def test_a_disk_without_room_for_a_lease_is_named(small_disk):
    with pytest.raises(OSError, match="No space"):
        (small_disk / "filler").write_bytes(bytes(2 * 10**6))
    with pytest.raises(CacheError, match="No disk space left"):
        StageCache(small_disk).get("small", 1, {}, [], writes("never"))


def test_a_read_only_cache_gives_what_it_has_and_refuses_the_rest_before_it_is_computed(small_disk):
    stored = StageCache(small_disk).get("stored", 1, {}, [], lambda folder: (folder / "a").touch())
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    assert StageCache(small_disk).get("stored", 1, {}, [], writes("never")).folder == stored.folder

    def never(_folder: Path) -> None:
        raise AssertionError("computed")

    with pytest.raises(CacheError, match=r"(?s)cannot be written: .*Read-only.*cache_dir=/path"):
        StageCache(small_disk).get("missing", 1, {}, [], never)
