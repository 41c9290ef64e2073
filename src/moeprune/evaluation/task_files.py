"""Finds the tasks that come with lm-eval by their names, without reading the thousands of other ones.

lm-eval's own list of all tasks takes 16 seconds. Searching its files for the name takes less than one.
"""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from moeprune.errors import InputError

_NAME = re.compile(rb"""^["']?(?:task|group)["']?:[ \t]*["']?([^\s"'#]+)""", re.MULTILINE)


@dataclass(frozen=True)
class HarnessTask:
    """A task of lm-eval, or a group of them, as its files say, with a lm-eval TaskManager that can load it.

    ``config`` is that of the task or group, ``leaves`` those of the tasks it is made of, itself where it is no group;
    in both, functions are the paths of their files.
    """

    name: str
    manager: Any
    config: Mapping[str, Any]
    leaves: Mapping[str, Mapping[str, Any]]


@cache
def known_tasks() -> Mapping[str, Path]:
    """The file of each task and group that comes with lm-eval."""
    files: dict[str, Path] = {}
    for path in sorted(_harness_folder().rglob("*.yaml")):
        for name in _NAME.findall(path.read_bytes()):
            files.setdefault(name.decode(), path)
    return files


def find_task(name: str, also: Iterable[str] = ()) -> HarnessTask:
    """The task or group of this name.

    Raises InputError where there is none, with names that are spelled alike, ``also`` among these; and for a tag: a set
    of tasks that has no mean of its own.
    """
    manager = _manager_of({name})
    if name not in known_tasks() or name not in manager.task_index:  # some files name what lm-eval does not read
        raise _no_task(name, also)
    config = manager.task_index[name].cfg
    return HarnessTask(name, manager, config, _leaves(name, manager.task_index))


def _no_task(name: str, also: Iterable[str]) -> InputError:
    tagged = _tasks_with_tag(name)
    if tagged:
        return InputError(
            f"{name!r} is no task but a tag of {len(tagged)} tasks.", change=f"Name them: [{','.join(tagged)}]."
        )
    near = get_close_matches(name, [*also, *known_tasks()], n=5, cutoff=0.6)
    change = f"Did you mean: {', '.join(near)}?" if near else "lm-eval ls tasks prints what lm-eval knows."
    return InputError(f"Task {name!r} does not exist.", change=change)


def _manager_of(names: set[str]) -> Any:
    """A TaskManager of the folders in which the tasks are, and those that they are made of."""
    while True:
        manager = _manager(known_tasks()[name].parent for name in names if name in known_tasks())
        members = {member for name in names for member in _members(manager.task_index.get(name))}
        if members <= names:
            return manager
        names = names | members


def _manager(folders: Iterable[Path]) -> Any:
    from lm_eval.tasks import TaskManager

    wanted = set(folders)
    outermost = [str(folder) for folder in sorted(wanted) if not wanted.intersection(folder.parents)]
    return TaskManager(include_defaults=False, include_path=outermost)


def _members(entry: Any) -> list[str]:
    """The names that a group is made of, or the tasks with a tag."""
    if entry is None:
        return []
    members = entry.tags if entry.cfg is None else entry.cfg.get("task") if "group" in entry.cfg else ()
    names = [member if isinstance(member, str) else member.get("task") for member in members or ()]
    return [name for name in names if isinstance(name, str)]  # the others are written out within the group


def _leaves(name: str, index: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    entry = index.get(name)
    members = _members(entry)
    if entry is not None and not members:
        return {name: entry.cfg}
    return {leaf: config for member in members for leaf, config in _leaves(member, index).items()}


def _tasks_with_tag(tag: str) -> list[str]:
    """The tasks that have the tag, often by way of a file that they include."""
    mentioned = re.compile(
        rb"""^(?:["']?tag["']?:|\s*-)[ \t]*["']?%b["']?\s*$""" % re.escape(tag.encode()), re.MULTILINE
    )
    folders = {path.parent for path in _harness_folder().rglob("*yaml") if mentioned.search(path.read_bytes())}
    found = [_manager([folder]).task_index.get(tag) for folder in folders]
    return sorted({task for entry in found if entry is not None for task in entry.tags})


def _harness_folder() -> Path:
    from lm_eval import tasks

    return Path(os.path.dirname(tasks.__file__))
